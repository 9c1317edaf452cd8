"""How a classifier does class by class: confusion matrix, its picture, a table, class names.

Shapes: C classes. A confusion matrix [C, C] counts videos by label (row) and prediction (column).
"""

import argparse
import contextlib
import csv
import io
import os
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from util.errors import UserError
from util.file_io import open_file, write_atomically
from util.meters import append_log

if TYPE_CHECKING:
    from util.kinetics import VideoIndex

PICTURE_SIDE = 400  # pixels, at least, unless there are more classes
BLUE, RED = (8, 48, 107), (165, 15, 21)  # right and wrong predictions, the darker the more


def count_confusions(labels: Tensor, predictions: Tensor, num_classes: int) -> Tensor:
    """Count videos by label and prediction: two int64 [N] -> int64 [C, C] on their device."""
    counts = labels.new_zeros(num_classes, num_classes)
    counts.view(-1).scatter_add_(0, labels * num_classes + predictions, torch.ones_like(labels))
    return counts


class ClassReport(NamedTuple):
    """What a confusion matrix says of one class."""

    label: int
    videos: int
    accuracy: float  # percent of its videos, nan without any
    confused_with: int | None  # the class that most of its other videos are taken for
    confusions: int  # how many those are


def report_classes(
    confusion: np.ndarray, unpredicted: np.ndarray | None = None
) -> list[ClassReport]:
    """Describe every class, in the order of the labels.

    Args:
        confusion: int [C, C].
        unpredicted: int [C], videos of each class without a prediction, which count as wrong.
    """
    videos = confusion.sum(axis=1)
    if unpredicted is not None:
        videos = videos + unpredicted
    wrong = confusion - np.diag(confusion.diagonal())
    reports = []
    for label, (total, row) in enumerate(zip(videos.tolist(), wrong, strict=True)):
        accuracy = 100 * int(confusion[label, label]) / total if total else float("nan")
        most = int(row.argmax()) if row.any() else None
        reports.append(ClassReport(label, total, accuracy, most, int(row.max())))
    return reports


def read_class_names(folder: str, num_classes: int) -> list[str]:
    """Read classes.txt (one name per label) beside the csvs or one folder above; else numbers."""
    for place in (folder, os.path.dirname(folder.rstrip("/"))):
        # whether a file is there, a web server only tells when asked for it
        with contextlib.suppress(UserError), open_file(os.path.join(place, "classes.txt")) as file:
            names = file.read().splitlines()
            if len(names) == num_classes:
                return names
    return [str(label) for label in range(num_classes)]


def worst_classes(reports: list[ClassReport], names: list[str], count: int = 20) -> str:
    """Write the classes of the lowest accuracy as a Markdown table."""
    shown = sorted((r for r in reports if r.videos), key=lambda r: r.accuracy)[:count]
    lines = ["| class | videos | top-1 % | mostly taken for |", "|---|---|---|---|"]
    for report in shown:
        other = "" if report.confused_with is None else names[report.confused_with]
        times = f" ({report.confusions} x)" if report.confusions else ""
        name = names[report.label]
        cells = name, report.videos, f"{report.accuracy:.1f}", f"{other}{times}"
        lines.append("| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def draw_confusion(confusion: np.ndarray) -> np.ndarray:
    """Draw the shares of every row: int [C, C] -> uint8 [H, W, 3].

    Rows are labels and columns predictions, from the top left; right predictions are blue, wrong
    ones red. Cells that are large enough show percents, and the margins the labels.
    """
    classes = len(confusion)
    share = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    hue = np.where(np.eye(classes, dtype=bool)[..., None], BLUE, RED)
    cells = (255 + share[..., None] * (hue - 255.0)).round().astype(np.uint8)
    side = max(1, -(-PICTURE_SIDE // classes))
    pixels = cells.repeat(side, axis=0).repeat(side, axis=1)
    if side < 24:  # no room for numbers
        return pixels
    margin = 24
    image = Image.new("RGB", (len(pixels) + margin, len(pixels) + margin), "white")
    image.paste(Image.fromarray(pixels), (margin, margin))
    draw = ImageDraw.Draw(image)
    for i in range(classes):
        middle = margin + i * side + side // 2
        draw.text((margin // 2, middle), str(i), "black", anchor="mm")
        draw.text((middle, margin // 2), str(i), "black", anchor="mm")
        for j in np.flatnonzero(confusion[i]).tolist():
            colour = "white" if share[i, j] > 0.5 else "black"
            place = margin + j * side + side // 2, middle
            draw.text(place, f"{100 * share[i, j]:.0f}", colour, anchor="mm")
    return np.asarray(image)


def topk_correct(logits: Tensor, labels: Tensor, k: int) -> Tensor:
    """Count rows of [N, classes] whose label is among the k largest; k is cut to the classes."""
    top = logits.topk(min(k, logits.shape[1]), dim=1).indices
    return (top == labels.unsqueeze(1)).any(dim=1).sum()


class VideoScores(NamedTuple):
    """What multi-view testing says of every row of a csv, in order."""

    scores: np.ndarray  # float32 [V, classes], zero where the video could not be read
    readable: np.ndarray  # bool [V]
    errors: list[str]  # why a row could not be read, empty where it could


def report(result: VideoScores, index: "VideoIndex", args: argparse.Namespace) -> None:
    """Print the accuracy and write predictions.csv, classes.csv, scores.npz and log.txt.

    Unreadable videos count as wrong, so that numbers of different machines can be compared.
    """
    if not result.readable.any():
        raise UserError(f"none of the {len(index)} videos of {index.csv_path} could be read", 1)
    ranking = np.argsort(-result.scores, axis=1, kind="stable")[:, :5]  # the first among equals
    hits = (ranking == index.labels[:, None]) & result.readable[:, None]
    top1, top5 = (100 * int(hits[:, :k].sum()) / len(index) for k in (1, 5))

    views = args.num_clips * args.num_crops if args.ensemble == "sum" else 1
    names = read_class_names(os.path.dirname(index.csv_path), args.num_classes)
    tables = {
        "predictions.csv": prediction_rows(result, index, ranking, views),
        "classes.csv": class_rows(result, index.labels, ranking, hits, names),
    }
    errors = [error for error in result.errors if error]
    if errors:
        print(f"{len(errors)} unreadable videos, counted as wrong:")
        print("\n".join(f"  {error}" for error in errors))
    print(
        f"{len(index)} videos x {args.num_clips * args.num_crops} views ({args.ensemble}): "
        f"top-1 {top1:.2f} %  top-5 {top5:.2f} %; predictions, classes and scores go to "
        f"{args.output_dir}",
        flush=True,
    )
    for name, rows in tables.items():
        text = io.StringIO()
        csv.writer(text).writerows(rows)
        data = text.getvalue().encode("utf-8", "surrogateescape")
        write_atomically(os.path.join(args.output_dir, name), lambda file, d=data: file.write(d))
    write_atomically(
        os.path.join(args.output_dir, "scores.npz"),
        lambda file: np.savez(file, scores=result.scores, labels=index.labels),
    )
    seen = np.bincount(index.labels)
    per_class = np.bincount(index.labels, weights=hits[:, 0])[seen > 0] / seen[seen > 0]
    record = {"test_acc1": top1, "test_acc5": top5, "videos": len(index), "bad": len(errors)}
    record["test_mean_class_acc"] = 100 * float(per_class.mean())
    names = "finetune", "num_clips", "num_crops", "ensemble"
    record |= {name: getattr(args, name) for name in names}
    append_log(args.output_dir, record)


def prediction_rows(
    result: VideoScores, index: "VideoIndex", ranking: np.ndarray, views: int
) -> list[list[str | int]]:
    """Make the lines of predictions.csv; the score is a mean over views, or their maximum."""
    rows: list[list[str | int]] = [
        ["video", "label", "prediction", "correct", "score", "top5", "error"]
    ]
    for i, label in enumerate(index.labels.tolist()):
        if result.readable[i]:
            best = ranking[i].tolist()
            score = f"{result.scores[i, best[0]] / views:.4f}"
            told = [best[0], int(best[0] == label), score, " ".join(map(str, best)), ""]
        else:
            told = ["", 0, "", "", result.errors[i]]
        rows.append([index.path(i), label, *told])
    return rows


def class_rows(
    result: VideoScores,
    labels: np.ndarray,
    ranking: np.ndarray,
    hits: np.ndarray,
    names: list[str],
) -> list[list[str | int]]:
    """Make the lines of classes.csv, in the order of the labels; accuracies in percent."""
    good = result.readable
    pairs = torch.from_numpy(labels[good]), torch.from_numpy(ranking[good, 0])
    confusion = count_confusions(*pairs, len(names)).numpy()
    unreadable = np.bincount(labels[~good], minlength=len(names))
    top5 = np.bincount(labels[hits.any(axis=1)], minlength=len(names))
    header = "label name videos unreadable top1 top5 confused_with confusions".split()
    rows: list[list[str | int]] = [list(header)]
    for entry in report_classes(confusion, unreadable):
        c, other = entry.label, entry.confused_with
        accuracies = ["", ""]
        if entry.videos:
            accuracies = [f"{entry.accuracy:.2f}", f"{100 * top5[c] / entry.videos:.2f}"]
        taken_for = "" if other is None else names[other]
        counts = [entry.videos, int(unreadable[c])]
        rows.append([c, names[c], *counts, *accuracies, taken_for, entry.confusions])
    return rows
