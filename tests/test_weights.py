"""Tests of util/weights.py: loading, and what it refuses."""

import argparse
import os
import pickle
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
import safetensors.torch
import torch

import main_finetune
import main_test
from models_mae import MaskedAutoencoderViT
from models_vit import VisionTransformer
from tests import formats, golden
from tests.conftest import FORK
from util import weights
from util.errors import UserError
from util.formats import checkpoint_args, model_state
from util.weights import apply_weights, read_checkpoint, read_weights

LOADING = golden.table("ckpt_loading.json")
PRETRAINED = "ckpt_pretrain_model_state.pth"
VIT = {"kwargs": LOADING["vit_kwargs"], "layernorm_eps": LOADING["layernorm_eps"]}
MAE = {"kwargs": LOADING["mae_kwargs"], "layernorm_eps": LOADING["layernorm_eps"]}


def assert_bitwise_equal(a, b):
    assert a.keys() == b.keys()
    assert [k for k in a if not torch.equal(a[k], b[k])] == []


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


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.9, 0.999])
def test_truncated_files(tmp_path, zipped, share, mmap):
    path = tmp_path / "short.pth"
    state = {"model": golden.build(MaskedAutoencoderViT, MAE).state_dict()}
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    with open(path, "r+b") as file:
        file.truncate(int(path.stat().st_size * share))
    with pytest.raises(UserError, match=r"short\.pth is damaged or not a checkpoint"):
        read_checkpoint(str(path), mmap=mmap)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize("zipped", [True, False])
def test_damaged_bytes_never_give_a_traceback(tmp_path, zipped, mmap):
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
            content = read_checkpoint(str(path), mmap=mmap).get("model")
            if isinstance(content, dict):  # every number of a mapped file is there
                sum(v.double().sum() for v in content.values() if isinstance(v, torch.Tensor))
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


# --- reading once, and only what is used

FAT = 2**28  # bytes of an optimiser


def counts() -> tuple[int, int]:
    """Return the bytes that this process has read, and its peak of memory in bytes."""
    with open("/proc/self/io") as io, open("/proc/self/status") as status:
        return int(io.read().split()[1]), 1024 * int(status.read().split("VmHWM:")[1].split()[0])


def growth_in_test(argv: list[str]) -> list[int]:
    """Run main_test and return by how much the counts have grown."""
    before = counts()
    main_test.main(main_test.parse_args(argv))
    return [after - b for after, b in zip(counts(), before, strict=True)]


@pytest.mark.skipif(not os.path.exists("/proc/self/io"), reason="needs Linux's counters")
def test_multi_view_test_leaves_the_optimiser_on_the_disk(tmp_path, videos):
    """Neither read nor mapped memory that was touched: both would show, the latter as peak."""
    checkpoint = formats.reference(decoder=False)
    checkpoint["optimizer"] = {"state": {0: {"exp_avg": torch.zeros(FAT // 4)}}}
    path = tmp_path / "checkpoint-00099.pth"
    torch.save(checkpoint, path)
    argv = ["--path_to_data_dir", str(videos), "--finetune", str(path), "--dry_run"]
    argv += ["--output_dir", str(tmp_path / "out"), "--device", "cpu", "--num_workers", "0"]
    with ProcessPoolExecutor(1, FORK) as pool:
        read, peak = pool.submit(growth_in_test, argv).result(timeout=120)
    assert read < FAT / 4 and peak < FAT / 2


def test_a_file_is_read_once_for_flags_and_weights(tmp_path, monkeypatch):
    reads = []

    def count(path, mmap):
        reads.append(path)
        return read_checkpoint(path, mmap)

    monkeypatch.setattr(weights, "read_checkpoint", count)
    path = tmp_path / "in.pth"
    torch.save(formats.reference(decoder=False), path)
    for parse in (
        lambda: main_test.parse_args(["--finetune", str(path)]),
        lambda: main_finetune.parse_args(["--eval", "--resume", str(path)]),
    ):
        args = parse()
        assert len(pickle.dumps(args)) < 10_000  # of a job: no weights
        assert read_weights(str(path)).source == "MAE"
        assert len(reads) == 1
        assert read_weights(str(path)).source == "MAE"  # not what a model may have changed
        assert len(reads) == 2
        reads.clear()
        parse()
        torch.save(formats.pyslowfast(), tmp_path / "new.pth")
        os.replace(tmp_path / "new.pth", path)
        assert read_weights(str(path)).source == "PySlowFast"
        torch.save(formats.reference(decoder=False), path)
        reads.clear()


@pytest.mark.parametrize("kind", ["pth", "safetensors", "zipless"])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_models_do_not_depend_on_the_mapped_file(tmp_path, device, kind):
    path = tmp_path / f"in.{kind}"
    state = golden.build(VisionTransformer, VIT).state_dict()
    if kind == "safetensors":
        safetensors.torch.save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind == "pth")
    found = read_weights(str(path))
    with torch.device(device):
        model = VisionTransformer(
            **found.classifier_arguments(num_heads=VIT["kwargs"]["num_heads"])
        )
    apply_weights(model, found, keep_head=True)
    path.write_bytes(bytes(path.stat().st_size))  # in place: whoever views the file sees zeros
    assert_bitwise_equal(model.state_dict(), state)


# --- loading weights


WRAPPINGS = {
    "model": lambda state: {"model": state, "epoch": 1},
    "model_state": lambda state: {"epoch": 1, "model_state": state, "cfg": "A: 1"},
    "module": lambda state: {"module": state},
    "state_dict": lambda state: {"state_dict": state},
    "bare": lambda state: state,
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
    apply_weights(model, read_weights(str(path)), keep_head=False)
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
    apply_weights(model, read_weights(str(path)), keep_head=keep_head)
    assert list(model_state(read_checkpoint(str(path)), "x")) == LOADING["converted_key_names"]
    assert torch.equal(model.head.weight, trained.head.weight) == keep_head
    video = golden.tensor("ckpt_loading.npz", "video")
    assert torch.equal(model(video), trained(video)) == keep_head


def test_head_of_another_number_of_classes(tmp_path):
    trained = golden.build(VisionTransformer, VIT, num_classes=5)
    path = saved(tmp_path / "five.pth", trained.state_dict())
    model = fresh_classifier()
    apply_weights(model, read_weights(path), keep_head=False)
    head = golden.tensors("ckpt_loading.npz", "init_sd/head.")
    assert torch.equal(model.head.weight, head["weight"])
    assert torch.equal(model.norm.weight, trained.norm.weight)
    with pytest.raises(UserError, match=r"head\.weight is \[5, 48\].*\[7, 48\].*--num_classes"):
        apply_weights(fresh_classifier(), read_weights(path), keep_head=True)


def assert_untouched(model):
    assert_bitwise_equal(model.state_dict(), golden.tensors("ckpt_loading.npz", "init_sd/"))


@pytest.mark.parametrize(
    "lost, says",
    [
        (("cls_token", "pos_embed_class"), r"\d weights.*cls_token.*--no-cls_embed"),
        (("cls_token",), "cls_token: the checkpoint is incomplete"),
        (("q.bias", "k.bias", "v.bias"), r"\d weights.*q\.bias.*--no_qkv_bias"),
        (("q.bias",), r"\d weights.*q\.bias.*--allow_missing"),
        (("mlp.fc1.bias",), r"\d weights.*mlp\.fc1\.bias.*--allow_missing"),
    ],
)
def test_missing_encoder_weights_are_named(tmp_path, lost, says):
    state = golden.build(VisionTransformer, VIT).state_dict()
    state = {k: v for k, v in state.items() if not k.endswith(lost)}
    path = saved(tmp_path / "lacking.pth", state)
    model = fresh_classifier()
    with pytest.raises(UserError, match=rf"lacking\.pth lacks {says}"):
        apply_weights(model, read_weights(path), keep_head=False)
    assert_untouched(model)


def test_a_missing_head_is_an_error_when_it_is_needed():
    path = str(golden.DATA / PRETRAINED)
    with pytest.raises(UserError, match=r"lacks 2 weights of the model \(head\.weight, head\.bias"):
        apply_weights(fresh_classifier(), read_weights(path), keep_head=True)


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
    with pytest.raises(UserError, match=rf"shape\.pth does not fit the model: .*{weight}.*{flag}"):
        apply_weights(model, read_weights(path), keep_head=False)
    assert_untouched(model)
