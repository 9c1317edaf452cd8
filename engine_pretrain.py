"""One epoch of masked-autoencoder pre-training."""

from argparse import Namespace
from functools import partial

import torch
from torch import nn
from torch.optim import Optimizer

from util.checkpoint import Checkpoints
from util.dist import rank, seed_step, world_size
from util.loader import VideoLoader
from util.lr_sched import learning_rate, set_learning_rate
from util.meters import RunLog, epoch_1000x
from util.optim import autocast, grad_sync, optim_step
from util.video.transforms import augment_on_device


def train_one_epoch(
    model: nn.Module,
    loader: VideoLoader,
    optimizer: Optimizer,
    scaler: torch.amp.GradScaler,
    device: torch.device,
    checkpoints: Checkpoints,
    log: RunLog,
    args: Namespace,
) -> dict[str, float]:
    """Train over every batch of the loader once, from where checkpoints.progress says.

    A step takes B videos with R clips each, uint8 [B, R, T, H, W, C]; every accum_iter of them
    make an update. What is left over at the end of an epoch is not applied. Signals end the loop
    early, after the same update on every rank.

    Returns:
        the epoch's mean metrics over all ranks.

    Raises:
        NonFiniteError: on every rank, when a loss or gradient is infinite or NaN.
    """
    model.train()
    optimizer.zero_grad(set_to_none=True)
    parameters = [p for p in model.parameters() if p.requires_grad]
    epoch, steps, lr = checkpoints.progress.epoch, len(loader), 0.0
    clips_per_step = args.batch_size * args.repeat_aug * world_size()

    def x_axis(step: float) -> int:
        return epoch_1000x(epoch + step / steps, args.repeat_aug)

    loader.set_epoch(epoch, checkpoints.progress.step)
    header = f"Epoch [{epoch}/{args.epochs}]"
    # beside what it prints, `every` reads the metrics, saves when it is time, and stops at a signal
    for step, batch in log.every(loader, header, steps, clips_per_step, x_axis, checkpoints):
        seed_step(args.seed, epoch, step, rank())  # masks depend on the step alone
        update = (step + 1) % args.accum_iter == 0
        if step % args.accum_iter == 0:
            progress = epoch + step / steps  # fractional epochs
            lr = learning_rate(progress, args.lr, args.min_lr, args.warmup_epochs, args.epochs)
            set_learning_rate(optimizer, lr)

        clips = batch.clips.to(device, non_blocking=True).flatten(0, 1)  # (B*R, T, H, W, C)
        flip = batch.flip.to(device, non_blocking=True).flatten()
        clips = augment_on_device(clips, flip, erase=None)  # (N, C, T, H, W)

        with grad_sync(model, update):
            with autocast(device, args.precision):
                loss, _, _ = model(clips, args.mask_ratio, args.decoder_mask_ratio)
            scaler.scale(loss / args.accum_iter).backward()
        metrics = {"loss": loss.detach(), "lr": lr}
        log.guard.observe(step, batch.row, loss)  # --skip_nonfinite decides with the gradient norm
        if update:
            allows = partial(log.guard.allows, step)
            norm = optim_step(optimizer, scaler, parameters, args.clip_grad, allows)
            metrics["grad_norm"] = norm
        log.meters.update(step, batch.row, **metrics)
    return log.meters.means()
