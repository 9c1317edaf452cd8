"""Layer-wise learning-rate decay: earlier layers of a pre-trained classifier learn more slowly."""

from typing import Any

from torch import nn


def layer_id(name: str, depth: int) -> int:
    """Number a parameter's layer: 0 patches and positions, i + 1 block i, then norm and head."""
    if name.startswith(("patch_embed", "pos_embed", "cls_token")):
        return 0
    if name.startswith("blocks."):
        return int(name.split(".")[1]) + 1
    return depth + 1


def param_groups_lrd(
    model: nn.Module, depth: int, weight_decay: float, layer_decay: float
) -> list[dict[str, Any]]:
    """Group a classifier's parameters by layer and weight decay.

    Every group has `lr_scale` = layer_decay ** (depth + 1 - layer id). 1-D tensors, the class
    token and the positions are not decayed.
    """
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        layer = layer_id(name, depth)
        decayed = parameter.ndim > 1 and not name.startswith(("pos_embed", "cls_token"))
        group = groups.setdefault(
            (layer, decayed),
            {
                "lr_scale": layer_decay ** (depth + 1 - layer),
                "weight_decay": weight_decay if decayed else 0.0,
                "params": [],
            },
        )
        group["params"].append(parameter)
    return list(groups.values())
