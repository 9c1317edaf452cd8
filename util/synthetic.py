"""The embedded data set: short H.264 videos whose class can only be told from motion.

Every video shows a few textured shapes that move together over a textured background. The kind and
direction of the shapes' movement is the class. All the rest, that is textures, colours, shapes,
their positions, their speed and the drift of the background, is drawn independently of the class.
Both layers wrap around the frame's edges, so a shape's position is uniform in every single frame,
the first and the last included: one frame says nothing about the class.

    python -m util.synthetic OUT
    python main_pretrain.py --path_to_data_dir OUT/pretrain @recipes/synthetic_pretrain.args

writes the Kinetics layout::

    OUT/videos/CLASS/ID_000000_000002.mp4   every video, ID = train000017, val__000003, test_000003
    OUT/classes.txt                         one class a line, in the order of the labels
    OUT/pretrain/train.csv                  every training video
    OUT/finetune/train.csv                  the small labelled part of them
    OUT/finetune/val.csv, test.csv          held-out videos: a few to watch training, the others
    OUT/dataset.json                        the parameters, written last

Shapes: T frames, H W pixels (H = W = size), K layers.
"""

from __future__ import annotations

import argparse
import functools
import inspect
import json
import math
import os
import shutil
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import av
import numpy as np
from tqdm import tqdm

from util import dist
from util.dist import print0

MARKER = "dataset.json"
SPLITS = ("train", "val__", "test_")  # five letters: with the number, an ID of eleven
FORMAT = 1  # raised when the same parameters would give other videos


# --- movements: the classes ---------------------------------------------------------------------


def straight(degrees: float, distance: np.ndarray, turn: np.ndarray) -> np.ndarray:
    """Return the (y, x) path [T, 2] of a uniform movement, 0 degrees = right, 90 = down."""
    angle = math.radians(degrees)
    return distance[:, None] * np.array([math.sin(angle), math.cos(angle)])


def circle(sign: int, distance: np.ndarray, turn: np.ndarray) -> np.ndarray:
    """Return the (y, x) path [T, 2] of a movement on a circle, sign +1 = clockwise."""
    radius = (distance[1] - distance[0]) / (turn[1] - turn[0])
    return radius * np.stack([np.sin(sign * turn), np.cos(turn)], axis=1)


def swing(degrees: float, distance: np.ndarray, turn: np.ndarray) -> np.ndarray:
    """Return the (y, x) path [T, 2] of a movement to and fro along one direction."""
    radius = (distance[1] - distance[0]) / (turn[1] - turn[0])
    return straight(degrees, 1.3 * radius * np.cos(turn), turn)


# Each maps the distance gone [T] (pixels) and the phase [T] (radians; its start is random) to a
# path [T, 2]. The first num_classes of them are the classes of a set.
MOVEMENTS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "moving_right": functools.partial(straight, 0),
    "moving_down": functools.partial(straight, 90),
    "moving_left": functools.partial(straight, 180),
    "moving_up": functools.partial(straight, 270),
    "moving_down_right": functools.partial(straight, 45),
    "moving_down_left": functools.partial(straight, 135),
    "moving_up_left": functools.partial(straight, 225),
    "moving_up_right": functools.partial(straight, 315),
    "circling_clockwise": functools.partial(circle, 1),
    "circling_anticlockwise": functools.partial(circle, -1),
    "swinging_sideways": functools.partial(swing, 0),
    "swinging_up_and_down": functools.partial(swing, 90),
}


# --- pictures -----------------------------------------------------------------------------------


def smooth_texture(rng: np.random.Generator, size: int) -> np.ndarray:
    """Draw a periodic colour texture [3, H, W] of mean 0 and luminance deviation 1.

    Its details measure a quarter of the frame and more. So little of a removed patch can be guessed
    from its neighbours in space, and none of it can be copied from the frame before without moving
    it: a masked autoencoder has to see motion. Colours are spread as in photographs: most in
    luminance, less in blue-yellow, least in red-green.
    """
    rows = np.fft.fftfreq(size)[:, None] * size
    columns = np.fft.rfftfreq(size) * size
    frequency = np.hypot(rows, columns)  # cycles per frame
    amplitude = frequency / (1 + (frequency / 3) ** 6)
    spectrum = np.fft.rfft2(rng.standard_normal((3, size, size))) * amplitude
    texture = np.fft.irfft2(spectrum, s=(size, size))
    texture /= texture.std(axis=(1, 2), keepdims=True)
    opponent = np.array([[1.0, 1.0, 1.0], [0.25, 0.0, -0.25], [0.06, -0.12, 0.06]])
    return np.einsum("kyx,kc->cyx", texture, opponent)  # (3, H, W)


def random_blob(rng: np.random.Generator, size: int) -> np.ndarray:
    """Draw the opacity [H, W] in [0, 1] of one smooth shape at a uniform place, edges wrapping."""
    centre = rng.uniform(0, size, 2)
    radius = rng.uniform(0.22, 0.34) * size
    grid = np.arange(size) + 0.5
    y = ((grid - centre[0] + size / 2) % size - size / 2)[:, None]
    x = ((grid - centre[1] + size / 2) % size - size / 2)[None, :]
    angle = np.arctan2(y, x)
    outline = np.ones((size, size))
    for waves in (2, 3, 4):
        outline += rng.normal(0, 0.12) * np.cos(waves * angle + rng.uniform(0, 2 * np.pi))
    return np.clip((radius * outline - np.hypot(y, x)) / 2 + 0.5, 0, 1)  # edge of two pixels


def random_colour(rng: np.random.Generator) -> np.ndarray:
    """Draw a shift of colour [3, 1, 1] in 8-bit levels, mostly of brightness."""
    return (rng.normal(0, 28) + rng.normal(0, 14, 3))[:, None, None]


def shift(layers: np.ndarray, path: np.ndarray) -> np.ndarray:
    """Move periodic layers [K, H, W] along a path [T, 2] (pixels, fractions allowed): [T, K, H, W].

    By the Fourier shift theorem, so that no sub-pixel position is blurred more than another.
    """
    size = layers.shape[-1]
    rows = np.exp(-2j * np.pi * path[:, :1] * np.fft.fftfreq(size)).astype(np.complex64)
    columns = np.exp(-2j * np.pi * path[:, 1:] * np.fft.rfftfreq(size)).astype(np.complex64)
    phase = rows[:, :, None] * columns[:, None, :]  # (T, H, W/2 + 1)
    spectrum = np.fft.rfft2(layers.astype(np.float32))
    return np.fft.irfft2(phase[:, None] * spectrum, s=(size, size))


def render_video(rng: np.random.Generator, movement: str, size: int, num_frames: int) -> np.ndarray:
    """Draw one video of a class as uint8 [T, H, W, 3].

    The shapes go 2.3 to 3.3 pixels a frame (at size 64), the background at most 0.5 anywhere.
    """
    unit = size / 64
    background = rng.uniform(24, 36) * smooth_texture(rng, size) + 115 + random_colour(rng)
    foreground = rng.uniform(40, 60) * smooth_texture(rng, size) + 115
    opacity = np.zeros((size, size))
    for _ in range(rng.integers(3, 6)):
        blob = random_blob(rng, size)
        foreground += blob * random_colour(rng)
        opacity += blob * (1 - opacity)

    time = np.arange(num_frames)
    turn = 2 * np.pi * (rng.uniform() + time / rng.uniform(8, 12))
    path = MOVEMENTS[movement](rng.uniform(2.3, 3.3) * unit * time, turn)
    drift_speed = 0.5 * unit * math.sqrt(rng.uniform())
    drift = straight(rng.uniform(0, 360), drift_speed * time, turn)

    still = shift(background, drift)  # (T, 3, H, W)
    moving = shift(np.concatenate([foreground * opacity, opacity[None]]), path)  # (T, 4, H, W)
    frames = still * (1 - moving[:, 3:]) + moving[:, :3]
    return np.clip(frames, 0, 255).round().astype(np.uint8).transpose(0, 2, 3, 1)


# --- files --------------------------------------------------------------------------------------


def write_video(path: Path, frames: np.ndarray, fps: int) -> None:
    """Encode uint8 RGB frames [T, H, W, 3] as an H.264 mp4."""
    # One thread: the bytes must not depend on the number of cores. Key frames every half second:
    # a clip that starts in the middle needs few frames before it.
    options = {"preset": "superfast", "crf": "16", "g": str(max(fps // 2, 1)), "threads": "1"}
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def write_dataset(
    out: str | os.PathLike[str],
    *,
    num_videos: int = 2048,
    num_labelled: int = 32,
    num_val: int = 64,
    num_test: int = 512,
    num_classes: int = 8,
    size: int = 48,
    num_frames: int = 20,
    fps: int = 15,
    seed: int = 0,
    num_workers: int = 0,
) -> Path:
    """Write the data set to the folder `out`, unless it is there already, and return the folder.

    The same parameters give the same frames. The folder appears complete or not at all, so it may
    be asked for before every run and by several processes at once. A folder that holds anything
    else, or a set of other parameters, is left alone and raises FileExistsError.

    Args:
        num_videos: training videos, the labelled ones included.
        num_labelled: training videos that the fine-tuning csv lists.
        num_val: held-out videos in finetune/val.csv.
        num_test: other held-out videos, in finetune/test.csv.
        num_classes: movements used, 2 to 12.
        size: height and width in pixels, even, at least 32.
        num_frames: frames of a video.
        fps: frames per second.
        num_workers: threads, 0 = one for every core. The result does not depend on it.
    """
    out = Path(out).absolute()
    parameters = {
        "num_videos": num_videos,
        "num_labelled": num_labelled,
        "num_val": num_val,
        "num_test": num_test,
        "num_classes": num_classes,
        "size": size,
        "num_frames": num_frames,
        "fps": fps,
        "seed": seed,
    }
    _check(**parameters)
    if _is_written(out, parameters):
        return out

    # Written beside its place and renamed: a killed run leaves a *.partial-* folder, never half a
    # set under the final name.
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f"{out.name}.partial-", dir=out.parent))
    try:
        _write_files(partial, num_workers=num_workers, **parameters)
        marker = {"format": FORMAT, **parameters}
        (partial / MARKER).write_text(json.dumps(marker, indent=2) + "\n")
        partial.chmod(0o777 & ~_umask())  # mkdtemp makes a private folder
        try:
            partial.rename(out)
        except OSError:
            if not _is_written(out, parameters):  # else another process was faster
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out


def _check(
    num_videos: int,
    num_labelled: int,
    num_val: int,
    num_test: int,
    num_classes: int,
    size: int,
    num_frames: int,
    fps: int,
    seed: int,
) -> None:
    if not 2 <= num_classes <= len(MOVEMENTS):
        raise ValueError(f"num_classes must be 2 to {len(MOVEMENTS)}, not {num_classes}")
    if not 1 <= num_labelled <= num_videos:
        raise ValueError(f"num_labelled must be 1 to num_videos={num_videos}, not {num_labelled}")
    if num_val < 1 or num_test < 1:
        raise ValueError(f"num_val and num_test must be at least 1, not {num_val} and {num_test}")
    if size < 32 or size % 2:
        raise ValueError(f"size must be an even number of at least 32 pixels, not {size}")
    if num_frames < 2 or fps < 1:
        raise ValueError(f"num_frames must be at least 2 and fps 1, not {num_frames} and {fps}")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _is_written(out: Path, parameters: dict[str, int]) -> bool:
    """Tell whether `out` holds this very set; raise FileExistsError when it holds anything else."""
    try:
        found = json.loads((out / MARKER).read_text())
    except FileNotFoundError:
        if out.exists() and not (out.is_dir() and not any(out.iterdir())):
            raise FileExistsError(
                f"{out} exists and holds no synthetic data set: choose another folder"
            ) from None
        return False
    wanted = {"format": FORMAT, **parameters}
    if found != wanted:
        other = ", ".join(
            f"{name}={found.get(name)} (asked for: {value})"
            for name, value in wanted.items()
            if found.get(name) != value
        )
        raise FileExistsError(
            f"{out} holds a synthetic data set with {other}: remove it or choose another folder"
        )
    return True


def _write_files(
    root: Path,
    *,
    num_videos: int,
    num_labelled: int,
    num_val: int,
    num_test: int,
    num_classes: int,
    size: int,
    num_frames: int,
    fps: int,
    seed: int,
    num_workers: int,
) -> None:
    classes = list(MOVEMENTS)[:num_classes]
    for name in ("pretrain", "finetune", *(f"videos/{name}" for name in classes)):
        (root / name).mkdir(parents=True)
    (root / "classes.txt").write_text("".join(f"{name}\n" for name in classes))

    end = math.ceil(num_frames / fps)

    def write_one(job: tuple[int, int]) -> str:
        """Write one video and return its line in a csv. Labels go round: any part is balanced."""
        split, index = job
        label = index % num_classes
        rng = np.random.default_rng((seed, split, index))
        path = f"videos/{classes[label]}/{SPLITS[split]}{index:06d}_000000_{end:06d}.mp4"
        write_video(root / path, render_video(rng, classes[label], size, num_frames), fps)
        return f"../{path} {label}\n"

    counts = (num_videos, num_val, num_test)
    jobs = [(split, index) for split, count in enumerate(counts) for index in range(count)]
    # Threads do: FFT and encoder release the interpreter's lock.
    with ThreadPoolExecutor(num_workers or os.cpu_count()) as pool:
        try:
            written = pool.map(write_one, jobs)
            lines = list(
                tqdm(written, "Writing synthetic videos", len(jobs), unit="video", mininterval=1)
            )
        except BaseException:
            pool.shutdown(cancel_futures=True)  # Ctrl-C must not wait for the rest
            raise
    train, held_out = lines[:num_videos], lines[num_videos:]
    for name, part in {
        "pretrain/train.csv": train,
        "finetune/train.csv": train[:num_labelled],
        "finetune/val.csv": held_out[:num_val],
        "finetune/test.csv": held_out[num_val:],
    }.items():
        (root / name).write_text("".join(part))


def get_args_parser() -> argparse.ArgumentParser:
    """Build the command line; its defaults are those of `write_dataset`."""
    default = {name: p.default for name, p in inspect.signature(write_dataset).parameters.items()}
    parser = argparse.ArgumentParser(
        prog="python -m util.synthetic",
        description="Write short H.264 videos whose class can only be told from motion.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("out", help="folder to create")
    for name, text in {
        "num_videos": "training videos, the labelled ones included",
        "num_labelled": "labelled training videos",
        "num_val": "held-out videos of finetune/val.csv",
        "num_test": "held-out videos of finetune/test.csv",
        "num_classes": f"movements, 2 to {len(MOVEMENTS)}",
        "size": "height and width in pixels",
        "num_frames": "frames of a video",
        "fps": "frames per second",
        "seed": "seed of every random choice",
        "num_workers": "threads, 0 = one for every core",
    }.items():
        parser.add_argument(f"--{name}", type=int, default=default[name], metavar="N", help=text)
    return parser


def main() -> None:
    """Write a data set from the command line."""
    args = get_args_parser().parse_args()
    try:
        out = write_dataset(**vars(args))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(
        f"{out} holds {args.num_videos} training videos, {args.num_val} + {args.num_test} held out"
    )


ROOT = Path(__file__).parent.parent


def synthetic_recipe(name: str) -> Callable[[Namespace], Sequence[str]]:
    """Return the default flags of runs without --path_to_data_dir: the embedded videos' recipe."""

    def default_flags(args: Namespace) -> Sequence[str]:
        return [] if args.path_to_data_dir else [f"@{ROOT / 'recipes' / name}"]

    return default_flags


def data_dir(args: Namespace, task: str) -> str:
    """Return the folder of csvs: --path_to_data_dir, or the synthetic videos, written if needed.

    Args:
        task: "pretrain" (all videos) or "finetune" (the few labelled ones).
    """
    if args.path_to_data_dir:
        return args.path_to_data_dir

    folder = ROOT / "data" / "synthetic"
    print0(
        f"no --path_to_data_dir: using the embedded synthetic videos in {folder}, and "
        f"recipes/synthetic_{task}.args for flags that are not given"
    )
    if dist.is_main():
        write_dataset(str(folder))
    dist.barrier()
    return str(folder / task)


if __name__ == "__main__":
    main()
