"""How a classifier does class by class: confusion matrix, its picture, a table, class names.

Shapes: C classes. A confusion matrix [C, C] counts videos by label (row) and prediction (column).
"""

import contextlib
import os
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from util.errors import UserError
from util.file_io import open_file

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
