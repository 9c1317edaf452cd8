"""Videos listed in a csv as a data set: index, samples, sampler and loader.

Shapes: B videos, R clips of a video, T frames, H W pixels, C channels.
"""

import os
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from util.dist import rank, world_size
from util.errors import UserError
from util.file_io import is_remote, local_path, open_file
from util.rand_augment import RandAugment
from util.transforms import (
    NO_BOX,
    Box,
    random_erasing_box,
    random_resized_crop_box,
    resize,
    short_side_size,
    uniform_crop_box,
)
from util.video import (
    Video,
    VideoError,
    clip_length,
    clip_start,
    frame_indices,
    random_start,
)

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
        with open_file(csv_path) as file:
            try:
                for number, line in enumerate(file, start=1):
                    line = line.strip()
                    if not line or line.startswith("#"):
                        continue
                    path, label = _parse_row(line)
                    problem = _row_problem(path, label, num_classes)
                    if problem:
                        raise UserError(f"{csv_path}, line {number}: {problem}: {line[:120]!r}")
                    blob += os.fsencode(path)
                    ends.append(len(blob))
                    labels.append(label)
            except UnicodeDecodeError as error:
                raise UserError(f"{csv_path} is not a text file: {error}") from error
        if not ends:
            raise UserError(f"{csv_path} lists no videos; it needs one `path label` per line")
        self._paths = np.frombuffer(bytes(blob), dtype=np.uint8)
        self._ends = np.array(ends, dtype=np.int64)
        self.labels = np.array(labels, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends)

    def path(self, i: int) -> str:
        """Return the path of row i, made absolute by the prefix."""
        start = self._ends[i - 1] if i else 0
        path = os.fsdecode(self._paths[start : self._ends[i]].tobytes())
        return path if is_remote(path) else os.path.join(self.folder, path)


def _parse_row(line: str) -> tuple[str, int]:
    """Split a csv line at its last separator into path and label (NO_LABEL without one)."""
    cut = max(line.rfind(separator) for separator in " ,\t")
    try:
        label = int(line[cut + 1 :])
    except ValueError:
        return line.strip(" ,\t"), NO_LABEL
    return line[: max(cut, 0)].strip(" ,\t"), label


def _row_problem(path: str, label: int, num_classes: int | None) -> str:
    """Say what is wrong with a row, or nothing."""
    if not path:
        return "no path"
    if label < NO_LABEL:
        return "negative label"
    if num_classes is None:
        return ""
    if label == NO_LABEL:
        return "no label (an integer after the path)"
    return f"label {label} is not below --num_classes {num_classes}" if label >= num_classes else ""


class Sample(NamedTuple):
    """What a loader worker makes of one video; batches have the same fields with B in front."""

    clips: Tensor  # uint8 [R, T, H, W, C]
    flip: Tensor  # bool [R], mirror on the device
    erase: Tensor  # int64 [R, 4], box to erase on the device, empty for none
    label: int
    row: int  # of the csv; -1 when no readable video was found
    error: str  # "PATH: reason" of unreadable videos met on the way, a line each


class View(NamedTuple):
    """A clip to cut from a video: frame numbers [T] and the box of each frame."""

    frames: np.ndarray
    box: Box


def cut_views(video: Video, views: list[View]) -> list[Tensor]:
    """Cut clips from a video in one decode: a uint8 [T, h, w, C] tensor per view."""
    clips = [torch.empty((len(v.frames), *v.box[2:], 3), dtype=torch.uint8) for v in views]
    arrays = [clip.numpy() for clip in clips]
    places: dict[int, list[tuple[int, int]]] = {}
    for v, view in enumerate(views):
        for t, number in enumerate(view.frames.tolist()):
            places.setdefault(number, []).append((v, t))
    for number, frame in video.frames(sorted(places)):
        for v, t in places[number]:
            top, left, h, w = views[v].box
            arrays[v][t] = frame[top : top + h, left : left + w]
    return clips


class Kinetics(Dataset):
    """Clips of the videos of an index. Items are asked for by (epoch, row).

    Every random choice of a sample comes from a generator seeded by (seed, epoch, row, repeat), so
    that clips depend neither on the number of workers nor on the step a run was resumed at.

    mode "pretrain": `repeat_aug` clips, each with its own start, crop and flip (section 4.2,
    repeated sampling). "finetune": `repeat_aug` augmentations of one random clip. "test":
    `num_clips` x `num_crops` views without randomness, time outermost; 1 x 1 (the centre) is what
    validation uses. In training an unreadable video is replaced by another one, drawn from the
    same generator; in testing its row comes back with zeros and an error.

    Args:
        input_size: height and width of the clips, pixels.
        num_frames, sampling_rate: frames of a clip, and their distance at 30 fps.
        scales, ratios: range of the random crop's area (share of the frame) and aspect.
        hflip: mirror half of the training clips.
        rand_augment: applied to whole fine-tuning clips, before the crop.
        reprob: probability of random erasing in fine-tuning.
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
    ):
        self.index = index
        modes = {"pretrain": self._pretrain, "finetune": self._finetune, "test": self._test}
        self.load = modes[mode]
        self.training = mode != "test"
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
        self.views = repeat_aug if self.training else num_clips * num_crops

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        epoch, row = key
        rngs = [np.random.default_rng((self.seed, epoch, row, r)) for r in range(self.repeat_aug)]
        errors = []
        for _ in range(MAX_REPLACEMENTS if self.training else 1):
            try:
                with Video(local_path(self.index.path(row))) as video:
                    clips, flip, erase = self.load(video, rngs)
            except (VideoError, UserError) as error:
                errors.append(" ".join(str(error).split()))
                row = int(rngs[0].integers(len(self.index))) if self.training else row
                continue
            label = int(self.index.labels[row])
            return Sample(clips, flip, erase, label, row, "\n".join(errors))
        shape = (self.views, self.num_frames, self.input_size, self.input_size, 3)
        return Sample(
            torch.zeros(shape, dtype=torch.uint8),
            torch.zeros(self.views, dtype=torch.bool),
            torch.zeros((self.views, 4), dtype=torch.int64),
            int(self.index.labels[row]),
            -1 if self.training else row,
            "\n".join(errors),
        )

    def _clip_length(self, video: Video) -> float:
        return clip_length(self.num_frames, self.sampling_rate, video.fps)

    def _random_frames(self, video: Video, rng: np.random.Generator) -> np.ndarray:
        length = self._clip_length(video)
        start = random_start(video.num_frames, length, rng)
        return frame_indices(start, length, self.num_frames, video.num_frames)

    def _random_box(self, height: int, width: int, rng: np.random.Generator) -> Box:
        return random_resized_crop_box(height, width, self.scales, self.ratios, rng)

    def _flip(self, rng: np.random.Generator) -> bool:
        return bool(rng.random() < 0.5) and self.hflip

    def _pretrain(
        self, video: Video, rngs: list[np.random.Generator]
    ) -> tuple[Tensor, Tensor, Tensor]:
        height, width = video.height, video.width
        views = [
            View(self._random_frames(video, rng), self._random_box(height, width, rng))
            for rng in rngs
        ]
        flip = torch.tensor([self._flip(g) for g in rngs])
        size = (self.input_size, self.input_size)
        clips = torch.stack([resize(clip, size) for clip in cut_views(video, views)])
        return clips, flip, torch.tensor([NO_BOX] * len(rngs))

    def _finetune(
        self, video: Video, rngs: list[np.random.Generator]
    ) -> tuple[Tensor, Tensor, Tensor]:
        frames = self._random_frames(video, rngs[0])
        (whole,) = cut_views(video, [View(frames, (0, 0, video.height, video.width))])
        if self.rand_augment is not None and min(whole.shape[1:3]) > AUGMENT_SIDE:
            whole = resize(whole, short_side_size(*whole.shape[1:3], AUGMENT_SIDE))
        height, width = whole.shape[1:3]
        clips, flip, erase = [], [], []
        for rng in rngs:
            clip = whole if self.rand_augment is None else self.rand_augment(whole, rng)
            top, left, h, w = self._random_box(height, width, rng)
            crop = clip[:, top : top + h, left : left + w]
            clips.append(resize(crop, (self.input_size, self.input_size)))
            flip.append(self._flip(rng))
            erase.append(random_erasing_box(self.input_size, self.input_size, rng, self.reprob))
        return torch.stack(clips), torch.tensor(flip), torch.tensor(erase)

    def _test(self, video: Video, rngs: list[np.random.Generator]) -> tuple[Tensor, Tensor, Tensor]:
        length, total = self._clip_length(video), video.num_frames
        starts = [clip_start(total, length, k, self.num_clips) for k in range(self.num_clips)]
        frames = np.stack([frame_indices(s, length, self.num_frames, total) for s in starts])
        numbers, place = np.unique(frames, return_inverse=True)
        # every frame is decoded and resized once; all views are crops of these
        (whole,) = cut_views(video, [View(numbers, (0, 0, video.height, video.width))])
        height, width = short_side_size(video.height, video.width, self.input_size)
        whole = resize(whole, (height, width))
        place = torch.from_numpy(place.reshape(frames.shape))
        clips = []
        for k in range(self.num_clips):
            clip = whole[place[k]]
            for s in range(self.num_crops):
                top, left, h, w = uniform_crop_box(
                    height, width, self.input_size, s, self.num_crops
                )
                clips.append(clip[:, top : top + h, left : left + w])
        views = len(clips)
        return (
            torch.stack(clips),
            torch.zeros(views, dtype=torch.bool),
            torch.zeros((views, 4), dtype=torch.int64),
        )


class EpochSampler(Sampler):
    """Deal the rows of an epoch to the ranks as (epoch, row), from (seed, epoch) alone.

    In training the order is shuffled and cut to whole batches of all ranks, and step s of the
    joint batch holds the same rows however many ranks share it; in testing every row comes once,
    to one rank.
    """

    def __init__(self, num_rows: int, batch_size: int, training: bool, seed: int):
        self.num_rows = num_rows
        self.training = training
        self.seed = seed
        self.epoch = 0
        joint = batch_size * world_size()
        self.used_rows = num_rows // joint * joint if training else num_rows

    def __len__(self) -> int:
        return len(range(rank(), self.used_rows, world_size()))

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = np.arange(self.num_rows)
        if self.training:
            order = np.random.default_rng((self.seed, self.epoch)).permutation(self.num_rows)
        for row in order[: self.used_rows][rank() :: world_size()]:
            yield self.epoch, int(row)


class VideoLoader:
    """Batches of a data set for this rank, with a record of unreadable videos.

    Args:
        batch_size: videos per batch of this rank.
        num_workers: processes; None takes what the CPUs allow.
        max_bad_share: training stops when more than this share of the csv cannot be read.

    Raises:
        UserError: fewer videos than one batch of all ranks; too many unreadable ones (iterating).
    """

    def __init__(
        self,
        dataset: Kinetics,
        batch_size: int,
        num_workers: int | None,
        max_bad_share: float,
        device: torch.device,
    ):
        self.dataset = dataset
        self.max_bad_share = max_bad_share
        self.bad: set[str] = set()
        self.sampler = EpochSampler(len(dataset), batch_size, dataset.training, dataset.seed)
        if dataset.training and self.sampler.used_rows == 0:
            raise UserError(
                f"{dataset.index.csv_path} lists {len(dataset)} videos, fewer than one batch of "
                f"--batch_size {batch_size} on {world_size()} ranks"
            )
        workers = default_num_workers() if num_workers is None else num_workers
        self.loader = DataLoader(
            dataset,
            batch_size=batch_size,
            sampler=self.sampler,
            num_workers=workers,
            pin_memory=device.type == "cuda",
            persistent_workers=workers > 0,
            worker_init_fn=_start_worker,
        )

    def __len__(self) -> int:
        return len(self.loader)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order and clips the next iteration gives."""
        self.sampler.epoch = epoch

    def __iter__(self) -> Iterator[Sample]:
        for batch in self.loader:
            self._record(batch)
            yield batch

    def _record(self, batch: Sample) -> None:
        """Report unreadable videos once each, and stop when they are too many."""
        for line in "\n".join(batch.error).split("\n"):
            if line and line not in self.bad:
                self.bad.add(line)
                print(f"unreadable video ({len(self.bad)} so far): {line}", flush=True)
        if not self.dataset.training:
            return
        csv_path = self.dataset.index.csv_path
        if (torch.as_tensor(batch.row) < 0).any():
            raise UserError(
                f"{MAX_REPLACEMENTS} videos in a row of {csv_path} could not be read; the last "
                f"one: {batch.error[-1].splitlines()[-1]}",
                status=1,
            )
        if len(self.bad) > self.max_bad_share * len(self.dataset):
            raise UserError(
                f"{len(self.bad)} of {len(self.dataset)} videos of {csv_path} cannot be read, more "
                f"than --max_bad_share {self.max_bad_share}; they are listed above",
                status=1,
            )


def default_num_workers() -> int:
    """Return the CPUs that this process may use, shared among the ranks of this machine."""
    if hasattr(os, "sched_getaffinity"):
        cpus = len(os.sched_getaffinity(0))
    else:
        cpus = os.cpu_count() or 1
    return max(1, min(16, cpus // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def _start_worker(_: int) -> None:
    torch.set_num_threads(1)  # the workers are the parallelism
