"""Videos listed in a csv as a data set: index and samples; util/loader.py makes batches of them.

Shapes: V views or R clips of a video, T frames, H W pixels, C channels.
"""

import io
import math
import os
import re
import zlib
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from util.errors import UserError
from util.file_io import ADDRESSES, is_remote, local_path, open_file
from util.video.decode import MAX_PIXELS, Video, VideoError
from util.video.rand_augment import RandAugment
from util.video.rand_augment import apply as augment
from util.video.sampling import (
    NO_BOX,
    Box,
    clip_length,
    clip_start,
    frame_indices,
    random_erasing_box,
    random_resized_crop_box,
    random_start,
    segment_indices,
    short_side_size,
    uniform_crop_box,
)
from util.video.time_limit import call_within
from util.video.transforms import resize_frame

MAX_REPLACEMENTS = 10  # unreadable videos in a row before a loader gives up
NO_LABEL = -1
AUGMENT_SIDE = 256  # pixels: RandAugment sees no larger short side, as in the reference


class VideoIndex:
    """The rows of a csv: one `path label` per line, in packed arrays.

    Separators are space, comma or tab; paths may hold spaces; blank lines and lines that start
    with # are skipped. Relative paths start from `path_prefix`, or from the csv's folder. A Python
    list of strings would be copied into every loader worker as its reference counts change;
    arrays are shared.

    Args:
        csv_path: path or address.
        path_prefix: folder of relative paths; empty for the csv's own.
        num_classes: labels must be below it; None allows rows without a label (pre-training).

    Raises:
        UserError: no such file, no rows, or a bad line, named by file and number.
    """

    def __init__(self, csv_path: str, path_prefix: str = "", num_classes: int | None = None):
        self.csv_path = csv_path
        self.folder = path_prefix or os.path.dirname(csv_path)
        blob, ends, labels = bytearray(), [], []
        with open_file(csv_path, "rb") as file:
            # names of files are bytes: what is no UTF-8 stays as it is, as in os.listdir
            text = io.TextIOWrapper(file, encoding="utf-8", errors="surrogateescape")
            for number, line in enumerate(text, start=1):
                line = line.removeprefix("\ufeff").strip()  # of editors on Windows
                if not line or line.startswith("#"):
                    continue
                path, label = _parse_row(line)
                problem = _row_problem(path, label, num_classes)
                if problem:
                    raise UserError(f"{csv_path}, line {number}: {problem}: {line[:120]!r}")
                blob += os.fsencode(path)
                ends.append(len(blob))
                labels.append(label)
        if not ends:
            raise UserError(f"{csv_path} lists no videos; it needs one `path label` per line")
        self._paths = np.frombuffer(bytes(blob), dtype=np.uint8)
        self._ends = np.array(ends, dtype=np.int64)
        self.labels = np.array(labels, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends)

    def fingerprint(self) -> int:
        """Return a checksum of all rows, by which a resumed run knows its data set."""
        return zlib.crc32(self.labels.tobytes(), zlib.crc32(self._paths.tobytes()))

    def path(self, i: int) -> str:
        """Return the path of row i, made absolute by the prefix."""
        start = self._ends[i - 1] if i else 0
        path = os.fsdecode(self._paths[start : self._ends[i]].tobytes())
        return path if is_remote(path) else os.path.join(self.folder, path)


def _parse_row(line: str) -> tuple[str, int]:
    """Split a csv line at its last separator into path and label (NO_LABEL without one)."""
    cut = max(line.rfind(separator) for separator in " ,\t")
    path, label = line, NO_LABEL
    if re.fullmatch("[+-]?[0-9]+", line[cut + 1 :]):
        path, label = line[: max(cut, 0)], int(line[cut + 1 :])
    path = path.strip(" ,\t")
    if len(path) > 2 and path[0] == path[-1] == '"':  # as spreadsheets write those with commas
        path = path[1:-1]
    return path, label


def _row_problem(path: str, label: int, num_classes: int | None) -> str:
    """Say what is wrong with a row, or nothing."""
    if not path:
        return "no path"
    if "\0" in path:
        return "not a text file"
    if re.match(r"[a-z0-9]+://", path) and not path.startswith(ADDRESSES):
        return f"an address of another kind than {', '.join(ADDRESSES)}"
    if label < NO_LABEL:
        return "negative label"
    if label > 2**31:
        return "a label that large cannot be one"
    if num_classes is None:
        almost = re.search(r"[ ,\t][+-]?[0-9]*\.?[0-9]+(,|\s+#.*)?$", path)
        return "a label must be an integer at the end" if label == NO_LABEL and almost else ""
    if label == NO_LABEL:
        return "no label (an integer after the path)"
    return f"label {label} is not below --num_classes {num_classes}" if label >= num_classes else ""


class Sample(NamedTuple):
    """What a loader worker makes of one video."""

    clips: Tensor  # uint8 [R, T, H, W, C]
    flip: Tensor  # bool [R], mirror on the device
    erase: Tensor  # int64 [R, 4], box to erase on the device, empty for none
    label: int
    row: int  # of the csv; -1 when no readable video was found
    errors: dict[str, str]  # path -> "PATH: reason" of unreadable videos met on the way


DrawBoxes = Callable[[int, int], list[Box]]


def cut_views(
    video: Video, frames: np.ndarray, draw_boxes: DrawBoxes, out: Tensor, side: int | None = None
) -> None:
    """Cut V clips from a video in one decode, each frame straight into its places.

    Args:
        frames: int64 [V, T], frame numbers.
        draw_boxes: maps the frame's height and width to V boxes. Called when the first frame is
            there: whether a video is upright is known only then.
        out: uint8 [V, T, h, w, C], written; each box is resized to h x w.
        side: scale frames to this short side before the boxes are drawn.
    """
    places: dict[int, list[tuple[int, int]]] = {}
    for v, numbers in enumerate(frames.tolist()):
        for t, number in enumerate(numbers):
            places.setdefault(number, []).append((v, t))
    targets, boxes = out.numpy(), None
    for number, frame in video.frames(sorted(places)):
        if side is not None:
            if math.prod(short_side_size(frame.shape[0], frame.shape[1], side)) > MAX_PIXELS:
                raise VideoError(f"{video.path}: frames are too narrow to scale to {side} pixels")
            frame = _scale(frame, side)
        if boxes is None:
            boxes = draw_boxes(frame.shape[0], frame.shape[1])
        for v, t in places[number]:
            top, left, h, w = boxes[v]
            resize_frame(frame[top : top + h, left : left + w], targets[v, t])
        del frame  # the next one takes its memory, which is still in the caches


def read_clip(video: Video, frames: np.ndarray, max_side: int) -> np.ndarray:
    """Return one clip uint8 [T, H, W, C], uncropped, its short side scaled down to max_side."""
    clip = np.empty(0, np.uint8)
    for number, frame in video.frames(frames):
        if min(frame.shape[:2]) > max_side:
            frame = _scale(frame, max_side)
        if not len(clip):
            clip = np.empty((len(frames), *frame.shape), np.uint8)
        clip[frames == number] = frame
        del frame  # as in cut_views
    return clip


def _scale(frame: np.ndarray, side: int) -> np.ndarray:
    """Resize a frame [H, W, C] to a short side."""
    height, width, channels = frame.shape
    out = np.empty((*short_side_size(height, width, side), channels), np.uint8)
    resize_frame(frame, out)
    return out


class Kinetics(Dataset):
    """Clips of the videos of an index. Items are asked for by (epoch, row).

    Every random choice of a sample comes from a generator seeded by (seed, epoch, row, repeat), so
    that clips depend neither on the number of workers nor on the step a run was resumed at.

    mode "pretrain": `repeat_aug` clips, each with its own start, crop and flip (the paper's
    repeated sampling). "finetune": `repeat_aug` augmentations of one random clip. "test":
    `num_clips` x `num_crops` views without randomness, time outermost; 1 x 1 (the centre) is what
    validation uses. In training a video that cannot be read, or not in time, is replaced by another
    one, the same in every run; in testing its row comes back with zeros and an error.

    Args:
        input_size: height and width of the clips, pixels.
        num_frames, sampling_rate: frames of a clip, and their distance at 30 fps.
        sampling: "dense" clips as said, or "segments": one frame from each of num_frames equal
            parts of the video, at random in training, evenly placed in testing (1: the centres).
        scales, ratios: range of the random crop's area (share of the frame) and aspect.
        hflip: mirror half of the training clips.
        rand_augment: applied to whole fine-tuning clips, before the crop.
        reprob: probability of random erasing in fine-tuning.
        max_pixels: videos with larger frames (width * height) count as unreadable.
        item_timeout: seconds that reading a video may take.
    """

    def __init__(
        self,
        index: VideoIndex,
        mode: str,
        input_size: int,
        num_frames: int,
        sampling_rate: int,
        seed: int = 0,
        repeat_aug: int = 1,
        scales: tuple[float, float] = (0.5, 1.0),
        ratios: tuple[float, float] = (3 / 4, 4 / 3),
        hflip: bool = True,
        rand_augment: RandAugment | None = None,
        reprob: float = 0.0,
        num_clips: int = 1,
        num_crops: int = 1,
        sampling: str = "dense",
        max_pixels: int = MAX_PIXELS,
        item_timeout: float = 60.0,
    ):
        self.index = index
        modes = {"pretrain": self._pretrain, "finetune": self._finetune, "test": self._test}
        self.load = modes[mode]
        self.training = mode != "test"
        self.dense = sampling == "dense"
        self.input_size = input_size
        self.num_frames = num_frames
        self.sampling_rate = sampling_rate
        self.seed = seed
        self.repeat_aug = repeat_aug
        self.scales = scales
        self.ratios = ratios
        self.hflip = hflip
        self.rand_augment = rand_augment
        self.reprob = reprob
        self.num_clips = num_clips
        self.num_crops = num_crops
        self.max_pixels = max_pixels
        self.item_timeout = item_timeout
        self.views = repeat_aug if self.training else num_clips * num_crops
        self.clips_shape = (self.views, num_frames, input_size, input_size, 3)  # of a sample

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        return self.read(*key, torch.empty(self.clips_shape, dtype=torch.uint8))

    def read(self, epoch: int, row: int, clips: Tensor) -> Sample:
        """Make the sample of a row in `clips`, uint8 [R, T, H, W, C], if possible.

        The sample's clips are others when a hung read was given up: it may still write to `clips`.
        """
        seeds = [(self.seed, epoch, row, r) for r in range(self.repeat_aug)]
        replacements = np.random.default_rng((self.seed, epoch, row, self.repeat_aug))
        errors = {}
        for _ in range(MAX_REPLACEMENTS if self.training else 1):
            path = self.index.path(row)
            rngs = [np.random.default_rng(seed) for seed in seeds]
            load = partial(self._load_path, path, rngs, clips)
            try:
                # The decoder looks at the clock itself and frees what it holds; a call that does
                # not come back even then hangs in the file system.
                flip, erase = call_within(self.item_timeout + 1, load)
            except (VideoError, UserError) as error:
                errors[path] = " ".join(str(error).split())
            except TimeoutError:
                errors[path] = f"{path}: does not answer within {self.item_timeout:g} seconds"
                clips = torch.empty_like(clips)
            else:
                label = int(self.index.labels[row])
                return Sample(clips, flip, erase, label, row, errors)
            if self.training:
                row = int(replacements.integers(len(self.index)))
        return Sample(
            clips.zero_(),
            torch.zeros(self.views, dtype=torch.bool),
            torch.zeros((self.views, 4), dtype=torch.int64),
            int(self.index.labels[row]),
            -1 if self.training else row,
            errors,
        )

    def _load_path(
        self, path: str, rngs: list[np.random.Generator], clips: Tensor
    ) -> tuple[Tensor, Tensor]:
        with Video(local_path(path), self.max_pixels, self.item_timeout) as video:
            return self.load(video, rngs, clips)

    def _random_frames(self, video: Video, rng: np.random.Generator) -> np.ndarray:
        total = video.num_frames
        if not self.dense:
            return segment_indices(total, self.num_frames, rng.random(self.num_frames))
        length = clip_length(self.num_frames, self.sampling_rate, video.fps)
        start = random_start(total, length, rng)
        return frame_indices(start, length, self.num_frames, total)

    def _test_frames(self, video: Video, clip: int) -> np.ndarray:
        total = video.num_frames
        if not self.dense:
            return segment_indices(total, self.num_frames, (clip + 0.5) / self.num_clips)
        length = clip_length(self.num_frames, self.sampling_rate, video.fps)
        start = clip_start(total, length, clip, self.num_clips)
        return frame_indices(start, length, self.num_frames, total)

    def _random_box(self, height: int, width: int, rng: np.random.Generator) -> Box:
        return random_resized_crop_box(height, width, self.scales, self.ratios, rng)

    def _random_boxes(self, rngs: list[np.random.Generator], height: int, width: int) -> list[Box]:
        return [self._random_box(height, width, rng) for rng in rngs]

    def _flip(self, rng: np.random.Generator) -> bool:
        return bool(rng.random() < 0.5) and self.hflip

    def _pretrain(
        self, video: Video, rngs: list[np.random.Generator], clips: Tensor
    ) -> tuple[Tensor, Tensor]:
        frames = np.stack([self._random_frames(video, rng) for rng in rngs])

        cut_views(video, frames, partial(self._random_boxes, rngs), clips)
        flip = torch.tensor([self._flip(rng) for rng in rngs])
        return flip, torch.tensor([NO_BOX] * len(rngs))

    def _finetune(
        self, video: Video, rngs: list[np.random.Generator], clips: Tensor
    ) -> tuple[Tensor, Tensor]:
        frames = self._random_frames(video, rngs[0])
        if self.rand_augment is None:
            repeated = np.stack([frames] * len(rngs))
            cut_views(video, repeated, partial(self._random_boxes, rngs), clips)
        else:
            whole = read_clip(video, frames, AUGMENT_SIDE)
            for rng, out in zip(rngs, clips.numpy(), strict=True):
                drawn = self.rand_augment.draw(rng)
                box = self._random_box(whole.shape[1], whole.shape[2], rng)
                for frame, target in zip(augment(whole, drawn, box), out, strict=True):
                    resize_frame(frame, target)
        flip = torch.tensor([self._flip(rng) for rng in rngs])
        size = self.input_size
        erase = [random_erasing_box(size, size, rng, self.reprob) for rng in rngs]
        return flip, torch.tensor(erase)

    def _test(
        self, video: Video, rngs: list[np.random.Generator], clips: Tensor
    ) -> tuple[Tensor, Tensor]:
        views = [(k, s) for k in range(self.num_clips) for s in range(self.num_crops)]
        frames = [self._test_frames(video, k) for k in range(self.num_clips)]

        def draw_boxes(height: int, width: int) -> list[Box]:
            size, crops = self.input_size, self.num_crops
            return [uniform_crop_box(height, width, size, s, crops) for _, s in views]

        # every frame is decoded and scaled once; all views are crops of these
        numbers = np.stack([frames[k] for k, _ in views])
        cut_views(video, numbers, draw_boxes, clips, side=self.input_size)
        flip = torch.zeros(self.views, dtype=torch.bool)
        return flip, torch.zeros((self.views, 4), dtype=torch.int64)
