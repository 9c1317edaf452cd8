"""Every table of a classifier: results of a test, accuracy by class, confusion matrix.

Shapes: N clips, V videos of a csv, C classes. A confusion matrix [C, C] counts videos by label
(row) and prediction (column).
"""

import argparse
import contextlib
import csv
import io
import os
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from util.errors import UserError
from util.file_io import open_file, write_atomically
from util.meters import append_log

if TYPE_CHECKING:
    from util.kinetics import VideoIndex

PICTURE_SIDE = 400  # pixels at least, and one per class
BLUE, RED = (8, 48, 107), (165, 15, 21)  # of right and wrong predictions; darker means more


def topk_correct(logits: Tensor, labels: Tensor, k: int) -> Tensor:
    """Count rows of logits [N, C] whose label [N] is among the k largest; with C < k all count."""
    top = logits.topk(min(k, logits.shape[1]), dim=1).indices
    return (top == labels.unsqueeze(1)).any(dim=1).sum()


def count_confusions(labels: Tensor, predictions: Tensor, num_classes: int) -> Tensor:
    """Count videos by label and prediction: two int64 [N] -> int64 [C, C] on the same device."""
    counts = labels.new_zeros(num_classes, num_classes)
    counts.view(-1).scatter_add_(0, labels * num_classes + predictions, torch.ones_like(labels))
    return counts


class ClassReport(NamedTuple):
    """What a confusion matrix says about one class."""

    label: int
    videos: int
    accuracy: float  # percent of its videos, nan if it has none
    confused_with: int | None  # the most frequent wrong prediction
    confusions: int  # how often that is predicted


def report_classes(confusion: np.ndarray, unpredicted: np.ndarray | int = 0) -> list[ClassReport]:
    """Describe every class, in the order of the labels, from counts int [C, C].

    `unpredicted` (int [C]) counts the videos of each class without a prediction, which are wrong.
    """
    videos = confusion.sum(axis=1) + unpredicted
    wrong = confusion - np.diag(confusion.diagonal())
    reports = []
    for label, (total, row) in enumerate(zip(videos.tolist(), wrong, strict=True)):
        accuracy = 100 * int(confusion[label, label]) / total if total else float("nan")
        most = int(row.argmax()) if row.any() else None
        reports.append(ClassReport(label, total, accuracy, most, int(row.max())))
    return reports


def read_class_names(folder: str, num_classes: int) -> list[str]:
    """Return the names in classes.txt, beside the csvs or one folder above; else the numbers.

    A file with another number of names belongs to another data set and is ignored.
    """
    for place in (folder, os.path.dirname(folder.rstrip("/"))):
        # open it without checking that it exists: web servers cannot be asked
        with contextlib.suppress(UserError), open_file(os.path.join(place, "classes.txt")) as file:
            names = file.read().splitlines()
            if len(names) == num_classes:
                return names
    return [str(label) for label in range(num_classes)]


class VideoScores(NamedTuple):
    """The result of multi-view testing for every row of a csv, in order."""

    scores: np.ndarray  # float32 [V, C], zero where the video could not be read
    readable: np.ndarray  # bool [V]
    errors: list[str]  # why a video could not be read, empty where it could


def report(result: VideoScores, index: "VideoIndex", args: argparse.Namespace) -> None:
    """Print the accuracy and write predictions.csv, classes.csv, scores.npz and log.txt.

    Unreadable videos count as wrong, so that results of different machines can be compared.
    """
    if not result.readable.any():
        raise UserError(f"none of the {len(index)} videos of {index.csv_path} could be read", 1)

    # Rank the five best classes of every video and compare them with its label.
    ranking = np.argsort(-result.scores, axis=1, kind="stable")[:, :5]  # of equals, the first
    hits = (ranking == index.labels[:, None]) & result.readable[:, None]
    top1, top5 = (100 * int(hits[:, :k].sum()) / len(index) for k in (1, 5))
    per_class = [hits[index.labels == label, 0].mean() for label in np.unique(index.labels)]
    errors = [error for error in result.errors if error]

    # Print the accuracy.
    if errors:
        print(f"{len(errors)} unreadable videos, counted as wrong:", *errors, sep="\n  ")
    each = f"{args.num_clips * args.num_crops} views ({args.ensemble})"
    accuracy = f"{len(index)} videos x {each}: top-1 {top1:.2f} %  top-5 {top5:.2f} %"
    print(f"{accuracy}; predictions, classes and scores go to {args.output_dir}", flush=True)

    # Write the files.
    names = read_class_names(os.path.dirname(index.csv_path), args.num_classes)
    predictions, classes, scores = (
        os.path.join(args.output_dir, name)
        for name in ("predictions.csv", "classes.csv", "scores.npz")
    )
    views = args.num_clips * args.num_crops if args.ensemble == "sum" else 1
    write_predictions(predictions, result, index, ranking, views)
    write_classes(classes, result.readable, index.labels, ranking, names)
    write_atomically(scores, lambda f: np.savez(f, scores=result.scores, labels=index.labels))
    record = {"test_acc1": top1, "test_acc5": top5, "videos": len(index), "bad": len(errors)}
    record["test_mean_class_acc"] = 100 * float(np.mean(per_class))
    flags = "finetune", "num_clips", "num_crops", "ensemble"
    append_log(args.output_dir, record | {name: getattr(args, name) for name in flags})


def write_predictions(
    path: str, result: VideoScores, index: "VideoIndex", ranking: np.ndarray, views: int
) -> None:
    """Write a row per video; its score is the mean over views, or their maximum if views = 1."""
    rows: list[list[Any]] = ["video label prediction correct score top5 error".split()]
    for i, label in enumerate(index.labels.tolist()):
        cells = ["", 0, "", "", result.errors[i]]
        if result.readable[i]:
            best = ranking[i].tolist()
            score = f"{result.scores[i, best[0]] / views:.4f}"
            cells = [best[0], int(best[0] == label), score, " ".join(map(str, best)), ""]
        rows.append([index.path(i), label, *cells])
    write_csv(path, rows)


def write_classes(
    path: str, good: np.ndarray, labels: np.ndarray, ranking: np.ndarray, names: list[str]
) -> None:
    """Write a row per class: videos, accuracy in percent, and what it is mostly confused with."""
    confusion = np.zeros((len(names), len(names)), dtype=int)
    np.add.at(confusion, (labels[good], ranking[good, 0]), 1)
    unreadable = np.bincount(labels[~good], minlength=len(names))
    in_top5 = good & (ranking == labels[:, None]).any(axis=1)
    top5 = np.bincount(labels[in_top5], minlength=len(names))
    header = "label name videos unreadable top1 top5 confused_with confusions"
    rows: list[list[Any]] = [header.split()]
    for c, total, accuracy, other, confusions in report_classes(confusion, unreadable):
        shares = [f"{accuracy:.2f}", f"{100 * top5[c] / total:.2f}"] if total else ["", ""]
        confused_with = "" if other is None else names[other]
        rows.append([c, names[c], total, unreadable[c], *shares, confused_with, confusions])
    write_csv(path, rows)


def write_csv(path: str, rows: list[list[Any]]) -> None:
    """Write rows of cells; file names may hold any bytes, which os.fsdecode has escaped."""
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    write_atomically(path, lambda f: f.write(text.getvalue().encode("utf-8", "surrogateescape")))


def worst_classes(reports: list[ClassReport], names: list[str], count: int = 20) -> str:
    """Return a Markdown table of the classes with the lowest accuracy."""
    shown = sorted((r for r in reports if r.videos), key=lambda r: r.accuracy)[:count]
    lines = ["| class | videos | top-1 % | mostly taken for |", "|---|---|---|---|"]
    names = [name.replace("|", "\\|") for name in names]
    for label, videos, accuracy, other, times in shown:
        taken_for = "" if other is None else f"{names[other]} ({times} x)"
        lines.append(f"| {names[label]} | {videos} | {accuracy:.1f} | {taken_for} |")
    return "\n".join(lines)


def draw_confusion(confusion: np.ndarray) -> np.ndarray:
    """Draw a confusion matrix int [C, C], each row as shares of its sum: uint8 [H, W, 3].

    Right predictions are blue, wrong ones red. Large cells show percents, and the margins labels.
    """
    # Draw one square of pixels per cell.
    classes = len(confusion)
    share = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    hue = np.where(np.eye(classes, dtype=bool)[..., None], BLUE, RED)
    cells = (255 + share[..., None] * (hue - 255.0)).round().astype(np.uint8)
    side = max(1, -(-PICTURE_SIDE // classes))
    pixels = cells.repeat(side, axis=0).repeat(side, axis=1)
    if side < 24:  # too small for numbers
        return pixels

    # Write labels in the margins and percents in the cells.
    margin = 24
    image = Image.new("RGB", (len(pixels) + margin, len(pixels) + margin), "white")
    image.paste(Image.fromarray(pixels), (margin, margin))
    write = partial(ImageDraw.Draw(image).text, anchor="mm")
    middles = range(margin + side // 2, len(pixels) + margin, side)
    for i, y in enumerate(middles):
        write((margin // 2, y), str(i), "black")
        write((y, margin // 2), str(i), "black")
        for j in np.flatnonzero(confusion[i]).tolist():
            colour = "white" if share[i, j] > 0.5 else "black"
            write((middles[j], y), f"{100 * share[i, j]:.0f}", colour)
    return np.asarray(image)
