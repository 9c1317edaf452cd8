"""Where a clip lies in a video: its frames in time, its boxes in space.

Frame numbers are int64 [num_frames]. One box serves all frames [H, W] of a clip.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.random import Generator

Box = tuple[int, int, int, int]  # top, left, height, width; pixels
Range = Sequence[float]  # lowest and highest value
NO_BOX = (0, 0, 0, 0)


def clip_length(num_frames: int, sampling_rate: int, fps: float, target_fps: float = 30.0) -> float:
    """Return the length in frames at `fps` of num_frames * sampling_rate frames at `target_fps`."""
    return sampling_rate * num_frames / target_fps * fps


def random_start(total: float, clip_len: float, rng: Generator) -> float:
    """Draw the start of a training clip, uniformly from where it fits in `total` frames."""
    return float(rng.uniform(0, max(total - clip_len, 0)))


def clip_start(total: float, clip_len: float, clip: int, num_clips: int) -> float:
    """Return the start of test clip `clip`; clips are spread evenly, a single one is centred."""
    spare = max(total - clip_len, 0)
    return float(spare // 2) if num_clips == 1 else float(clip * (spare // (num_clips - 1)))


def frame_indices(
    start: float, clip_len: float, num_frames: int, total: float, times: np.ndarray | None = None
) -> np.ndarray:
    """Return the frame numbers of a clip; past the end of the video, the last frame repeats.

    All lengths are in frames or, if `times` says when each frame appears, in the unit of `times`.
    The rounding of torch's float32 linspace decides which frames, as in the published results.
    """
    dtype = torch.float32 if times is None else torch.float64
    end = start + max(clip_len - 1, 0)
    places = torch.linspace(start, end, num_frames, dtype=dtype).clamp(0, total - 1)
    if times is None:
        return places.long().numpy()
    return np.searchsorted(times, places.numpy(), side="right") - 1


def segment_indices(total: int, num_frames: int, place: float | np.ndarray) -> np.ndarray:
    """Return the numbers of `num_frames` frames, one in each of as many equal segments.

    `place` in [0, 1), one for all or one for each, is where in its segment a frame lies.
    """
    numbers = (np.arange(num_frames) + place) * (total / num_frames)
    return np.minimum(numbers.astype(np.int64), total - 1)


def random_resized_crop_box(H: int, W: int, scale: Range, ratio: Range, rng: Generator) -> Box:
    """Draw a box by the rule of torchvision's RandomResizedCrop.

    `scale` bounds the area as a share of the frame, `ratio` the aspect (width / height). If ten
    draws do not fit, return the largest centred box whose aspect lies within `ratio`.
    """
    for _ in range(10):
        w, h = _draw_sides(H * W, scale, ratio, rng)
        if 0 < h <= H and 0 < w <= W:
            return place_box(H, W, h, w, rng)
    h, w = (max(1, side) for side in (min(H, round(W / min(ratio))), min(W, round(H * max(ratio)))))
    return (H - h) // 2, (W - w) // 2, h, w


def random_erasing_box(height: int, width: int, rng: Generator, probability: float = 0.25) -> Box:
    """Draw the box, smaller than the frame, that random erasing (arXiv 1708.04896) removes.

    Return NO_BOX with probability 1 - `probability`, and in the rare case that no draw fits.
    """
    if rng.random() > probability:
        return NO_BOX
    for _ in range(100):
        h, w = _draw_sides(height * width, (0.02, 1 / 3), (0.3, 1 / 0.3), rng)
        if h < height and w < width:
            return place_box(height, width, h, w, rng)
    return NO_BOX


def _draw_sides(area: float, share: Range, ratio: Range, rng: Generator) -> tuple[int, int]:
    """Draw two sides: their product is a share of `area`, their ratio is log-uniform."""
    area = area * rng.uniform(share[0], share[1])
    aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
    return round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))


def place_box(height: int, width: int, h: int, w: int, rng: Generator) -> Box:
    """Draw a box of h x w pixels, uniformly from where it fits in the frame."""
    return int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1)), h, w


def uniform_crop_box(H: int, W: int, size: int, position: int, num_positions: int = 3) -> Box:
    """Return the square test crop number `position` of `num_positions` along the longer side.

    Crops run from left to right or from top to bottom, evenly spaced from edge to edge, with
    offsets rounded up; a single one is centred.
    """
    if not 0 <= position < num_positions:
        raise ValueError(f"crop position {position} is not in 0..{num_positions - 1}")
    if size > min(H, W):
        raise ValueError(f"a crop of {size} does not fit into a frame of {H} x {W}")
    top, left = -(-(H - size) // 2), -(-(W - size) // 2)  # rounded up
    if num_positions > 1:
        offset = -(-(max(H, W) - size) * position // (num_positions - 1))
        top, left = (offset, left) if H > W else (top, offset)
    return top, left, size, size


def short_side_size(height: int, width: int, size: int) -> tuple[int, int]:
    """Return the (height, width) whose short side is `size` and whose aspect is that of a frame."""
    if min(height, width) == size:
        return height, width
    if height < width:
        return size, math.floor(width / height * size)
    return math.floor(height / width * size), size
