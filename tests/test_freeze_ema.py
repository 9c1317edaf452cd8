"""Fine-tuning with frozen blocks (--freeze) and a moving average of the weights (--model_ema)."""

import shutil
import weakref
from pathlib import Path

import numpy as np
import pytest
import simplejson
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn.functional import cross_entropy

import main_finetune
import main_test
from models_vit import VisionTransformer
from tests.test_scripts import FINETUNE, call, fails, finish, spawn, weights
from util.lr_sched import set_learning_rate
from util.optim import WeightAverage, layer_id, make_optimizer, optim_step, param_groups_lrd
from util.weights import read_weights

CPU = torch.device("cpu")
DEPTH = 4
EMBEDDING = ("cls_token", "pos_embed", "patch_embed")
SIZES = {"img_size": 32, "patch_size": 8, "num_frames": 4, "embed_dim": 128, "num_classes": 3}


def build(frozen: int = 0, **overrides) -> VisionTransformer:
    torch.manual_seed(0)
    model = VisionTransformer(**SIZES | {"depth": DEPTH, "num_heads": 4} | overrides)
    if frozen:
        model.freeze(frozen)
    return model


def is_frozen(name: str, blocks: int) -> bool:
    names = (*EMBEDDING, *(f"blocks.{i}." for i in range(blocks)))
    return name.startswith((*names, "norm.") if blocks == DEPTH else names)


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    """Write a classifier with positions that are no zeros."""
    model = build()
    for parameter in model.parameters(recurse=False):
        torch.nn.init.normal_(parameter, std=0.02)
    path = tmp_path_factory.mktemp("start") / "start.pth"
    torch.save({"model": model.state_dict(), "arguments": model.arguments}, path)
    return path


# --- frozen blocks ------------------------------------------------------------------------------


def saved_bytes(model: VisionTransformer, clips: torch.Tensor, mask_ratio: float = 0.0) -> int:
    """Return the size of the activations that a forward pass keeps for its backward pass."""
    others = {x.untyped_storage().data_ptr() for x in (clips, *model.parameters())}
    packed = []

    def pack(x):
        x = x.detach()
        packed.append(weakref.ref(x))
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = model(clips, mask_ratio).square().sum()
    storages = [x.untyped_storage() for ref in packed if (x := ref()) is not None]
    loss.backward()
    return sum({s.data_ptr(): s.nbytes() for s in storages if s.data_ptr() not in others}.values())


@pytest.mark.parametrize("mask_ratio", [0.0, 0.5])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("blocks", [1, 3, DEPTH])
def test_frozen_parts_get_no_gradient_and_keep_nothing(blocks, checkpointing, mask_ratio):
    clips = torch.randn(2, 3, 4, 32, 32)
    whole, model = build(), build(blocks)
    kept = []
    for each in (whole, model):
        each.grad_checkpointing = checkpointing
        torch.manual_seed(1)
        kept.append(saved_bytes(each.train(), clips, mask_ratio))
    own = dict(model.named_parameters())
    for name, parameter in whole.named_parameters():
        assert own[name].requires_grad != is_frozen(name, blocks), name
        if is_frozen(name, blocks):
            assert own[name].grad is None
        else:  # the same gradient as without --freeze
            torch.testing.assert_close(own[name].grad, parameter.grad)
    share = 1 - blocks / DEPTH
    assert kept[1] < (share + 0.15) * kept[0], kept


def test_fixed_positions_stay_fixed():
    model = build(1, sep_pos_embed=False, sincos_pos_embed=True)
    assert not model.pos_embed.requires_grad


def test_drop_path_is_off_in_frozen_blocks_alone():
    clips = torch.randn(8, 3, 4, 32, 32)
    for blocks in (3, DEPTH):
        model = build(blocks, drop_path_rate=0.9)
        still = model.eval()(clips)
        assert torch.equal(model.train()(clips), still) == (blocks == DEPTH)
    assert model.dropout.training


def test_layers_keep_their_number():
    """The rate of a layer does not depend on which others are frozen."""
    scales = []
    for model in (build(), build(2)):
        names = {p: name for name, p in model.named_parameters()}
        groups = param_groups_lrd(model, DEPTH, 0.05, 0.5)
        scales.append({names[p]: g["lr_scale"] for g in groups for p in g["params"]})
    assert scales[1] == {k: v for k, v in scales[0].items() if layer_id(k, DEPTH) > 2}


def test_more_blocks_than_the_model_has(capsys, videos, start):
    flags = ["--path_to_data_dir", videos, *FINETUNE, "--finetune", start]
    status, text = fails(capsys, main_finetune, *flags, "--freeze", DEPTH + 1)
    assert (status, text.split(": ", 2)[2]) == (2, "cannot freeze 5 blocks: the model has 4")


def test_random_weights_are_not_frozen(capsys, videos):
    status, text = fails(capsys, main_finetune, "--path_to_data_dir", videos, *FINETUNE,
                         "--freeze", 1)  # fmt: skip
    assert status == 2 and "--freeze needs --finetune" in text


# --- the moving average -------------------------------------------------------------------------


def train(model, optimizer, scaler, steps, allows=lambda norm: True, scale=1.0):
    for step in steps:
        torch.manual_seed(step)
        set_learning_rate(optimizer, 1e-3)
        loss = scale * cross_entropy(model(torch.randn(2, 3, 4, 32, 32)), torch.tensor([0, 1]))
        scaler.scale(loss).backward()
        optim_step(optimizer, scaler, list(model.parameters()), 1.0, allows)


def make_average(decay, frozen=0, scaled=False):
    model = build(frozen)
    optimizer = make_optimizer(param_groups_lrd(model, DEPTH, 0.05, 0.75), (0.9, 0.999), CPU)
    average = WeightAverage(model, decay, optimizer)
    return model, optimizer, torch.amp.GradScaler("cpu", enabled=scaled), average


@pytest.mark.parametrize("decay", [0.2, 0.999])
def test_average_of_the_weights(decay):
    """The decay rises to the one given: what a short run forgets are its first weights."""
    model, optimizer, scaler, average = make_average(decay)
    expected = {k: v.double() for k, v in model.state_dict().items()}
    for n in range(1, 7):
        train(model, optimizer, scaler, [n])
        share = 1 - min(decay, (n - 1) / (n + 9))
        for name, now in model.state_dict().items():
            expected[name] += share * (now.double() - expected[name])
    found = average.module.state_dict()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor.float(), msg=name)
    assert not torch.equal(found["head.weight"], model.state_dict()["head.weight"])
    assert average.updates == 6 and not average.module.training


@pytest.mark.parametrize("fault", ["overflow", "guard"])
def test_skipped_updates_do_not_count(fault):
    """In fp16 a fused optimizer runs and skips the step by itself; the guard does not call it."""
    model, optimizer, scaler, average = make_average(0.9, scaled=True)
    train(model, optimizer, scaler, [0, 1])
    then = {k: v.clone() for k, v in average.module.state_dict().items()}
    before = model.head.weight.clone()
    if fault == "guard":
        train(model, optimizer, scaler, [2], allows=lambda norm: False)
    else:
        train(model, optimizer, scaler, [2], scale=1e36)
        assert scaler.get_scale() < 2**16  # it has seen the overflow
    assert torch.equal(model.head.weight, before)
    assert average.updates == 2
    assert all(torch.equal(v, then[k]) for k, v in average.module.state_dict().items())
    train(model, optimizer, scaler, [3])
    assert average.updates == 3


def test_frozen_weights_are_their_own_average():
    model, optimizer, scaler, average = make_average(0.9, frozen=2)
    train(model, optimizer, scaler, range(3))
    for name, tensor in average.module.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]) == is_frozen(name, 2), name


# --- runs ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tuned(videos, start, tmp_path_factory) -> tuple[Path, str]:
    """Fine-tune two of four blocks and average the weights; two updates in each of two epochs."""
    out = tmp_path_factory.mktemp("tuned")
    flags = ["--batch_size", 1, "--accum_iter", 3, "--lr", 1e-2, "--freeze", 2, "--model_ema", 0.5]
    call(main_finetune, "--path_to_data_dir", videos, "--output_dir", out, "--finetune", start,
         *FINETUNE, *flags, "--drop_path_rate", 0.2)  # fmt: skip
    return out


def test_only_the_other_blocks_learn(tuned, start):
    before, after = weights(start), weights(tuned / "checkpoint-00001.pth")
    for name, tensor in after.items():
        assert torch.equal(tensor, before[name]) == is_frozen(name, 2), name


def test_average_is_saved_and_logged(tuned):
    content = torch.load(tuned / "checkpoint-00001.pth", weights_only=True)
    assert content["model_ema"].keys() == content["model"].keys()
    assert content["ema_updates"] == content["step"] == 4  # not after every micro-step
    head = "head.weight"
    assert not torch.equal(content["model_ema"][head], content["model"][head])
    records = [simplejson.loads(line) for line in (tuned / "log.txt").open()]
    names = ("loss", "acc1", "acc5", "mean_class_acc", "bad", "not_finite")
    for record in records:
        assert {f"val_ema_{name}" for name in names} <= record.keys()
    assert records[-1]["val_ema_loss"] != records[-1]["val_loss"]
    events = EventAccumulator(str(tuned / "tensorboard")).Reload()
    for name in names:
        logged = [(e.step, e.value) for e in events.Scalars(f"val_ema/{name}")]
        values = [pytest.approx(record[f"val_ema_{name}"]) for record in records]
        assert logged == list(zip([1999, 3999], values, strict=True))


@pytest.mark.parametrize(("flag", "key"), [([], "val"), (["--use_ema"], "val_ema")])
def test_average_is_validated_and_tested(videos, tuned, tmp_path, capsys, flag, key):
    path = tuned / "checkpoint-00001.pth"
    record = simplejson.loads((tuned / "log.txt").read_text().splitlines()[-1])
    flags = ["--path_to_data_dir", videos, "--device", "cpu", "--num_workers", 0, *flag]
    call(main_finetune, *flags, "--output_dir", "", "--eval", "--resume", path)
    out = capsys.readouterr().out
    assert f"top-1 {record[f'{key}_acc1']:.2f} %" in out
    assert f"loss {record[f'{key}_loss']:.4f}\n" in out
    assert f"tensors from {path} (MAE format)\n" in out
    call(main_test, *flags, "--output_dir", tmp_path, "--finetune", path, "--num_clips", 1,
         "--num_crops", 1)  # fmt: skip
    tested = main_test.parse_args(list(map(str, [*flags, "--finetune", path])))
    model = main_test.load_model(tested, read_weights(str(path), bool(flag)))
    content = torch.load(path, weights_only=True)["model_ema" if flag else "model"]
    assert all(torch.equal(v, content[k]) for k, v in model.state_dict().items())
    line = simplejson.loads((tmp_path / "log.txt").read_text())
    assert np.isclose(line["test_acc1"], record[f"{key}_acc1"])


def test_validation_of_both_is_printed(videos, start, capsys):
    call(main_finetune, "--path_to_data_dir", videos, "--output_dir", "", *FINETUNE, "--epochs", 1,
         "--model_ema", 0.9)  # fmt: skip
    lines = capsys.readouterr().out.splitlines()
    (first,) = (i for i, line in enumerate(lines) if line.startswith("validation: top-1 "))
    assert lines[first + 1].startswith("moving average: top-1 ")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "more"),
    [
        (1, "--freeze 2 --grad_checkpointing --mask_ratio 0.5"),
        (2, "--freeze 2"),
        (2, f"--freeze {DEPTH} --skip_nonfinite 1"),
        (1, f"--freeze {DEPTH} --compile"),
        (1, "--freeze 2 --compile --mask_ratio 0.5"),
    ],
)
def test_a_run_resumes_exactly(videos, start, tmp_path, ranks, more):
    argv = ["--path_to_data_dir", videos, *FINETUNE, "--finetune", start, "--batch_size", 1]
    argv += ["--model_ema", 0.9, *more.split(), "--output_dir"]
    out = finish(spawn("main_finetune.py", *argv, tmp_path / "whole", ranks=ranks))
    assert "recompile_limit" not in out  # PyTorch gives up after too many versions of a block
    (tmp_path / "parts").mkdir()
    shutil.copy(tmp_path / "whole/checkpoint-00000.pth", tmp_path / "parts")
    out = finish(spawn("main_finetune.py", *argv, tmp_path / "parts", ranks=ranks))
    assert "resumed from" in out and "some flags differ" not in out
    whole, parts = (torch.load(tmp_path / x / "checkpoint-00001.pth") for x in ("whole", "parts"))
    for key in ("model", "model_ema"):
        assert all(torch.equal(v, parts[key][k]) for k, v in whole[key].items())
    assert whole["ema_updates"] == parts["ema_updates"] == whole["step"]
    logs = [(tmp_path / x / "log.txt").read_text() for x in ("whole", "parts")]
    assert logs[0] == logs[1] and "val_ema_acc1" in logs[0]


def test_another_number_of_frozen_blocks_is_refused(capsys, videos, start, tuned, tmp_path):
    shutil.copy(tuned / "checkpoint-00001.pth", tmp_path)
    argv = ["--path_to_data_dir", videos, "--output_dir", tmp_path, "--finetune", start, *FINETUNE]
    argv += ["--batch_size", 1, "--accum_iter", 3, "--model_ema", 0.5, "--epochs", 3]
    status, text = fails(capsys, main_finetune, *argv, "--freeze", 3)
    assert status == 2
    assert "does not fit the model (" in text and "--freeze 2 -> 3" in text
