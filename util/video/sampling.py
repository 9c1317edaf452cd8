"""Where a clip lies in a video: its frames in time, its boxes in space."""

import math
from collections.abc import Sequence

import numpy as np
import torch

NO_BOX = (0, 0, 0, 0)


Box = tuple[int, int, int, int]


Range = tuple[float, float] | Sequence[float]


def random_resized_crop_box(
    height: int, width: int, scale: Range, ratio: Range, rng: np.random.Generator
) -> Box:
    """Draw the box of a random resized crop by the rule of torchvision's RandomResizedCrop.

    `scale` bounds the area as a share of the frame, `ratio` the aspect (width / height), drawn
    log-uniformly. Ten draws that do not fit are followed by the largest centred box whose aspect
    lies within `ratio`.
    """
    for _ in range(10):
        area = height * width * rng.uniform(scale[0], scale[1])
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        h = round(math.sqrt(area / aspect))
        w = round(math.sqrt(area * aspect))
        if 0 < h <= height and 0 < w <= width:
            top = int(rng.integers(0, height - h + 1))
            left = int(rng.integers(0, width - w + 1))
            return top, left, h, w
    h, w = height, width
    if width / height < min(ratio):
        h = round(width / min(ratio))
    elif width / height > max(ratio):
        w = round(height * max(ratio))
    return (height - h) // 2, (width - w) // 2, h, w


def uniform_crop_box(
    height: int, width: int, size: int, position: int, num_positions: int = 3
) -> Box:
    """Place square test crop number `position` of `num_positions` along the longer side.

    Positions run left to right, or top to bottom when the frame is taller than wide; a square
    frame counts as wide. They are spaced evenly from edge to edge with offsets rounded up, and a
    single one sits in the centre. Raise ValueError when the crop does not fit.
    """
    if not 0 <= position < num_positions:
        raise ValueError(f"crop position {position} is not in 0..{num_positions - 1}")
    if size > min(height, width):
        raise ValueError(f"a crop of {size} does not fit into a frame of {height} x {width}")
    top = -(-(height - size) // 2)  # rounded up
    left = -(-(width - size) // 2)
    if num_positions > 1:
        free = max(height, width) - size
        offset = -(-free * position // (num_positions - 1))
        if height > width:
            top = offset
        else:
            left = offset
    return top, left, size, size


def short_side_size(height: int, width: int, size: int) -> tuple[int, int]:
    """Return the (height, width) that makes the short side `size` and keeps the aspect."""
    if min(height, width) == size:
        return height, width
    if height < width:
        return size, math.floor(width / height * size)
    return math.floor(height / width * size), size


def random_erasing_box(
    height: int,
    width: int,
    rng: np.random.Generator,
    probability: float = 0.25,
    area: Range = (0.02, 1 / 3),
    aspect: Range = (0.3, 1 / 0.3),
) -> Box:
    """Draw the box that random erasing (arXiv 1708.04896) removes from a clip.

    `area` bounds its share of the frame and `aspect` its height / width, drawn log-uniformly. The
    box is always smaller than the frame. Return the empty box, all zeros, with probability
    1 - `probability` and in the rare case that 100 draws do not fit.
    """
    if rng.random() > probability:
        return NO_BOX
    for _ in range(100):
        target = height * width * rng.uniform(area[0], area[1])
        h_over_w = math.exp(rng.uniform(math.log(aspect[0]), math.log(aspect[1])))
        h = round(math.sqrt(target * h_over_w))
        w = round(math.sqrt(target / h_over_w))
        if h < height and w < width:
            top = int(rng.integers(0, height - h + 1))
            left = int(rng.integers(0, width - w + 1))
            return top, left, h, w
    return NO_BOX


def clip_length(num_frames: int, sampling_rate: int, fps: float, target_fps: float = 30.0) -> float:
    """Return the source frames spanned by `num_frames`, one per `sampling_rate` at `target_fps`."""
    return sampling_rate * num_frames / target_fps * fps


def random_start(total: int, clip_len: float, rng: np.random.Generator) -> float:
    """Draw a training clip's start, uniform over the places where it fits in `total` frames."""
    return float(rng.uniform(0, max(total - clip_len, 0)))


def clip_start(total: int, clip_len: float, clip: int, num_clips: int) -> float:
    """Return the start of test clip `clip` of `num_clips`, evenly spread; one is the centre one."""
    spare = max(total - clip_len, 0)
    return float(spare // 2) if num_clips == 1 else float(clip * (spare // (num_clips - 1)))


def frame_indices(start: float, clip_len: float, num_frames: int, total: int) -> np.ndarray:
    """Return the int64 [num_frames] frame numbers of a clip; past the end the last frame repeats.

    Rounding decides whole frames here, so it is torch's float32 linspace, as in published results.
    """
    numbers = torch.linspace(start, start + clip_len - 1, num_frames, dtype=torch.float32)
    return numbers.clamp(0, total - 1).long().numpy()


def segment_indices(total: int, num_frames: int, place: float | np.ndarray) -> np.ndarray:
    """Return int64 [num_frames] frame numbers, one from each of num_frames equal segments.

    `place` in [0, 1) is where in its segment a frame is taken, one for all or one for each.
    """
    numbers = (np.arange(num_frames) + place) * (total / num_frames)
    return np.minimum(numbers.astype(np.int64), total - 1)
