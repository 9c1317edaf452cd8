"""PIL's operations on the frames of a clip, uint8 [T, H, W, C] in and out, fast in loader workers.

The results are equal bit for bit to those of Pillow (ImageOps, ImageEnhance, Image.transform),
except that a few in 10,000 warped or blended pixels differ by one level. A warp of 16 frames needs
64 times the memory of one frame, and keeps it for the next warp.

Operations on single pixels may run after a crop. The others take the `box` of the crop that
follows: they read whole frames, but compute only what lies in the box.
"""

import math
from collections.abc import Callable, Iterable
from itertools import product
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from util.video.sampling import Box

FILL = 128  # level of the pixels that a warp moves in from outside the frame
# PIL truncates to uint8 and OpenCV rounds. Adding this makes OpenCV truncate; it is not quite -0.5,
# because float32 sums may fall short of a whole level.
TRUNCATE = -0.49994
BLOCK = 16384  # pixels that a warp makes at a time, so that its memory stays in the caches

Matrix = tuple[float, float, float, float, float, float]
_levels = np.arange(256, dtype=np.uint8)
_free_tables: list[Tensor] = []  # see _make_table
cv2.setNumThreads(0)  # see transforms.py


def crop(clip: np.ndarray, box: Box | None) -> np.ndarray:
    """View the part of a clip inside the box, or all of it."""
    top, left, h, w = box or (0, 0, *clip.shape[1:3])
    return clip[:, top : top + h, left : left + w]


def auto_contrast(clip: np.ndarray, box: Box | None = None) -> np.ndarray:
    return _map_channels(clip, _auto_contrast_tables, box)


def equalize(clip: np.ndarray, box: Box | None = None) -> np.ndarray:
    return _map_channels(clip, _equalize_tables, box)


def invert(clip: np.ndarray) -> np.ndarray:
    return 255 - clip


def posterize(clip: np.ndarray, bits: int) -> np.ndarray:
    """Keep the highest `bits` bits of every level."""
    return clip & np.uint8(256 - 2 ** (8 - bits))


def solarize(clip: np.ndarray, threshold: int) -> np.ndarray:
    """Invert the levels from `threshold` on."""
    return _look_up(clip, np.where(_levels < threshold, _levels, 255 - _levels))


def solarize_add(clip: np.ndarray, amount: int) -> np.ndarray:
    """Add `amount`, at most 128, to the levels below 128."""
    return _look_up(clip, np.where(_levels < 128, _levels + np.uint8(amount), _levels))


# In the next five, factor 1 changes nothing, and factor 0 gives: grey frames, the mean grey of each
# frame, black, the mean grey of the clip, a blur. Three can write to `out`, which may be the clip.
def color(clip: np.ndarray, factor: float, out: np.ndarray | None = None) -> np.ndarray:
    return _blend((cv2.cvtColor(_gray(x), cv2.COLOR_GRAY2RGB) for x in clip), clip, factor, out)


def contrast(clip: np.ndarray, factor: float, box: Box | None = None) -> np.ndarray:
    means = [int(cv2.mean(_gray(frame))[0] + 0.5) for frame in clip]
    frames = zip(crop(clip, box), means, strict=True)
    return np.stack([_look_up(x, _blend_table(m, factor)) for x, m in frames])


def brightness(clip: np.ndarray, factor: float, out: np.ndarray | None = None) -> np.ndarray:
    return _scale(clip, factor, 0, out)


def clip_contrast(clip: np.ndarray, factor: float, out: np.ndarray | None = None) -> np.ndarray:
    """Change the contrast about the mean grey of the whole clip, so that its frames stay alike."""
    red, green, blue, _ = cv2.mean(clip.reshape(-1, *clip.shape[2:]))
    gray = red * 0.299 + green * 0.587 + blue * 0.114
    return _scale(clip, factor, gray * (1 - factor), out)


def sharpness(clip: np.ndarray, factor: float, box: Box | None = None) -> np.ndarray:
    _, H, W, _ = clip.shape
    top, left, h, w = box or (0, 0, H, W)
    y, x = max(top - 1, 0), max(left - 1, 0)  # the filter needs a pixel around the box
    clip = clip[:, y : top + h + 1, x : left + w + 1]
    return crop(_blend(map(_smooth, clip), clip, factor), (top - y, left - x, h, w))


def color_jitter(clip: np.ndarray, strength: float, rng: np.random.Generator) -> None:
    """Change brightness, contrast and saturation of a dense clip in place, in random order.

    The factors are uniform in [1 - strength, 1 + strength], and the same for all frames.
    """
    factors = rng.uniform(1 - strength, 1 + strength, 3)
    for i in rng.permutation(3):  # in place: new memory would cost page faults
        (brightness, clip_contrast, color)[i](clip, factors[i], out=clip)


def shear_x(clip: np.ndarray, factor: float, box: Box | None = None) -> np.ndarray:
    top, left, h, w = box or (0, 0, *clip.shape[1:3])
    offsets = factor * (np.arange(top, top + h) + 0.5)
    return _move_rows([x[top : top + h] for x in clip], offsets, left, w)


def shear_y(clip: np.ndarray, factor: float, box: Box | None = None) -> np.ndarray:
    top, left, h, w = box or (0, 0, *clip.shape[1:3])
    offsets = factor * (np.arange(left, left + w) + 0.5)
    columns = [cv2.transpose(x[:, left : left + w]) for x in clip]
    return np.stack([cv2.transpose(x) for x in _move_rows(columns, offsets, top, h)])


def translate_x(clip: np.ndarray, share: float, box: Box | None = None) -> np.ndarray:
    return _translate(clip, 0, share * clip.shape[2], box)


def translate_y(clip: np.ndarray, share: float, box: Box | None = None) -> np.ndarray:
    return _translate(clip, share * clip.shape[1], 0, box)


def rotate(clip: np.ndarray, degrees: float, box: Box | None = None) -> np.ndarray:
    """Rotate counterclockwise about the centre."""
    _, H, W, _ = clip.shape
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    x, y = W / 2 - (cos * W / 2 - sin * H / 2), H / 2 - (sin * W / 2 + cos * H / 2)
    return warp(clip, (cos, -sin, x, sin, cos, y), box)


def warp(clip: np.ndarray, matrix: Matrix, box: Box | None = None) -> np.ndarray:
    """Resample a clip [T, H, W, C] bicubically through PIL's affine matrix (a, b, c, d, e, f).

    The output pixel with centre (x, y) takes its value from (ax + by + c, dx + ey + f) of the
    input, or FILL if that lies outside. The cubic is PIL's, with a = -1.
    """
    # An output pixel is a weighted sum of up to 16 input pixels, the same ones in all frames. An
    # embedding bag computes this, where the embedding of a pixel is its T * C values: exact and
    # fast. OpenCV's warp rounds positions to 1/32 pixel and uses another cubic.
    T, H, W, C = clip.shape
    top, left, h, w = box or (0, 0, H, W)
    source = _source_rectangle(matrix, (top, left, h, w), H, W)
    if source is None:
        return np.full((T, h, w, C), FILL, np.uint8)
    out, table = np.empty((T, h, w, C), np.uint8), _make_table(clip, source)
    rows = max(1, BLOCK // w)
    for y in range(0, h, rows):
        part = top + y, left, min(rows, h - y), w
        index, weights = _neighbours(matrix, part, source, H, W)
        pixels = F.embedding_bag(index, table, mode="sum", per_sample_weights=weights).numpy()
        levels = cv2.addWeighted(pixels, 1, pixels, 0, TRUNCATE, dtype=cv2.CV_8U)  # (h w, C T)
        out[:, y : y + rows] = cv2.transpose(levels.reshape(-1, T)).reshape(T, -1, w, C)
    _free_tables.append(table)
    return out


def _translate(clip: np.ndarray, dy: float, dx: float, box: Box | None) -> np.ndarray:
    """Shift a clip by (dy, dx) pixels, of which one is 0, as `warp` would.

    All pixels lie at the same place between their neighbours: four weights in a convolution do it.
    """
    T, H, W, C = clip.shape
    top, left, h, w = box or (0, 0, H, W)
    out = np.full((T, h, w, C), FILL, np.uint8)
    source, place, border, weights = [], [], [], []
    for first, count, size, offset in ((top, h, H, dy), (left, w, W, dx)):
        whole, start, end = (int(x) for x in _moved(np.float64(offset), first, count, size))
        if start >= end:
            return out
        low, high = start + whole - 1, end + whole + 2  # with neighbours at -1 to +2
        source.append(slice(max(low, 0), high))
        place.append(slice(start - first, end - first))
        border += [max(-low, 0), max(high - size, 0)]
        weights.append(_cubic_weights(np.array([offset - whole], np.float32)))
    kernel, (up, down, before, after) = np.outer(*weights), border
    for frame, target in zip(clip[(slice(None), *source)], out, strict=True):
        bordered = cv2.copyMakeBorder(frame, up, down, before, after, cv2.BORDER_REPLICATE)
        moved = cv2.filter2D(bordered, -1, kernel, anchor=(1, 1), delta=TRUNCATE)
        target[tuple(place)] = moved[1:-2, 1:-2]
    return out


def _move_rows(frames: list[np.ndarray], offsets: np.ndarray, first: int, w: int) -> np.ndarray:
    """Move row y of all frames [h, W, C] by offsets[y] pixels, as `warp` would: [T, h, w, C].

    The result has the columns from `first` on, w of them.
    """
    T, (h, W, C) = len(frames), frames[0].shape
    whole, starts, ends = _moved(offsets, first, w, W)
    kernels = np.ascontiguousarray(_cubic_weights((offsets - whole).astype(np.float32)).T)
    rows = np.stack([cv2.copyMakeBorder(x, 0, 0, 2, 3, cv2.BORDER_REPLICATE) for x in frames])
    out = np.full((T, h, w, C), FILL, np.uint8)
    for y in (starts < ends).nonzero()[0].tolist():
        start, end, shift = int(starts[y]), int(ends[y]), int(whole[y])
        # The same row of all frames makes one picture. Neighbours are at -1 to +2.
        row = rows[:, y, start + shift + 1 : end + shift + 4]
        moved = cv2.filter2D(row, -1, kernels[y : y + 1], anchor=(1, 0), delta=TRUNCATE)
        out[:, y, start - first : end - first] = moved[:, 1:-2]
    return out


def _moved(offset: Any, first: int, count: int, size: int) -> tuple[Any, Any, Any]:
    """Return an offset in whole pixels, rounded down, and where the pixels that move begin and end.

    The pixels from `first` on, `count` of them, take their values from `offset` pixels ahead in a
    frame of `size` pixels, if these lie inside of it.
    """
    start = np.maximum(first, np.ceil(-0.5 - offset))
    end = np.minimum(first + count, np.ceil(size - 0.5 - offset))
    return np.floor(offset).astype(int), start.astype(int), end.astype(int)


def _source_rectangle(matrix: Matrix, box: Box, H: int, W: int) -> Box | None:
    """Return the rectangle, if any, that a warp to a box reads of frames with a border of 2."""
    a, b, c, d, e, f = matrix
    top, left, h, w = box
    x, y = np.array([left, left + w]), np.array([[top], [top + h]])  # the corners are extremes
    u, v = np.clip(a * x + b * y + c, 0, W), np.clip(d * x + e * y + f, 0, H)
    if u.min() == u.max() or v.min() == v.max():
        return None
    # A pixel's neighbours lie at -1 to +2; the border makes that +1 to +4.
    first_u, first_v = (math.floor(z.min() - 0.5) + 1 for z in (u, v))
    end_u, end_v = (min(math.floor(z.max() - 0.5) + 5, n + 4) for z, n in ((u, W), (v, H)))
    return first_v, first_u, end_v - first_v, end_u - first_u


def _make_table(clip: np.ndarray, source: Box) -> Tensor:
    """Return a rectangle of the bordered clip as rows of C * T floats, and a last row of FILL."""
    T, H, W, C = clip.shape
    top, left, h, w = source[0] - 2, source[1] - 2, *source[2:]  # without the border
    border = max(-top, 0), max(top + h - H, 0), max(-left, 0), max(left + w - W, 0)
    inside = slice(max(top, 0), top + h), slice(max(left, 0), left + w)
    bordered = [cv2.copyMakeBorder(x[inside], *border, cv2.BORDER_REPLICATE) for x in clip]
    # The page faults of fresh memory would cost more than what is done with it.
    table = (_free_tables.pop() if _free_tables else torch.empty(0)).resize_(h * w + 1, C * T)
    rows = max(1, BLOCK // w)
    for y in range(0, h, rows):
        pixels = np.stack([x[y : y + rows] for x in bordered])
        values = torch.from_numpy(cv2.transpose(pixels.reshape(T, -1)))
        table[y * w : min(y + rows, h) * w].view(-1, T).copy_(values)
    table[-1] = FILL
    return table


def _neighbours(matrix: Matrix, box: Box, source: Box, H: int, W: int) -> tuple[Tensor, Tensor]:
    """Return the rows of the table that each pixel of a box sums, and weights: [h w, 16]."""
    a, b, c, d, e, f = matrix
    top, left, h, w = box
    x, y = np.arange(left, left + w) + 0.5, np.arange(top, top + h)[:, None] + 0.5
    u, v = a * x + b * y + (c - 0.5), d * x + e * y + (f - 0.5)  # positions minus half a pixel
    outside = ((u < -0.5) | (u >= W - 0.5)) | ((v < -0.5) | (v >= H - 0.5))  # [h, w]
    first_u, first_v = np.floor(u), np.floor(v)
    u_weights = _cubic_weights((u - first_u).astype(np.float32))
    v_weights = _cubic_weights((v - first_v).astype(np.float32))
    weights = np.empty((16, h, w), np.float32)
    offsets = np.empty((16, 1), np.int32)
    for k, (i, j) in enumerate(product(range(4), repeat=2)):
        np.multiply(v_weights[i], u_weights[j], out=weights[k])
        offsets[k] = i * source[3] + j
    row = first_v.astype(np.int32) + (1 - source[0])
    column = first_u.astype(np.int32) + (1 - source[1])
    index = cv2.transpose((row * source[3] + column).reshape(1, -1) + offsets)
    index[outside.ravel()] = source[2] * source[3]
    weights = cv2.transpose(weights.reshape(16, -1))
    return torch.from_numpy(index), torch.from_numpy(weights)


def _cubic_weights(d: np.ndarray) -> np.ndarray:
    """Return the weights [4, *d.shape] of the four neighbours of points `d` past the second one."""
    d2 = d * d
    d3 = d2 * d
    return np.stack([2 * d2 - d - d3, 1 - 2 * d2 + d3, d + d2 - d3, d3 - d2])


def _look_up(pixels: np.ndarray, table: np.ndarray) -> np.ndarray:
    # OpenCV looks up fastest in two dimensions and one channel.
    return cv2.LUT(pixels.reshape(len(pixels), -1), table).reshape(pixels.shape)


def _scale(clip: np.ndarray, factor: float, offset: float, out: np.ndarray | None) -> np.ndarray:
    """Return clip * factor + offset, which takes half the time of looking it up."""
    out = np.empty(clip.shape, np.uint8) if out is None else out
    flat, target = (x.reshape(len(x), -1) for x in (clip, out))
    cv2.addWeighted(flat, factor, flat, 0, offset + TRUNCATE, dst=target)
    return out


def _map_channels(clip: np.ndarray, make_tables: Callable, box: Box | None) -> np.ndarray:
    """Map each channel by its row of the tables [3, 256] that make_tables(whole frame) returns."""
    out = crop(clip, box).copy()
    for frame, part in zip(clip, out, strict=True):
        tables = np.clip(make_tables(frame), 0, 255).astype(np.uint8)
        part[...] = cv2.LUT(part, np.ascontiguousarray(tables.T)[None])
    return out


def _auto_contrast_tables(frame: np.ndarray) -> np.ndarray:
    H, W, C = frame.shape
    rows = frame.reshape(H, W * C)  # numpy is fastest along rows of this length
    lows, highs = rows.min(0).reshape(W, C).min(0), rows.max(0).reshape(W, C).max(0)
    levels, tables = np.arange(256), []
    for low, high in zip(lows.tolist(), highs.tolist(), strict=True):
        scale = 255.0 / max(high - low, 1)
        stretched = (levels * scale + -low * scale).astype(np.int64)
        tables.append(stretched if low < high else levels)
    return np.stack(tables)


def _equalize_tables(frame: np.ndarray) -> np.ndarray:
    tables = []
    for channel in range(frame.shape[2]):
        counts = cv2.calcHist([frame], [channel], None, [256], [0, 256]).ravel().astype(np.int64)
        step = (counts.sum() - counts[counts.nonzero()[0][-1]]) // 255
        tables.append((step // 2 + counts.cumsum() - counts) // step if step else np.arange(256))
    return np.stack(tables)


def _gray(frame: np.ndarray) -> np.ndarray:
    """Return PIL's luma of a frame: integer weights over 2^16, rounded; float32 is exact here."""
    weights = np.array([[19595, 38470, 7471, 32768]], dtype=np.float32) / 65536
    return cv2.transform(frame.astype(np.float32), weights).astype(np.uint8)


def _smooth(frame: np.ndarray) -> np.ndarray:
    """Apply PIL's SMOOTH filter, which does not change the pixels at the border."""
    kernel = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], dtype=np.float32) / 13
    out = cv2.filter2D(frame, -1, kernel)
    out[[0, -1]] = frame[[0, -1]]
    out[:, [0, -1]] = frame[:, [0, -1]]
    return out


def _blend(
    start: Iterable[np.ndarray], end: np.ndarray, factor: float, out: np.ndarray | None = None
) -> np.ndarray:
    """Go `factor` of the way from the frames `start` to `end`; a factor above 1 goes beyond."""
    out = np.empty(end.shape, np.uint8) if out is None else out
    for low, high, target in zip(start, end, out, strict=True):
        cv2.addWeighted(high, factor, low, 1 - factor, TRUNCATE, dst=target)
    return out


def _blend_table(start: float, factor: float) -> np.ndarray:
    mixed = np.float32(start) + (_levels - np.float32(start)) * np.float32(factor)
    return np.clip(mixed, 0, 255).astype(np.uint8)
