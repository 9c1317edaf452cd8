"""Fine-tuning, validation and multi-view testing of a classifier.

Shapes: B videos, R augmentations of one clip of each, N = B * R clips, C channels, T frames,
H W pixels, V views of a test video.
"""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from util.dist import all_reduce_sum, gather_objects, rank, seed_step, world_size
from util.lr_sched import annealed_mask_ratio, learning_rate, set_learning_rate
from util.meters import RunLog
from util.optim import autocast, grad_sync, optim_step
from util.report import VideoScores, check_scores, count_confusions, topk_correct
from util.video.transforms import augment_on_device, channels_first

if TYPE_CHECKING:
    from util.checkpoint import Checkpoints
    from util.loader import VideoLoader
    from util.video.mixup import Mixup


def train_one_epoch(
    model: nn.Module,
    mixup: Mixup | None,
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

    loader.set_epoch(progress.epoch, progress.step)
    for step, batch in log.every(loader, header, clips_per_step, progress):
        # All random choices, those of mixup included, depend on the step and the rank alone.
        seed_step(args.seed, progress.epoch, step, rank())  # masks, drop path, dropout, erasing
        rng = np.random.default_rng((args.seed, progress.epoch, step, rank()))

        # Set the learning rate at the first micro-step of every update.
        done = progress.epoch + step / steps  # fractional epochs
        if step % args.accum_iter == 0:
            lr = learning_rate(done, args.lr, args.min_lr, args.warmup_epochs, args.epochs)
            set_learning_rate(optimizer, lr)
        update = (step + 1) % args.accum_iter == 0

        # Move the clips to the device; flip, normalise and erase them there.
        clips = batch.clips.to(device, non_blocking=True).flatten(0, 1)  # uint8 (N, T, H, W, C)
        flip = batch.flip.to(device, non_blocking=True).flatten()  # (N,)
        erase = batch.erase.to(device, non_blocking=True).flatten(0, 1) if args.reprob else None
        clips = augment_on_device(clips, flip, erase)  # float (N, C, T, H, W)

        # Mix clips and labels; the mixed targets (N, classes) are already smoothed.
        labels = batch.label.to(device, non_blocking=True)  # (B,)
        targets, smoothing = labels.repeat_interleave(args.repeat_aug), args.smoothing  # (N,)
        if mixup is not None:
            clips, targets = mixup(clips, targets, rng)
            smoothing = 0.0

        # Forward and backward; gradients are averaged over ranks once per update.
        mask_ratio = annealed_mask_ratio(done, args.mask_ratio, 0.0, args.epochs)
        with grad_sync(model, update):
            with autocast(device, args.precision):
                logits = model(clips, mask_ratio)  # (N, classes)
            loss = F.cross_entropy(logits.float(), targets, label_smoothing=smoothing)
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


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: VideoLoader,
    device: torch.device,
    precision: str,
    num_classes: int,
    log: RunLog,
    stop: Callable[[], bool] | None = None,
) -> tuple[dict[str, float], np.ndarray]:
    """Classify the centre view of every video; the ranks share the videos.

    A video whose logits are not finite counts as wrong and not in the loss.

    Args:
        stop: called before every step that all ranks take. When it returns True, on all ranks at
            once, the loop ends early and the result is incomplete.

    Returns:
        loss, acc1, acc5 and mean_class_acc (the mean of the classes' acc1; all three in percent)
        over the readable videos of all ranks; bad and not_finite, the numbers of unreadable videos
        and of those without finite logits; and counts of labels by predictions, int64 [C, C + 1]
        (see count_confusions).

    Raises:
        UserError: no video could be read, or none has finite logits.
    """
    model.eval()
    exact = torch.float32 if device.type == "mps" else torch.float64  # Apple's have no float64
    sums = torch.zeros(2, dtype=exact, device=device)  # loss, top-5
    confusion = torch.zeros((num_classes, num_classes + 1), dtype=torch.int64, device=device)
    seen: list[tuple[Tensor, Tensor]] = []  # rows of the csv, and which of them have finite logits
    stopped = False
    clips_per_step = loader.batch_size * world_size()
    common_steps = len(loader.dataset) // world_size() // loader.batch_size  # that all ranks take
    for step, batch in log.every(loader, "Validate", clips_per_step):
        stopped = stop is not None and step < common_steps and stop()
        if stopped:
            break

        # Leave out videos that could not be read.
        good = [i for i, errors in enumerate(batch.errors) if not errors]
        if not good:
            continue
        clips, labels, rows = batch.clips, batch.label, batch.row
        if len(good) < len(clips):  # indexing copies
            clips, labels, rows = clips[good], labels[good], rows[good]

        # Classify the readable videos and count, without waiting for the device.
        clips = clips.to(device, non_blocking=True).flatten(0, 1)  # uint8 (N, T, H, W, C)
        labels = labels.to(device, non_blocking=True)  # (N,)
        with autocast(device, precision):
            logits = model(channels_first(clips))
        logits = logits.float()  # (N, classes)
        finite = logits.softmax(dim=1).isfinite().all(dim=1)  # (N,); a single -inf is a score of 0
        seen.append((rows, finite))
        known = logits.where(finite.unsqueeze(1), 0.0)  # whose loss is log(classes)
        sums[0] += F.cross_entropy(known, labels, reduction="sum")
        sums[0] -= (~finite).sum() * math.log(num_classes)
        sums[1] += topk_correct(logits, labels.where(finite, -1), 5)
        predictions = logits.argmax(dim=1).where(finite, num_classes)
        confusion += count_confusions(labels, predictions, num_classes)

    # Add up the counts of all ranks, and name the videos without finite logits.
    loss, top5 = all_reduce_sum(sums).tolist()
    counts = all_reduce_sum(confusion).cpu().numpy()
    odd = [row for rows, finite in seen for row in rows[~finite.cpu()].tolist()]
    odd = [row for rows in gather_objects(odd) for row in rows]
    if not stopped:
        check_scores(int(counts.sum()), odd, loader.dataset.index, precision)
    return validation_stats(loss, top5, counts, len(loader.dataset)), counts


def validation_stats(
    loss: float, top5: float, counts: np.ndarray, num_videos: int
) -> dict[str, float]:
    """Return the statistics of `evaluate` from sums over videos and counts [C, C + 1]."""
    total, videos, odd = counts.sum(axis=1), int(counts.sum()), int(counts[:, -1].sum())
    per_class = counts.diagonal()[total > 0] / total[total > 0]
    return {
        "loss": loss / max(videos - odd, 1),
        "acc1": 100 * float(counts.trace()) / max(videos, 1),
        "acc5": 100 * top5 / max(videos, 1),
        "mean_class_acc": 100 * float(per_class.mean()) if videos else 0.0,
        "bad": num_videos - videos,
        "not_finite": odd,
    }


@torch.no_grad()
def test(
    model: nn.Module,
    loader: VideoLoader,
    device: torch.device,
    precision: str,
    clips_per_forward: int,
    ensemble: str,
    log: RunLog,
) -> VideoScores:
    """Score every video by the sum or the maximum of the softmax of its views.

    Args:
        loader: gives one video, with all its views, per batch.
        clips_per_forward: views that go through the model at once.
        ensemble: "sum" or "max".
    """
    model.eval()
    dataset = loader.dataset
    rows: list[tuple[int, np.ndarray | None, str]] = []
    for _, batch in log.every(loader, "Test", dataset.views * world_size()):
        for clips, row, errors in zip(batch.clips, batch.row, batch.errors, strict=True):
            if errors:
                rows.append((int(row), None, "; ".join(errors.values())))
                continue
            # Classify all views of the video, clips_per_forward at a time.
            views = []
            for part in clips.split(clips_per_forward):  # uint8 (V, T, H, W, C)
                part = part.to(device, non_blocking=True)
                with autocast(device, precision):
                    logits = model(channels_first(part))
                views.append(logits.float().softmax(dim=1))
            rows.append((int(row), combine_views(torch.cat(views), ensemble).cpu().numpy(), ""))

    # Put the rows of all ranks into the order of the csv.
    gathered = [row for part in gather_objects(rows) for row in part]
    classes = max((len(scores) for _, scores, _ in gathered if scores is not None), default=0)
    result = np.zeros((len(dataset), classes), dtype=np.float32)
    readable = np.zeros(len(dataset), dtype=bool)
    errors = [""] * len(dataset)
    for row, scores, error in gathered:
        errors[row] = error
        if scores is not None:
            result[row], readable[row] = scores, True
    return VideoScores(result, readable, errors)


def combine_views(softmax: Tensor, ensemble: str) -> Tensor:
    """Combine the views of a video: [V, classes] -> [classes], by "sum" or "max"."""
    return softmax.sum(dim=0) if ensemble == "sum" else softmax.amax(dim=0)
