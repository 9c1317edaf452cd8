"""Tests of util/video/rand_augment.py and clip_ops.py against golden tables and timm's PIL code."""

import math
import random
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import auto_augment
from torchvision.transforms import functional

from tests import golden
from util.errors import UserError
from util.video import clip_ops
from util.video.clip_ops import crop
from util.video.rand_augment import (
    OPERATIONS,
    RandAugment,
    apply,
    operation_arguments,
    parse_config,
)

GOLDEN = golden.table("randaug.json")
WARPS = ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY")


def our_name(name):
    return name.removesuffix("Increasing").removesuffix("Rel")


def timm_name(name):
    return name + "Rel" if name.startswith("Translate") else name


def on_pil_frames(name, clip, *arguments):
    """Apply timm's operation to every frame of a clip."""
    operation = auto_augment.NAME_TO_OP[timm_name(name)]
    kwargs = {"fillcolor": (128, 128, 128), "resample": Image.Resampling.BICUBIC}
    frames = [operation(Image.fromarray(frame), *arguments, **kwargs) for frame in clip]
    return np.stack([np.asarray(frame) for frame in frames])


@pytest.fixture(scope="module")
def clips():
    """Return four clips [T, H, W, 3]: smooth, noisy, constant, and with few dark levels."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:57, :83]
    waves = [np.sin(x / 9 + k) + np.cos(y / 7 - k) for k in range(9)]
    smooth = np.stack([np.stack(waves[k : k + 3], -1) for k in range(0, 9, 3)])
    noise = rng.integers(0, 256, (3, 40, 31, 3), dtype=np.uint8)
    constant = np.broadcast_to(np.array([0, 77, 255], dtype=np.uint8), (2, 24, 33, 3)).copy()
    dark = rng.integers(20, 23, (2, 25, 16, 3), dtype=np.uint8)
    return [((smooth + 2) * 63).astype(np.uint8), noise, constant, dark]


def test_configs_mean_what_the_golden_table_says():
    for config, expected in GOLDEN["config_parsing"].items():
        ours = parse_config(config)
        assert ours.num_layers == expected["num_layers"]
        assert ours.magnitude == expected["magnitude"]
        assert ours.magnitude_std == expected["magnitude_std"]
        assert ours.replace == expected["replace"]
        assert ours.increasing == expected["increasing"]
        shares = RandAugment(config).shares
        golden_shares = np.array(expected["weights"] or [1 / 15] * 15)
        by_name = dict(zip(ours.weights, shares, strict=True))
        names = [our_name(name) for name in GOLDEN["default_variant_names"]]
        np.testing.assert_allclose([by_name.get(name, 0) for name in names], golden_shares)


@pytest.mark.parametrize(
    "config",
    ["rand-m9-mstd0.5", "rand-m5-n3-p0.8-mstd101-mmax20-inc1", "rand-tweights-m3-n4", "rand-mmax0"],
)
def test_configs_mean_what_timm_makes_of_them(config):
    ours = RandAugment(config)
    theirs = auto_augment.rand_augment_transform(config, {"translate_const": 100})
    assert ours.config.num_layers == theirs.num_layers
    assert ours.config.replace == (theirs.choice_weights is None)
    op = theirs.ops[0]
    assert ours.config.magnitude == op.magnitude
    assert ours.config.magnitude_std == op.magnitude_std
    assert ours.config.magnitude_max == (op.magnitude_max or 10)
    assert ours.config.probability == op.prob
    names = [op.name for op in theirs.ops]
    assert ours.config.increasing == any(name.endswith("Increasing") for name in names)
    shares = theirs.choice_weights
    if shares is None:
        shares = [1 / len(names)] * len(names)
    expected = {our_name(name): share for name, share in zip(names, shares, strict=True)}
    assert dict(zip(ours.names, ours.shares, strict=True)) == pytest.approx(expected)


BAD_CONFIGS = ["original-mstd0.5", "augmix-m3", "random-m7", "", "rand-", "rand-x3", "rand-m"]
BAD_CONFIGS += ["rand-m7,n2", "rand-n2.5", "rand-inc", "rand-m-1", "rand-mstd1e3", "rand-t3a"]
BAD_CONFIGS += ["rand-w1", "rand-t3aw", "rand-p50", "rand-w0-n14"]


@pytest.mark.parametrize("config", BAD_CONFIGS)
def test_bad_config_is_refused_in_one_sentence(config):
    with pytest.raises(UserError) as error:
        RandAugment(config)
    assert repr(config) in str(error.value)
    assert "\n" not in str(error.value)


def test_operations_are_the_golden_fifteen():
    assert list(parse_config("rand").weights) == [our_name(op["name"]) for op in GOLDEN["ops"]]


def test_arguments_are_the_golden_ones():
    for op in GOLDEN["ops"]:
        name = our_name(op["name"])
        for key, expected in op["args_by_magnitude_and_sign"].items():
            magnitude, direction = key.split("|")
            sign = -1.0 if direction == "neg" else 1.0
            ours = operation_arguments(name, float(magnitude), lambda sign=sign: sign, True)
            if name == "Posterize" and expected == [0]:
                expected = [1]  # 0 bits are an error in Pillow
            assert list(ours) == pytest.approx(expected), (name, key)
    for name, by_magnitude in GOLDEN["default_variant_args_pos"].items():
        for magnitude, expected in by_magnitude.items():
            ours = operation_arguments(our_name(name), float(magnitude), lambda: 1.0, False)
            if name == "Posterize" and expected == [0]:
                expected = [1]
            assert list(ours) == pytest.approx(expected), (name, magnitude)


@pytest.mark.parametrize("magnitude", [0.0, 0.3, 3.1, 7.0, 8.7, 10.0])
@pytest.mark.parametrize("name", [name for name in OPERATIONS if name not in WARPS])
def test_colours_are_bit_for_bit_those_of_timm(name, magnitude, clips):
    for increasing, sign in ((True, 1.0), (True, -1.0), (False, 1.0)):
        arguments = operation_arguments(name, magnitude, lambda sign=sign: sign, increasing)
        for clip in clips:
            before = clip.copy()
            ours = OPERATIONS[name](clip, *arguments)
            assert ours.dtype == np.uint8 and ours is not clip
            np.testing.assert_array_equal(ours, on_pil_frames(name, clip, *arguments))
            np.testing.assert_array_equal(clip, before)


@pytest.mark.parametrize("magnitude", [0.0, 0.3, 3.1, 7.0, 8.7, 10.0])
@pytest.mark.parametrize("name", WARPS)
def test_warps_are_those_of_timm_except_for_rare_single_levels(name, magnitude, clips):
    for sign in (1.0, -1.0):
        arguments = operation_arguments(name, magnitude, lambda sign=sign: sign, True)
        for clip in clips[:3]:
            ours = OPERATIONS[name](clip, *arguments)
            difference = np.abs(ours.astype(int) - on_pil_frames(name, clip, *arguments))
            assert ours.shape == clip.shape and ours.dtype == np.uint8
            assert difference.max() <= 1
            assert difference.mean() <= 0.01  # 0.001 on real frames, from sums rounded differently


class SeededDraws:
    """Stand in for a Generator: draws of the generators that made the golden rows."""

    def __init__(self, seed):
        numbers, rng = np.random.RandomState(seed), random.Random(seed)
        self.choice = lambda n, size, replace, p: numbers.choice(n, size, replace=replace)
        self.random, self.normal, self.uniform = rng.random, rng.gauss, rng.uniform


@pytest.mark.parametrize("row", GOLDEN["seeded"])
def test_seeded_draws(row):
    augment = RandAugment(GOLDEN["config"])
    names = [augment.names[i] for i in SeededDraws(row["seed"]).choice(15, 2, True, None)]
    assert names == [our_name(name) for name in row["ops_drawn"]]
    drawn = augment.draw(SeededDraws(row["seed"]))
    assert bool(drawn) == row["changed"]
    assert {name for name, _ in drawn} <= set(names)


def test_draws_have_the_configured_frequencies():
    augment, rng = RandAugment("rand-m7-mstd0.5-inc1"), np.random.default_rng(0)
    clips = [augment.draw(rng) for _ in range(6000)]
    assert sum(map(len, clips)) / len(clips) == pytest.approx(1, abs=0.04)  # 2 x 0.5
    counts = Counter(name for drawn in clips for name, _ in drawn)
    assert min(counts.values()) > 300 and max(counts.values()) < 500  # 400 of each
    degrees = np.array([args[0] for drawn in clips for name, args in drawn if name == "Rotate"])
    assert (degrees > 0).mean() == pytest.approx(0.5, abs=0.1)
    assert np.abs(degrees).mean() == pytest.approx(21, abs=0.3)
    assert np.abs(degrees).std() == pytest.approx(1.5, abs=0.2)


def test_magnitudes_stay_within_their_bound():
    rng = np.random.default_rng(0)

    def degrees(config):
        draws = (draw for _ in range(2000) for draw in RandAugment(config).draw(rng))
        return np.array([abs(arguments[0]) for name, arguments in draws if name == "Rotate"])

    assert degrees("rand-m10-mstd3-p1").max() == 30
    assert degrees("rand-m20-mmax20-p1").min() == 60
    uniform = degrees("rand-m10-mstd101-p1")
    assert uniform.mean() == pytest.approx(15, abs=2) and uniform.min() < 1


def test_a_clip_changes_as_its_frames_would_and_keeps_its_source(clips):
    augment = RandAugment("rand-m7-n4-mstd0.5-inc1-p0.8")
    clip, before = clips[1], clips[1].copy()
    changed = 0
    for seed in range(20):
        drawn = augment.draw(np.random.default_rng(seed))
        assert drawn == augment.draw(np.random.default_rng(seed))
        out = apply(clip, drawn)
        assert out.shape == clip.shape and out.dtype == np.uint8
        for t in range(len(clip)):
            np.testing.assert_array_equal(apply(clip[t : t + 1], drawn), out[t : t + 1])
        changed += not np.array_equal(out, clip)
    assert changed >= 15
    np.testing.assert_array_equal(clip, before)


def test_zero_probability_changes_nothing(clips):
    drawn = RandAugment("rand-m9-p0").draw(np.random.default_rng(0))
    np.testing.assert_array_equal(apply(clips[0], drawn), clips[0])
    assert math.isinf(parse_config("rand-mstd1000").magnitude_std)


@pytest.mark.parametrize("config", ["rand-m7-n1-p1-mstd0.5-inc1", "rand-m10-n3-p0.8-inc1"])
def test_computing_only_the_crop_gives_the_same_crop(clips, config):
    augment, seen = RandAugment(config), set()
    for seed in range(120):
        clip = clips[seed % 4]
        rng = np.random.default_rng(seed)
        _, height, width, _ = clip.shape
        top, left = int(rng.integers(height)) * (seed % 3 > 0), int(rng.integers(width))
        h, w = int(rng.integers(1, height - top + 1)), int(rng.integers(1, width - left + 1))
        box = top, left, h, w
        drawn = augment.draw(rng)
        seen |= {name for name, _ in drawn}
        before = clip.copy()
        cropped = apply(clip, drawn, box)
        np.testing.assert_array_equal(cropped, crop(apply(clip, drawn), box), f"{drawn} {box}")
        np.testing.assert_array_equal(clip, before)
    assert seen == set(augment.names)


@pytest.mark.parametrize("factor", [0.0, 0.3, 1.0, 1.4, 2.0])
@pytest.mark.parametrize(
    ("operation", "name"),
    [(clip_ops.brightness, "brightness"), (clip_ops.clip_contrast, "contrast"),
     (clip_ops.color, "saturation")],
)  # fmt: skip
def test_colours_of_a_clip_are_those_of_torchvision(operation, name, factor):
    """For torchvision, the frames one above the other are one picture, with one mean grey."""
    noise = np.random.default_rng(0).integers(0, 256, (5, 24, 31, 3))
    clip = (noise * np.linspace(0.2, 1, 5)[:, None, None, None]).astype(np.uint8)  # brightens
    found = operation(clip, factor)
    picture = torch.from_numpy(clip).flatten(0, 1).permute(2, 0, 1)
    expected = getattr(functional, f"adjust_{name}")(picture, factor).permute(1, 2, 0).numpy()
    assert found.dtype == np.uint8
    np.testing.assert_allclose(found.reshape(expected.shape).astype(int), expected, atol=1, rtol=0)


def test_draws_of_colour_jitter(monkeypatch):
    """Each of the three once, in every order, by factors that fill the range evenly."""
    calls = []
    for name in ("brightness", "clip_contrast", "color"):
        monkeypatch.setattr(clip_ops, name, lambda clip, x, out, name=name: calls.append((name, x)))
    rng = np.random.default_rng(0)
    for _ in range(600):
        clip_ops.color_jitter(np.zeros((1, 1, 1, 3), np.uint8), 0.4, rng)
    orders = Counter(tuple(name for name, _ in calls[i : i + 3]) for i in range(0, 1800, 3))
    assert len(orders) == 6 and min(orders.values()) > 60
    assert all(len(set(order)) == 3 for order in orders)
    for name in orders.popitem()[0]:
        factors = np.array([x for other, x in calls if other == name])
        assert 0.6 <= factors.min() < 0.61 and 1.39 < factors.max() <= 1.4
        assert factors.mean() == pytest.approx(1, abs=0.03)


def test_colour_jitter_in_place_is_that_in_new_memory(clips):
    operations = clip_ops.brightness, clip_ops.clip_contrast, clip_ops.color
    for seed in range(6):
        clip, rng = clips[0].copy(), np.random.default_rng(seed)
        clip_ops.color_jitter(clip, 0.6, np.random.default_rng(seed))
        expected, factors = clips[0], rng.uniform(0.4, 1.6, 3)
        for i in rng.permutation(3):
            expected = operations[i](expected, factors[i])
        np.testing.assert_array_equal(clip, expected)


def test_warps_of_only_the_outside_are_filled(clips):
    for clip in clips:
        box = (0, 0, clip.shape[1], 5)
        out = OPERATIONS["TranslateX"](clip, -1.0, box=box)
        assert out.shape == crop(clip, box).shape and (out == 128).all()
