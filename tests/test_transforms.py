"""Tests of util/video/sampling.py and transforms.py against golden numbers and torchvision."""

import math
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms import RandomResizedCrop

from tests import golden
from util.video.sampling import (
    NO_BOX,
    clip_length,
    clip_start,
    frame_indices,
    random_erasing_box,
    random_resized_crop_box,
    random_start,
    short_side_size,
    uniform_crop_box,
)
from util.video.transforms import augment_on_device, channels_first, normalize, resize_frame

SPATIAL = golden.table("spatial_sampling.json")
ERASING = golden.table("random_erasing.json")
GOLDEN_RATIO = (0.75, 1.3333)


class GivenDraws:
    """Stand in for a Generator: fixed uniform draws in turn, integers at their upper bound."""

    def __init__(self, *uniforms):
        self.uniforms = uniforms
        self.calls = 0

    def random(self):
        return 0.0

    def uniform(self, low, high):
        self.calls += 1
        return self.uniforms[(self.calls - 1) % len(self.uniforms)]

    def integers(self, low, high):
        return high - 1


class PythonRandom:
    """Stand in for a Generator: draws of the standard library, which made the golden rows."""

    def __init__(self, seed):
        rng = random.Random(seed)
        self.random, self.uniform = rng.random, rng.uniform
        self.integers = lambda low, high: rng.randint(low, high - 1)


def resize(clip, size):
    """Resize all frames of a clip."""
    out = clip.new_empty(len(clip), *size, clip.shape[3])
    for source, target in zip(clip.numpy(), out.numpy(), strict=True):
        resize_frame(source, target)
    return out


def moving_pattern(num_frames=4, height=256, width=340):
    """Return a smooth coloured pattern with edges that moves, uint8 [T, H, W, 3]."""
    t, y, x, c = torch.meshgrid(*map(torch.arange, (num_frames, height, width, 3)), indexing="ij")
    waves = torch.sin(x / (7 + c) + t) + torch.cos(y / (5 + c) - t)
    checks = ((x // 23 + y // 17 + t) % 2) * 0.5
    return ((waves + checks + 2) / 4.5 * 255).to(torch.uint8)


def test_clip_length():
    assert clip_length(16, 4, 30.0) == 64
    assert clip_length(16, 4, 15.0) == 32
    assert clip_length(16, 4, 30000 / 1001) == pytest.approx(63.936064)
    assert clip_length(8, 8, 25.0, target_fps=25.0) == 64


def test_random_start_is_uniform_where_the_clip_fits():
    rng = np.random.default_rng(0)
    starts = [random_start(300, 64.0, rng) for _ in range(2000)]
    assert 0 <= min(starts) < 2 and 234 < max(starts) <= 236
    assert np.mean(starts) == pytest.approx(118, abs=5)
    assert random_start(30, 64.0, rng) == 0
    assert random_start(300, 64.0, np.random.default_rng(7)) == random_start(
        300, 64.0, np.random.default_rng(7)
    )


def test_clip_starts_of_the_test_views():
    assert [clip_start(300, 64.0, k, 7) for k in range(7)] == [39.0 * k for k in range(7)]
    assert [clip_start(300, 64.0, k, 10) for k in range(10)] == [26.0 * k for k in range(10)]
    assert clip_start(300, 64.0, 0, 1) == 118
    assert clip_start(301, 64.0, 0, 1) == 118  # rounded down
    assert clip_start(300, 63.5, 1, 3) == 118  # 236.5 / 2, rounded down
    assert [clip_start(30, 64.0, k, 3) for k in range(3)] == [0, 0, 0]


def test_frame_indices():
    # end = start + clip - 1: 63 frames in 15 steps of 4.2
    expected = [0, 4, 8, 12, 16, 21, 25, 29, 33, 37, 42, 46, 50, 54, 58, 63]
    assert frame_indices(0, 64, 16, 300).tolist() == expected
    assert frame_indices(236, 64, 16, 300).tolist() == [236 + i for i in expected]
    assert frame_indices(0.9, 64, 16, 300).tolist()[:3] == [0, 5, 9]
    assert frame_indices(0, 64, 16, 10).tolist() == [0, 4, 8] + [9] * 13  # shorter than the clip
    assert frame_indices(0, 64, 1, 300).tolist() == [0]
    for start, shown in ((0, 0), (7.3, 7), (299.95, 299)):  # a frame lasts longer than the clip
        assert frame_indices(start, 0.1, 4, 300).tolist() == [shown] * 4
    assert frame_indices(0, 64, 16, 300).dtype == np.int64


@pytest.mark.parametrize("row", SPATIAL["random_resized_crop_given_draws"]["rows"])
def test_resized_crop_of_given_draws(row):
    height, width, area, log_aspect, box = row
    rng = GivenDraws(area, log_aspect)
    assert random_resized_crop_box(height, width, (0.08, 1), GOLDEN_RATIO, rng) == tuple(box)


@pytest.mark.parametrize("row", SPATIAL["random_resized_crop_seeded"]["rows"])
def test_resized_crop_of_seeded_draws(row):
    seed, height, width, scale, ratio, box = row
    assert random_resized_crop_box(height, width, scale, ratio, PythonRandom(seed)) == tuple(box)


@pytest.mark.parametrize("row", SPATIAL["random_resized_crop_fallback"]["rows"])
def test_resized_crop_gives_up_after_ten_draws(row):
    height, width, box = row
    rng = GivenDraws(100.0, 0.0)  # ten times wider and taller than the frame
    assert random_resized_crop_box(height, width, (0.5, 1), GOLDEN_RATIO, rng) == tuple(box)
    assert rng.calls == 20


def test_resized_crops_are_distributed_as_torchvision_draws_them():
    height, width, scale, ratio = 256, 340, (0.5, 1.0), (3 / 4, 4 / 3)
    rng = np.random.default_rng(0)
    ours = [random_resized_crop_box(height, width, scale, ratio, rng) for _ in range(4000)]
    torch.manual_seed(0)
    frame = torch.empty(3, height, width)
    theirs = [RandomResizedCrop.get_params(frame, list(scale), list(ratio)) for _ in range(4000)]
    for quantile in (0.1, 0.5, 0.9):
        a, b = np.quantile(ours, quantile, axis=0), np.quantile(theirs, quantile, axis=0)
        np.testing.assert_allclose(a, b, atol=6)


def test_uniform_crops():
    for height, width, size, position, top, left in SPATIAL["uniform_crop"]["rows"]:
        box = uniform_crop_box(height, width, size, position)
        assert box == (top, left, size, size), (height, width, size, position)


@pytest.mark.parametrize(("height", "width"), [(256, 341), (341, 256), (224, 224)])
def test_single_and_many_crops(height, width):
    assert uniform_crop_box(height, width, 224, 0, 1) == uniform_crop_box(height, width, 224, 1, 3)
    along = 0 if height > width else 1
    five = [uniform_crop_box(height, width, 224, k, 5)[along] for k in range(5)]
    three = [uniform_crop_box(height, width, 224, k, 3)[along] for k in range(3)]
    assert five[::2] == three
    assert max(np.diff(five)) - min(np.diff(five)) <= 1


def test_crop_that_does_not_exist():
    with pytest.raises(ValueError, match="does not fit"):
        uniform_crop_box(200, 340, 224, 0)
    with pytest.raises(ValueError, match="crop position 3 is not in"):
        uniform_crop_box(256, 340, 224, 3)


def test_short_side_sizes():
    for height, width, draw, size in SPATIAL["short_side_scale_jitter"]["rows"]:
        assert short_side_size(height, width, round(draw)) == tuple(size), (height, width, draw)


@pytest.mark.parametrize("size", [(5, 6), (13, 11), (7, 9)])
def test_resize_has_the_golden_geometry(size):
    expected = golden.arrays("spatial_resize.npz")
    source = expected["x"].transpose(1, 2, 3, 0)  # (C, T, H, W) -> (T, H, W, C)
    target = expected[f"bilinear_{size[0]}x{size[1]}"].transpose(1, 2, 3, 0)
    low, span = source.min(), np.ptp(source)  # bilinear weights sum to 1, so levels map back
    clip = torch.from_numpy(((source - low) / span * 255).round().astype(np.uint8))
    error = np.abs(resize(clip, size).numpy() - (target - low) / span * 255)
    assert error.max() <= 1.5  # half a level from the source, one from the result


@pytest.mark.parametrize("position", [0, 1, 2])
@pytest.mark.parametrize("tall", [False, True])
def test_whole_test_view_is_the_golden_one(tall, position):
    expected = golden.arrays("spatial_resize.npz")
    source = expected["clip"].transpose(1, 2, 3, 0)
    if tall:
        source = source.transpose(0, 2, 1, 3)
    target = expected[f"test_crop16{'_tall' * tall}_idx{position}"].transpose(1, 2, 3, 0)
    low, span = source.min(), np.ptp(source)
    clip = torch.from_numpy(((source - low) / span * 255).round().astype(np.uint8))
    clip = resize(clip, short_side_size(*clip.shape[1:3], 16))
    top, left, h, w = uniform_crop_box(*clip.shape[1:3], 16, position)
    error = np.abs(clip[:, top : top + h, left : left + w].numpy() - (target - low) / span * 255)
    assert error.max() <= 1.5


@pytest.mark.parametrize(
    "box", [(3, 40, 247, 260), (10, 20, 201, 230), (60, 60, 100, 120), (0, 0, 256, 340)]
)
def test_resize_is_within_one_level_of_float_bilinear(box):
    top, left, h, w = box
    crop = moving_pattern()[:, top : top + h, left : left + w]
    out = resize(crop, (224, 224))
    exact = F.interpolate(crop.permute(0, 3, 1, 2).double(), (224, 224), mode="bilinear")
    error = (out - exact.permute(0, 2, 3, 1)).abs()
    assert out.dtype == torch.uint8 and out.is_contiguous()
    assert error.max() <= 1
    assert error.mean() <= 0.28  # 0.25 is left by perfect rounding where nothing is flat


def test_resize_antialiases_only_large_reductions():
    stripes = torch.zeros(1, 720, 720, 3, dtype=torch.uint8)
    stripes[:, :, ::2] = 255
    small = resize(stripes, (224, 224)).float()
    assert small.is_contiguous()
    assert small[:, :, 2:-2].std() < 12  # plain bilinear: about 90
    half = resize(stripes[:, :300, :300], (224, 224)).float()
    assert half.std() > 50


def test_resize_to_the_same_size_changes_nothing():
    clip = moving_pattern(2, 32, 48)
    assert torch.equal(resize(clip, (32, 48)), clip)


@pytest.mark.parametrize("row", ERASING["given_draws"]["rows"])
def test_erasing_box_of_given_draws(row):
    area, log_aspect, box = row
    height, width = ERASING["given_draws"]["H"], ERASING["given_draws"]["W"]
    y0, y1, x0, x1 = box or (0, 0, 0, 0)  # no box: NO_BOX
    drawn = random_erasing_box(height, width, GivenDraws(area, log_aspect))
    assert drawn == (y0, x0, y1 - y0, x1 - x0)


def test_erasing_box_is_smaller_than_the_frame():
    half = GivenDraws(0.5, 0.0)  # a square as large as the short side
    assert random_erasing_box(20, 40, half) == NO_BOX
    assert random_erasing_box(40, 20, half) == NO_BOX
    assert random_erasing_box(40, 40, GivenDraws(0.95, 0.0)) == (1, 1, 39, 39)


@pytest.mark.parametrize("name", ["pixel_count1", "pixel_count1_b", "p25_not_applied_or_applied"])
def test_erasing_box_of_seeded_draws(name):
    case = next(case for case in ERASING["cases"] if case["name"] == name)
    y0, y1, x0, x1 = case["bounding_box_per_frame_y0y1x0x1"][0]
    probability = case["kwargs"]["probability"]
    drawn = random_erasing_box(40, 52, PythonRandom(case["seed"]), probability)
    assert drawn == (y0, x0, y1 - y0, x1 - x0)


def test_erasing_happens_as_often_as_asked():
    rng = np.random.default_rng(0)
    boxes = [random_erasing_box(224, 224, rng) for _ in range(4000)]
    erased = [box for box in boxes if box != NO_BOX]
    assert len(erased) / len(boxes) == pytest.approx(0.25, abs=0.03)
    assert all(random_erasing_box(224, 224, rng, probability=0.0) == NO_BOX for _ in range(50))
    for top, left, h, w in erased:
        assert 0 <= top <= 224 - h and 0 <= left <= 224 - w
        assert 0.019 < h * w / 224**2 < 0.34


def test_normalize():
    expected = golden.arrays("spatial_resize.npz")
    clip = torch.from_numpy(expected["normalize_in_uint8"])
    out = normalize(channels_first(clip[None]))
    assert out.shape == (1, 3, 2, 3, 4)
    expected = torch.from_numpy(expected["normalize_out"])
    torch.testing.assert_close(out[0].permute(1, 2, 3, 0), expected, rtol=0, atol=1e-6)


def test_augment_on_device_without_draws_is_normalize():
    clips = moving_pattern(4, 20, 24).unflatten(0, (2, 2))
    assert torch.equal(augment_on_device(clips, None, None), normalize(channels_first(clips)))


def test_augment_on_device_flips_and_erases_the_given_clips():
    clips = moving_pattern(9, 20, 24).unflatten(0, (3, 3))
    flip = torch.tensor([False, True, False])
    erase = torch.tensor([[2, 3, 10, 12], [5, 0, 15, 4], [0, 0, 0, 0]])
    before = clips.clone()
    out = augment_on_device(clips, flip, erase)
    plain = normalize(channels_first(clips))
    plain[1] = plain[1].flip(-1)  # the box refers to the flipped clip
    for n, (top, left, h, w) in enumerate(erase.tolist()):
        inside = torch.zeros(20, 24, dtype=torch.bool)
        inside[top : top + h, left : left + w] = True
        assert torch.equal(out[n][..., ~inside], plain[n][..., ~inside])
        assert not (out[n][..., inside] == plain[n][..., inside]).any()
    assert torch.equal(clips, before)
    assert out.is_contiguous()


def test_erased_pixels_are_fresh_standard_noise():
    clips = torch.zeros(2, 4, 60, 60, 3, dtype=torch.uint8)
    erase = torch.tensor([[5, 5, 50, 50]]).expand(2, -1)
    torch.manual_seed(0)
    first = augment_on_device(clips, None, erase)[..., 5:55, 5:55]
    assert first.mean().abs() < 0.02 and abs(first.std().item() - 1) < 0.02
    frames = first.permute(0, 2, 1, 3, 4).flatten(0, 1).flatten(1)  # (N T, C h w)
    correlation = torch.corrcoef(frames) - torch.eye(len(frames))
    assert correlation.abs().max() < 6 / math.sqrt(frames.shape[1])
    torch.manual_seed(0)
    again = augment_on_device(clips, None, erase)[..., 5:55, 5:55]
    assert torch.equal(first, again)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_augment_on_device_does_not_wait_for_cuda():
    clips = moving_pattern(8, 32, 32).unflatten(0, (2, 4))
    flip = torch.tensor([True, False])
    no_erase = torch.zeros(2, 4, dtype=torch.int64)
    expected = augment_on_device(clips, flip, no_erase)
    arguments = [x.cuda() for x in (clips, flip, no_erase)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = augment_on_device(*arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(out.cpu(), expected, rtol=0, atol=1e-6)
