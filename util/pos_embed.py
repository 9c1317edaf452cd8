"""Position embeddings: joint, separable or a fixed sine-cosine table; resized for other clips.

Shapes: C channels, D width, (t, h, w) the grid of tokens; positions of patches have no class row.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

Grid = tuple[int, int, int]
Parts = dict[str, Tensor]  # "joint", or "spatial" and "temporal"; "class": the class token's row


def sincos_pos_embed(num_tokens: int, dim: int) -> Tensor:
    """Compute the fixed position table [L, D] of VideoMAE ("Attention Is All You Need", 3.5).

    The token's number in (t, h, w) order is the position; even columns are sines, odd ones
    cosines of position / 10000^(2 * (column // 2) / D).
    """
    column = torch.arange(dim, dtype=torch.float64)
    rate = 10000.0 ** (2 * (column // 2) / dim)
    angle = torch.arange(num_tokens, dtype=torch.float64).unsqueeze(1) / rate  # (L, D)
    return torch.where(column % 2 == 0, angle.sin(), angle.cos()).float()


def resize_spatial(pos: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Resize positions of frames, bicubic: [n, h*w, D] -> [n, h'*w', D]; equal sizes return pos."""
    if old == new:
        return pos
    grid = pos.unflatten(1, old).permute(0, 3, 1, 2)  # (n, D, h, w)
    grid = F.interpolate(grid, size=new, mode="bicubic", align_corners=False)
    return grid.flatten(2).transpose(1, 2)


def resize_temporal(pos: Tensor, t: int) -> Tensor:
    """Resize positions along time, linear: [n, t, D] -> [n, t', D]; equal sizes return pos."""
    if pos.shape[1] == t:
        return pos
    rows = pos.transpose(1, 2)
    return F.interpolate(rows, size=t, mode="linear", align_corners=False).transpose(1, 2)


def resize_joint(pos: Tensor, old: Grid, new: Grid) -> Tensor:
    """Resize joint positions [1, t*h*w, D] in space, then in time; equal grids return pos."""
    if old == new:
        return pos
    frames = resize_spatial(pos[0].unflatten(0, (old[0], old[1] * old[2])), old[1:], new[1:])
    columns = resize_temporal(frames.transpose(0, 1), new[0])  # (h'*w', t', D)
    return columns.transpose(0, 1).flatten(0, 1).unsqueeze(0)


def join(spatial: Tensor, temporal: Tensor) -> Tensor:
    """Add separable positions [1, h*w, D] and [1, t, D] to joint ones [1, t*h*w, D]."""
    # (1, t, 1, D) + (1, 1, h*w, D) -> (1, t*h*w, D)
    return (temporal.unsqueeze(2) + spatial.unsqueeze(1)).flatten(1, 2)


def split(joint: Tensor, grid: Grid, rounding: float = 0.0) -> tuple[Tensor, Tensor]:
    """Write joint positions [1, t*h*w, D] as the sum of spatial [1, h*w, D] and temporal [1, t, D].

    Args:
        rounding: relative rounding error of the stored positions.

    Raises:
        ValueError: even the best sum loses more than 0.01 % and more than the rounding.
    """
    frames = joint.double().unflatten(1, (grid[0], grid[1] * grid[2]))  # (1, t, h*w, D)
    spatial = frames.mean(dim=1)
    temporal = (frames - spatial.unsqueeze(1)).mean(dim=2)
    rest = (join(spatial, temporal) - joint).norm() / (joint.double().norm() + 1e-12)
    if rest > max(1e-4, rounding):
        raise ValueError(
            "joint positions are not a sum of positions in space and in time: "
            f"{rest:.1%} would be lost"
        )
    return spatial.to(joint.dtype), temporal.to(joint.dtype)


def take_positions(state: dict[str, Tensor], name: str, cls_embed: bool) -> Parts:
    """Return a state dict's positions by name, e.g. "decoder_pos_embed"; {} if it lacks them."""
    if name in state:
        rows = state[name]
        return {"class": rows[:, :1], "joint": rows[:, 1:]} if cls_embed else {"joint": rows}
    names = {part: f"{name}_{part}" for part in ("spatial", "temporal", "class")}
    parts = {part: state[key] for part, key in names.items() if key in state}
    return parts if {"spatial", "temporal"} <= parts.keys() else {}


def put_positions(
    parts: Parts, name: str, old: Grid, new: Grid, joint: bool, rounding: float = 0.0
) -> dict[str, Tensor]:
    """Resize positions to another grid; return them by parameter name, joint or separable.

    Raises RuntimeError if they do not fit the old grid, and ValueError as split does.
    """
    fitted = dict(parts)
    if "joint" in parts:
        fitted["joint"] = resize_joint(parts["joint"], old, new)
    else:
        fitted["spatial"] = resize_spatial(parts["spatial"], old[1:], new[1:])
        fitted["temporal"] = resize_temporal(parts["temporal"], new[0])
    if joint:
        rows = fitted["joint"] if "joint" in parts else join(fitted["spatial"], fitted["temporal"])
        return {name: torch.cat([parts["class"], rows], dim=1) if "class" in parts else rows}
    if "joint" in parts:
        fitted["spatial"], fitted["temporal"] = split(fitted.pop("joint"), new, rounding)
    return {f"{name}_{part}": pos for part, pos in fitted.items()}


def resize_kernel(kernel: Tensor, t: int) -> Tensor:
    """Resize a patch kernel [D, C, t, p, p] in time; still clips keep their tokens.

    Frames are repeated, divided and summed in groups, so that the sum over time stays the same.
    """
    old = kernel.shape[2]
    if old == t:
        return kernel
    steps = math.lcm(old, t)
    fine = kernel.repeat_interleave(steps // old, dim=2) / (steps // old)
    return fine.unflatten(2, (t, steps // t)).sum(dim=3)
