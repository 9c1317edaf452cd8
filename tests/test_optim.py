"""Compare schedules, groups, optimiser steps and training engines with golden numbers."""

import argparse
import contextlib
import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

import engine_finetune
import engine_pretrain
from models_mae import MaskedAutoencoderViT
from models_vit import VisionTransformer
from tests import golden
from util.checkpoint import Checkpoints
from util.dist import seed_step
from util.loader import Batch
from util.lr_sched import learning_rate, set_learning_rate
from util.meters import RunLog
from util.optim import (
    NonFiniteError,
    autocast,
    choose_precision,
    grad_sync,
    layer_id,
    make_optimizer,
    make_scaler,
    optim_step,
    param_groups_lrd,
    param_groups_weight_decay,
)

CPU = torch.device("cpu")
SCHEDULE = golden.table("lr_schedule.json")
GROUPS = golden.table("optimizer_groups.json")
TRAJECTORIES = golden.table("trajectories.json")
ACCUM = golden.table("traj_mae_accum.json")
LRD = "param_groups_lrd|layer_decay=0.75|weight_decay=0.05"


def no_scaler():
    return make_scaler(CPU, "fp32")


# --- schedule and parameter groups


# one row has the epochs end with the warm-up, where nothing is defined: a run never gets there
SCHEDULE_ROWS = [row for row in SCHEDULE["rows"] if row[5] != "ZeroDivisionError"]


@pytest.mark.parametrize("row", SCHEDULE_ROWS, ids=lambda row: "-".join(map(str, row[:5])))
def test_learning_rate_schedule(row):
    lr, min_lr, warmup_epochs, epochs, progress, expected, plain, scaled = row
    rate = learning_rate(progress, lr, min_lr, warmup_epochs, epochs)
    assert rate == pytest.approx(expected, rel=1e-12, abs=1e-18)
    groups = [{"params": [nn.Parameter(torch.zeros(1))]} for _ in range(2)]
    groups[1]["lr_scale"] = 0.31640625
    optimizer = make_optimizer(groups, (0.9, 0.95), CPU)
    set_learning_rate(optimizer, rate)
    rates = [group["lr"] for group in optimizer.param_groups]
    assert rates == pytest.approx([plain, scaled], rel=1e-12, abs=1e-18)


@pytest.mark.parametrize("case", [name for name in GROUPS if name.startswith("add_weight_decay")])
def test_pretraining_groups(case):
    _, positions, bias_wd = case.split("|")
    overrides = {"sep_pos_embed": "sep1" in positions, "cls_embed": "cls1" in positions}
    model = golden.build(MaskedAutoencoderViT, TRAJECTORIES["mae"], **overrides)
    groups = param_groups_weight_decay(model, 0.05, bias_wd=bias_wd.endswith("True"))
    names = {p: name for name, p in model.named_parameters()}
    found = [
        {"weight_decay": g["weight_decay"], "names": [names[p] for p in g["params"]]}
        for g in groups
    ]
    assert found == GROUPS[case]  # the order too: a stored optimiser state goes by position


@pytest.mark.parametrize("positions", GROUPS[LRD])
def test_layer_decay_groups(positions):
    overrides = {"sep_pos_embed": "sep1" in positions, "cls_embed": "cls1" in positions}
    model = golden.build(VisionTransformer, TRAJECTORIES["vit"], **overrides)
    expected = GROUPS[LRD][positions]
    groups = param_groups_lrd(model, expected["depth"], weight_decay=0.05, layer_decay=0.75)
    assert len(groups) == expected["num_groups"]
    rows = {}
    for number, group in enumerate(groups):
        for parameter in group["params"]:
            assert parameter not in rows
            rows[parameter] = group["lr_scale"], group["weight_decay"], number
    parameters = dict(model.named_parameters())
    assert len(rows) == len(parameters)
    for name, layer, *row in expected["rows"]:
        assert layer_id(name, expected["depth"]) == layer, name
        assert rows[parameters[name]] == pytest.approx(tuple(row), rel=1e-12), name


@pytest.mark.parametrize("depth", GROUPS["lrd_layer_scales_by_depth"])
def test_layer_scales(depth):
    sizes = {"img_size": 8, "patch_size": 8, "num_frames": 2, "embed_dim": 4, "num_heads": 1}
    model = VisionTransformer(**sizes, depth=int(depth), num_classes=2)
    groups = param_groups_lrd(model, int(depth), weight_decay=0.05, layer_decay=0.75)
    scales = sorted({group["lr_scale"] for group in groups})
    assert scales == pytest.approx(GROUPS["lrd_layer_scales_by_depth"][depth], rel=1e-12)


def test_frozen_parameters_are_in_no_group():
    model = golden.build(VisionTransformer, TRAJECTORIES["vit"])
    model.patch_embed.requires_grad_(False)
    trainable = {p for p in model.parameters() if p.requires_grad}
    for groups in (param_groups_lrd(model, 3, 0.05, 0.75), param_groups_weight_decay(model, 0.05)):
        assert {p for group in groups for p in group["params"]} == trainable


# --- trajectories of the real training loops


class GivenBatches:
    """Replace VideoLoader: give normalised float clips without augmentation."""

    def __init__(self, clips, steps=None):
        self.batches = [clip if clip.ndim == 6 else clip.unsqueeze(1) for clip in clips]
        self.steps = len(clips) if steps is None else steps
        self.epoch = None

    def __len__(self):
        return self.steps

    def set_epoch(self, epoch, start_step=0):
        self.epoch = epoch
        assert start_step == 0

    def __iter__(self):
        for step, clips in enumerate(self.batches):  # (B, R, C, T, H, W)
            B, R = clips.shape[:2]
            rows = torch.arange(B) + 100 * step
            flip, erase = torch.zeros(B, R, dtype=torch.bool), torch.zeros(B, R, 4)
            yield Batch(clips, flip, erase, torch.zeros(B, dtype=torch.int64), rows, [{}] * B)


class RecordingLog(RunLog):
    """Keep every scalar that a run writes."""

    def __init__(self, print_freq=1):
        super().__init__("", print_freq, CPU)
        self.record = {}

    def scalar(self, name, value, x):
        self.record.setdefault(name.removeprefix("train/"), []).append(value)
        self.record.setdefault("x", []).append(x)


@pytest.fixture(autouse=True)
def clips_as_given(monkeypatch):
    monkeypatch.setattr(engine_pretrain, "flip_on_device", lambda clips, flip: clips)
    monkeypatch.setattr(engine_pretrain, "channels_first", lambda clips: clips)
    monkeypatch.setattr(engine_finetune, "augment_on_device", lambda clips, flip, erase: clips)


def engine_args(engine, schedule, **overrides):
    ratios = {"mask_ratio": 0.0}
    if engine is engine_pretrain:
        ratios = {"mask_ratio": 0.9, "mask_ratio_end": None, "decoder_mask_ratio": 0.0}
        ratios["mask_type"] = "random"
    defaults = {"seed": 0, "batch_size": 4, "repeat_aug": 1, "accum_iter": 1, "precision": "fp32"}
    defaults |= ratios | {"reprob": 0.0, "smoothing": 0.1, "checkpoint_minutes": 0}
    defaults |= {"dist_timeout": 30, "compile": False}
    schedule = {k: v for k, v in schedule.items() if k != "epoch_of_step"}
    return argparse.Namespace(**(defaults | schedule | overrides))


def at_epoch(epoch, model, optimizer, scaler, args):
    """Return checkpoints at the beginning of an epoch."""
    checkpoints = Checkpoints(args, model, optimizer, scaler, fingerprint=0)
    checkpoints.progress.epoch = epoch
    return checkpoints


def scaler_for(scaled):
    return torch.amp.GradScaler("cpu", enabled=scaled)  # its scale 2**16 rounds nothing


def start_pretraining(case, state_file="traj_mae.npz"):
    model = golden.build(MaskedAutoencoderViT, case)
    model.load_state_dict(golden.tensors(state_file, "init/"))
    groups = param_groups_weight_decay(model, 0.05)
    return model, make_optimizer(groups, (0.9, 0.95), CPU)


def assert_trajectory(log, case):
    assert log.record["loss"] == pytest.approx(case["losses_float64"], rel=5e-7)
    assert log.record["grad_norm"] == pytest.approx(case["grad_norms_float64"], rel=1e-6)
    assert log.record["lr"] == pytest.approx(case["lrs"], rel=1e-6)  # read back in float32


def assert_final_parameters(model, file, distances):
    """Compare with golden parameters within a few times their distance from float64.

    The true gradient of attn.k.bias is zero; Adam turns its rounding noise into whole steps.
    """
    parameters = dict(model.named_parameters())
    final = golden.tensors(file, "final/")
    assert len(final) > 0.85 * len(parameters)
    for name, expected in final.items():
        if not name.endswith("attn.k.bias"):
            error = (parameters[name].detach() - expected).abs().max().item()
            assert error <= 4 * distances[name] + 1e-7, name


@pytest.mark.parametrize("scaled", [False, True])
def test_pretraining_trajectory(scaled):
    case = TRAJECTORIES["mae"]
    model, optimizer = start_pretraining(case)
    videos, noises = (golden.tensor(case["file"], k) for k in ("videos", "noises"))
    args = engine_args(engine_pretrain, case["schedule"], clip_grad=case["clip_grad"])
    log, scaler = RecordingLog(), scaler_for(scaled)
    with golden.masking_noise(*noises):
        for epoch in range(3):  # two steps an epoch, as the schedule says; one in the last
            loader = GivenBatches(videos[2 * epoch : 2 * epoch + 2], steps=2)
            state = model, loader, optimizer, scaler, CPU
            checkpoints = at_epoch(epoch, model, optimizer, scaler, args)
            engine_pretrain.train_one_epoch(*state, checkpoints, log, args)
            assert loader.epoch == epoch
    assert_trajectory(log, case)
    distances = case["final_param_max_abs_diff_fp32_vs_fp64"]
    assert_final_parameters(model, case["file"], distances)
    with torch.no_grad(), golden.masking_noise(noises[0]):
        loss = model(videos[0], case["mask_ratio"])[0]
    assert loss.item() == pytest.approx(case["loss_after_float64"], rel=5e-7)


@pytest.mark.parametrize("scaled", [False, True])
def test_finetuning_trajectory(scaled):
    case = TRAJECTORIES["vit"]
    model = golden.build(VisionTransformer, case)
    model.load_state_dict(golden.tensors(case["file"], "init/"))
    optimizer = make_optimizer(param_groups_lrd(model, 3, 0.05, 0.75), (0.9, 0.999), CPU)
    rates = []
    optimizer.register_step_pre_hook(
        lambda optimizer, args, kwargs: rates.append([g["lr"] for g in optimizer.param_groups])
    )
    videos = golden.tensor(case["file"], "videos")
    targets = iter(golden.tensor(case["file"], "targets"))

    def mixup(clips, labels, rng):  # its soft targets must not be smoothed again
        return clips, next(targets)

    args = engine_args(engine_finetune, case["schedule"], clip_grad=case["clip_grad"])
    log, scaler = RecordingLog(), scaler_for(scaled)
    for epoch in range(3):
        loader = GivenBatches(videos[2 * epoch : 2 * epoch + 2], steps=2)
        engine_finetune.train_one_epoch(
            model, mixup, loader, optimizer, scaler, CPU,
            at_epoch(epoch, model, optimizer, scaler, args), log, args,
        )  # fmt: skip
    assert_trajectory(log, case)
    np.testing.assert_allclose(rates, case["group_lrs"], rtol=1e-12)
    distances = case["final_param_max_abs_diff_fp32_vs_fp64"]
    assert_final_parameters(model, case["file"], distances)


def test_pretraining_with_accumulation():
    file, epochs = "traj_mae_accum.npz", ACCUM["epochs_run"]
    model, optimizer = start_pretraining(ACCUM)
    rates = []
    optimizer.register_step_pre_hook(
        lambda optimizer, args, kwargs: rates.append(optimizer.param_groups[0]["lr"])
    )
    videos = golden.tensor(file, "videos")  # (10, B, R, C, T, H, W)
    schedule = {"lr": 1e-2, "min_lr": 0.0, "warmup_epochs": 1, "epochs": 4}
    args = engine_args(
        engine_pretrain,
        schedule,
        batch_size=2,
        repeat_aug=2,
        accum_iter=ACCUM["accum_iter"],
        clip_grad=0.02,
    )
    log = RecordingLog(print_freq=3)  # 5 steps: flushed inside and at the end of an epoch
    log.repeat_aug = args.repeat_aug
    with golden.masking_noise(*golden.tensor(file, "noises")):
        for epoch in epochs:
            loader = GivenBatches(videos[5 * epoch : 5 * epoch + 5])
            stats = engine_pretrain.train_one_epoch(
                model, loader, optimizer, no_scaler(), CPU,
                at_epoch(epoch, model, optimizer, no_scaler(), args), log, args,
            )  # fmt: skip
            expected = ACCUM["epoch_stats"][epoch]
            assert stats["loss"] == pytest.approx(expected["loss"], rel=5e-7)
            assert stats["lr"] == pytest.approx(expected["lr"], rel=1e-6)
            assert len(optimizer.state[model.mask_token]) > 0
            assert model.mask_token.grad is not None  # of the fifth micro-batch, never applied
    assert log.record["loss"] == pytest.approx(ACCUM["losses_per_micro_batch"], rel=5e-7)
    assert rates == pytest.approx(ACCUM["lr_of_update"], rel=1e-12)
    assert len(log.record["grad_norm"]) == 4  # two updates an epoch
    # epoch_1000x: int((step / 5 + epoch) * 1000 * repeat_aug) of every step
    x = [int((step / 5 + epoch) * 1000 * 2) for epoch in epochs for step in range(5)]
    assert sorted(set(log.record["x"])) == x
    distances = TRAJECTORIES["mae"]["final_param_max_abs_diff_fp32_vs_fp64"]
    assert_final_parameters(model, file, distances)


@pytest.mark.parametrize("engine", [engine_pretrain, engine_finetune])
def test_accumulated_gradient_is_that_of_the_joint_batch(engine):
    """Adam and clipping hide a constant factor; the norm before clipping shows it."""
    videos, noises = (golden.tensor("traj_mae.npz", k)[:2] for k in ("videos", "noises"))
    norms = []
    for joint in (False, True):
        if joint:
            videos, noises = videos.flatten(0, 1).unsqueeze(0), noises.flatten(0, 1).unsqueeze(0)
        args = engine_args(
            engine,
            TRAJECTORIES["mae"]["schedule"],
            accum_iter=len(videos),
            clip_grad=None,
            smoothing=0.1,
        )
        log = RecordingLog()
        if engine is engine_pretrain:
            model, optimizer = start_pretraining(TRAJECTORIES["mae"])
            training, noise = (model,), noises
        else:
            model = golden.build(VisionTransformer, TRAJECTORIES["vit"])
            model.load_state_dict(golden.tensors("traj_vit.npz", "init/"))
            groups = param_groups_lrd(model, 3, 0.05, 0.75)
            optimizer = make_optimizer(groups, (0.9, 0.999), CPU)
            training, noise = (model, None), ()
        with golden.masking_noise(*noise):
            loader = GivenBatches(videos)
            scaler = no_scaler()
            checkpoints = at_epoch(0, model, optimizer, scaler, args)
            state = loader, optimizer, scaler, CPU, checkpoints
            engine.train_one_epoch(*training, *state, log, args)
        norms += log.record["grad_norm"]
    assert len(norms) == 2 and norms[0] == pytest.approx(norms[1], rel=1e-5)


def pretrain_briefly(videos, precision="fp32", scaler=None, **overrides):
    model, optimizer = start_pretraining(TRAJECTORIES["mae"])
    args = engine_args(
        engine_pretrain, TRAJECTORIES["mae"]["schedule"], clip_grad=0.02, precision=precision
    )
    vars(args).update(overrides)
    log = RecordingLog()
    scaler = scaler or no_scaler()
    checkpoints = at_epoch(1, model, optimizer, scaler, args)
    engine_pretrain.train_one_epoch(
        model, GivenBatches(videos), optimizer, scaler, CPU, checkpoints, log, args
    )
    return log.record


def test_masks_depend_on_the_step_alone():
    videos = golden.tensor("traj_mae.npz", "videos")
    torch.manual_seed(1)
    first = pretrain_briefly(videos)["loss"]
    torch.manual_seed(2)
    assert pretrain_briefly(videos)["loss"] == first
    assert pretrain_briefly(videos, seed=1)["loss"] != first


def test_seed_step_tells_all_its_numbers_apart():
    draws = set()
    keys = list(itertools.product(range(3), repeat=4))  # seed, epoch, step, rank
    for key in keys:
        seed_step(*key)
        once = torch.rand(()).item()
        seed_step(*key)
        assert torch.rand(()).item() == once
        draws.add(once)
    assert len(draws) == len(keys)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_pretraining_in_half_precision_stays_close(precision):
    videos = golden.tensor("traj_mae.npz", "videos")
    expected = pretrain_briefly(videos)
    record = pretrain_briefly(videos, precision, make_scaler(CPU, precision))
    assert record["loss"] == pytest.approx(expected["loss"], rel=0.02)
    assert record["loss"] != expected["loss"]
    assert record["grad_norm"][0] == pytest.approx(expected["grad_norm"][0], rel=0.02)


def test_a_loss_scale_that_overflows_does_not_end_training():
    videos = golden.tensor("traj_mae.npz", "videos")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**22)
    record = pretrain_briefly(videos, "fp16", scaler)
    skipped = [norm == 0.0 for norm in record["grad_norm"]]
    assert skipped[0] and not skipped[-1]  # the scale falls until the gradient fits
    assert scaler.get_scale() == 2.0 ** (22 - sum(skipped))
    assert record["loss"][-1] < record["loss"][0]


def test_a_broken_video_is_an_error_that_names_the_step_and_the_rows():
    videos = golden.tensor("traj_mae.npz", "videos").clone()
    videos[2, 1, 0, 0, 0, 0] = math.nan
    with pytest.raises(NonFiniteError, match="step 2 is not finite") as caught:
        pretrain_briefly(videos)
    assert caught.value.step == 2 and caught.value.samples.tolist() == [200, 201, 202, 203]


# --- one optimiser step


def tiny_step(clip_grad, scaler):
    """Take a step of SGD with rate 1 from the gradient (3, 4), whose norm is 5."""
    weight = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    scaler.scale((weight * torch.tensor([3.0, 4.0])).sum()).backward()
    norm = optim_step(optimizer, scaler, [weight], clip_grad)
    return norm, weight


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(
    "clip_grad, expected", [(None, [-3, -4]), (10.0, [-3, -4]), (1.0, [-0.6, -0.8])]
)
def test_optim_step_clips_by_the_global_norm(clip_grad, expected, scaled):
    norm, weight = tiny_step(clip_grad, scaler_for(scaled))
    assert norm.item() == pytest.approx(5.0)  # before clipping, and without the loss scale
    assert weight.tolist() == pytest.approx(expected, rel=1e-5)
    assert weight.grad is None


def test_optim_step_skips_an_overflow():
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    norm, weight = tiny_step(1.0, scaler)
    assert norm == 0.0 and weight.tolist() == [0.0, 0.0] and weight.grad is None
    assert scaler.get_scale() == 2.0**126


def test_optim_step_does_not_blame_a_low_scale_for_an_overflow():
    """Otherwise a broken gradient would stop learning silently while the scale keeps falling."""
    weight = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=0.5)
    (scaler.scale(weight.sum()) * math.inf).backward()
    norm = optim_step(optimizer, scaler, [weight], clip_grad=1.0)
    assert not norm.isfinite() and weight.tolist() == [0.0, 0.0]


def test_precision():
    assert choose_precision(None, CPU) == "fp32"
    assert choose_precision("bf16", CPU) == "bf16"
    x = torch.ones(2, 2)
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.half)):
        with autocast(CPU, name):
            assert (x @ x).dtype == dtype
        assert make_scaler(CPU, name).is_enabled() == (name == "fp16")


def test_optimizer_is_adamw_with_the_betas_and_eps_of_the_paper():
    weight = nn.Parameter(torch.ones(1))
    group = {"params": [weight], "weight_decay": 0.05}
    (group,) = make_optimizer([group], (0.9, 0.95), CPU).param_groups
    assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.9, 0.95), 1e-8, 0.05)


def test_grad_sync_of_one_process_does_nothing():
    assert isinstance(grad_sync(nn.Linear(1, 1), enabled=False), contextlib.nullcontext)


@pytest.mark.parametrize("engine", [engine_pretrain, engine_finetune])
def test_skip_nonfinite_skips_up_to_so_many_updates_in_a_row(engine, capsys):
    videos = golden.tensor("traj_mae.npz", "videos").clone()
    for step in (1, 2, 4):
        videos[step, 1, 0, 0, 0, 0] = math.nan
    model, optimizer = start_pretraining(TRAJECTORIES["mae"])
    training = (model,)
    if engine is engine_finetune:
        model = golden.build(VisionTransformer, TRAJECTORIES["vit"])
        optimizer = make_optimizer(param_groups_lrd(model, 3, 0.05, 0.75), (0.9, 0.999), CPU)
        training = (model, None)
    args = engine_args(engine, TRAJECTORIES["mae"]["schedule"], clip_grad=0.02)
    for limit in (2, 1):
        log = RecordingLog()
        log.guard.limit, log.guard.in_a_row = limit, 0
        checkpoints = at_epoch(1, model, optimizer, no_scaler(), args)
        state = GivenBatches(videos), optimizer, no_scaler(), CPU, checkpoints, log, args
        if limit == 2:
            stats = engine.train_one_epoch(*training, *state)
            assert capsys.readouterr().out.count("update skipped") == 3
            assert all(p.isfinite().all() for p in model.parameters())
            assert math.isfinite(stats["loss"])
            assert len(log.record["loss"]) == len(videos) - 3
            assert {int(s["step"]) for s in optimizer.state.values()} == {len(videos) - 3}
        else:
            with pytest.raises(NonFiniteError, match="step 2 is not finite"):  # the second in a row
                engine.train_one_epoch(*training, *state)
