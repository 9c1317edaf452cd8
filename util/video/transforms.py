"""The pixels of clips: resizing in loader workers; flips, normalisation and erasing on the device.

N clips, T frames, H W pixels, C channels.
"""

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

MEAN = 0.45  # of every RGB channel in [0, 1], as is customary for Kinetics
STD = 0.225

# Loader workers are the parallelism, and OpenCV's pool of threads does not survive their fork.
cv2.setNumThreads(0)


def resize_frame(frame: np.ndarray, out: np.ndarray) -> None:
    """Resize a uint8 frame [H, W, C], or a view of a crop, bilinearly into `out` [h, w, C].

    Up to a reduction by 2 there is no antialiasing, and the result is within one level of float
    interpolation. Larger reductions would skip pixels and flicker, so there the filter widens.
    """
    (H, W), (h, w) = frame.shape[:2], out.shape[:2]
    if (h, w) == (H, W):
        out[...] = frame
    elif max(H / h, W / w) <= 2:
        # Unlike F.interpolate, OpenCV rounds once, not after each axis, and reads crops in place.
        cv2.resize(frame, (w, h), dst=out, interpolation=cv2.INTER_LINEAR)
    else:
        channels_last = torch.from_numpy(frame)[None].permute(0, 3, 1, 2)
        small = F.interpolate(channels_last, (h, w), mode="bilinear", antialias=True)
        out[...] = small[0].permute(1, 2, 0).numpy()


def normalize(pixels: Tensor) -> Tensor:
    """Normalise uint8 pixels of any shape to float32; float pixels are returned as they are."""
    if pixels.is_floating_point():
        return pixels
    return pixels.to(torch.float32).div_(255).sub_(MEAN).div_(STD)


def channels_first(clips: Tensor) -> Tensor:
    """View clips [N, T, H, W, C], as loaders make them, as [N, C, T, H, W], as models take them."""
    return clips.permute(0, 4, 1, 2, 3)


def flip_on_device(clips: Tensor, flip: Tensor) -> Tensor:
    """Mirror the clips [N, T, H, W, C] that are marked in `flip`, bool [N], left to right."""
    return torch.where(flip[:, None, None, None, None], clips.flip(3), clips)


def augment_on_device(clips: Tensor, flip: Tensor | None, erase: Tensor | None) -> Tensor:
    """Flip, normalise and erase uint8 clips [N, T, H, W, C] into float32 [N, C, T, H, W].

    `flip` is bool [N]: which clips to mirror left to right. `erase` is int64 [N, 4]: the box of
    each flipped clip whose pixels become standard normal noise, different for every frame. The host
    reads none of these values, so that it does not wait for the device.
    """
    clips = clips if flip is None else flip_on_device(clips, flip)
    x = normalize(channels_first(clips).contiguous())
    if erase is not None:
        x = torch.where(_box_mask(erase, *x.shape[-2:]), torch.randn_like(x), x)
    return x


def _box_mask(boxes: Tensor, height: int, width: int) -> Tensor:
    """Mark the pixels inside boxes, int64 [N, 4], in a mask, bool [N, 1, 1, H, W]."""
    top, left, h, w = boxes[:, :, None].unbind(1)  # each (N, 1)
    rows, cols = (torch.arange(size, device=boxes.device) for size in (height, width))
    in_rows = (rows >= top) & (rows < top + h)  # (N, H)
    in_cols = (cols >= left) & (cols < left + w)  # (N, W)
    return in_rows[:, None, None, :, None] & in_cols[:, None, None, None, :]
