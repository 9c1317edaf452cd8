"""Draw videos and their nearest neighbours by features as a GIF, in which all of them play.

    python -m demo.neighbours output/features/val.npz --gallery output/features/train.npz

The files are those of main_features.py, and similarity is the cosine of features. See FEATURES.md.
"""

import argparse
import os
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from util import args as flags
from util.cache import Cache
from util.errors import UserError
from util.features import read_npz
from util.file_io import make_dirs, text_to_path, write_atomically
from util.run import run
from util.video.decode import Video, VideoError
from util.visualize import encode_gif

SIDE, TEXT, GAP = 88, 16, 4  # pixels: a frame, its caption, and between frames
FRAMES, FPS = 8, 6  # of the GIF: the frames are spread evenly over each video
BLACK, GREEN, RED = "black", "#007828", "#be1e1e"


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the flags."""
    parser = flags.Parser("Draw videos and their nearest neighbours by features")
    add = flags.adder(parser)
    parser.add_argument("features", help="file of main_features.py that holds the queries")
    add("--gallery", "", "file that holds the neighbours; empty: the same, without the query")
    add("--queries", 4, "rows of the picture, spread evenly over the file", flags.small_int)
    add("--neighbours", 5, "neighbours of each", flags.small_int)
    add("--output", "./output/neighbours.gif", "the picture")
    return parser.parse_args(argv)


def read(path: str) -> tuple[np.ndarray, list[str], list[str]]:
    """Read a file's unit vectors [V, D], the mean of each video's views, and paths and labels."""
    features, paths, labels, classes = read_npz(path, "features", "paths", "labels", "classes")
    vectors = features.mean(axis=1)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    names = [str(classes[label]) if len(classes) else f"class {label}" for label in labels]
    if labels.min() < 0:
        names = [os.path.basename(path) for path in paths]
    return vectors, paths.tolist(), names


def draw_cell(path: str, caption: str, colour: str) -> Tensor:
    """Draw the middle square of a video's frames above a caption: uint8 [FRAMES, H, W, 3]."""
    try:
        with Cache().hold(text_to_path(path)) as local, Video(local) as video:
            numbers = np.linspace(0, video.num_frames - 1, FRAMES).round().astype(int)
            frames = dict(video.frames(sorted(set(numbers.tolist()))))
    except VideoError as error:
        raise UserError(str(error)) from error
    blank = Image.new("RGB", (SIDE + GAP, SIDE + TEXT + GAP), "white")
    place = blank.width // 2, SIDE + (GAP + TEXT) // 2
    ImageDraw.Draw(blank).text(place, caption[:20], colour, ImageFont.load_default(9), anchor="mm")
    cells = [blank.copy() for _ in numbers]
    for cell, number in zip(cells, numbers.tolist(), strict=True):
        square = ImageOps.fit(Image.fromarray(frames[number]), (SIDE, SIDE))
        cell.paste(square, (GAP // 2, GAP // 2))
    return torch.from_numpy(np.stack([np.asarray(cell) for cell in cells]))


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

    # A row for each query: itself, a gap, and its neighbours from the nearest on.
    sheet = []
    for row, cosines in zip(rows, similarity, strict=True):
        cells = [draw_cell(paths[row], labels[row], BLACK)]
        cells.append(torch.full_like(cells[0][:, :, : 4 * GAP], 255))
        for other in np.argsort(-cosines, kind="stable")[:count].tolist():
            colour = GREEN if other_labels[other] == labels[row] else RED
            cells.append(draw_cell(other_paths[other], other_labels[other], colour))
        sheet.append(torch.cat(cells, dim=2))
    data = encode_gif(torch.cat(sheet, dim=1), FPS)
    make_dirs(os.path.dirname(os.path.abspath(args.output)))
    write_atomically(args.output, lambda file: file.write(data))
    print(f"{args.output}: {len(rows)} queries, {count} neighbours of each")


if __name__ == "__main__":
    run(main, parse_args)
