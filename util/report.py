"""Every table of a classifier: results of a test, accuracy by class, confusion matrix.

Shapes: N clips, V videos of a csv, C classes. A confusion matrix [C, C] counts videos by label
(row) and prediction (column).
"""

import argparse
import contextlib
import csv
import io
import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from util.classes import some_names
from util.dist import print0
from util.errors import UserError
from util.file_io import is_remote, path_to_text, printable, write_atomically
from util.meters import append_log

if TYPE_CHECKING:
    from util.kinetics import VideoIndex

PICTURE_SIDE = 400  # pixels at least, and one per class
MAX_NAME = 16  # characters of a name beside it
BLUE, RED = (8, 48, 107), (165, 15, 21)  # of right and wrong predictions; darker means more


def topk_correct(logits: Tensor, labels: Tensor, k: int) -> Tensor:
    """Count rows of logits [N, C] whose label [N] is among the k largest; with C < k all count."""
    top = logits.topk(min(k, logits.shape[1]), dim=1).indices
    return (top == labels.unsqueeze(1)).any(dim=1).sum()


def count_confusions(labels: Tensor, predictions: Tensor, num_classes: int) -> Tensor:
    """Count videos by label and prediction: two int64 [N] -> int64 [C, C + 1] on the same device.

    The prediction C means that there is none, because the scores are not finite.
    """
    counts = labels.new_zeros(num_classes, num_classes + 1)
    place = labels * (num_classes + 1) + predictions
    counts.view(-1).scatter_add_(0, place, torch.ones_like(labels))
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


class VideoScores(NamedTuple):
    """The result of multi-view testing for every row of a csv, in order."""

    scores: np.ndarray  # float32 [V, C], zero where the video could not be read
    readable: np.ndarray  # bool [V]
    errors: list[str]  # why a video could not be read, empty where it could

    @property
    def finite(self) -> np.ndarray:
        """Which videos have scores that are numbers: bool [V]."""
        return self.readable & np.isfinite(self.scores).all(axis=1)


def report(
    result: VideoScores, index: "VideoIndex", args: argparse.Namespace, names: list[str]
) -> None:
    """Print the accuracy and write predictions.csv, scores.npz, log.txt and classes.csv.

    Videos that are unreadable or whose scores are not finite count as wrong, so that results of
    different machines can be compared. Without labels, nothing is said about accuracy.

    Args:
        names: of the C classes.
    """
    finite, unreadable = result.finite, [error for error in result.errors if error]
    odd = np.flatnonzero(result.readable & ~finite).tolist()
    check_scores(int(result.readable.sum()), odd, index, args.precision)

    # Rank the five best classes of every video and compare them with its label.
    ranking = np.argsort(-result.scores, axis=1, kind="stable")[:, :5]  # of equals, the first
    hits = (ranking == index.labels[:, None]) & finite[:, None]
    views = args.num_clips * args.num_crops if args.ensemble == "sum" else 1
    flags = "finetune", "num_clips", "num_crops", "ensemble"
    record = {name: getattr(args, name) for name in flags}

    # Print the accuracy, or what the videos named on the command line show.
    if unreadable:
        wrong = ", counted as wrong" if index.has_labels else ""
        print(f"{len(unreadable)} unreadable videos{wrong}:", *unreadable, sep="\n  ")
    summary = f"{len(index)} videos x {args.num_clips * args.num_crops} views ({args.ensemble})"
    if index.has_labels:
        top1, top5 = (100 * int(hits[:, :k].sum()) / len(index) for k in (1, 5))
        per_class = [hits[index.labels == label, 0].mean() for label in np.unique(index.labels)]
        accuracies = {"test_acc1": top1, "test_acc5": top5}
        record = accuracies | {"test_mean_class_acc": 100 * float(np.mean(per_class))} | record
        summary += f": top-1 {top1:.2f} %  top-5 {top5:.2f} %"
    elif args.videos:
        print_best(result, index, ranking, views, names)
    else:
        summary += f": {index.csv_path} has no labels, so there is no accuracy"
    files = "predictions, classes and scores" if index.has_labels else "predictions and scores"
    files = f"; {files} go to {args.output_dir}" if args.output_dir else ""
    print(f"{summary}{files}", flush=True)
    if not args.output_dir:
        return

    record |= {"videos": len(index), "bad": len(unreadable), "not_finite": len(odd)}
    append_log(args.output_dir, record)
    write_predictions(args.output_dir, result, index, ranking, views, names)
    # last, because this only decorates the result
    classes = os.path.join(args.output_dir, "classes.csv")
    with warned(f"{classes} is not written"):
        if index.has_labels:
            write_classes(classes, finite, index.labels, ranking, names)
        elif not is_remote(classes):  # one of an earlier test would be taken for this one's
            Path(classes).unlink(missing_ok=True)


def check_scores(readable: int, odd: list[int], index: "VideoIndex", precision: str) -> None:
    """Name the rows of a csv whose scores are not finite (odd).

    Raises:
        UserError: no video was readable, or none has finite scores.
    """
    if not readable:
        raise UserError(f"none of the {len(index)} videos of {index.csv_path} could be read", 1)
    if len(odd) == readable:
        raise UserError(
            f"the scores of all {readable} readable videos of {index.csv_path} are not numbers: "
            f"the weights are damaged, or too large for --precision {precision}; try another "
            "--precision",
            status=1,
        )
    if odd:
        wrong = ", counted as wrong" if index.has_labels else ""
        files = some_names([path_to_text(index.path(i)) for i in odd], "\n  ")
        print0(f"{len(odd)} videos whose scores are not numbers{wrong}:\n  {files}")


@contextlib.contextmanager
def warned(lost: str) -> Iterator[None]:
    """Turn any error of the body into a warning, for what only decorates a result."""
    try:
        yield
    except Exception as error:
        print(f"WARNING: {lost}: {' '.join(str(error).split()) or type(error).__name__}")


def print_best(
    result: VideoScores, index: "VideoIndex", ranking: np.ndarray, views: int, names: list[str]
) -> None:
    """Print the five best classes of every video, with their scores."""
    for i in np.flatnonzero(result.finite).tolist():
        print(printable(path_to_text(index.path(i))))
        for label in ranking[i].tolist():
            print(f"  {result.scores[i, label] / views:.4f}  {printable(names[label])}")


def write_predictions(
    folder: str,
    result: VideoScores,
    index: "VideoIndex",
    ranking: np.ndarray,
    views: int,
    names: list[str],
) -> None:
    """Write predictions.csv, a row per video, and scores.npz.

    The score in a row is the mean over views, or their maximum if views = 1.
    """
    header = "video label prediction correct score top5 error name top5_names label_name"
    rows: list[list[Any]] = [header.split()]
    finite = result.finite
    for i, label in enumerate(index.labels.tolist()):
        cells: list[Any] = ["", 0, "", "", result.errors[i] or "scores are not numbers", "", ""]
        if finite[i]:
            best = ranking[i].tolist()
            score = f"{result.scores[i, best[0]] / views:.4f}"
            top5, top5_names = " ".join(map(str, best)), "; ".join(names[k] for k in best)
            hit, name = int(best[0] == label), names[best[0]]
            cells = [best[0], hit, score, top5, "", name, top5_names]
        label_name = names[label] if index.has_labels else ""
        if not index.has_labels:
            label = cells[1] = ""
        rows.append([path_to_text(index.path(i)), label, *cells, label_name])
    scores = os.path.join(folder, "scores.npz")
    arrays = {"scores": result.scores, "labels": index.labels, "classes": np.array(names)}
    write_atomically(scores, lambda f: np.savez(f, **arrays))
    write_csv(os.path.join(folder, "predictions.csv"), rows)


def write_classes(
    path: str, good: np.ndarray, labels: np.ndarray, ranking: np.ndarray, names: list[str]
) -> None:
    """Write a row per class: videos, accuracy in percent, and what it is mostly confused with.

    `good` (bool [V]) are the videos that have a prediction; the others count as unreadable.
    """
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
    """Write rows of cells; names may hold any bytes, escaped as by file_io.read_text."""
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


def draw_confusion(confusion: np.ndarray, names: Sequence[str] = ()) -> np.ndarray:
    """Draw a confusion matrix int [C, C], each row as shares of its sum: uint8 [H, W, 3].

    Right predictions are blue, wrong ones red. Large cells show percents, and the margins the
    names of the classes, or else their numbers.
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

    # Write names in the margins, from below on top, and percents in the cells.
    names = [name[:MAX_NAME] for name in names or map(str, range(classes))]
    font = ImageFont.load_default()
    margin = max(24, int(max(map(font.getlength, names))) + 10)
    image = Image.new("RGB", (len(pixels) + margin, len(pixels) + margin), "white")
    image.paste(Image.fromarray(pixels), (margin, margin))
    middles = range(side // 2, len(pixels), side)
    for anchor, x in (("rm", margin - 5), ("lm", 5)):
        strip = Image.new("RGB", (margin, len(pixels)), "white")
        for y, name in zip(middles, names, strict=True):
            ImageDraw.Draw(strip).text((x, y), name, "black", font, anchor)
        on_top = anchor == "lm"
        strip = strip.rotate(90, expand=True) if on_top else strip
        image.paste(strip, (margin, 0) if on_top else (0, margin))
    write = partial(ImageDraw.Draw(image).text, font=font, anchor="mm")
    for i, j in np.argwhere(confusion).tolist():
        colour = "white" if share[i, j] > 0.5 else "black"
        place = margin + middles[j], margin + middles[i]
        write(place, f"{100 * share[i, j]:.0f}", colour)
    return np.asarray(image)
