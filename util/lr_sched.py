"""Learning rate and mask ratio as functions of progress, which is counted in fractional epochs."""

import math
from argparse import Namespace

from torch.optim import Optimizer

from util.dist import print0, world_size
from util.errors import UserError


def scaled_lr(blr: float, effective_batch_size: int) -> float:
    """Apply the linear scaling rule: the base learning rate is for a total batch of 256."""
    return blr * effective_batch_size / 256


def effective_lr(args: Namespace, counted: str, steps: int) -> float:
    """Return the peak learning rate, and print the arithmetic that leads to it.

    Args:
        counted: what the recipe counts as its batch, "videos" or their (repeated) "clips".
        steps: micro-steps of an epoch.

    Raises:
        UserError: an epoch has too few steps for an update, or the rate would rise to --min_lr.
    """
    accum, ranks = args.accum_iter, world_size()
    if steps < accum:
        raise UserError(
            f"an epoch has {steps} steps, too few for an update every --accum_iter {accum} steps; "
            "lower it, or use more videos"
        )
    if steps % accum:
        print0(
            f"WARNING: --accum_iter {accum} does not divide the {steps} steps of an epoch: the "
            f"last {steps % accum} of every epoch are computed in vain, as no update follows them"
        )
    # Count what an update sees.
    videos = args.batch_size * accum * ranks
    batch = {"videos": videos, "clips": videos * args.repeat_aug}
    print0(
        f"videos per update: {args.batch_size} per rank x {accum} accumulated x {ranks} ranks = "
        f"{videos}; clips per update: {videos} x {args.repeat_aug} = {batch['clips']}"
    )

    # Scale the base rate, unless --lr gives the peak itself.
    if args.lr is None:
        lr, size = scaled_lr(args.blr, batch[counted]), f"{batch[counted]} {counted}"
        print0(f"learning rate: blr {args.blr:g} x batch of {size} / 256 = {lr:.3g}")
    else:
        lr = args.lr
        print0(f"learning rate: {lr:.3g} (--lr)")
    if not args.min_lr <= lr < math.inf:
        raise UserError(
            f"the peak learning rate {lr:.3g} must be finite and at least --min_lr "
            f"{args.min_lr:g}, to which it falls; change --min_lr, --blr or --lr"
        )
    if args.warmup_epochs >= args.epochs:
        reached = lr * args.epochs / args.warmup_epochs
        print0(
            f"WARNING: --warmup_epochs {args.warmup_epochs:g} do not end within --epochs "
            f"{args.epochs}: the learning rate rises to {reached:.3g} and never falls"
        )
    return lr


def learning_rate(
    progress: float, lr: float, min_lr: float, warmup_epochs: float, epochs: float
) -> float:
    """Rise linearly from 0 over warmup_epochs; fall along half a cosine to min_lr at epochs."""
    if progress < warmup_epochs:
        return lr * progress / warmup_epochs
    share = (progress - warmup_epochs) / (epochs - warmup_epochs)
    return min_lr + (lr - min_lr) * 0.5 * (1.0 + math.cos(math.pi * share))


def set_learning_rate(optimizer: Optimizer, lr: float) -> None:
    """Set every group's rate to lr times its lr_scale (layer decay), or to lr where it has none."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def annealed_mask_ratio(progress: float, start: float, end: float | None, epochs: int) -> float:
    """Return the share of tokens to leave out, from start to end (None: start) by half a cosine.

    It changes in steps of 0.01: a GPU plans its kernels anew for every number of tokens.
    """
    end = start if end is None else end
    exact = end + (start - end) * 0.5 * (1 + math.cos(math.pi * progress / epochs))
    return min(max(round(exact, 2), min(start, end)), max(start, end))
