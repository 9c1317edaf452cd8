"""What a masked autoencoder predicts: pixels, their changes, or histograms of gradients.

Shapes: N clips, C channels, T frames, t of them predicted, H W pixels, L tokens, p patch size, u
predicted frames per patch.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from util.video.transforms import MEAN, STD, normalize

TARGETS = ("patch", "channel", "pixels", "hog", "motion")
NORMALISED = ("patch", "channel")  # by statistics of each patch
CELL, BINS = 8, 9  # of a histogram: side in pixels, orientations
LEVEL = 1 / 255 / STD  # one level of uint8 pixels: less motion than this is taken for noise


def choose_target(
    target: str | None,
    norm_pix_loss: bool,
    target_norm: Sequence[Sequence[float]] | None,
    in_chans: int,
    patch_size: int,
    num_frames: int,
) -> str:
    """Return the name of the target; ValueError if it is unknown or does not fit the arguments."""
    if target is None:
        target = "patch" if norm_pix_loss else "pixels"
    if target not in TARGETS:
        raise ValueError(f"target = {target!r} must be one of {', '.join(TARGETS)}")
    shape = torch.tensor(target_norm or 0).shape
    if target_norm is not None and (target != "patch" or shape != (2, in_chans)):
        raise ValueError(
            f"target_norm needs target = 'patch' and in_chans = {in_chans} means and standard "
            f"deviations, not {target!r} and {target_norm!r}"
        )
    if target == "hog" and patch_size % CELL:
        raise ValueError(
            f"target = 'hog' needs a patch_size that is a multiple of {CELL}, not {patch_size}"
        )
    if target == "motion" and num_frames < 2:
        raise ValueError(f"target = 'motion' needs num_frames of at least 2, not {num_frames}")
    return target


def values_per_frame(target: str | None, patch_size: int, in_chans: int) -> int:
    """Count the values that are predicted of one frame of a patch."""
    if target == "hog":
        return (patch_size // CELL) ** 2 * in_chans * BINS
    return patch_size**2 * in_chans


def target_statistics(
    patches: Tensor, target: str, in_chans: int, target_norm: Sequence[Sequence[float]] | None
) -> tuple[Tensor, Tensor]:
    """Return the mean and scale that turn patches into targets, and predictions into patches.

    Patches [N, L, u*p*p*C] are of clips normalised by (0.45, 0.225), or for "motion" of their
    differences. A target is (patches - mean) / scale, and a prediction shows pred * scale + mean.
    Both broadcast to patches: [N, L, 1], [N, L, u*p*p*C] if channels differ, or scalars. The scale
    of "motion" is the root mean square of the clip's differences, [N, 1, 1].
    """
    if target not in NORMALISED:
        scale = patches.new_ones(())
        if target == "motion":  # of the clip: still patches stay 0, slow clips count like fast ones
            scale = (patches.square().mean(dim=(1, 2), keepdim=True) + LEVEL**2).sqrt()
        return patches.new_zeros(()), scale
    C = in_chans  # the fastest index of a patch
    repeats = patches.shape[-1] // C
    if target == "channel":  # VideoMAE adds 1e-6 to the deviation of pixels in [0, 1]
        x = patches.unflatten(-1, (-1, C))  # (N, L, u*p*p, C)
        std, mean = torch.std_mean(x - x[..., :1, :], dim=-2)  # of flat patches: exactly 0
        mean, scale = mean + x[..., 0, :], std + 1e-6 / STD  # (N, L, C)
        return mean.repeat(1, 1, repeats), scale.repeat(1, 1, repeats)
    if not target_norm:
        var, mean = torch.var_mean(patches, dim=-1, keepdim=True)  # unbiased
        return mean, (var + 1e-6).sqrt()
    m, s = patches.new_tensor(target_norm).repeat(1, repeats)  # in [0, 1]
    m, s = (m - MEAN) / STD, s / STD  # in our normalisation
    var, mean = torch.var_mean((patches - m) / s, dim=-1, keepdim=True)
    return mean * s + m, (var + 1e-6).sqrt() * s


def motion(imgs: Tensor, frames: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Subtract from each of the frames the one before it; frame 0 counts as frame 1.

    Clips [N, C, T, H, W] become differences of normalised pixels [N, C, t, H, W].
    """
    later = [max(t, 1) for t in frames]
    now, before = (torch.stack([imgs[:, :, t - i] for t in later], dim=2) for i in (0, 1))
    return normalize(now).to(dtype) - normalize(before).to(dtype)


def hog(frames: Tensor) -> Tensor:
    """Compute histograms of oriented gradients, as scikit-image does, of every channel.

    A cell has 8 x 8 pixels, a histogram 9 bins of 20 degrees, and a pixel votes for the bin of its
    gradient with the gradient's magnitude. Each histogram is divided by its L2 norm; scikit-image's
    epsilon of 1e-5 for pixels in [0, 1] keeps flat cells at 0.

    Args:
        frames: normalised pixels [N, C, t, H, W], float32 or float64; H, W are multiples of 8.

    Returns:
        [N, C*9, t, H/8, W/8], where the bins of a channel stand together.
    """
    # Central differences, 0 at the borders of the frame
    col = F.pad(frames[..., 2:] - frames[..., :-2], (1, 1))
    row = F.pad(frames[..., 2:, :] - frames[..., :-2, :], (0, 0, 1, 1))
    magnitude = (row.square() + col.square()).sqrt()

    # The cotangent falls from inf to -inf as the angle rises from 0 to 180 degrees, so comparing it
    # with the borders of the bins finds the bin without an arctangent, and exactly at 0.
    cot = torch.where(row == 0, math.inf, col / row)
    bins = torch.zeros_like(cot, dtype=torch.uint8)
    for i in range(1, BINS):
        bins += cot <= 1 / math.tan(math.pi * i / BINS)
    histograms = [_cell_means(magnitude * (bins == i)) for i in range(BINS)]
    x = torch.stack(histograms, dim=2)  # (N, C, 9, t, H/8, W/8)
    x = x / (x.square().sum(dim=2, keepdim=True) + (1e-5 / STD) ** 2).sqrt()
    return x.flatten(1, 2)


def _cell_means(x: Tensor) -> Tensor:
    """Average over cells: [..., H, W] -> [..., H/8, W/8]."""
    x = x.unflatten(-1, (-1, CELL)).unflatten(-3, (-1, CELL))  # (..., H/8, 8, W/8, 8)
    return x.sum(dim=-3).sum(dim=-1) / CELL**2  # on a CPU faster than both at once
