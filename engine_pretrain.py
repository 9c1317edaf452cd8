"""One epoch of masked-autoencoder pre-training.

Shapes: B videos, R clips of each, N = B * R clips, C channels, T frames, H W pixels.
"""

from __future__ import annotations

from argparse import Namespace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.optim import Optimizer

from util.dist import rank, seed_step, world_size
from util.lr_sched import annealed_mask_ratio, learning_rate, set_learning_rate
from util.meters import RunLog
from util.optim import autocast, grad_sync, optim_step
from util.video.transforms import channels_first, flip_on_device

if TYPE_CHECKING:
    from util.checkpoint import Checkpoints
    from util.loader import VideoLoader


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
    """Train on the batches of one epoch, starting at the step in checkpoints.progress.

    An update takes accum_iter micro-steps; those left over at the end of an epoch are not applied.
    A signal ends the loop early, after the same update on every rank. Returns the epoch's mean
    metrics over all ranks.

    Raises:
        NonFiniteError: on every rank, when a loss or gradient is not finite.
    """
    model.train()
    optimizer.zero_grad(set_to_none=True)
    parameters = [p for p in model.parameters() if p.requires_grad]
    progress, steps, lr = checkpoints.progress, len(loader), 0.0
    clips_per_step = args.batch_size * args.repeat_aug * world_size()
    header = f"Epoch [{progress.epoch}/{args.epochs}]"
    flip_clips = torch.compile(flip_on_device) if args.compile else flip_on_device

    loader.set_epoch(progress.epoch, progress.step)
    for step, batch in log.every(loader, header, clips_per_step, progress):
        seed_step(args.seed, progress.epoch, step, rank())  # masks depend on the step alone

        # Set the learning rate at the first micro-step of every update.
        done = progress.epoch + step / steps  # fractional epochs
        if step % args.accum_iter == 0:
            lr = learning_rate(done, args.lr, args.min_lr, args.warmup_epochs, args.epochs)
            set_learning_rate(optimizer, lr)
        update = (step + 1) % args.accum_iter == 0

        # Move the clips to the device and flip them there; the model normalises what it uses.
        clips = batch.clips.to(device, non_blocking=True).flatten(0, 1)  # uint8 (N, T, H, W, C)
        flip = batch.flip.to(device, non_blocking=True).flatten()  # (N,)
        clips = channels_first(flip_clips(clips, flip))  # uint8 (N, C, T, H, W)

        # Forward and backward; gradients are averaged over ranks once per update.
        mask_ratio = annealed_mask_ratio(done, args.mask_ratio, args.mask_ratio_end, args.epochs)
        ratios = mask_ratio, args.decoder_mask_ratio
        with grad_sync(model, update):
            with autocast(device, args.precision):
                loss, _, _ = model(clips, *ratios, args.mask_type)
            scaler.scale(loss / args.accum_iter).backward()

        # Clip the gradient and step, unless the guard rejects the update (--skip_nonfinite).
        metrics = {"loss": loss.detach(), "lr": lr}
        log.guard.observe(step, batch.row, loss)
        if update:
            allows = partial(log.guard.allows, step)
            norm = optim_step(optimizer, scaler, parameters, args.clip_grad, allows)
            metrics["grad_norm"] = norm
        log.meters.update(step, batch.row, **metrics)

        # Save when it is time; stop at a signal.
        if checkpoints.after_step(step, log):
            break
    return log.meters.means()
