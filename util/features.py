"""Features of videos by a frozen encoder: a video's clips, their features, files of features.

Shapes: V videos or views of one, T frames, H W pixels, C channels, L tokens, D width.
"""

import json
import math
import os
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from glob import escape, glob
from typing import Any, TypeVar
from zipfile import BadZipFile

import numpy as np
import torch
from numpy.lib.format import write_array_header_1_0
from torch import Tensor

from util.dist import broadcast_object, is_main, print0
from util.errors import UserError
from util.file_io import make_dirs, open_file, path_to_text, printable, write_atomically
from util.kinetics import Kinetics, VideoIndex
from util.optim import autocast
from util.video.transforms import channels_first, normalize
from util.video_vit import Encoder

NAMES = ("train", "val", "test", "videos")  # of feature files: those of csvs, and of --videos
Result = TypeVar("Result")


def load_clips(
    path: str | os.PathLike[str], model: Encoder, num_clips: int = 1, num_crops: int = 1
) -> Tensor:
    """Read the views of a video that main_test.py scores: float32 [V, 3, T, H, W], on the CPU.

    The pixels are normalised, and the clips have the size and the sampling that the model was
    trained with (model.sampling_rate and model.sampling, which loading a checkpoint sets). They are
    spread evenly over the video, and the crops of each along the longer side of its frames. Raise
    UserError, which names the file, if it cannot be read or a number is not positive.
    """
    path, embed = os.fspath(path), model.patch_embed
    if min(num_clips, num_crops) < 1:
        raise UserError(f"{path}: num_clips = {num_clips}, num_crops = {num_crops} give no view")
    sizes = embed.img_size, embed.num_frames, model.sampling_rate
    views: Any = {"num_clips": num_clips, "num_crops": num_crops, "sampling": model.sampling}
    sample = Kinetics(VideoIndex.of_files([path]), "test", *sizes, **views)[0, 0]
    if sample.errors:
        raise UserError("; ".join(sample.errors.values()))
    return normalize(channels_first(sample.clips).contiguous())


@torch.inference_mode()
def encode(
    model: Encoder, clips: Tensor, path: str, device: torch.device, args: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Encode a video's clips, uint8 [V, T, H, W, C], --batch_size at a time.

    Return features float32 [V, D] and with --tokens also tokens [V, L, D], float16 with --half.
    Raise UserError, which names the video's path, if some are not finite.
    """
    features, tokens = [], []
    for part in clips.split(args.batch_size):
        with autocast(device, args.precision):
            x = channels_first(part.to(device, non_blocking=True))
            pooled, tokens_of_part = model.encode_features(x, args.layer)
        features.append(pooled.float().cpu())
        if args.tokens:
            tokens.append(tokens_of_part.to(torch.float16 if args.half else torch.float32).cpu())
    found = [torch.cat(parts) for parts in (features, tokens) if parts]
    for name, values in zip(("features", "tokens"), found, strict=False):
        if not values.isfinite().all():
            half = " or --half" if args.half else ""
            why = f"the weights are damaged, or too large for --precision {args.precision}{half}"
            raise UserError(f"{path_to_text(path)}: its {name} are not finite numbers: {why}", 1)
    return found[0].numpy(), found[-1].numpy()


def on_main(function: Callable[[], Result]) -> Result:
    """Return on every rank what function() returns, or raise its UserError, on the main one."""
    result: Any = None
    if is_main():
        try:
            result = function()
        except UserError as error:
            result = error
    result = broadcast_object(result)
    if isinstance(result, UserError):
        raise result
    return result


# --- files ----------------------------------------------------------------------------------------


def read_npz(path: str, *names: str) -> list[Any]:
    """Return arrays of an .npz file; UserError if it is damaged or lacks one of them."""
    try:
        with open_file(path, "rb") as file, np.load(file) as arrays:
            return [arrays[name] for name in names]
    except (OSError, ValueError, TypeError, KeyError, BadZipFile, RuntimeError) as error:
        reason = f"{path} is damaged or not a file of main_features.py ({error})"
        raise UserError(f"{reason}: delete it and extract it again") from error


def check_folder(folder: str, name: str, arguments: dict[str, Any]) -> None:
    """Raise UserError if feature files of a folder were made with other arguments.

    The checkpoint may be in another place now. Only those of split `name` must have its videos.
    """
    kinds = *(f"{split}.npz" for split in NAMES), "parts/*.npz", "windows/*/*.npz"
    for path in [path for kind in kinds for path in sorted(glob(f"{escape(folder)}/{kind}"))]:
        theirs = json.loads(str(read_npz(path, "arguments")[0]))
        is_other_split = not re.match(f"{name}[-.]", os.path.basename(path))
        for key, value in arguments.items():
            if key in ("checkpoint", "csv") or (key == "index" and is_other_split):
                continue
            if theirs.get(key) != value:
                made = f"with {key} = {theirs.get(key)}, not {value}"
                made = "of other videos or labels" if key == "index" else made
                raise UserError(f"{path} was made {made}: give another --output_dir")


@dataclass
class FeatureFile:
    """Write FOLDER/NAME.npz with the features of an index, and NAME.tokens.npy for their tokens.

    The rows are cut into chunks, the same for every number of ranks. Each chunk is written to a
    part in FOLDER/parts, so that the next run makes only the parts that a killed one lacks. The
    main rank merges them.
    """

    folder: str
    name: str
    index: VideoIndex
    arguments: dict[str, Any]
    token_shape: tuple[int, ...]  # [views, L, D] of a video; (): write no tokens

    def __post_init__(self) -> None:
        self.path = os.path.join(self.folder, f"{self.name}.npz")
        self.size = 8 if self.token_shape else 64  # videos of a chunk
        self.chunks = range(-(-len(self.index) // self.size))
        self.dtype = np.dtype("float16" if self.arguments["half"] else "float32")
        self.video_bytes = math.prod(self.token_shape) * self.dtype.itemsize
        self.made: list[tuple[int, np.ndarray, np.ndarray]] = []  # rows of the chunk in the making
        self.errors: list[str] = []

    def part(self, chunk: int, suffix: str = ".npz") -> str:
        return os.path.join(self.folder, "parts", f"{self.name}-{chunk:05d}{suffix}")

    def rows(self, chunk: int) -> range:
        return range(chunk * self.size, min((chunk + 1) * self.size, len(self.index)))

    def open(self) -> list[int] | None:
        """Return the chunks that are still to make; None if the file is there.

        Raise UserError if the folder has features of another kind, or no room for tokens.
        """
        check_folder(self.folder, self.name, self.arguments)
        if os.path.exists(self.path):
            self._remove_parts()
            return None
        make_dirs(os.path.join(self.folder, "parts"))
        missing = [chunk for chunk in self.chunks if not os.path.exists(self.part(chunk))]
        if self.token_shape:
            videos = sum(len(self.rows(chunk)) for chunk in missing)
            # while parts are merged, one of them is on the disk twice
            needed = (videos + len(self.rows(0))) * self.video_bytes / 1e9
            free = shutil.disk_usage(self.folder).free / 1e9
            print0(f"{self.name}: the tokens of {videos} videos need {needed:.3g} GB")
            if needed > free:
                raise UserError(f"--tokens: {self.folder} has only {free:.3g} GB free", status=1)
        return missing

    def add(self, row: int, made: tuple[np.ndarray, np.ndarray] | None, errors: list[str]) -> None:
        """Take a row's features [views, D] and tokens, or errors; with a chunk's last, write it."""
        chunk = row // self.size
        self.made += [(row, *made)] if made else []
        self.errors += errors
        if row != self.rows(chunk)[-1]:
            return
        if self.token_shape:
            tokens = np.array([tokens for _, _, tokens in self.made], self.dtype)
            write_atomically(self.part(chunk, ".tokens"), lambda file: file.write(tokens.data))
        part = {
            "features": np.array([features for _, features, _ in self.made], np.float32),
            "rows": np.array([row for row, _, _ in self.made], np.int64),
            "unreadable": np.array(self.errors, str), "arguments": json.dumps(self.arguments),
        }  # fmt: skip
        write_atomically(self.part(chunk), lambda file: np.savez(file, **part))
        self.made, self.errors = [], []

    def merge(self, classes: list[str]) -> str:
        """Write the file from its parts, remove these, and return what is in it."""
        names = "features", "rows", "unreadable"
        parts = [read_npz(self.part(chunk), *names) for chunk in self.chunks]
        rows, unreadable = (np.concatenate([part[i] for part in parts]) for i in (1, 2))
        if len(rows):
            if self.token_shape:
                self._merge_tokens([len(rows) for _, rows, _ in parts])
            paths = [path_to_text(self.index.path(row)) for row in rows.tolist()]
            whole = {
                "features": np.concatenate([features for features, rows, _ in parts if len(rows)]),
                "labels": self.index.labels[rows], "paths": np.array(paths, str), "rows": rows,
                "unreadable": unreadable, "classes": np.array(classes, str),
                "arguments": json.dumps(self.arguments),
            }  # fmt: skip
            write_atomically(self.path, lambda file: np.savez(file, **whole))
        self._remove_parts()
        counts = count_videos(self.index, len(rows), unreadable.tolist())
        return f"{self.path}: features of {counts}"

    def _remove_parts(self) -> None:
        for path in glob(os.path.join(escape(self.folder), "parts", f"{self.name}-*")):
            os.remove(path)
        with suppress(OSError):  # there may be none, or another split's
            os.rmdir(os.path.join(self.folder, "parts"))

    def _merge_tokens(self, counts: list[int]) -> None:
        """Move the parts' tokens to their places in one file, so that they are on the disk once."""
        parts = [self.part(chunk, ".tokens") for chunk in self.chunks]
        there = [os.path.exists(part) for part in parts]
        whole = os.path.join(self.folder, f"{self.name}.tokens.npy")
        partial = f"{whole}.partial"
        if not any(there) and os.path.exists(whole) and not os.path.exists(partial):
            return  # an earlier run was killed when it had moved all
        shape = sum(counts), *self.token_shape
        header = {"descr": self.dtype.str, "fortran_order": False, "shape": shape}
        # "r+b": an earlier run was killed between two moves
        with open(partial, "wb" if all(there) else "r+b") as file:
            write_array_header_1_0(file, header)
            for part, count in zip(parts, counts, strict=True):
                if not os.path.exists(part):
                    file.seek(count * self.video_bytes, os.SEEK_CUR)
                    continue
                with open(part, "rb") as source:
                    shutil.copyfileobj(source, file)
                file.flush()
                os.fsync(file.fileno())
                os.remove(part)
        os.replace(partial, whole)


def count_videos(index: VideoIndex, readable: int, unreadable: list[str]) -> str:
    """Say how many videos were read, and which were not; UserError if none was."""
    if not readable:
        all_of = f"none of the {len(unreadable)} videos of {index.csv_path} could be read"
        raise UserError(f"{all_of}: {unreadable[0]}", 1)
    listed = [f"; {len(unreadable)} unreadable videos:", *map(printable, unreadable)]
    return f"{readable} videos" + ("\n  ".join(listed) if unreadable else "")
