"""Learning rate and mask ratio as functions of progress, which is counted in fractional epochs."""

import math
from argparse import Namespace

from torch.optim import Optimizer

from util.dist import print0, world_size
from util.errors import UserError

# Below these, a run is warned. The recipes have rates of 5e-4 and more; in pre-training, 1,024
# updates and more on 2,048 videos and more; in fine-tuning, 160 updates and more.
LOW_RATE = 1e-4
FEW_UPDATES = {"videos": 1000, "clips": 100}  # in pre-training and in fine-tuning, see effective_lr
FEW_VIDEOS = 500  # in pre-training


def effective_lr(args: Namespace, counted: str, num_videos: int) -> float:
    """Return the peak learning rate, and print the arithmetic that leads to it.

    Print also how many updates the run makes, and warn if they, the rate or the videos are few.

    Args:
        counted: what the recipe counts as its batch, "videos" or their (repeated) "clips".
        num_videos: videos of train.csv.

    Raises:
        UserError: an epoch has too few steps for an update, or the rate would rise to --min_lr.
    """
    accum, ranks = args.accum_iter, args.ranks or world_size()
    steps = num_videos // (args.batch_size * ranks)  # whole batches of all ranks, as in the loader
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

    # Scale the base rate linearly from a batch of 256, unless --lr gives the peak itself.
    updates = steps // accum * args.epochs
    print0(f"{updates:,} updates in {args.epochs} epochs of {steps // accum:,}")
    if args.lr is None:
        lr, size = args.blr * batch[counted] / 256, f"{batch[counted]} {counted}"
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
    _warn_of_little(args, counted, lr, updates, num_videos)
    return lr


def _warn_of_little(
    args: Namespace, counted: str, lr: float, updates: int, num_videos: int
) -> None:
    """Warn if rate, updates or videos are far below those of any recipe."""
    if lr < LOW_RATE:
        print0(
            f"WARNING: the peak learning rate {lr:.3g} is far below that of the recipes (5e-4 or "
            "more): give --lr, or more videos per update by --accum_iter"
        )
    if updates < FEW_UPDATES[counted]:
        print0(
            f"WARNING: {updates:,} updates are few: every recipe makes more than "
            f"{FEW_UPDATES[counted]:,}; raise --epochs, or take fewer videos per update"
        )
    if counted == "videos" and num_videos < FEW_VIDEOS and not args.finetune:
        print0(
            f"WARNING: {num_videos} videos are few to pre-train on from fresh weights (the recipes "
            "have 2,048 or more): continuing from a checkpoint (--finetune) is likely better"
        )


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
