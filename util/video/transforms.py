"""Spatial transforms of whole clips: crops, resize, flip, normalisation, random erasing.

Workers handle uint8 clips [T, H, W, C] and draw boxes; float arithmetic waits for the accelerator,
where `augment_on_device` flips, normalises and erases a batch. A box is (top, left, height, width)
in pixels and holds for every frame of its clip.

N clips, T frames, H W pixels, C channels.
"""

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

MEAN = 0.45  # of every RGB channel in [0, 1], as is customary for Kinetics
STD = 0.225


# Loader workers are the parallelism; threads in each would only fight over the same cores, and
# OpenCV's pool does not survive the fork of a worker.
cv2.setNumThreads(0)


def resize(clip: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize a uint8 clip [T, H, W, C], or a crop view of one, to [T, *size, C] as resize_frame.

    A clip that has the size is returned.
    """
    if tuple(clip.shape[1:3]) == size:
        return clip
    out = clip.new_empty(len(clip), *size, clip.shape[3])
    for source, target in zip(clip.numpy(), out.numpy(), strict=True):
        resize_frame(source, target)
    return out


def resize_frame(frame: np.ndarray, out: np.ndarray) -> None:
    """Resize a uint8 frame [H, W, C], or a crop view of one, bilinearly into `out` [h, w, C].

    Half-pixel centres, no antialiasing up to a reduction by 2 (the result is within one level of
    float bilinear interpolation); beyond that plain bilinear would skip pixels and shimmer from
    frame to frame, so the filter widens with the reduction.
    """
    (H, W), (h, w) = frame.shape[:2], out.shape[:2]
    if (h, w) == (H, W):
        out[...] = frame
    elif max(H / h, W / w) <= 2:
        # OpenCV rounds once where F.interpolate rounds after each axis, and reads crops in place.
        cv2.resize(frame, (w, h), dst=out, interpolation=cv2.INTER_LINEAR)
    else:
        channels_last = torch.from_numpy(frame)[None].permute(0, 3, 1, 2)
        small = F.interpolate(channels_last, (h, w), mode="bilinear", antialias=True)
        out[...] = small[0].permute(1, 2, 0).numpy()


def normalize(clips: Tensor) -> Tensor:
    """Turn uint8 clips [N, T, H, W, C] into standardised float32 [N, C, T, H, W], contiguous."""
    x = clips.permute(0, 4, 1, 2, 3)
    x = x.to(torch.float32, memory_format=torch.contiguous_format)
    return x.div_(255).sub_(MEAN).div_(STD)


def augment_on_device(clips: Tensor, flip: Tensor | None, erase: Tensor | None) -> Tensor:
    """Flip, normalise and erase uint8 clips [N, T, H, W, C] into float32 [N, C, T, H, W].

    flip: bool [N], mirror the clip left to right, or None. erase: int64 [N, 4], the box of the
    flipped clip whose pixels become standard normal noise, drawn anew for every frame, or None.
    Both lie on the device of `clips`; no value of theirs is read by the host, which need not wait.
    """
    if flip is not None:
        clips = torch.where(flip[:, None, None, None, None], clips.flip(3), clips)
    x = normalize(clips)
    if erase is not None:
        x = torch.where(_box_mask(erase, *x.shape[-2:]), torch.randn_like(x), x)
    return x


def _box_mask(boxes: Tensor, height: int, width: int) -> Tensor:
    """Mark the pixels inside int64 boxes [N, 4]: bool [N, 1, 1, H, W]."""
    top, left, h, w = boxes[:, :, None].unbind(1)  # each (N, 1)
    rows = torch.arange(height, device=boxes.device)
    cols = torch.arange(width, device=boxes.device)
    in_rows = (rows >= top) & (rows < top + h)  # (N, H)
    in_cols = (cols >= left) & (cols < left + w)  # (N, W)
    return in_rows[:, None, None, :, None] & in_cols[:, None, None, None, :]
