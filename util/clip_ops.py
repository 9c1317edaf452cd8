"""Operations of PIL on the frames of a clip, uint8 [T, H, W, C] in and out, fast in loader workers.

Every function does to each frame what Pillow (ImageOps, ImageEnhance, Image.transform) does to an
image of that frame: equal bit for bit, except that a few warped pixels differ by one level. Clips
are not changed in place. Meant for frames with a short side of about 256; a warp needs some 50
times the memory of a frame for 16 frames.

T frames, H W pixels, C = 3 channels.
"""

import math
from collections.abc import Callable, Iterable

import cv2
import numpy as np
import torch
import torch.nn.functional as F

FILL = 128  # level of pixels that a warp brings in from outside the frame

cv2.setNumThreads(0)  # loader workers are the parallelism


def auto_contrast(clip: np.ndarray) -> np.ndarray:
    return _map_by_histogram(clip, _auto_contrast_table)


def equalize(clip: np.ndarray) -> np.ndarray:
    return _map_by_histogram(clip, _equalize_table)


def invert(clip: np.ndarray) -> np.ndarray:
    return 255 - clip


def posterize(clip: np.ndarray, bits: int) -> np.ndarray:
    return clip & np.uint8(256 - 2 ** (8 - bits))


def solarize(clip: np.ndarray, threshold: int) -> np.ndarray:
    levels = np.arange(256, dtype=np.uint8)
    return _look_up(clip, np.where(levels < threshold, levels, 255 - levels))


def solarize_add(clip: np.ndarray, amount: int) -> np.ndarray:
    levels = np.arange(256)
    return _look_up(clip, np.where(levels < 128, levels + amount, levels).astype(np.uint8))


def color(clip: np.ndarray, factor: float) -> np.ndarray:
    return _blend((cv2.cvtColor(_gray(x), cv2.COLOR_GRAY2RGB) for x in clip), clip, factor)


def contrast(clip: np.ndarray, factor: float) -> np.ndarray:
    means = [int(_gray(frame).mean() + 0.5) for frame in clip]
    return np.stack(
        [_look_up(x, _blend_table(m, factor)) for x, m in zip(clip, means, strict=True)]
    )


def brightness(clip: np.ndarray, factor: float) -> np.ndarray:
    return _look_up(clip, _blend_table(0, factor))


def sharpness(clip: np.ndarray, factor: float) -> np.ndarray:
    return _blend(map(_smooth, clip), clip, factor)


def shear_x(clip: np.ndarray, factor: float) -> np.ndarray:
    return warp(clip, (1, factor, 0, 0, 1, 0))


def shear_y(clip: np.ndarray, factor: float) -> np.ndarray:
    return warp(clip, (1, 0, 0, factor, 1, 0))


def translate_x(clip: np.ndarray, share: float) -> np.ndarray:
    return warp(clip, (1, 0, share * clip.shape[2], 0, 1, 0))


def translate_y(clip: np.ndarray, share: float) -> np.ndarray:
    return warp(clip, (1, 0, 0, 0, 1, share * clip.shape[1]))


def rotate(clip: np.ndarray, degrees: float) -> np.ndarray:
    """Rotate counter-clockwise about the centre."""
    _, H, W, _ = clip.shape
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    x = W / 2 - (cos * W / 2 - sin * H / 2)
    y = H / 2 - (sin * W / 2 + cos * H / 2)
    return warp(clip, (cos, -sin, x, sin, cos, y))


def warp(clip: np.ndarray, matrix: tuple[float, float, float, float, float, float]) -> np.ndarray:
    """Resample a clip [T, H, W, C] bicubically through PIL's affine matrix (a, b, c, d, e, f).

    The centre (x, y) of an output pixel takes its value from (ax + by + c, dx + ey + f) of the
    input, or FILL from outside of it. The cubic is PIL's, the one with a = -1.
    """
    # An output pixel is a weighted sum of up to 16 input pixels, the same ones in all frames: an
    # embedding bag over pixels whose embedding is their T * C values. This is exact where
    # OpenCV's warp rounds positions to 1/32 pixel and has another cubic, and it is faster.
    T, H, W, C = clip.shape
    border = (2, 2, 2, 2)
    padded = np.stack([cv2.copyMakeBorder(x, *border, cv2.BORDER_REPLICATE) for x in clip])
    width, num_pixels = W + 4, (H + 4) * (W + 4)
    table = torch.empty(num_pixels + 1, C * T)
    table[:-1].view(-1, T).copy_(torch.from_numpy(cv2.transpose(padded.reshape(T, -1))))
    table[-1] = FILL

    a, b, c, d, e, f = matrix
    x, y = np.arange(W) + 0.5, np.arange(H)[:, None] + 0.5
    u, v = (a * x + b * y + c).ravel(), (d * x + e * y + f).ravel()  # (H W)
    outside = (u < 0) | (u >= W) | (v < 0) | (v >= H)
    left, top = np.floor(u - 0.5), np.floor(v - 0.5)
    u_weights = _cubic_weights((u - 0.5 - left).astype(np.float32))  # (4, H W)
    v_weights = _cubic_weights((v - 0.5 - top).astype(np.float32))
    # Shears and translations move along one axis: three of four rows or columns weigh nothing.
    columns, rows = u_weights.any(1).nonzero()[0], v_weights.any(1).nonzero()[0]
    weights = (v_weights[rows, None] * u_weights[columns]).reshape(-1, H * W)
    first = ((top + 1) * width + left + 1).astype(np.int32)
    index = first[:, None] + (rows[:, None] * width + columns).ravel().astype(np.int32)
    index[outside] = num_pixels

    out = F.embedding_bag(
        torch.from_numpy(index),  # (H W, 1, 4 or 16)
        table,
        mode="sum",
        per_sample_weights=torch.from_numpy(cv2.transpose(weights)),
    )
    # Clip to uint8 and truncate as PIL does: OpenCV rounds, so shift down by a half, less what
    # float32 sums may fall short of a whole level.
    out = cv2.addWeighted(out.numpy(), 1, out.numpy(), 0, -0.4998, dtype=cv2.CV_8U)  # (H W, C T)
    return cv2.transpose(out.reshape(-1, T)).reshape(clip.shape)


def _cubic_weights(d: np.ndarray) -> np.ndarray:
    """Weigh the four neighbours of points [N] that lie `d` beyond the second one: [4, N]."""
    d2 = d * d
    d3 = d2 * d
    return np.stack([2 * d2 - d - d3, 1 - 2 * d2 + d3, d + d2 - d3, d3 - d2])


def _look_up(pixels: np.ndarray, table: np.ndarray) -> np.ndarray:
    # Two dimensions and one channel are what OpenCV looks up fastest.
    return cv2.LUT(pixels.reshape(len(pixels), -1), table).reshape(pixels.shape)


def _map_by_histogram(
    clip: np.ndarray, make_table: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    """Map every channel of every frame by the table made from its histogram."""
    out = np.empty_like(clip)
    for frame, target in zip(clip, out, strict=True):
        counts = [cv2.calcHist([frame], [i], None, [256], [0, 256]).ravel() for i in range(3)]
        tables = np.stack([make_table(x.astype(np.int64)) for x in counts], axis=-1)
        target[...] = cv2.LUT(frame, np.clip(tables, 0, 255).astype(np.uint8)[None])
    return out


def _auto_contrast_table(counts: np.ndarray) -> np.ndarray:
    low, high = counts.nonzero()[0][[0, -1]]
    if low == high:
        return np.arange(256)
    scale = 255.0 / (high - low)
    return (np.arange(256) * scale + -low * scale).astype(np.int64)


def _equalize_table(counts: np.ndarray) -> np.ndarray:
    step = (counts.sum() - counts[counts.nonzero()[0][-1]]) // 255
    if step == 0:
        return np.arange(256)
    return (step // 2 + counts.cumsum() - counts) // step


def _gray(frame: np.ndarray) -> np.ndarray:
    """Return PIL's luma of a frame: integer weights over 2^16, rounded (exact in float32)."""
    weights = np.array([[19595, 38470, 7471, 32768]], dtype=np.float32) / 65536
    return cv2.transform(frame.astype(np.float32), weights).astype(np.uint8)


def _smooth(frame: np.ndarray) -> np.ndarray:
    """Apply PIL's SMOOTH filter, which leaves the border as it is."""
    kernel = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], dtype=np.float32) / 13
    out = cv2.filter2D(frame, -1, kernel)
    out[[0, -1]] = frame[[0, -1]]
    out[:, [0, -1]] = frame[:, [0, -1]]
    return out


def _blend(start: Iterable[np.ndarray], end: np.ndarray, factor: float) -> np.ndarray:
    """Go from `start`, given frame by frame, `factor` of the way to `end`, or beyond."""
    out = np.empty_like(end)
    for low, high, target in zip(start, end, out, strict=True):
        low = low.astype(np.float32)
        mixed = high.astype(np.float32)  # in place from here on, and in PIL's order of rounding
        mixed -= low
        mixed *= np.float32(factor)
        mixed += low
        target[...] = np.clip(mixed, 0, 255, out=mixed)
    return out


def _blend_table(start: int, factor: float) -> np.ndarray:
    levels = np.arange(256, dtype=np.uint8)
    return _blend([np.full(256, start)], levels[None], factor)[0]
