"""What TensorBoard shows besides curves: reconstructions of fixed clips, and single classes."""

from argparse import Namespace

import numpy as np
import torch
from torch import nn

from util.confusion import draw_confusion, report_classes, worst_classes
from util.dist import print0
from util.kinetics import Kinetics
from util.meters import RunLog, last_x
from util.optim import autocast
from util.visualize import encode_gif, enlarge, reconstruct, tile

NUM_CLIPS = 4  # that are shown
MAX_READS = 4 * NUM_CLIPS  # videos that are tried for them
MASK_SEED = 0
STRIP_FRAMES = 4  # of a clip in a still picture
MIN_SIDE = 96  # pixels: smaller frames are enlarged


class FixedClips:
    """Show what a masked autoencoder makes of the same clips and masks, epoch after epoch.

    They are the centres of the first readable videos of the csv. Only the main process works; the
    others wait for it at their next exchange. Nothing of the training changes: neither the random
    state nor the model's mode, and the loader is not used.

    Args:
        dataset: in mode "test", with one view per video.
        args: with mask_ratio, vis_period (epochs, 0: never), epochs, precision, repeat_aug,
            num_frames and sampling_rate.
    """

    def __init__(self, dataset: Kinetics, args: Namespace, device: torch.device):
        self.dataset = dataset
        self.args = args
        self.device = device
        self.clips: torch.Tensor | None = None  # uint8 [N, T, H, W, C], read when first needed

    def show(self, model: nn.Module, epoch: int, log: RunLog) -> None:
        """Log pictures and the loss of every removed patch every vis_period epochs and at the end.

        Args:
            model: a MaskedAutoencoderViT without wrappers.
            epoch: that has just been trained.
        """
        period = self.args.vis_period
        due = period and ((epoch + 1) % period == 0 or epoch + 1 == self.args.epochs)
        if not due or log.writer is None:
            return
        if self.clips is None:
            self.clips = self._read()
        if not len(self.clips):
            return
        with autocast(self.device, self.args.precision):
            result = reconstruct(model, self.clips, self.args.mask_ratio, seed=MASK_SEED)
        x = last_x(epoch, self.args.repeat_aug)
        losses = result.loss[result.mask.bool()]
        log.scalar("fixed_clips/loss", losses.mean().item(), x)
        log.histogram("fixed_clips/patch_loss", losses.numpy(), x)
        versions = zip(result.original, result.masked, result.reconstruction, strict=True)
        factor = max(1, MIN_SIDE // self.clips.shape[2])
        for i, clip in enumerate(versions):
            rows = [enlarge(frames, factor) for frames in clip]
            video = tile([rows])  # side by side
            log.gif(f"fixed_clips/video_{i}", encode_gif(video, self._fps(len(video))), x)
            step = -(-len(rows[0]) // STRIP_FRAMES)
            strip = tile([list(row[::step, None]) for row in rows])[0]
            log.image(f"fixed_clips/frames_{i}", strip.numpy(), x)

    def _fps(self, num_frames: int) -> float:
        """Return the speed at which predicted frames move as in the video."""
        return 30 / self.args.sampling_rate * num_frames / self.args.num_frames

    def _read(self) -> torch.Tensor:
        """Read the first videos of the csv that can be read; others are reported."""
        clips: list[torch.Tensor] = []
        for row in range(min(MAX_READS, len(self.dataset))):
            sample = self.dataset[0, row]
            if sample.errors:
                reason = "; ".join(sample.errors.values())
                print0(f"unreadable video, not shown in TensorBoard: {reason}")
            else:
                clips.append(sample.clips[0])
            if len(clips) == NUM_CLIPS:
                break
        shape = self.dataset.clips_shape[1:]
        return torch.stack(clips) if clips else torch.empty((0, *shape), dtype=torch.uint8)


def show_classes(confusion: np.ndarray, names: list[str], log: RunLog, x: int) -> None:
    """Log the confusion matrix, the spread of the classes' accuracy and the worst of them.

    Args:
        confusion: int [C, C], labels by predictions.
        x: place on TensorBoard's x axis.
    """
    if log.writer is None or not confusion.any():
        return
    reports = report_classes(confusion)
    log.image("val/confusion", draw_confusion(confusion), x)
    accuracies = np.array([report.accuracy for report in reports if report.videos])
    log.histogram("val/class_acc", accuracies, x)
    log.text("val/worst_classes", worst_classes(reports, names), x)
