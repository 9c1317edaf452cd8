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
    return _keep_first(_draw_order(num_clips, grid, mask_type, device=device), K)


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
    orders = []
    for i in range(num_clips):
        state = np.random.SeedSequence((seed, i)).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(state[0]))
        orders.append(_draw_order(1, grid, mask_type, device="cpu", generator=generator))
    return _keep_first(torch.cat(orders), K)


def _draw_order(num_clips: int, grid: Grid, mask_type: str, **options: Any) -> Tensor:
    """Draw the order of the tokens [N, L] of which masks keep the first; options of torch.rand."""
    t, h, w = grid
    if mask_type == "random":
        return torch.rand(num_clips, t * h * w, **options).argsort(dim=1)

    if mask_type == "block":
        # Every possible cuboid draws a value, and a token takes the largest of those that cover it:
        # this removes one cuboid after another. They may stick out, or borders would be favoured.
        half = [(n + 1) // 2 for n in grid]
        places = (n + length - 1 for n, length in zip(grid, half, strict=True))
        noise = torch.rand(num_clips, *places, **options)
        for dim, length in enumerate(half, start=1):
            noise = noise.unfold(dim, length, 1).amax(dim=-1)
    else:
        shape = (1, h, w) if mask_type == "tube" else (t, 1, 1)
        noise = torch.rand(num_clips, *shape, **options).expand(-1, t, h, w)

    # Tokens of a tube, step or cuboid have equal noise: they stay together, in random order.
    order = torch.rand(num_clips, t * h * w, **options).argsort(dim=1)
    return order.gather(1, noise.flatten(1).gather(1, order).argsort(dim=1, stable=True))


def _keep_first(order: Tensor, K: int) -> Masks:
    """Keep the first K tokens of each clip's order [N, L]."""
    ids_restore = order.argsort(dim=1)
    mask = (ids_restore >= K).to(torch.get_default_dtype())
    return Masks(mask, ids_restore, order[:, :K])
