"""Draw videos and their nearest neighbours by features: the middle frame of each, with its label.

    python -m demo.neighbours output/features/val.npz --gallery output/features/train.npz

The files are those of main_features.py, and similarity is the cosine. See FEATURES.md.
"""

import argparse
import os
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from util import args as flags
from util.errors import UserError
from util.features import read_npz
from util.file_io import local_path, make_dirs, text_to_path, write_atomically
from util.run import run
from util.video.decode import Video, VideoError

SIDE, TEXT, GAP = 144, 20, 6  # pixels: a frame, its caption, and between frames
BLACK, GREEN, RED = "black", "#007828", "#be1e1e"


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the flags."""
    parser = flags.Parser("Draw videos and their nearest neighbours by features")
    add = flags.adder(parser)
    parser.add_argument("features", help="file of main_features.py that holds the queries")
    add("--gallery", "", "file that holds the neighbours; empty: the same, without the query")
    add("--queries", 4, "rows of the picture, spread evenly over the file", flags.small_int)
    add("--neighbours", 5, "neighbours of each", flags.small_int)
    add("--output", "./output/neighbours.png", "the picture")
    return parser.parse_args(argv)


def read(path: str) -> tuple[np.ndarray, list[str], list[str]]:
    """Read a file's unit vectors [V, D], the mean of each video's views, and paths and labels."""
    features, paths, labels, classes = read_npz(path, "features", "paths", "labels", "classes")
    if classes is None:
        raise UserError(f"{path} is not a feature file of main_features.py")
    vectors = features.mean(axis=1)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    names = [str(classes[label]) if len(classes) else f"class {label}" for label in labels]
    if labels.min() < 0:
        names = [os.path.basename(path) for path in paths]
    return vectors, paths.tolist(), names


def draw_cell(path: str, caption: str, colour: str) -> Image.Image:
    """Draw the square in the middle of a video's middle frame, and text below it."""
    cell = Image.new("RGB", (SIDE + GAP, SIDE + TEXT + GAP), "white")
    try:
        with Video(local_path(text_to_path(path))) as video:
            _, frame = next(video.frames([video.num_frames // 2]))
    except VideoError as error:
        raise UserError(str(error)) from error
    cell.paste(ImageOps.fit(Image.fromarray(frame), (SIDE, SIDE)), (GAP // 2, GAP // 2))
    place = SIDE // 2, SIDE + GAP // 2 + TEXT // 2
    font = ImageFont.load_default(12)
    ImageDraw.Draw(cell).text(place, caption[:24], colour, font, anchor="mm")
    return cell


def main(args: argparse.Namespace) -> None:
    """Find the neighbours and write the picture."""
    queries, paths, labels = read(args.features)
    gallery, other_paths, other_labels = read(args.gallery or args.features)
    if gallery.shape[1] != queries.shape[1]:
        raise UserError(f"{args.gallery} has features of another width than {args.features}")
    rows = np.unique(np.linspace(0, len(queries) - 1, args.queries).round().astype(int)).tolist()
    similarity = queries[rows] @ gallery.T  # [queries, V]
    if not args.gallery:
        similarity[range(len(rows)), rows] = -np.inf
    count = min(args.neighbours, len(gallery) - (not args.gallery))
    # A row for each query: itself, a gap, and its neighbours from the nearest on
    width, height = SIDE + GAP, SIDE + TEXT + GAP
    sheet = Image.new("RGB", ((count + 1) * width + 36, len(rows) * height), "white")
    for y, row in enumerate(rows):
        sheet.paste(draw_cell(paths[row], labels[row], BLACK), (0, y * height))
        for x, other in enumerate(np.argsort(-similarity[y])[:count].tolist(), start=1):
            colour = GREEN if other_labels[other] == labels[row] else RED
            cell = draw_cell(other_paths[other], other_labels[other], colour)
            sheet.paste(cell, (x * width + 36, y * height))
    make_dirs(os.path.dirname(os.path.abspath(args.output)))
    write_atomically(args.output, lambda file: sheet.save(file, "PNG"))
    print(f"{args.output}: {len(rows)} queries, {count} neighbours of each")


if __name__ == "__main__":
    run(main, parse_args)
