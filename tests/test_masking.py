"""Test the types of masks (util/masking.py), and pre-training with each of them."""

import itertools
import math

import numpy as np
import pytest
import torch

import main_pretrain
import models_mae
from tests.test_scripts import PRETRAIN, call
from util import visualize
from util.lr_sched import annealed_mask_ratio
from util.masking import MASK_TYPES, draw_masks, fixed_masks, num_kept, num_visible

GRID = (8, 14, 14)  # of the paper's models
L = math.prod(GRID)
RATIOS = {"random": 0.9, "tube": 0.9, "time": 0.5, "block": 0.75}  # of runs with 2 time steps


# --- types


@pytest.mark.parametrize("mask_type", MASK_TYPES)
@pytest.mark.parametrize("ratio", [0.01, 0.5, 0.75, 0.9, 0.95, 0.98, 0.9999])
def test_masks_are_consistent(mask_type, ratio):
    unit = {"tube": 8, "time": 196}.get(mask_type, 1)
    kept = int(L * (1 - ratio)) // unit * unit
    drawn = [(fixed_masks(5, GRID, ratio, mask_type, seed=5), max(kept, unit))]
    if kept:
        torch.manual_seed(0)
        drawn.append((draw_masks(5, GRID, ratio, mask_type), kept))
    for masks, count in drawn:
        assert masks.mask.dtype == torch.float32
        for mask, ids_restore, ids_keep in zip(*masks, strict=True):
            assert sorted(ids_restore.tolist()) == list(range(L))
            assert torch.equal(ids_restore[ids_keep], torch.arange(count))  # kept come first
            assert torch.equal(mask == 0, torch.zeros(L).index_fill(0, ids_keep, 1).bool())
        assert not (masks.mask == masks.mask[0]).all()


def test_shapes_of_masks():
    torch.manual_seed(0)

    def mask(ratio, mask_type, num_clips=5):
        return draw_masks(num_clips, GRID, ratio, mask_type).mask.view(num_clips, *GRID)

    tube = mask(0.9, "tube")
    assert (tube == tube[:, :1]).all()
    assert ((tube[:, 0] == 0).sum(dim=(1, 2)) == 19).all()
    steps = mask(0.75, "time").flatten(2)
    assert (steps == steps[..., :1]).all()
    assert ((steps[..., 0] == 0).sum(dim=1) == 2).all()

    def share_of_like_neighbours(mask_type):
        drawn = mask(0.5, mask_type, 20)
        return sum((drawn.diff(dim=dim) == 0).float().mean() for dim in (1, 2, 3)) / 3

    assert share_of_like_neighbours("random") < 0.52
    assert share_of_like_neighbours("block") > 0.8


def test_random_masks_are_their_definition():
    torch.manual_seed(3)
    masks = draw_masks(16, GRID, 0.9)
    torch.manual_seed(3)
    ids_shuffle = torch.rand(16, L).argsort(dim=1)
    assert torch.equal(masks.ids_keep, ids_shuffle[:, :156])
    assert torch.equal(masks.ids_restore, ids_shuffle.argsort(dim=1))


@pytest.mark.parametrize("grid", [(4, 6, 5), (1, 3, 2)])
def test_block_masks_remove_one_cuboid_after_another(grid):
    """Cuboids are half as long as the clip, start at every place, and may stick out."""
    half = [math.ceil(n / 2) for n in grid]
    ends = [n + length - 1 for n, length in zip(grid, half, strict=True)]
    torch.manual_seed(3)
    mask = draw_masks(1, grid, 0.5, "block").mask.view(grid).numpy()
    torch.manual_seed(3)
    values = torch.rand(1, *ends)[0].numpy()
    order, removed = np.full(grid, np.inf), 0
    for number, place in enumerate(values.flatten().argsort()[::-1]):
        last = np.unravel_index(place, values.shape)
        cuboid = tuple(slice(max(b - n + 1, 0), b + 1) for b, n in zip(last, half, strict=True))
        order[cuboid] = np.minimum(order[cuboid], number)
        removed = np.isfinite(order).sum()
        if removed >= mask.sum():
            break
    assert (mask[np.isinf(order)] == 0).all()
    assert (mask[order < number] == 1).all()  # only the last cuboid may be cut


@pytest.mark.parametrize("mask_type", MASK_TYPES)
def test_fixed_masks_depend_on_seed_and_clip_and_are_nested(mask_type):
    few, many = (fixed_masks(2, GRID, ratio, mask_type, seed=3).mask for ratio in (0.95, 0.5))
    assert (few >= many).all()
    torch.manual_seed(1)
    assert torch.equal(fixed_masks(1, GRID, 0.5, mask_type, seed=3).mask, many[:1])
    assert not torch.equal(fixed_masks(1, GRID, 0.5, mask_type, seed=4).mask, many[:1])


@pytest.mark.parametrize("ratio", [0, 1, -0.1, 95, float("nan")])
def test_bad_ratio_of_fixed_masks_is_refused(ratio):
    with pytest.raises(ValueError, match=r"mask_ratio = .* must be above 0 and below 1"):
        fixed_masks(1, GRID, ratio)


def test_unknown_mask_type_and_negative_seed_are_refused():
    for draw in (draw_masks, fixed_masks):
        with pytest.raises(ValueError, match="mask_type 'cube' is none of random, tube, time, bl"):
            draw(1, GRID, 0.9, "cube")
    with pytest.raises(ValueError, match="seed = -1 is negative"):
        fixed_masks(1, GRID, 0.9, seed=-1)


@pytest.mark.parametrize(
    ("mask_type", "grid", "ratio", "highest"),
    [("time", GRID, 0.9, 0.875), ("time", (10, 4, 4), 0.95, 0.899), ("tube", GRID, 0.999, 0.994)],
)
def test_a_ratio_that_a_type_cannot_keep_is_refused_with_the_highest(
    mask_type, grid, ratio, highest
):
    kept = rf"keeps 0 of {math.prod(grid)} tokens; .* mask_type = '{mask_type}' is {highest}$"
    with pytest.raises(ValueError, match=rf"mask_ratio = {ratio} {kept}"):
        models_mae.check_mask_ratio(grid, ratio, mask_type=mask_type)
    models_mae.check_mask_ratio(grid, highest, mask_type=mask_type)
    with pytest.raises(ValueError, match=f"mask_ratio = {ratio} keeps 0 of"):
        draw_masks(1, grid, ratio, mask_type)


@pytest.mark.parametrize("mask_type", ["random", "tube", "time"])
def test_a_decoder_that_skips_patches_favours_no_place(mask_type):
    """It decodes the first of the removed patches, as in MaskedAutoencoderViT.forward."""
    torch.manual_seed(0)
    masks = draw_masks(4000, (4, 4, 4), 0.5, mask_type)
    decoded = (masks.ids_restore >= 32) & (masks.ids_restore < 44)  # 12 of 32
    shares = decoded.float().mean(dim=0)
    assert 0.14 < shares.min() < 12 / 64 < shares.max() < 0.24


# --- training


@pytest.mark.parametrize("mask_type", MASK_TYPES)
@pytest.mark.parametrize("decoder_mask_ratio", [0.0, 0.5])
def test_every_type_trains_on_the_visible_patches_alone(mask_type, decoder_mask_ratio):
    torch.manual_seed(0)
    model = models_mae.mae_vit_tiny_patch8(img_size=32, num_frames=8, pred_t_dim=4)
    imgs, other = torch.randn(2, 2, 3, 8, 32, 32)

    def run(imgs):
        torch.manual_seed(1)
        return model(imgs, 0.7, decoder_mask_ratio, mask_type)

    loss, pred, decoded = run(imgs)
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in model.parameters())
    removed = 64 - num_kept((4, 4, 4), 0.7, mask_type)
    assert (decoded.sum(dim=1) == num_visible(removed, decoder_mask_ratio)).all()
    torch.manual_seed(1)
    mask = draw_masks(2, (4, 4, 4), 0.7, mask_type).mask.view(2, 4, 4, 4)
    for dim, size in ((1, 2), (2, 8), (3, 8)):  # of a patch
        mask = mask.repeat_interleave(size, dim)
    changed = torch.where(mask.bool().unsqueeze(1), other, imgs)
    assert torch.equal(run(changed)[1], pred)
    assert not torch.equal(run(torch.where(mask.bool().unsqueeze(1), imgs, other))[1], pred)


@pytest.fixture
def drawn(monkeypatch):
    """Record (mask_ratio, mask_type) of all masks that runs draw, for training and pictures."""
    calls = {"training": [], "pictures": []}

    def spy(kind, draw):
        def draw_and_record(num_clips, grid, *args):
            calls[kind].append(args[:2])
            return draw(num_clips, grid, *args)

        return draw_and_record

    monkeypatch.setattr(models_mae, "draw_masks", spy("training", draw_masks))
    monkeypatch.setattr(visualize, "fixed_masks", spy("pictures", fixed_masks))
    return calls


@pytest.mark.parametrize("mask_type", MASK_TYPES)
def test_runs_draw_their_type(videos, tmp_path, capsys, drawn, mask_type):
    ratio = RATIOS[mask_type]
    call(main_pretrain, "--path_to_data_dir", videos, "--output_dir", tmp_path, *PRETRAIN,
         "--epochs", 1, "--vis_period", 1, "--mask_type", mask_type,
         "--mask_ratio", ratio)  # fmt: skip
    assert drawn == {"training": [(ratio, mask_type)] * 3, "pictures": [(ratio, mask_type)]}
    out = capsys.readouterr().out
    fewer = "--mask_type tube keeps 1 of 16 places: 2 of 32 tokens (--mask_ratio 0.9 asks for 3)\n"
    assert out.count(fewer) == (mask_type == "tube")
    assert out.count(" keeps ") == (mask_type == "tube")


def test_flops_are_those_of_the_first_mask_ratio(videos, capsys):
    costs = []
    for ratio in (0.5, 0.9):
        call(main_pretrain, "--path_to_data_dir", videos, *PRETRAIN, "--dry_run",
             "--input_size", 128, "--mask_ratio", ratio, "--mask_ratio_end", 0.75)  # fmt: skip
        before, _, after = capsys.readouterr().out.rpartition(" MFLOPs per clip forward at ")
        assert after.startswith(f"--mask_ratio {ratio} (multiply-adds counted once)")
        costs.append(float(before.split()[-1]))
    assert costs[0] > costs[1]


# --- mask ratios that change


@pytest.mark.parametrize(("start", "end"), [(0.5, 0.9), (0.95, 0.75), (0.905, 0.5)])
def test_mask_ratios_go_from_end_to_end_in_hundredths(start, end):
    values = [annealed_mask_ratio(step / 100, start, end, 10) for step in range(1001)]
    assert values[0] == pytest.approx(start, abs=0.0051) and values[-1] == end
    assert values == sorted(values, reverse=start > end)
    assert values[500] == pytest.approx((start + end) / 2, abs=0.0051)
    assert max(abs(a - b) for a, b in itertools.pairwise(values)) < 0.0101
    assert annealed_mask_ratio(3, 0.9375, None, 10) == 0.9375  # does not change


def test_runs_take_the_mask_ratio_of_their_progress(videos, tmp_path, drawn):
    flags = [*PRETRAIN, "--path_to_data_dir", videos, "--output_dir", tmp_path, "--epochs", 2]
    call(main_pretrain, *flags, "--mask_ratio", 0.5, "--mask_ratio_end", 0.9)
    expected = [0.9 - 0.4 * (1 + math.cos(math.pi * step / 6)) / 2 for step in range(6)]
    assert [ratio for ratio, _ in drawn["training"]] == pytest.approx(expected, abs=0.0051)
