"""The embedded data set: short H.264 videos whose class only the motion shows.

Every video shows a few textured shapes that move together over a textured background. The class is
the kind and direction of this movement. Textures, colours, shapes, their positions and speed, and
the slow drift of the background do not depend on it. Both layers wrap around the edges, so that the
shapes are equally likely to be anywhere in every frame: a single one says nothing about the class.

    python -m util.synthetic OUT
    python main_pretrain.py --path_to_data_dir OUT/pretrain @recipes/synthetic_pretrain.args

The first command writes the layout of Kinetics; dataset.json with the parameters comes last::

    OUT/videos/CLASS/ID_000000_000002.mp4   every video; ID: train000017, val__000003, test_000003
    OUT/classes.txt                         one class per line, in the order of the labels
    OUT/pretrain/train.csv                  all training videos
    OUT/finetune/train.csv                  the few of them that are labelled
    OUT/finetune/val.csv, test.csv          held-out videos, for validation and for the test

Shapes: T frames, H W pixels (H = W = size), K layers.
"""

import argparse
import json
import math
import os
import secrets
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import av
import numpy as np
from tqdm.auto import tqdm  # in notebooks a widget, elsewhere a line of text

from util import dist
from util.file_io import print_any

ROOT = Path(__file__).parent.parent  # of the project, or of the packages that are installed
MARKER = "dataset.json"
SPLITS = ("train", "val__", "test_")  # five letters and six digits make an ID of eleven
FORMAT = 1  # increased when the same parameters would give other videos


def straight(degrees: float, distance: np.ndarray, turn: np.ndarray) -> np.ndarray:
    """Return the (y, x) path [T, 2] of a uniform movement, 0 degrees = right, 90 = down."""
    angle = math.radians(degrees)
    return distance[:, None] * np.array([math.sin(angle), math.cos(angle)])


def circle(sign: int, distance: np.ndarray, turn: np.ndarray) -> np.ndarray:
    """Return the (y, x) path [T, 2] of a movement on a circle, sign +1 = clockwise."""
    radius = (distance[1] - distance[0]) / (turn[1] - turn[0])
    return radius * np.stack([np.sin(sign * turn), np.cos(turn)], axis=1)


def swing(degrees: float, distance: np.ndarray, turn: np.ndarray) -> np.ndarray:
    """Return the (y, x) path [T, 2] of a movement back and forth along one direction."""
    radius = (distance[1] - distance[0]) / (turn[1] - turn[0])
    return straight(degrees, 1.3 * radius * np.cos(turn), turn)


ANGLES = {"right": 0, "down": 90, "left": 180, "up": 270}
ANGLES |= {"down_right": 45, "down_left": 135, "up_left": 225, "up_right": 315}
# Each function takes the distance covered [T] (pixels) and the phase [T] (radians, with a random
# start) and returns a path [T, 2]. The classes of a data set are the first num_classes of them.
MOVEMENTS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    **{f"moving_{name}": partial(straight, degrees) for name, degrees in ANGLES.items()},
    "circling_clockwise": partial(circle, 1),
    "circling_anticlockwise": partial(circle, -1),
    "swinging_sideways": partial(swing, 0),
    "swinging_up_and_down": partial(swing, 90),
}


# --- pictures -----------------------------------------------------------------------------------


def smooth_texture(rng: np.random.Generator, size: int) -> np.ndarray:
    """Draw a periodic colour texture [3, H, W] of mean 0 whose luminance has deviation 1.

    Its details are at least a quarter of the frame wide. Little of a removed patch can be guessed
    from its neighbours in space, and nothing can be copied from the frame before without moving it,
    so a masked autoencoder has to see motion. As in photographs, luminance varies most, blue-yellow
    less and red-green least.
    """
    # cycles per frame
    frequency = np.hypot(np.fft.fftfreq(size)[:, None] * size, np.fft.rfftfreq(size) * size)
    amplitude = frequency / (1 + (frequency / 3) ** 6)
    spectrum = np.fft.rfft2(rng.standard_normal((3, size, size))) * amplitude
    texture = np.fft.irfft2(spectrum, s=(size, size))
    texture /= texture.std(axis=(1, 2), keepdims=True)
    opponent = np.array([[1.0, 1.0, 1.0], [0.25, 0.0, -0.25], [0.06, -0.12, 0.06]])
    return np.einsum("kyx,kc->cyx", texture, opponent)  # (3, H, W)


def random_blob(rng: np.random.Generator, size: int) -> np.ndarray:
    """Draw the opacity [H, W], 0 to 1, of a smooth shape anywhere; it wraps around the edges."""
    centre = rng.uniform(0, size, (2, 1))
    radius = rng.uniform(0.22, 0.34) * size
    y, x = (np.arange(size) + 0.5 - centre + size / 2) % size - size / 2
    y = y[:, None]
    angle = np.arctan2(y, x)
    outline = np.ones((size, size))
    for waves in (2, 3, 4):
        outline += rng.normal(0, 0.12) * np.cos(waves * angle + rng.uniform(0, 2 * np.pi))
    return np.clip((radius * outline - np.hypot(y, x)) / 2 + 0.5, 0, 1)  # edges: two pixels wide


def random_colour(rng: np.random.Generator) -> np.ndarray:
    """Draw a change of colour [3, 1, 1] in 8-bit levels, mostly of brightness."""
    return (rng.normal(0, 28) + rng.normal(0, 14, 3))[:, None, None]


def shift(layers: np.ndarray, path: np.ndarray) -> np.ndarray:
    """Move periodic layers [K, H, W] along a path [T, 2] (pixels, fractions allowed): [T, K, H, W].

    This uses the Fourier shift theorem, so that all positions between pixels are equally sharp.
    """
    size = layers.shape[-1]
    rows = np.exp(-2j * np.pi * path[:, :1] * np.fft.fftfreq(size)).astype(np.complex64)
    columns = np.exp(-2j * np.pi * path[:, 1:] * np.fft.rfftfreq(size)).astype(np.complex64)
    phase = rows[:, :, None] * columns[:, None, :]  # (T, H, W/2 + 1)
    spectrum = np.fft.rfft2(layers.astype(np.float32))
    return np.fft.irfft2(phase[:, None] * spectrum, s=(size, size))


def render_video(rng: np.random.Generator, movement: str, size: int, num_frames: int) -> np.ndarray:
    """Draw one video of a class as uint8 [T, H, W, 3].

    At size 64, the shapes move 2.3 to 3.3 pixels per frame, and the background at most 0.5.
    """
    # Draw the textures and the outlines of the shapes.
    unit = size / 64
    background = rng.uniform(24, 36) * smooth_texture(rng, size) + 115 + random_colour(rng)
    foreground = rng.uniform(40, 60) * smooth_texture(rng, size) + 115
    opacity = np.zeros((size, size))
    for _ in range(rng.integers(3, 6)):
        blob = random_blob(rng, size)
        foreground += blob * random_colour(rng)
        opacity += blob * (1 - opacity)

    # Place both layers in every frame.
    time = np.arange(num_frames)
    turn = 2 * np.pi * (rng.uniform() + time / rng.uniform(8, 12))
    path = MOVEMENTS[movement](rng.uniform(2.3, 3.3) * unit * time, turn)
    drift_speed = 0.5 * unit * math.sqrt(rng.uniform())
    drift = straight(rng.uniform(0, 360), drift_speed * time, turn)

    # Put the shapes over the background.
    still = shift(background, drift)  # (T, 3, H, W)
    moving = shift(np.concatenate([foreground * opacity, opacity[None]]), path)  # (T, 4, H, W)
    frames = still * (1 - moving[:, 3:]) + moving[:, :3]
    return np.clip(frames, 0, 255).round().astype(np.uint8).transpose(0, 2, 3, 1)


def write_video(
    file: str | BinaryIO, frames: np.ndarray, fps: int | Fraction, options: dict[str, str]
) -> None:
    """Encode uint8 RGB frames [T, H, W, 3] as H.264 in MP4, with options of x264."""
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fps, options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"  # all players can show it
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


# --- the data set -------------------------------------------------------------------------------


def _number(default: int, least: int, text: str) -> Any:
    return field(default=default, metadata={"least": least, "help": text})


@dataclass(frozen=True)
class Parameters:
    """What a data set holds; each field is also a flag of the command line."""

    num_videos: int = _number(2048, 1, "training videos, the labelled ones included")
    num_labelled: int = _number(32, 1, "training videos that finetune/train.csv lists")
    num_val: int = _number(64, 1, "held-out videos in finetune/val.csv")
    num_test: int = _number(512, 1, "other held-out videos, in finetune/test.csv")
    num_classes: int = _number(8, 2, f"movements, 2 to {len(MOVEMENTS)}")
    size: int = _number(48, 32, "height and width in pixels, an even number of at least 32")
    num_frames: int = _number(20, 2, "frames of a video")
    fps: int = _number(15, 1, "frames per second")
    seed: int = _number(0, 0, "seed of all random choices")

    def __post_init__(self) -> None:
        most = {"num_classes": len(MOVEMENTS), "num_labelled": self.num_videos}
        for f in fields(self):
            value, least = getattr(self, f.name), f.metadata["least"]
            if not least <= value <= most.get(f.name, value):
                limits = f"{least} to {most[f.name]}" if f.name in most else f"at least {least}"
                raise ValueError(f"{f.name} must be {limits}, not {value}")
        if self.size % 2:
            raise ValueError(f"size must be an even number of pixels, not {self.size}")


def write_dataset(out: str | os.PathLike[str], *, num_workers: int = 0, **parameters: int) -> Path:
    """Write the data set to the folder `out`, unless it is already there, and return the folder.

    The same fields of Parameters give the same frames with any num_workers (threads, 0 = one per
    core). The folder appears when it is complete, so several processes may call this at once.
    Raises ValueError for a parameter out of range, FileExistsError if the folder holds other files.
    """
    out = Path(out).absolute()
    p = Parameters(**parameters)
    marker = {"format": FORMAT, **asdict(p)}
    if _is_written(out, marker):
        return out
    # The set is written beside its place and then renamed: a killed run leaves a *.partial-*
    # folder, but never half a set under the final name.
    unfinished = out.with_name(f"{out.name}.partial-{secrets.token_hex(4)}")
    try:
        _write_files(unfinished, p, num_workers)
        (unfinished / MARKER).write_text(json.dumps(marker, indent=2) + "\n")
        unfinished.rename(out)
    except OSError:
        if not _is_written(out, marker):  # otherwise another process was faster
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return out


def _is_written(out: Path, marker: dict[str, int]) -> bool:
    """Return whether `out` holds exactly this set; raise FileExistsError if it holds another."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    if not (out / MARKER).exists():
        raise FileExistsError(f"{out} holds no synthetic data set: choose another folder")
    found = json.loads((out / MARKER).read_text())
    others = [name for name, value in marker.items() if found.get(name) != value]
    words = ", ".join(f"{name}={found.get(name)} (asked for: {marker[name]})" for name in others)
    if others:
        raise FileExistsError(f"{out} holds a data set with {words}: remove it or use another path")
    return True


def _write_files(root: Path, p: Parameters, num_workers: int) -> None:
    """Write the videos, classes.txt and the csvs."""
    classes = list(MOVEMENTS)[: p.num_classes]
    for name in ("pretrain", "finetune", *(f"videos/{name}" for name in classes)):
        (root / name).mkdir(parents=True)
    (root / "classes.txt").write_text("".join(f"{name}\n" for name in classes))
    end = math.ceil(p.num_frames / p.fps)  # seconds, as in the names of Kinetics
    # One thread, so that the bytes do not depend on the number of cores. A key frame every half
    # second, so that a clip in the middle needs only a few frames before it.
    options = {"preset": "superfast", "crf": "16", "g": str(max(p.fps // 2, 1)), "threads": "1"}

    def write_one(job: tuple[int, int]) -> str:
        """Write one video and return its line in a csv."""
        split, index = job
        label = index % p.num_classes  # in turn, so that every part of a split is balanced
        rng = np.random.default_rng((p.seed, split, index))
        path = f"videos/{classes[label]}/{SPLITS[split]}{index:06d}_000000_{end:06d}.mp4"
        frames = render_video(rng, classes[label], p.size, p.num_frames)
        write_video(str(root / path), frames, p.fps, options)
        return f"../{path} {label}\n"

    # Threads are enough: the FFT and the encoder release the interpreter's lock. After an error or
    # Ctrl-C, map cancels the videos that no thread has begun.
    counts = (p.num_videos, p.num_val, p.num_test)
    jobs = [(split, index) for split, count in enumerate(counts) for index in range(count)]
    with ThreadPoolExecutor(num_workers or os.cpu_count()) as pool:
        written, title = pool.map(write_one, jobs), "Writing synthetic videos"
        try:
            lines = list(tqdm(written, title, len(jobs), unit="video", mininterval=1))
        finally:
            pool.shutdown(cancel_futures=True)  # Ctrl-C does not wait for the rest
    train, held_out = lines[: p.num_videos], lines[p.num_videos :]
    (root / "pretrain/train.csv").write_text("".join(train))
    (root / "finetune/train.csv").write_text("".join(train[: p.num_labelled]))
    (root / "finetune/val.csv").write_text("".join(held_out[: p.num_val]))
    (root / "finetune/test.csv").write_text("".join(held_out[p.num_val :]))


# --- runs without --path_to_data_dir, and the command line --------------------------------------


def synthetic_recipe(name: str) -> Callable[[argparse.Namespace], list[str]]:
    """Return a function that gives runs without --path_to_data_dir the flags in recipes/NAME."""
    return lambda args: [] if args.path_to_data_dir else [f"@{ROOT / 'recipes' / name}"]


def data_dir(args: argparse.Namespace, task: str) -> str:
    """Return the folder of csvs: --path_to_data_dir, or the embedded videos, written if needed.

    `task` is "pretrain" (all training videos) or "finetune" (the few labelled ones). The folder
    data/synthetic is in the checkout, or in the current folder if the project is installed.
    """
    if args.path_to_data_dir:
        return args.path_to_data_dir
    is_checkout = (ROOT / "pyproject.toml").exists()
    folder = (ROOT if is_checkout else Path.cwd()) / "data" / "synthetic"
    dist.print0(
        f"no --path_to_data_dir: using the embedded synthetic videos in {folder}, and "
        f"recipes/synthetic_{task}.args for flags that are not given"
    )
    if dist.is_main():
        write_dataset(folder)
    dist.barrier()
    return str(folder / task)


def get_args_parser() -> argparse.ArgumentParser:
    """Build the command line: a flag for every field of Parameters."""
    parser = argparse.ArgumentParser(
        "python -m util.synthetic",
        description="Write short H.264 videos whose class only the motion shows.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("out", help="folder to create")
    add = partial(parser.add_argument, type=int, metavar="N")
    for f in fields(Parameters):
        add(f"--{f.name}", default=f.default, help=f.metadata["help"])
    add("--num_workers", default=0, help="threads, 0 = one per core")
    return parser


def main() -> None:
    """Write a data set from the command line."""
    args = get_args_parser().parse_args()
    try:
        out = write_dataset(**vars(args))
    except (ValueError, OverflowError, OSError) as error:
        sys.exit(f"error: {error}")
    print_any(f"{out}: {args.num_videos} for training, {args.num_val} + {args.num_test} held out")


if __name__ == "__main__":
    main()
