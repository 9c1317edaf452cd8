"""The videos of a csv as a data set of samples, from which util/loader.py makes batches.

Shapes: V views or R clips of a video, T frames, H W pixels, C channels.
"""

import io
import math
import os
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from util.cache import Cache
from util.classes import ClassNames, match_labels
from util.dist import print0
from util.errors import UserError
from util.file_io import ADDRESSES, is_remote, path_to_text, printable, read_text
from util.video import clip_ops, sampling
from util.video.decode import MAX_PIXELS, ROUNDING, Video, VideoError
from util.video.rand_augment import RandAugment
from util.video.rand_augment import apply as augment
from util.video.sampling import NO_BOX, Box
from util.video.source import file_of
from util.video.time_limit import call_within
from util.video.transforms import resize_frame

MAX_REPLACEMENTS = 10  # a loader gives up after this many unreadable videos in a row
NO_LABEL = -1
AUGMENT_SIDE = 256  # pixels; RandAugment sees no larger short side, as in the reference

Generators = list[np.random.Generator]
DrawBoxes = Callable[[int, int], list[Box]]


class VideoIndex:
    """The rows of a csv, one `path label` per line.

    Separators are space, comma or tab; paths may contain spaces or stand in double quotes, where ""
    is one quote. Blank lines are skipped, and so are lines that start with #, which are counted.
    The rows are kept in packed arrays, which loader workers share. A list of strings would be
    copied into every worker, because reading a string changes its reference count.

    Args:
        path_prefix: folder that relative paths start from; empty: that of the csv.
        num_classes: labels must be below it; None allows rows without a label (pre-training).
        needs_labels: if False, all rows may lack their labels, which are then NO_LABEL.
    """

    def __init__(
        self,
        csv_path: str,
        path_prefix: str = "",
        num_classes: int | None = None,
        needs_labels: bool = True,
    ):
        self.csv_path = csv_path
        self.folder = path_prefix or os.path.dirname(csv_path)
        rows, unlabelled, comments = [], 0, 0
        for number, line in enumerate(io.StringIO(read_text(csv_path), newline=None), start=1):
            line = line.removeprefix("\ufeff").strip()  # Windows editors write this mark
            comments += line.startswith("#")
            if not line or line.startswith("#"):
                continue
            path, label = _parse_row(line)
            problem = _row_problem(line, path, label, num_classes, needs_labels)
            if problem:
                raise UserError(f"{csv_path}, line {number}: {problem}: {line[:120]!r}")
            unlabelled = unlabelled or number * (label == NO_LABEL)
            rows.append((path.encode("utf-8", "surrogateescape"), label))  # the name's bytes
        if comments:
            hint = "a path that starts with # must stand in double quotes"
            print0(f"{printable(path_to_text(csv_path))}: comments skipped: {comments}; {hint}")
        if not rows:
            raise UserError(f"{csv_path} lists no videos; it needs one `path label` per line")
        self._pack(rows)
        if num_classes is not None and unlabelled and (self.labels != NO_LABEL).any():
            raise UserError(f"{csv_path}, line {unlabelled}: no label, but other lines have one")

    @classmethod
    def of_files(cls, paths: Sequence[str]) -> "VideoIndex":
        """Return an index of these files or addresses, without labels.

        Raise UserError if a file does not exist.
        """
        for path in paths:
            file = file_of(path)
            if not (is_remote(path) or os.path.isfile(file)):
                raise UserError(f"{file} is {'a folder' if os.path.isdir(file) else 'no file'}")
        index = cls.__new__(cls)
        index.csv_path, index.folder = "--videos", ""
        index._pack([(os.fsencode(path), NO_LABEL) for path in paths])
        return index

    def _pack(self, rows: list[tuple[bytes, int]]) -> None:
        self._paths = np.frombuffer(b"".join(path for path, _ in rows), dtype=np.uint8)
        self._ends = np.cumsum([len(path) for path, _ in rows])
        self.labels = np.array([label for _, label in rows], dtype=np.int64)

    @property
    def has_labels(self) -> bool:
        return bool((self.labels != NO_LABEL).all())

    def __len__(self) -> int:
        return len(self._ends)

    def match_labels(self, names: ClassNames, known: list[str], num_classes: int) -> None:
        """Replace the labels by those of a model; see classes.match_labels."""
        labels = match_labels(names, known, num_classes)
        if labels is not None:
            self.labels = labels[self.labels]

    def fingerprint(self) -> int:
        """Return a checksum of all rows; a resumed run compares it with its checkpoint's."""
        return zlib.crc32(self.labels.tobytes(), zlib.crc32(self._paths.tobytes()))

    def refuse_missing(self) -> None:
        """Raise UserError if none of up to 100 files, spread evenly over the rows, exists."""
        rows = np.linspace(0, len(self) - 1, min(len(self), 100)).astype(int).tolist()
        paths = [self.path(row) for row in rows]
        if not any(is_remote(path) or os.path.exists(file_of(path)) for path in paths):
            problem = f"the files of {self.csv_path} do not exist, {paths[0]} for example"
            raise UserError(f"{problem}; --path_prefix is the folder that its paths start from")

    def path(self, i: int) -> str:
        """Return the path of row i; a relative one starts from `path_prefix`."""
        start = self._ends[i - 1] if i else 0
        path = os.fsdecode(self._paths[start : self._ends[i]].tobytes())
        return path if is_remote(path) else os.path.join(self.folder, path)


def _parse_row(line: str) -> tuple[str, int]:
    """Split a csv line at its last separator into path and label."""
    if quoted := re.fullmatch(r'"((?:[^"]|"")*)"(?:[ ,\t]+([+-]?[0-9]+)|[ ,\t]*)', line):
        return quoted[1].replace('""', '"'), int(quoted[2] or NO_LABEL)
    cut = max(line.rfind(separator) for separator in " ,\t")
    path, label = line, NO_LABEL
    if re.fullmatch("[+-]?[0-9]+", line[cut + 1 :]):
        path, label = line[: max(cut, 0)], int(line[cut + 1 :])
    return path.strip(" ,\t"), label


def _row_problem(
    line: str, path: str, label: int, num_classes: int | None, needs_labels: bool
) -> str:
    """Return what is wrong with a row, or an empty string."""
    if not path:
        return "no path"
    if "\0" in path:
        return "not a text file"
    if re.match(r"[a-z0-9]+://", path) and not path.startswith(ADDRESSES):
        return f"an address must start with one of {', '.join(ADDRESSES)}"
    if label < NO_LABEL:
        return "negative label"
    if label > 2**31:
        return "a label cannot be this large"
    if num_classes is None or not needs_labels:
        almost = re.search(r"[ ,\t][+-]?[0-9]*\.?[0-9]+([ ,\t]*|\s+#.*)$", line)
        if label == NO_LABEL and almost:
            return "a label must be an integer at the end"
    elif label == NO_LABEL:
        return "no label (an integer after the path)"
    if num_classes is not None and label >= num_classes:
        return f"label {label} is not below the number of classes, {num_classes}"
    return ""


class Sample(NamedTuple):
    """What a loader worker makes of one video."""

    clips: Tensor  # uint8 [R, T, H, W, C]
    flip: Tensor  # bool [R], clips to mirror on the device
    erase: Tensor  # int64 [R, 4], boxes to erase on the device; an empty box erases nothing
    label: int
    row: int  # of the csv; -1 if no readable video was found
    errors: dict[str, str]  # path -> "PATH: reason", the unreadable videos that were tried


def dense_frames(
    video: Video, num_frames: int, sampling_rate: int, place: Callable[[float, float], float]
) -> np.ndarray:
    """Return the numbers int64 [T] of frames that are spread evenly over a clip.

    A clip spans num_frames * sampling_rate frames at 30 fps. If the video's frame rate varies, its
    frames are chosen by their times, as if the video had been resampled at 30 fps.

    Args:
        place: takes the lengths of the video and of the clip; returns where the clip starts.
    """
    total, fps, times = timeline(video)
    length = sampling.clip_length(num_frames, sampling_rate, fps)
    return sampling.frame_indices(place(total, length), length, num_frames, total, times)


def timeline(video: Video) -> tuple[float, float, np.ndarray | None]:
    """Return a video's length, units per second, and frames' times: in frames, or in 1/30 s.

    The latter is for videos whose frame rate varies; the times are None for the others.
    """
    if video.times is None:
        return video.num_frames, video.fps, None
    fps, last = 30.0, video.times[-1]
    times = (video.times - ROUNDING) * fps
    # The last frame is shown for as long as the others are on average.
    return last * fps + max(last * fps / (video.num_frames - 1), 1), fps, times


def cut_views(
    video: Video, frames: np.ndarray, draw_boxes: DrawBoxes, out: Tensor, side: int | None = None
) -> None:
    """Cut V clips from a video; each frame is decoded once, even if several clips use it.

    Args:
        frames: int64 [V, T], frame numbers.
        draw_boxes: takes the frames' height and width once the first is decoded; returns V boxes.
        out: uint8 [V, T, h, w, C], written; each box is resized to h x w.
        side: scale frames to this short side before the boxes are cut.
    """
    places: dict[int, list[tuple[int, int]]] = {}
    for v, numbers in enumerate(frames.tolist()):
        for t, number in enumerate(numbers):
            places.setdefault(number, []).append((v, t))
    targets, boxes = out.numpy(), None
    for number, frame in video.frames(sorted(places)):
        if side is not None:
            frame = scale_frame(video, frame, side)
        if boxes is None:
            boxes = draw_boxes(*frame.shape[:2])
        for v, t in places[number]:
            top, left, h, w = boxes[v]
            resize_frame(frame[top : top + h, left : left + w], targets[v, t])
        del frame  # so that the next frame takes the same memory, which is still in the caches


def read_clip(video: Video, frames: np.ndarray, max_side: int) -> np.ndarray:
    """Return a clip uint8 [T, H, W, C] of whole frames; a short side above max_side is scaled."""
    clip = np.empty(0, np.uint8)
    for number, frame in video.frames(frames):
        if min(frame.shape[:2]) > max_side:
            frame = scale_frame(video, frame, max_side)
        if not len(clip):
            clip = np.empty((len(frames), *frame.shape), np.uint8)
        clip[frames == number] = frame
        del frame  # as in cut_views
    return clip


def scale_frame(video: Video, frame: np.ndarray, side: int) -> np.ndarray:
    """Resize a frame [H, W, C] of a video to a short side; VideoError if it becomes too large."""
    H, W, C = frame.shape
    size = sampling.short_side_size(H, W, side)
    if math.prod(size) > MAX_PIXELS:
        raise VideoError(f"{video.path}: frames are too narrow to scale to {side} pixels")
    out = np.empty((*size, C), np.uint8)
    resize_frame(frame, out)
    return out


@dataclass(eq=False)
class Kinetics(Dataset):
    """Clips of the videos of an index. The key of an item is (epoch, row).

    What a sample holds depends on `mode`:
        "pretrain": `repeat_aug` clips, each with its own start, crop and flip (the paper's
            repeated sampling).
        "finetune": one random clip, augmented `repeat_aug` times.
        "test": `num_clips` x `num_crops` views, all crops of the first clip first.

    Every random choice comes from a generator seeded by (seed, epoch, row, repeat): it depends on
    neither the number of workers nor the step at which a run was resumed. In training, a video that
    cannot be read in time is replaced by another one, the same in every run. In testing, its sample
    holds zeros and an error.
    """

    index: VideoIndex
    mode: str
    input_size: int  # height and width of the clips, pixels
    num_frames: int  # of a clip
    sampling_rate: int  # a clip spans num_frames * sampling_rate frames at 30 fps
    seed: int = 0
    repeat_aug: int = 1
    scales: tuple[float, float] = (0.5, 1.0)  # area of the random crop, as a share of the frame
    ratios: tuple[float, float] = (3 / 4, 4 / 3)  # its aspect, width / height
    crop: str = "random"  # or "center": pre-training clips are the square in the middle
    hflip: bool = True  # mirror half of the training clips
    color_jitter: float = 0.0  # factors of pre-training clips' colours are 1 +- this at most
    rand_augment: RandAugment | None = None  # applied to fine-tuning clips, before the crop
    reprob: float = 0.0  # probability of random erasing in fine-tuning
    num_clips: int = 1
    num_crops: int = 1
    sampling: str = "dense"  # or "segments": one frame from each of num_frames equal parts
    max_pixels: int = MAX_PIXELS  # videos with larger frames (width * height) are unreadable
    item_timeout: float = 60.0  # seconds that reading a video may take, once it is fetched
    cache_dir: str = ""  # see Cache
    cache_gb: float = 0.0

    def __post_init__(self) -> None:
        if self.mode not in ("pretrain", "finetune", "test"):
            raise ValueError(f"mode {self.mode!r} is none of pretrain, finetune, test")
        self.cache = Cache(self.cache_dir, self.cache_gb)
        size, self.training = self.input_size, self.mode != "test"
        self.views = self.repeat_aug if self.training else self.num_clips * self.num_crops
        self.clips_shape = self.views, self.num_frames, size, size, 3  # [R, T, H, W, C] of a sample

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        return self.read(*key, torch.empty(self.clips_shape, dtype=torch.uint8))

    def read(self, epoch: int, row: int, clips: Tensor) -> Sample:
        """Make the sample of a row and write its clips to `clips`, uint8 [R, T, H, W, C].

        After a hung read the sample has a tensor of its own: that read may still write to `clips`.
        """
        seeds = [(self.seed, epoch, row, r) for r in range(self.repeat_aug)]
        replacements = np.random.default_rng((self.seed, epoch, row, self.repeat_aug))
        errors = {}
        for _ in range(MAX_REPLACEMENTS if self.training else 1):
            path = local = self.index.path(row)
            rngs = [np.random.default_rng(seed) for seed in seeds]
            try:
                with self.cache.hold(path, self.item_timeout) as local:
                    load = partial(self._load, local, rngs, clips)
                    # The decoder checks the clock itself and then frees what it holds. A call that
                    # still takes longer hangs in the file system.
                    flip, erase = call_within(self.item_timeout + 1, load)
            except (VideoError, UserError) as error:
                errors[path] = " ".join(str(error).replace(local, path).split())
            except TimeoutError:
                errors[path] = f"{path}: does not answer within {self.item_timeout:g} seconds"
                clips = torch.empty_like(clips)
            else:
                return Sample(clips, flip, erase, int(self.index.labels[row]), row, errors)
            if self.training:
                row = int(replacements.integers(len(self.index)))
        flip, erase = torch.tensor([False] * self.views), torch.tensor([NO_BOX] * self.views)
        label = int(self.index.labels[row])
        return Sample(clips.zero_(), flip, erase, label, -1 if self.training else row, errors)

    def _load(self, path: str, rngs: Generators, clips: Tensor) -> tuple[Tensor, Tensor]:
        """Write the clips of a video; return which to flip and what to erase on the device."""
        flip, erase, size = [False] * self.views, [NO_BOX] * self.views, self.input_size
        with Video(path, self.max_pixels, self.item_timeout) as video:
            if self.training:
                self._cut_random_clips(video, rngs, clips)
            else:
                self._cut_test_clips(video, clips)
        if self.training:
            flip = [bool(rng.random() < 0.5) and self.hflip for rng in rngs]
        if self.mode == "finetune":
            erase = [sampling.random_erasing_box(size, size, rng, self.reprob) for rng in rngs]
        if self.color_jitter:
            for rng, clip in zip(rngs, clips.numpy(), strict=True):
                clip_ops.color_jitter(clip, self.color_jitter, rng)
        return torch.tensor(flip), torch.tensor(erase)

    def _cut_random_clips(self, video: Video, rngs: Generators, clips: Tensor) -> None:
        if self.mode == "pretrain":
            frames = [self._random_frames(video, rng) for rng in rngs]
        else:
            frames = [self._random_frames(video, rngs[0])] * len(rngs)
        if self.mode == "pretrain" or self.rand_augment is None:
            side = self.input_size if self.crop == "center" else None
            cut_views(video, np.stack(frames), partial(self._training_boxes, rngs), clips, side)
            return
        whole = read_clip(video, frames[0], AUGMENT_SIDE)
        for rng, out in zip(rngs, clips.numpy(), strict=True):
            drawn = self.rand_augment.draw(rng)
            box = self._random_box(whole.shape[1], whole.shape[2], rng)
            for frame, target in zip(augment(whole, drawn, box), out, strict=True):
                resize_frame(frame, target)

    def _cut_test_clips(self, video: Video, clips: Tensor) -> None:
        size, crops = self.input_size, self.num_crops
        views = [(clip, crop) for clip in range(self.num_clips) for crop in range(crops)]
        frames = np.stack([self._test_frames(video, clip) for clip, _ in views])

        def boxes(H: int, W: int) -> list[Box]:
            return [sampling.uniform_crop_box(H, W, size, crop, crops) for _, crop in views]

        cut_views(video, frames, boxes, clips, side=size)

    def _random_frames(self, video: Video, rng: np.random.Generator) -> np.ndarray:
        """Draw the frame numbers int64 [T] of a training clip."""
        total, T = video.num_frames, self.num_frames
        if self.sampling == "segments":
            return sampling.segment_indices(total, T, rng.random(T))
        place = partial(sampling.random_start, rng=rng)
        return dense_frames(video, T, self.sampling_rate, place)

    def _test_frames(self, video: Video, clip: int) -> np.ndarray:
        """Return the frame numbers of a test clip; several are spread evenly, one is centred."""
        total, T = video.num_frames, self.num_frames
        if self.sampling == "segments":
            return sampling.segment_indices(total, T, (clip + 0.5) / self.num_clips)
        place = partial(sampling.clip_start, clip=clip, num_clips=self.num_clips)
        return dense_frames(video, T, self.sampling_rate, place)

    def _random_box(self, height: int, width: int, rng: np.random.Generator) -> Box:
        return sampling.random_resized_crop_box(height, width, self.scales, self.ratios, rng)

    def _training_boxes(self, rngs: Generators, height: int, width: int) -> list[Box]:
        if self.crop == "center":
            return [sampling.uniform_crop_box(height, width, self.input_size, 0, 1)] * len(rngs)
        return [self._random_box(height, width, rng) for rng in rngs]
