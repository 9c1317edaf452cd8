"""Mixup (arXiv 1710.09412) and CutMix (arXiv 1905.04899) of a batch of clips."""

from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from torch import Tensor

from util.video.sampling import Box, place_box


@dataclass(frozen=True)
class Mixup:
    """Mix every clip of a batch with its partner: the first with the last, and so on.

    One draw decides for the whole batch and all frames. Unlike timm.data.Mixup, whose boxes differ
    by a pixel between versions, this takes batches of any size and draws from a Generator.
    """

    num_classes: int
    mixup_alpha: float = 0.8  # a clip keeps a share drawn from Beta(alpha, alpha); 0: no mixup
    cutmix_alpha: float = 1.0  # the same for cutmix
    cutmix_minmax: tuple[float, float] | None = None  # instead: bounds of the box's sides (shares)
    prob: float = 1.0  # probability that a batch is mixed at all
    switch_prob: float = 0.5  # probability of cutmix if both are on
    smoothing: float = 0.1  # share of a label that is spread evenly over all classes

    def __call__(self, clips: Tensor, labels: Tensor, rng: Generator) -> tuple[Tensor, Tensor]:
        """Mix clips [N, C, T, H, W] in place and return them with soft labels [N, classes]."""
        lam = 1.0  # the share that a clip keeps
        if rng.random() < self.prob:
            cut = self.cutmix_alpha > 0 or self.cutmix_minmax is not None
            if cut and self.mixup_alpha > 0:
                cut = rng.random() < self.switch_prob
            if cut:
                lam = self._cut(clips, rng)
            else:
                lam = float(rng.beta(self.mixup_alpha, self.mixup_alpha))
                partners = clips.flip(0).mul_(1 - lam)
                clips.mul_(lam).add_(partners)
        off = self.smoothing / self.num_classes
        targets = clips.new_full((len(labels), self.num_classes), off)
        targets.scatter_(1, labels[:, None], 1 - self.smoothing + off)
        return clips, targets * lam + targets.flip(0) * (1 - lam)

    def _cut(self, clips: Tensor, rng: Generator) -> float:
        """Paste a box of its partner into every clip; return the share of pixels outside it."""
        H, W = clips.shape[-2:]
        if self.cutmix_minmax is not None:
            top, left, h, w = minmax_box(H, W, self.cutmix_minmax, rng)
        else:
            lam = float(rng.beta(self.cutmix_alpha, self.cutmix_alpha))
            top, left, h, w = cutmix_box(H, W, lam, rng)
        inside = clips[..., top : top + h, left : left + w]
        inside.copy_(inside.flip(0))
        return 1 - h * w / (H * W)


def cutmix_box(height: int, width: int, lam: float, rng: Generator) -> Box:
    """Draw a box of about 1 - `lam` of the frame's area, centred anywhere, clipped to the frame."""
    half_h, half_w = int(height * np.sqrt(1 - lam)) // 2, int(width * np.sqrt(1 - lam)) // 2
    y, x = int(rng.integers(0, height)), int(rng.integers(0, width))
    top, left = max(y - half_h, 0), max(x - half_w, 0)
    return top, left, min(y + half_h, height) - top, min(x + half_w, width) - left


def minmax_box(height: int, width: int, share: tuple[float, float], rng: Generator) -> Box:
    """Draw a box inside the frame whose sides are between two shares of the frame's sides."""
    h = int(rng.integers(int(height * share[0]), int(height * share[1]) + 1))
    w = int(rng.integers(int(width * share[0]), int(width * share[1]) + 1))
    return place_box(height, width, h, w, rng)
