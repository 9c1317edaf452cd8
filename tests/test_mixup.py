"""Tests of util/video/mixup.py against golden batches, and of its draws."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests import golden
from util.video.mixup import Mixup, cutmix_box, minmax_box

GOLDEN = golden.table("mixup_losses.json")


class GivenDraws:
    """Stand in for a Generator: it gives this share and this centre of the box."""

    def __init__(self, lam, centre):
        self.lam = lam
        self.centre = iter(centre or ())

    def random(self):
        return 0.0

    def beta(self, a, b):
        return self.lam

    def integers(self, low, high):
        return next(self.centre)


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: case["name"])
def test_golden_batches(case):
    expected = golden.arrays("mixup.npz")
    mixup = Mixup(
        case["num_classes"],
        mixup_alpha=0.0 if case["cutmix"] else 0.8,
        cutmix_alpha=1.0 if case["cutmix"] else 0.0,
        smoothing=case["smoothing"],
    )
    clips = torch.tensor(expected["x"])
    rng = GivenDraws(case["lam_drawn"], case["centre_yx"])
    mixed, targets = mixup(clips, torch.tensor(expected["targets"]), rng)  # pyright: ignore
    np.testing.assert_allclose(mixed, expected[f"{case['name']}/x"], rtol=0, atol=1e-6)
    np.testing.assert_allclose(targets, expected[f"{case['name']}/t"], rtol=0, atol=1e-6)
    if case["cutmix"]:
        y0, y1, x0, x1 = case["box_yl_yh_xl_xh"]
        rng = GivenDraws(None, case["centre_yx"])
        box = cutmix_box(*clips.shape[-2:], case["lam_drawn"], rng)  # pyright: ignore
        assert box == (y0, x0, y1 - y0, x1 - x0)


def test_golden_loss_of_soft_labels():
    losses = GOLDEN["losses"]
    loss = F.cross_entropy(
        torch.tensor(losses["logits"]), torch.tensor(golden.arrays("mixup.npz")["mixup_0.3/t"])
    )
    assert loss.item() == pytest.approx(losses["soft_target_ce"], abs=1e-6)


def kinds(mixup, num_batches=400):
    """Count the batches that are not changed, mixed, and cut."""
    rng, counts = np.random.default_rng(0), [0, 0, 0]
    for _ in range(num_batches):
        clips = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1, 1).expand(2, 1, 1, 32, 32).clone()
        mixed, targets = mixup(clips, torch.tensor([0, 1]), rng)
        kept = 1 - mixed[0].mean()  # a label's share is that of pixels, or of every pixel's value
        torch.testing.assert_close(targets[0], torch.stack([kept, 1 - kept]))
        kind = 1 if ((mixed > 0) & (mixed < 1)).any() else 2 if mixed[0].any() else 0
        counts[kind] += 1
    return counts


def test_draws_follow_the_probabilities():
    assert kinds(Mixup(2, smoothing=0, prob=0))[1:] == [0, 0]
    assert kinds(Mixup(2, smoothing=0, cutmix_alpha=0))[2] == 0
    assert kinds(Mixup(2, smoothing=0, mixup_alpha=0))[1] == 0
    alone, mixed, cut = kinds(Mixup(2, smoothing=0, prob=0.5, switch_prob=0.25))
    assert 170 < alone < 240 and 120 < mixed < 180 and 30 < cut < 75


def test_any_batch_size_has_partners():
    rng = np.random.default_rng(0)
    mixup = Mixup(3, cutmix_alpha=0.0, smoothing=0.0)
    clips = torch.arange(3.0).view(3, 1, 1, 1, 1)
    mixed, targets = mixup(clips.clone(), torch.arange(3), rng)
    lam = targets[0, 0].item()
    assert mixed.flatten().tolist() == pytest.approx([2 * (1 - lam), 1, 2 * lam])
    alone, targets = mixup(clips[2:].clone(), torch.tensor([2]), rng)
    assert alone.item() == pytest.approx(2) and targets.tolist() == [[0, 0, pytest.approx(1)]]


def test_same_generator_same_batch():
    clips = torch.randn(4, 3, 2, 16, 16)
    first = Mixup(5)(clips.clone(), torch.arange(4), np.random.default_rng(7))
    again = Mixup(5)(clips.clone(), torch.arange(4), np.random.default_rng(7))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


def test_minmax_boxes_keep_to_their_range():
    rng = np.random.default_rng(0)
    boxes = np.array([minmax_box(40, 60, (0.2, 0.5), rng) for _ in range(500)])
    top, left, h, w = boxes.T
    assert (h.min(), h.max(), w.min(), w.max()) == (8, 20, 12, 30)
    assert (top.min(), left.min()) == (0, 0)
    assert ((top + h).max(), (left + w).max()) == (40, 60)
    mixup = Mixup(2, mixup_alpha=0.0, cutmix_minmax=(0.5, 0.5), smoothing=0.0)
    _, targets = mixup(torch.zeros(2, 1, 1, 8, 8), torch.tensor([0, 1]), rng)
    assert targets[0].tolist() == [0.75, 0.25]
