"""Windows: clips that slide over whole videos, of which each is decoded once, as a stream.

Shapes: W windows of a video, B of a batch, T frames, H W pixels, C channels.
"""

import os
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import NamedTuple

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from util.errors import UserError
from util.kinetics import Kinetics, VideoIndex, scale_frame, timeline
from util.video.decode import Video, VideoError
from util.video.sampling import clip_length, frame_indices, uniform_crop_box
from util.video.time_limit import call_within


class Windows(NamedTuple):
    """Some windows of a video, or why it cannot be read."""

    row: int  # of the csv
    clips: np.ndarray  # uint8 [B, T, H, W, C]
    times: np.ndarray  # float64 [B, 2], seconds at which a window starts and ends
    share: float  # of the video that has come so far; 1: it is complete
    error: str = ""


def window_frames(
    video: Video, num_frames: int, sampling_rate: int, stride: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return the frame numbers int64 [W, T] of windows and their times in seconds, float64 [W, 2].

    A window starts every `stride` seconds, as long as it fits into the video, and has the frames
    that dense sampling takes for a clip which starts there. A short video has one window.
    """
    total, fps, shown = timeline(video)
    length = clip_length(num_frames, sampling_rate, fps)
    count = int(max(total - length, 0) / (stride * fps) + 1e-6) + 1
    starts = np.arange(count) * (stride * fps)
    frames = [frame_indices(start, length, num_frames, total, shown) for start in starts.tolist()]
    return np.stack(frames), np.stack([starts, np.minimum(starts + length, total)], 1) / fps


def cut_windows(video: Video, frames: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """Yield the clips uint8 [T, size, size, C] of windows, whose frame numbers int64 [W, T] ascend.

    Each frame is decoded once and resized at once, and dropped when no later window needs it.
    """
    pictures, held = video.frames(frames), {}
    for numbers in frames.tolist():
        held = {number: picture for number, picture in held.items() if number >= numbers[0]}
        while numbers[-1] not in held:
            number, picture = next(pictures)
            picture = scale_frame(video, picture, size)
            top, left, h, w = uniform_crop_box(picture.shape[0], picture.shape[1], size, 0, 1)
            held[number] = picture[top : top + h, left : left + w].copy()
        yield np.stack([held[number] for number in numbers])


@dataclass(eq=False)
class WindowReader(IterableDataset):
    """Make batches of the windows of whole videos; each loader worker takes every n-th video.

    Reading a batch, not a video, may take the data set's item_timeout.
    """

    dataset: Kinetics
    rows: Sequence[int]
    stride: float  # seconds from window to window
    batch_size: int

    def __iter__(self) -> Iterator[Windows]:
        worker = get_worker_info()
        for row in self.rows[worker.id :: worker.num_workers] if worker else self.rows:
            limit, nothing = self.dataset.item_timeout, np.empty(0)
            path = local = self.dataset.index.path(row)
            try:
                with self.dataset.cache.hold(path, limit) as local:
                    batches = partial(next, self._read(row, local), None)
                    while (batch := call_within(limit + 1, batches)) is not None:
                        yield batch
            except (VideoError, UserError, TimeoutError) as error:
                slow = f"a batch of its windows took longer than --item_timeout {limit:g} seconds"
                text = " ".join(str(error).replace(local, path).split()) or f"{path}: {slow}"
                yield Windows(row, nothing, nothing, 1.0, text)

    def _read(self, row: int, path: str) -> Iterator[Windows]:
        data = self.dataset
        with Video(path, data.max_pixels) as video:
            frames, times = window_frames(video, data.num_frames, data.sampling_rate, self.stride)
            clips = cut_windows(video, frames, data.input_size)
            for end in range(self.batch_size, len(frames) + self.batch_size, self.batch_size):
                some, share = times[end - self.batch_size : end], min(end / len(frames), 1.0)
                yield Windows(row, np.stack(list(islice(clips, len(some)))), some, share)


def window_names(index: VideoIndex) -> dict[int, str]:
    """Return by row, one for each video, its name, and its path's checksum if others share that."""
    rows = {index.path(row): row for row in range(len(index))}
    stem = {path: os.path.splitext(os.path.basename(path))[0] for path in rows}
    shared = Counter(stem.values())
    return {
        row: stem[path] + f"-{zlib.crc32(os.fsencode(path)):08x}" * (shared[stem[path]] > 1)
        for path, row in rows.items()
    }
