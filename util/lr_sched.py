"""Learning rate as a function of progress, in fractional epochs."""

import math

from torch.optim import Optimizer


def scaled_lr(blr: float, effective_batch_size: int) -> float:
    """Apply the linear scaling rule: the base rate is for a total batch of 256."""
    return blr * effective_batch_size / 256


def learning_rate(
    progress: float, lr: float, min_lr: float, warmup_epochs: float, epochs: float
) -> float:
    """Rise linearly from 0 over warmup_epochs, then fall by half a cosine to min_lr at epochs.

    Args:
        progress: epochs done, fractional.
    """
    if progress < warmup_epochs:
        return lr * progress / warmup_epochs
    share = (progress - warmup_epochs) / (epochs - warmup_epochs)
    return min_lr + (lr - min_lr) * 0.5 * (1.0 + math.cos(math.pi * share))


def annealed_mask_ratio(progress: float, mask_ratio: float, epochs: int) -> float:
    """Return the share of tokens left out of fine-tuning: half a cosine from mask_ratio to 0.

    Args:
        progress: epochs done, with fraction.
    """
    return mask_ratio * 0.5 * (1 + math.cos(math.pi * progress / epochs))


def set_learning_rate(optimizer: Optimizer, lr: float) -> None:
    """Set every group's rate to lr times its lr_scale (layer decay), 1 where it has none."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
