"""Tests of util/checkpoint.py: saving, resuming, loading, and what it refuses."""

import argparse
import contextlib
import os
import pickle
import resource
from pathlib import Path

import numpy as np
import pytest
import torch

from models_mae import MaskedAutoencoderViT
from models_vit import VisionTransformer
from tests import golden
from util import file_io
from util.checkpoint import (
    checkpoint_args,
    load_weights,
    model_state,
    newest_checkpoint,
    read_checkpoint,
    resume,
    save_checkpoint,
)
from util.errors import UserError
from util.lr_sched import set_learning_rate
from util.optim import make_optimizer, optim_step, param_groups_weight_decay

CPU = torch.device("cpu")
LOADING = golden.table("ckpt_loading.json")
PRETRAINED = "ckpt_pretrain_model_state.pth"
VIT = {"kwargs": LOADING["vit_kwargs"], "layernorm_eps": LOADING["layernorm_eps"]}
MAE = {"kwargs": LOADING["mae_kwargs"], "layernorm_eps": LOADING["layernorm_eps"]}


class Training:
    """A small autoencoder in training, with everything a checkpoint keeps."""

    def __init__(self, seed, name="mae_tiny"):
        torch.manual_seed(seed)
        self.model = golden.build(MaskedAutoencoderViT, MAE)
        groups = param_groups_weight_decay(self.model, 0.05)
        self.optimizer = make_optimizer(groups, (0.9, 0.95), CPU)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
        self.args = argparse.Namespace(model=name, beta=(0.9, 0.95), mask_ratio=0.9, lr=None)

    def train(self, *steps):
        for step in steps:
            torch.manual_seed(step)
            set_learning_rate(self.optimizer, 1e-3)
            loss = self.model(torch.randn(2, 3, 4, 32, 32), 0.75)[0]
            self.scaler.scale(loss).backward()
            optim_step(self.optimizer, self.scaler, list(self.model.parameters()), clip_grad=1.0)

    def save(self, folder, epoch=3, step=40):
        state = self.model, self.optimizer, self.scaler, self.args
        save_checkpoint(str(folder), epoch, step, *state)
        return folder / f"checkpoint-{epoch:05d}.pth"

    def resume(self, path):
        return resume(str(path), self.model, self.optimizer, self.scaler, self.args)

    def state(self):
        """Everything as one flat dict of tensors."""
        flat = dict(self.model.state_dict())
        for number, values in self.optimizer.state_dict()["state"].items():
            flat |= {f"{number}/{name}": value for name, value in values.items()}
        return flat | {"scale": torch.tensor(self.scaler.get_scale())}


def assert_bitwise_equal(a, b):
    assert a.keys() == b.keys()
    assert [k for k in a if not torch.equal(a[k], b[k])] == []


@pytest.fixture(scope="module")
def trained():
    training = Training(seed=0)
    training.train(0, 1)
    return training


# --- saving and resuming


def test_resuming_continues_bit_for_bit(tmp_path, capsys):
    uninterrupted = Training(seed=0)
    uninterrupted.train(0, 1)
    path = uninterrupted.save(tmp_path, epoch=3, step=40)
    assert f"saved {path}" in capsys.readouterr().out
    uninterrupted.train(2, 3)

    resumed = Training(seed=1)
    assert resumed.resume(newest_checkpoint(str(tmp_path))) == (4, 40)
    assert f"resumed from {path} (epoch 3 done)" in capsys.readouterr().out
    resumed.train(2, 3)
    assert_bitwise_equal(resumed.state(), uninterrupted.state())
    assert resumed.scaler.state_dict() == uninterrupted.scaler.state_dict()


def test_checkpoint_has_the_keys_of_the_family_and_plain_flags(tmp_path, trained):
    checkpoint = torch.load(trained.save(tmp_path), weights_only=True)  # no allowed classes at all
    assert {"args", "epoch", "model", "optimizer", "scaler", "step"} <= set(checkpoint)
    assert (checkpoint["epoch"], checkpoint["step"]) == (3, 40)
    assert checkpoint["args"] == vars(trained.args)
    assert list(checkpoint["model"]) == list(trained.model.state_dict())


def test_resuming_reads_the_reference_training_files(tmp_path, trained):
    """Their args are an argparse.Namespace; they count no steps and may hold no scaler state."""
    checkpoint = {
        "model": trained.model.state_dict(),
        "optimizer": trained.optimizer.state_dict(),
        "epoch": 7,
        "scaler": {},
        "args": argparse.Namespace(model="mae_tiny", lr=1e-3),
    }
    for group in checkpoint["optimizer"]["param_groups"]:
        group["fused"] = None  # not their optimiser's
    torch.save(checkpoint, tmp_path / "checkpoint-00007.pth")
    resumed = Training(seed=1)
    assert resumed.resume(tmp_path / "checkpoint-00007.pth") == (8, 0)
    own = trained.state()
    assert_bitwise_equal(resumed.state(), own | {"scale": torch.tensor(2.0**10)})
    resumed.train(2)


def test_resuming_another_model_is_refused(tmp_path, trained):
    path = trained.save(tmp_path)
    other = Training(seed=1, name="mae_small")
    before = {k: v.clone() for k, v in other.state().items()}
    with pytest.raises(UserError, match="of --model mae_tiny, not mae_small"):
        other.resume(path)
    assert_bitwise_equal(other.state(), before)


def test_resuming_another_size_is_refused(tmp_path, trained):
    path = trained.save(tmp_path)
    other = Training(seed=1)
    other.model = golden.build(MaskedAutoencoderViT, MAE, decoder_embed_dim=16)
    with pytest.raises(UserError, match=r"00003\.pth does not fit the model.*decoder_cls_token"):
        other.resume(path)


def test_resuming_another_optimizer_is_refused(tmp_path, trained):
    path = trained.save(tmp_path)
    other = Training(seed=1)
    other.optimizer = make_optimizer([{"params": other.model.parameters()}], (0.9, 0.95), CPU)
    with pytest.raises(UserError, match=r"00003\.pth does not fit the model.*parameter group"):
        other.resume(path)


@pytest.mark.parametrize("key", ["model", "optimizer", "epoch"])
def test_resuming_weights_alone_is_refused(tmp_path, trained, key):
    checkpoint = torch.load(trained.save(tmp_path))
    del checkpoint[key]
    torch.save(checkpoint, tmp_path / "weights.pth")
    with pytest.raises(UserError, match=rf"weights\.pth .*no '{key}'.*--finetune"):
        Training(seed=1).resume(tmp_path / "weights.pth")


# --- writes that fail


@contextlib.contextmanager
def full_disk(free_bytes=5000):
    """Let files grow no larger than this, so that the system refuses the write."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (free_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@contextlib.contextmanager
def failing_replace():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", lambda *paths: (_ for _ in ()).throw(OSError(28, "No space")))
        yield


@pytest.mark.parametrize("failure", [full_disk, failing_replace])
def test_a_failing_write_warns_and_leaves_the_old_file(tmp_path, trained, capsys, failure):
    path = trained.save(tmp_path)
    before = path.read_bytes()
    capsys.readouterr()
    with failure():
        trained.save(tmp_path)
        trained.save(tmp_path, epoch=4)
    out = capsys.readouterr().out
    assert f"WARNING: could not save {path}: " in out and "saved" not in out
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]  # neither a half-written one nor a temporary file


def test_a_lost_folder_warns(tmp_path, trained, capsys):
    (tmp_path / "file").write_text("")
    trained.save(tmp_path / "file" / "output")
    assert "WARNING: could not save" in capsys.readouterr().out


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "checkpoint-00000.pth"
    path.write_bytes(b"old")

    def write(file):
        file.write(b"half of the new")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        file_io.write_atomically(str(path), write)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == [path.name]


def test_the_final_name_appears_only_with_the_whole_file(tmp_path):
    path = tmp_path / "checkpoint-00000.pth"

    def write(file):
        file.write(b"all")
        file.flush()
        assert not path.exists()

    file_io.write_atomically(str(path), write)
    assert path.read_bytes() == b"all" and os.listdir(tmp_path) == [path.name]


def test_newest_checkpoint(tmp_path):
    assert newest_checkpoint("") is None
    assert newest_checkpoint(str(tmp_path / "missing")) is None
    assert newest_checkpoint(str(tmp_path)) is None
    names = ["checkpoint-00009.pth", "checkpoint-00010.pth", "checkpoint-00002.pth"]
    others = ["checkpoint-00011.pth.tmp77", "checkpoint-best.pth", "old-checkpoint-00099.pth"]
    for name in names + others:
        (tmp_path / name).write_bytes(b"")
    assert newest_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-00010.pth")
    for name in ("checkpoint-99999.pth", "checkpoint-100000.pth"):
        (tmp_path / name).write_bytes(b"")
    assert newest_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-100000.pth")


# --- files that are not checkpoints


class Bomb:
    """Run code when unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("place", ["whole", "args", "zipless"])
def test_code_in_a_checkpoint_is_not_run(tmp_path, place):
    path, crater = tmp_path / "bomb.pth", tmp_path / "crater"
    if place == "zipless":
        path.write_bytes(pickle.dumps(Bomb(crater), protocol=2))
    else:
        torch.save({"model": {}, "args": Bomb(crater)} if place == "args" else Bomb(crater), path)
    with pytest.raises(UserError, match=r"bomb\.pth is not loaded: it asks to run code \(.*mkdir"):
        read_checkpoint(str(path))
    assert not crater.exists()
    with open(path, "rb") as file:  # the bomb is real
        pickle.load(file) if place == "zipless" else torch.load(file, weights_only=False)
    assert crater.exists()


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.9, 0.999])
def test_truncated_files(tmp_path, trained, zipped, share):
    path = tmp_path / "short.pth"
    state = {"model": trained.model.state_dict()}
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    with open(path, "r+b") as file:
        file.truncate(int(path.stat().st_size * share))
    with pytest.raises(UserError, match=r"short\.pth is damaged or not a checkpoint"):
        read_checkpoint(str(path))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("zipped", [True, False])
def test_damaged_bytes_never_give_a_traceback(tmp_path, zipped):
    path = tmp_path / "damaged.pth"
    state = {"model": torch.nn.Linear(3, 2).state_dict(), "args": argparse.Namespace(model="x")}
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(200):
        damaged = np.frombuffer(whole, dtype=np.uint8).copy()
        places = rng.integers(len(whole), size=rng.choice([1, 5, 20]))
        damaged[places] = rng.integers(256, size=len(places))
        path.write_bytes(damaged.tobytes())
        try:
            read_checkpoint(str(path))
        except UserError as error:
            assert str(error).startswith(str(path))
            refused += 1
    assert refused > 100  # the rest hit a weight


@pytest.mark.parametrize("content", [b"", b"<!DOCTYPE html><html>Not found</html>", b"PK\x03\x04"])
def test_files_of_another_kind(tmp_path, content):
    path = tmp_path / "other.pth"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"other\.pth is damaged or not a checkpoint: \w") as caught:
        read_checkpoint(str(path))
    assert "weights_only" not in str(caught.value)  # never advise to run what the file holds


def test_folders_missing_files_and_other_contents(tmp_path):
    with pytest.raises(UserError, match="is a folder; give the checkpoint file in it"):
        read_checkpoint(str(tmp_path))
    with pytest.raises(UserError, match=r"cannot open .*missing\.pth: No such file"):
        read_checkpoint(str(tmp_path / "missing.pth"))
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    with pytest.raises(UserError, match=r"list\.pth holds a list, not a checkpoint"):
        read_checkpoint(str(tmp_path / "list.pth"))


@pytest.mark.parametrize("checkpoint", [{}, {"epoch": 3}, {"model": "vit"}, {"model": {}}])
def test_checkpoints_without_weights(checkpoint):
    with pytest.raises(UserError, match=r"x\.pth holds no weights; its keys are"):
        model_state(checkpoint, "x.pth")


def test_checkpoint_args():
    assert checkpoint_args({"args": {"lr": 1.0}}) == {"lr": 1.0}
    assert checkpoint_args({"args": argparse.Namespace(lr=1.0)}) == {"lr": 1.0}
    assert checkpoint_args({}) == checkpoint_args({"args": None}) == {}


# --- loading weights


def prefixed(state, prefix):
    return {prefix + k: v for k, v in state.items()}


WRAPPINGS = {
    "model": lambda state: {"model": state, "epoch": 1},
    "model_state": lambda state: {"epoch": 1, "model_state": state, "cfg": "A: 1"},
    "module": lambda state: {"module": state},
    "state_dict": lambda state: {"state_dict": state},
    "bare": lambda state: state,
    "DistributedDataParallel": lambda state: {"model": prefixed(state, "module.")},
    "torch.compile": lambda state: prefixed(state, "_orig_mod."),
    "both": lambda state: {"model": prefixed(state, "_orig_mod.module.")},
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_wrapped_and_bare_state_dicts(wrapping):
    state = {"head.weight": torch.ones(2), "blocks.0.norm1.bias": torch.zeros(3)}
    assert model_state(WRAPPINGS[wrapping](state), "x.pth") == state


def fresh_classifier(**overrides):
    model = golden.build(VisionTransformer, VIT, **overrides).eval()
    if not overrides:
        model.load_state_dict(golden.tensors("ckpt_loading.npz", "init_sd/"))
    return model


def saved(path, state):
    torch.save({"model": state}, path)
    return str(path)


@pytest.mark.parametrize("key", ["model_state", "model"])
def test_pretrained_weights_give_the_golden_logits(tmp_path, capsys, key):
    path = golden.DATA / PRETRAINED
    if key == "model":
        state = read_checkpoint(str(path))["model_state"]
        path = saved(tmp_path / "model.pth", state)
    model = fresh_classifier()
    load_weights(model, str(path), keep_head=False)
    case = next(case for case in LOADING["cases"] if case["file"] == PRETRAINED)
    logits = model(golden.tensor("ckpt_loading.npz", "video")).detach()
    expected = golden.tensor("ckpt_loading.npz", case["logits_key"])
    torch.testing.assert_close(logits, expected, rtol=0, atol=5e-6)
    head = golden.tensors("ckpt_loading.npz", "init_sd/head.")
    assert torch.equal(model.head.weight, head["weight"])
    assert torch.equal(model.head.bias, head["bias"])

    out = capsys.readouterr().out
    own = model.state_dict()
    assert f"loaded {len(own) - len(case['missing'])} of {len(own)} tensors from {path}" in out
    assert all(name in out for name in case["missing"] + case["unexpected"][:4])


@pytest.mark.parametrize("keep_head", [True, False])
def test_head_projection_is_the_head(tmp_path, keep_head):
    trained = golden.build(VisionTransformer, VIT).eval()
    state = {k.replace("head.", "head.projection."): v for k, v in trained.state_dict().items()}
    path = tmp_path / "finetuned.pth"
    torch.save({"model_state": state}, path)
    model = fresh_classifier()
    load_weights(model, str(path), keep_head=keep_head)
    assert list(model_state(read_checkpoint(str(path)), "x")) == LOADING["converted_key_names"]
    assert torch.equal(model.head.weight, trained.head.weight) == keep_head
    video = golden.tensor("ckpt_loading.npz", "video")
    assert torch.equal(model(video), trained(video)) == keep_head


def test_head_of_another_number_of_classes(tmp_path):
    trained = golden.build(VisionTransformer, VIT, num_classes=5)
    path = saved(tmp_path / "five.pth", trained.state_dict())
    model = fresh_classifier()
    load_weights(model, path, keep_head=False)
    head = golden.tensors("ckpt_loading.npz", "init_sd/head.")
    assert torch.equal(model.head.weight, head["weight"])
    assert torch.equal(model.norm.weight, trained.norm.weight)
    with pytest.raises(UserError, match=r"head\.weight is \[5, 48\].*\[7, 48\].*--num_classes"):
        load_weights(fresh_classifier(), path, keep_head=True)


def assert_untouched(model):
    assert_bitwise_equal(model.state_dict(), golden.tensors("ckpt_loading.npz", "init_sd/"))


@pytest.mark.parametrize(
    "lost, flag",
    [
        ("cls_token", "--no-cls_embed"),
        ("q.bias", "--no_qkv"),
        ("mlp.fc1.bias", "--allow_missing"),
    ],
)
def test_missing_encoder_weights_are_named(tmp_path, lost, flag):
    state = golden.build(VisionTransformer, VIT).state_dict()
    state = {k: v for k, v in state.items() if not k.endswith(lost)}
    path = saved(tmp_path / "lacking.pth", state)
    model = fresh_classifier()
    with pytest.raises(UserError, match=rf"lacking\.pth lacks \d weights.*{lost}.*{flag}"):
        load_weights(model, path, keep_head=False)
    assert_untouched(model)


def test_a_missing_head_is_an_error_when_it_is_needed():
    path = str(golden.DATA / PRETRAINED)
    with pytest.raises(UserError, match=r"lacks 2 weights of the model \(head\.weight, head\.bias"):
        load_weights(fresh_classifier(), path, keep_head=True)


@pytest.mark.parametrize(
    "overrides, weight, flag",
    [
        ({"patch_size": 16}, "patch_embed.proj.weight", "--model"),
        ({"embed_dim": 64}, "cls_token", "--model"),
    ],
)
def test_weights_of_another_shape_are_named(tmp_path, overrides, weight, flag):
    other = golden.build(VisionTransformer, VIT, **overrides)
    path = saved(tmp_path / "shape.pth", other.state_dict())
    model = fresh_classifier()
    with pytest.raises(UserError, match=rf"shape\.pth is of another shape.*{weight}.*{flag}"):
        load_weights(model, path, keep_head=False)
    assert_untouched(model)


def test_paths_may_be_relative(tmp_path, monkeypatch, trained):
    monkeypatch.chdir(tmp_path)
    trained.save(Path("output"))
    assert newest_checkpoint("output") == "output/checkpoint-00003.pth"
    assert Training(seed=1).resume("output/checkpoint-00003.pth") == (4, 40)
