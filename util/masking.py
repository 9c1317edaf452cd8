"""Choose the patches that a masked autoencoder sees.

Shapes: N clips, (t, h, w) the grid of tokens, L = t*h*w tokens, K of them visible.
"""

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from util.pos_embed import Grid

MASK_TYPES = ("random", "tube", "time", "block")


class Masks(NamedTuple):
    """Which patches of every clip are removed, as the autoencoder takes it."""

    mask: Tensor  # float32 [N, L], 1 = removed
    ids_restore: Tensor  # int64 [N, L]
    ids_keep: Tensor  # int64 [N, K]


def num_visible(num_tokens: int, mask_ratio: float) -> int:
    """Count the tokens that masking keeps, truncated by definition: 1568 and 0.9 give 156."""
    return int(num_tokens * (1 - mask_ratio))


def unit_size(grid: Grid, mask_type: str) -> int:
    """Count the tokens that are removed or kept together: those of a tube, a time step, or one."""
    if mask_type not in MASK_TYPES:
        raise ValueError(f"mask_type {mask_type!r} is none of {', '.join(MASK_TYPES)}")
    t, h, w = grid
    return {"tube": t, "time": h * w}.get(mask_type, 1)


def num_kept(grid: Grid, mask_ratio: float, mask_type: str = "random") -> int:
    """Return K: num_visible or, for tubes and time steps, the next lower multiple of their size."""
    unit = unit_size(grid, mask_type)
    return num_visible(math.prod(grid), mask_ratio) // unit * unit


def highest_ratio(grid: Grid, mask_type: str) -> float:
    """Return the highest mask ratio, in thousandths, at which something is kept."""
    return max(i / 1000 for i in range(1000) if num_kept(grid, i / 1000, mask_type))


def draw_masks(
    num_clips: int,
    grid: Grid,
    mask_ratio: float,
    mask_type: str = "random",
    device: torch.device | None = None,
) -> Masks:
    """Draw a mask for every clip of a batch (paper, Fig. 3), without waiting for the device.

    Args:
        mask_ratio: share to remove; see num_kept for what is left.
        mask_type: "random": single patches, the paper's choice; "tube": the same places at all
            times; "time": whole time steps; "block": cuboids half as long as the clip in every
            direction, until enough is removed.

    Raises:
        ValueError: the ratio keeps nothing, or there is no such type.
    """
    K, L = num_kept(grid, mask_ratio, mask_type), math.prod(grid)
    if not 0 < K <= L:
        raise ValueError(f"mask_ratio = {mask_ratio} keeps {K} of {L} tokens")
    return _keep_smallest(_draw_noise(num_clips, grid, mask_type, device=device), K, mask_type)


def fixed_masks(
    num_clips: int, grid: Grid, mask_ratio: float, mask_type: str = "random", seed: int = 0
) -> Masks:
    """Draw masks for pictures, on the CPU; that of clip i depends only on (seed, i).

    With the same seed, patches that are visible at a high ratio stay visible at a lower one. At
    least one patch, tube or time step stays. See draw_masks for the rest.
    """
    if not 0 < mask_ratio < 1:
        raise ValueError(f"mask_ratio = {mask_ratio:g} must be above 0 and below 1")
    if seed < 0:
        raise ValueError(f"seed = {seed} is negative")
    K = max(unit_size(grid, mask_type), num_kept(grid, mask_ratio, mask_type))
    noise = []
    for i in range(num_clips):
        state = np.random.SeedSequence((seed, i)).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(state[0]))
        noise.append(_draw_noise(1, grid, mask_type, device="cpu", generator=generator))
    return _keep_smallest(torch.cat(noise), K, mask_type)


def _draw_noise(num_clips: int, grid: Grid, mask_type: str, **options: Any) -> Tensor:
    """Return noise [N, L], of which masks keep the smallest; options are those of torch.rand."""
    t, h, w = grid
    if mask_type == "random":
        return torch.rand(num_clips, t * h * w, **options)
    if mask_type != "block":
        shape = (1, h, w) if mask_type == "tube" else (t, 1, 1)
        return torch.rand(num_clips, *shape, **options).expand(-1, t, h, w).flatten(1)

    # Every possible cuboid draws a value, and a token takes the largest of those that cover it:
    # this removes one cuboid after another. They may stick out, so that no place is favoured.
    half = [(n + 1) // 2 for n in grid]
    places = (n + length - 1 for n, length in zip(grid, half, strict=True))
    noise = torch.rand(num_clips, *places, **options)
    for dim, length in enumerate(half, start=1):
        noise = noise.unfold(dim, length, 1).amax(dim=-1)
    return noise.flatten(1)


def _keep_smallest(noise: Tensor, K: int, mask_type: str) -> Masks:
    """Keep the K tokens with the smallest noise [N, L] of each clip, in noise order."""
    # a stable sort keeps the tokens of a tube, step or cuboid, which have equal noise, together
    ids_shuffle = noise.argsort(dim=1, stable=mask_type != "random")
    ids_restore = ids_shuffle.argsort(dim=1)
    return Masks((ids_restore >= K).to(noise.dtype), ids_restore, ids_shuffle[:, :K])
