"""Tests of what other projects' files say: switches, targets, heads, layouts, and what is refused.

The files and the plain models that judge the loaded ones are in tests/formats.py; transformers
judges Hugging Face's format.
"""

import argparse
import contextlib
import datetime
import json
import os
import pathlib
import re
import resource
import sys
import types
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pytest
import safetensors.torch
import torch
import yaml
from torch import Tensor

import hubconf
import main_test
from models_mae import MaskedAutoencoderViT, mae_vit_small_patch16, mae_vit_tiny_patch8
from models_vit import VisionTransformer, vit_huge_patch14, vit_small_patch16, vit_tiny_patch8
from tests import formats
from tests.conftest import FORK
from tests.formats import IMAGENET, KINETICS, Maker, State
from tests.test_convert import (
    autoencoder,
    classifier,
    hf_config,
    ours,
    pixels,
    predict,
    randomised,
    saved,
)  # fmt: skip
from util import convert
from util.errors import UserError
from util.visualize import reconstruct
from util.weights import apply_weights, checkpoint_flags, interpret, read_weights

imagenet = partial(formats.normalised, statistics=IMAGENET)


def assert_close(found: Tensor, expected: Tensor) -> None:
    """Compare numbers that two implementations have computed in float32 and float64."""
    torch.testing.assert_close(found.double(), expected.double(), rtol=1e-5, atol=1e-5)


def double(state: State) -> State:
    return {name: tensor.double() for name, tensor in state.items()}


def flags_of(path: str, **options: Any) -> str:
    return " ".join(checkpoint_flags(path, **options)) + " "


def refusal(folder, capsys, checkpoint: Any, path: str = "") -> str:
    """Return the sentence with which reading, testing and converting all refuse a file."""
    path = path or saved(folder / "in.pth", checkpoint)
    with pytest.raises(UserError) as caught:
        read_weights(path)
    error = str(caught.value)
    with pytest.raises(UserError, match=re.escape(error)):
        main_test.parse_args(["--finetune", path])
    with pytest.raises(SystemExit):
        convert.main([path, str(folder / "out"), "--to", "safetensors"])
    assert error in capsys.readouterr().err
    assert not os.path.exists(folder / "out")
    assert "\n" not in error
    return error


# --- layer scale


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("names", ["gamma_1 gamma_2", "ls1.gamma ls2.gamma"])
@pytest.mark.parametrize("kind", ["pretrain", "finetune", "image", "PySlowFast"])
def test_layer_scale_is_folded_in(tmp_path, kind, names, dtype):
    """The plain models multiply each branch by its scale, in encoder and decoder."""
    plain = {
        "image": lambda: formats.image_mae("class token"),
        "PySlowFast": lambda: formats.pyslowfast(decoder=False),
    }.get(kind, lambda: formats.videomae(kind))()
    key = next(k for k in plain if k.startswith("mod"))
    scaled = formats.with_layer_scale(plain[key], names)
    assert len(scaled) > len(plain[key])
    scaled = {k: v.to(dtype) for k, v in scaled.items()}
    path, state = saved(tmp_path / "in.pth", plain | {key: scaled}), double(scaled)
    clips = pixels()
    if kind == "pretrain":
        pred, keep = predict(autoencoder(path), ours(clips))
        removed = [i for i in range(64) if i not in keep.tolist()]
        expected = formats.videomae_decode(state, imagenet(clips.double()), keep)
        assert_close(pred[:, removed], expected)
    elif kind == "finetune":
        expected = formats.videomae_classify(state, imagenet(clips.double()))
        assert_close(classifier(path)(ours(clips)), expected)
    elif kind == "image":
        still = clips[:, :, :1].expand(-1, -1, 2, -1, -1)
        expected = formats.image_classify(state, imagenet(still.double())[:, :, 0])
        assert_close(classifier(path, num_frames=2)(ours(still)), expected)
    else:
        expected = formats.pyslowfast_classify(state, ours(clips.double()))
        assert_close(classifier(path)(ours(clips)), expected)


def test_one_half_of_a_layer_scale(tmp_path):
    """A scale of one branch alone is folded into that branch."""
    checkpoint = formats.videomae("finetune")
    checkpoint["module"] = formats.with_layer_scale(checkpoint["module"], "gamma_2")
    model = classifier(saved(tmp_path / "in.pth", checkpoint))
    expected = formats.videomae_classify(double(checkpoint["module"]), imagenet(pixels().double()))
    assert_close(model(ours(pixels())).detach(), expected)


# --- tensors that have no place here


def hiera() -> dict[str, Any]:
    """Return a file whose third block doubles the width and pools."""
    make = Maker(7)
    make.add("pos_embed_spatial", 1, 16, 64)
    make.add("pos_embed_temporal", 1, 4, 64)
    make.encoder(64, 2, "fused", 2, 16, 16)
    make.blocks(["blocks.2", "blocks.3"], 128, "fused")
    make.linear("blocks.2.proj", 128, 64)
    make.norm("norm", 128)
    make.linear("head.projection", 7, 128)
    return {"model_state": make.state}


FINETUNED: dict[str, Callable[[], dict[str, Any]]] = {
    "VideoMAE": lambda: formats.videomae("finetune"),
    "PySlowFast": lambda: formats.pyslowfast(decoder=False, fused=True),
    "reference": lambda: formats.reference(decoder=False),
    "image MAE": lambda: formats.image_mae("fine-tuned"),
    "Hiera": hiera,
}


@pytest.mark.parametrize(
    "project, name, shape, switch",
    [
        ("VideoMAE", "blocks.0.attn.scale", (2, 1, 1), "cosine attention"),
        ("VideoMAE", "blocks.1.attn.logit_scale", (2, 1, 1), ""),
        ("VideoMAE", "norm.weight", (128,), ""),
        ("image MAE", "blocks.0.attn.relative_position_bias_table", (49, 2), ""),
        ("image MAE", "blocks.0.attn.q_norm.weight", (64,), ""),
        ("image MAE", "reg_token", (1, 4, 128), ""),
        ("reference", "patch_embed.norm.weight", (128,), ""),
        ("reference", "blocks.0.norm3.weight", (128,), ""),
        ("PySlowFast", "norm_embed.weight", (128,), "NORM_STEM"),
        ("PySlowFast", "blocks.0.attn.rel_pos_h", (7, 64), "REL_POS"),
        ("PySlowFast", "blocks.1.attn.rel_pos_w", (7, 64), "REL_POS"),
        ("PySlowFast", "blocks.1.attn.rel_pos_t", (7, 64), "REL_POS"),
        ("PySlowFast", "blocks.0.attn.pool_k.weight", (64, 1, 3, 3, 3), ""),
        ("Hiera", "blocks.2.proj.weight", (128, 64), ""),
    ],
)
def test_encoder_tensors_that_are_not_understood(tmp_path, capsys, project, name, shape, switch):
    checkpoint = FINETUNED[project]()
    state = next(v for v in checkpoint.values() if isinstance(v, dict))
    state[name] = 0.5 + torch.rand(shape)
    error = refusal(tmp_path, capsys, checkpoint)
    assert name in error and switch in error


def test_blocks_that_change_their_width(tmp_path, capsys):
    """Without the projection, only shapes show it."""
    checkpoint = hiera()
    for name in ("blocks.2.proj.weight", "blocks.2.proj.bias"):
        del checkpoint["model_state"][name]
    path = saved(tmp_path / "in.pth", checkpoint)
    with pytest.raises(UserError, match=r"blocks\.[23]\.|norm\.weight"):
        classifier(path)
    with pytest.raises(SystemExit):
        convert.main([path, str(tmp_path / "out"), "--to", "safetensors"])
    assert re.search(r"blocks\.[23]\.|norm\.weight", capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


PRETRAINED: dict[str, Callable[[], dict[str, Any]]] = {
    "reference": formats.reference,
    "image MAE": lambda: formats.image_mae("full"),
    "VideoMAE": lambda: formats.videomae("pretrain"),
    "PySlowFast": lambda: formats.pyslowfast_run(decoder=True),
}


@pytest.mark.parametrize(
    "project, name",
    [
        ("reference", "decoder_blocks.0.attn.rel_pos_h"),
        ("image MAE", "decoder_blocks.1.attn.q_norm.weight"),
        ("VideoMAE", "decoder.blocks.0.attn.scale"),
        ("PySlowFast", "pred_head.transforms.0.0.attn.rel_pos_t"),
        ("PySlowFast", "pred_head.projections.1.weight"),
    ],
)
def test_a_decoder_that_is_not_understood_is_left_out(tmp_path, capsys, project, name):
    checkpoint = PRETRAINED[project]()
    path = saved(tmp_path / "plain.pth", checkpoint)
    assert read_weights(path).has_decoder
    expected = classifier(path, keep_head=False).state_dict()
    state = next(v for v in checkpoint.values() if isinstance(v, dict))
    state[name] = torch.rand(64)
    path = saved(tmp_path / "in.pth", checkpoint)
    weights = read_weights(path)
    assert not weights.has_decoder and not any(k.startswith("decoder") for k in weights.state)
    assert any("decoder" in note for note in weights.notes)
    capsys.readouterr()
    model = classifier(path, keep_head=False).state_dict()
    assert ".".join(name.split(".")[-2:]) in capsys.readouterr().out  # under its name here
    encoder = [k for k in model if not k.startswith("head.")]
    assert [k for k in encoder if not torch.equal(model[k], expected[k])] == []
    out = str(tmp_path / "out.safetensors")
    convert.main([path, out, "--to", "safetensors"])
    assert not read_weights(out).has_decoder


def test_a_decoder_that_predicts_no_pixels_is_left_out():
    checkpoint = formats.videomae("pretrain")
    for name in ("decoder.head.weight", "decoder.head.bias"):
        checkpoint["model"][name] = checkpoint["model"][name][:768]
    weights = interpret(checkpoint, "in.pth")
    assert not weights.has_decoder
    assert any("768 outputs for 1536 values of a patch" in note for note in weights.notes)


@pytest.mark.parametrize("lost", [(), ("head.",)])
@pytest.mark.parametrize(
    "project, name",
    [
        ("reference", "head.norm.weight"),
        ("reference", "head.fc1.weight"),
        ("VideoMAE", "head.2.weight"),
        ("PySlowFast", "head.projection_verb.weight"),
    ],
)
def test_a_head_that_is_not_understood_is_left_out(tmp_path, capsys, project, name, lost):
    checkpoint = FINETUNED[project]()
    key = next(k for k, v in checkpoint.items() if isinstance(v, dict))
    checkpoint[key] = {k: v for k, v in checkpoint[key].items() if not k.startswith(lost)}
    checkpoint[key][name] = torch.rand(128, 128)
    path = saved(tmp_path / "in.pth", checkpoint)
    weights = read_weights(path)
    assert not weights.has_head and not any(k.startswith("head") for k in weights.state)
    assert any("head" in note for note in weights.notes)
    assert main_test.parse_args(["--finetune", path]).num_classes is None
    capsys.readouterr()
    classifier(path, keep_head=False)
    assert name in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["PySlowFast", "image", "prefix"])
def test_heads_that_models_here_lack(tmp_path, kind):
    """They read the mean of normalised tokens, or tensors of their own: the encoder is usable."""
    if kind == "PySlowFast":
        checkpoint = formats.pyslowfast_run({"MVIT.USE_MEAN_POOLING": False} | NO_CLASS)
    elif kind == "image":  # timm's, without a class token
        checkpoint = formats.image_mae("class token")
        del checkpoint["model"]["cls_token"]
        checkpoint["model"]["pos_embed"] = checkpoint["model"]["pos_embed"][:, 1:]
    else:
        checkpoint = formats.image_mae("class token")
        checkpoint["model"]["fc.weight"] = checkpoint["model"].pop("head.weight")
    path = saved(tmp_path / "in.pth", checkpoint)
    weights = read_weights(path)
    args = main_test.parse_args(["--finetune", path, "--videos", "a.mp4"])
    with pytest.raises(UserError, match=r"has no head \(its head has .* is left out\): fine-tune"):
        main_test.open_index(args, weights)
    classifier(path, keep_head=False)


# --- PySlowFast's configuration

OTHER_NORM = {"DATA.MEAN": [*IMAGENET[0]], "DATA.STD": [*IMAGENET[1]]}
NO_CLASS = {"MVIT.CLS_EMBED_ON": False}
# 2 x 8 x 8 tokens: as many as 8 x 4 x 4
JOINT = {"MVIT.SEP_POS_EMBED": False, "DATA.NUM_FRAMES": 4}
JOINT |= {"DATA.TRAIN_CROP_SIZE": 128, "DATA.TEST_CROP_SIZE": 128}
RUNS: dict[str, dict[str, Any]] = {
    "fused": {},
    "separate": {"MVIT.SEPARATE_QKV": True},
    "four heads": {"MVIT.NUM_HEADS": 4},
    "class token": {"MVIT.USE_MEAN_POOLING": False},
    "no class token": NO_CLASS,
    "joint": JOINT,
    "joint, no class token": JOINT | NO_CLASS,
    "layer scale": {"MVIT.LAYER_SCALE_INIT_VALUE": 0.1},
    "normalisation": OTHER_NORM,
    "separable decoder": {"MASK.DECODER_SEP_POS_EMBED": True},
    "separable decoder, no class token": {"MASK.DECODER_SEP_POS_EMBED": True} | NO_CLASS,
    "all frames": {"MASK.TIME_STRIDE_LOSS": False},
    "default pooling, no class token": {"MVIT.USE_MEAN_POOLING": False} | NO_CLASS,
    "no pooling": {"MVIT.POOL_Q_STRIDE": [[0, 1, 1, 1], [1, 1, 1, 1]]},
}


# all of them, but for a head that is refused
PARTS = [(run, part) for run in RUNS for part in (True, False) if part or "default" not in run]


@torch.no_grad()
@pytest.mark.parametrize("run, decoder", PARTS)
def test_the_configuration_decides(tmp_path, run, decoder):
    """Models from PySlowFast's files compute what plain ones compute from the same pixels."""
    checkpoint = formats.pyslowfast_run(RUNS[run], decoder)
    cfg = yaml.safe_load(checkpoint["cfg"])
    path = saved(tmp_path / "in.pyth", checkpoint)
    data, mvit = cfg["DATA"], cfg["MVIT"]
    frames, side, heads = data["NUM_FRAMES"], data["TRAIN_CROP_SIZE"], mvit["NUM_HEADS"]
    clips, state = pixels(frames, side), double(checkpoint["model_state"])
    theirs = formats.normalised(clips.double(), (data["MEAN"], data["STD"]))
    weights, told = read_weights(path), flags_of(path)
    assert not weights.doubt and weights.stated >= {"num_frames", "img_size", "num_heads"}
    assert f"--input_size {side} --num_frames {frames} --sampling_rate 8 " in told
    if decoder:
        model = autoencoder(path)
        pred, keep = predict(model, ours(clips))
        assert_close(pred, formats.pyslowfast_decode(state, theirs, keep, heads))
        numbers = torch.arange(frames).view(1, 1, -1, 1, 1).expand(1, 3, -1, side, side)
        stride = 2 if cfg["MASK"]["TIME_STRIDE_LOSS"] else 1
        shown = model.target_frames(numbers)[0, 0, :, 0, 0].tolist()
        assert shown == list(range(0, frames, stride))
        return
    pool = "mean" if mvit["USE_MEAN_POOLING"] else "cls"
    assert weights.arguments["pool"] == pool and "pool" in weights.stated
    assert f"--pool {pool} " in told
    expected = formats.pyslowfast_classify(state, theirs, pool, heads)
    assert_close(classifier(path)(ours(clips)), expected)


def test_a_configuration_may_be_a_dict():
    checkpoint = formats.pyslowfast_run(RUNS["four heads"])
    told, cfg = interpret(checkpoint, "in.pyth"), yaml.safe_load(checkpoint["cfg"])
    assert interpret(checkpoint | {"cfg": cfg}, "in.pyth").arguments == told.arguments
    assert told.arguments["num_heads"] == 4


@pytest.mark.parametrize(
    "changes",
    [
        {"MVIT.NORM_STEM": True},
        {"MVIT.REL_POS_SPATIAL": True},
        {"MVIT.REL_POS_TEMPORAL": True},
        {"MVIT.POOL_Q_STRIDE": [[1, 1, 2, 2]]},
        {"MVIT.POOL_KV_STRIDE": [[0, 1, 2, 2]]},
        {"MVIT.DIM_MUL": [[1, 2.0]]},
        {"MVIT.PATCH_STRIDE": [2, 8, 8]},
        {"MVIT.PATCH_PADDING": [0, 1, 1]},
        {"MVIT.RESIDUAL_POOLING": True},
        {"DATA.REVERSE_INPUT_CHANNEL": True},
        {"MVIT.REV.ENABLE": True},
        {"MVIT.EMBED_DIM": 192},
        {"MVIT.DEPTH": 3},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_switches_that_no_tensor_shows(tmp_path, capsys, changes):
    """They change every output, or contradict the tensors."""
    checkpoint = formats.pyslowfast_run()
    checkpoint["cfg"] = formats.changed_cfg(checkpoint["cfg"], changes)
    error = refusal(tmp_path, capsys, checkpoint)
    switch = next(iter(changes)).removeprefix("MVIT.")
    assert re.search(rf"{re.escape(switch)}|PATCH_KERNEL" if "STRIDE" in switch else switch, error)


@pytest.mark.parametrize("cfg", ["{}", "MVIT: {{NUM_HEADS: {}}}", "MODEL: [1, {}]"])
def test_a_configuration_runs_no_code(tmp_path, capsys, cfg):
    crater = tmp_path / "crater"
    checkpoint = formats.pyslowfast_run()
    checkpoint["cfg"] = cfg.format(f"!!python/object/apply:os.mkdir ['{crater}']")
    refusal(tmp_path, capsys, checkpoint)
    assert not crater.exists()
    yaml.unsafe_load(checkpoint["cfg"])  # the bomb is real
    assert crater.exists()


@pytest.mark.parametrize(
    "cfg", [None, "", "A: 1", "MVIT: 3", "- 1", {"MVIT": None}, 7, "a: [", "&a {b: *a}"]
)
def test_configurations_that_say_nothing(cfg):
    """They are as good as none, or refused in a sentence."""
    plain = formats.pyslowfast(decoder=False)
    try:
        weights = interpret(plain | {"cfg": cfg}, "in.pyth")
    except UserError as error:
        assert cfg in ("a: [", "&a {b: *a}") and "\n" not in str(error)
        return
    assert weights.arguments == interpret(plain, "in.pyth").arguments
    assert weights.arguments["pool"] == "mean" and "pool" not in weights.stated
    assert any("--pool" in note for note in weights.notes)


@torch.no_grad()
@pytest.mark.parametrize(
    "entry, value",
    [
        ("DATA.MEAN", "x"), ("DATA.MEAN", [0.45]), ("DATA.MEAN", None), ("DATA.STD", [0.0] * 3),
        ("DATA.STD", [float("nan")] * 3), ("DATA.MEAN", [float("nan")] * 3),
        ("DATA.NUM_FRAMES", 7), ("DATA.NUM_FRAMES", None),
        ("DATA.TRAIN_CROP_SIZE", [64, 64]), ("MVIT.NUM_HEADS", "two"), ("MVIT.NUM_HEADS", 0),
        ("MVIT.NUM_HEADS", 3), ("MVIT.PATCH_STRIDE", None), ("MVIT.PATCH_STRIDE", 16),
        ("MVIT.DIM_MUL", None), ("MVIT.DIM_MUL", "x"), ("MVIT.POOL_Q_STRIDE", [None, []]),
        ("MVIT.MLP_RATIO", "x"), ("MVIT.REV", None), ("MVIT.USE_MEAN_POOLING", "no"),
        ("MVIT", None), ("DATA", [1]),
    ],
)  # fmt: skip
def test_odd_entries_of_a_configuration(tmp_path, entry, value):
    """They are ignored, or refused in a sentence; no result is a number that is none."""
    checkpoint = formats.pyslowfast_run()
    checkpoint["cfg"] = formats.changed_cfg(checkpoint["cfg"], {entry: value})
    path = saved(tmp_path / "in.pyth", checkpoint)
    try:
        checkpoint_flags(path)
        assert classifier(path)(ours(pixels())).isfinite().all()
    except (UserError, ValueError) as error:
        assert "\n" not in str(error)


@torch.no_grad()
def test_an_assumed_pool_can_be_corrected(tmp_path):
    checkpoint = formats.pyslowfast(decoder=False)
    path = saved(tmp_path / "in.pyth", checkpoint)
    args = main_test.parse_args(["--finetune", path, "--pool", "cls"])
    model = main_test.load_model(args, read_weights(path)).eval()
    expected = formats.pyslowfast_classify(
        double(checkpoint["model_state"]), ours(pixels().double()), "cls"
    )
    assert_close(model(ours(pixels())), expected)
    assert not any("--pool" in note for note in interpret(formats.pyslowfast(), "in.pyth").notes)
    with pytest.raises(UserError, match=r"the file needs .* a --model with") as caught:
        apply_weights(vit_small_patch16(pool="cls"), read_weights(path), keep_head=True)
    assert "--pool" not in str(caught.value)  # the user has chosen


def test_a_head_of_the_reference_without_a_class_token_is_told():
    """Its head would leave the first patch out; ours, whose file says so, does not."""
    model = vit_tiny_patch8(img_size=32, num_frames=4, cls_embed=False)
    state = {"model": model.state_dict()}
    del model.arguments["pool"]  # as in a file of an older version
    for content, told in ((state, True), (state | {"arguments": model.arguments}, False)):
        notes = interpret(content, "in.pth").notes
        assert any("leave the first patch out" in note for note in notes) == told


# --- targets


class Target(NamedTuple):
    """A pre-training file, and what its decoder should predict."""

    make: Callable[[], dict[str, Any]]
    head: str  # the layer that predicts
    rule: Callable[[Tensor], Tensor]  # pixels in [0, 1] -> what the project wants of them
    target: str  # its name here
    target_norm: Any = None
    moves: bool = True  # its frames may differ
    file: str = "in.pth"


def videomae_run(**flags: bool) -> Callable[[], dict[str, Any]]:
    return lambda: formats.videomae("pretrain", **flags)


def reference_run(norm_pix_loss: bool) -> dict[str, Any]:
    checkpoint = formats.reference()
    checkpoint["args"].norm_pix_loss = norm_pix_loss
    return checkpoint


def pyslowfast_target(changes: dict[str, Any], target: str, norm: Any = None) -> Target:
    """Its frames are every second one from the first on, or all."""
    u = 1 if changes.get("MASK.TIME_STRIDE_LOSS", True) else 2

    def rule(frames: Tensor) -> Tensor:
        frames = frames[:, :, ::2] if u == 1 else frames
        return formats.mae_target(
            frames,
            target == "patch",
            IMAGENET if OTHER_NORM.items() <= changes.items() else KINETICS,
            u,
        )

    make = partial(formats.pyslowfast_run, changes, decoder=True)
    return Target(make, "pred_head.projections.0", rule, target, norm)


def still_target(
    make: Callable[[], dict[str, Any]],
    statistics: Any,
    target: str,
    norm: Any = None,
    u: int = 1,
    file: str = "in.pth",
) -> Target:
    """Its frames depend on rounding (0, 2, 4, 7), so they are all the same."""

    def rule(frames: Tensor) -> Tensor:
        return formats.mae_target(frames[:, :, :: 2 // u], target == "patch", statistics, u)

    return Target(make, "decoder_pred", rule, target, norm, u == 2, file)


def image_run(args: Any) -> Callable[[], dict[str, Any]]:
    return lambda: formats.image_mae("full", args=args)


RAW = {"MASK.NORM_PRED_PIXEL": False}
ALL_FRAMES = {"MASK.TIME_STRIDE_LOSS": False}
VIDEOMAE_HEAD = "decoder.head"
per_channel = partial(formats.videomae_target, normalise=True)
unit_pixels = partial(formats.videomae_target, normalise=False)
TARGETS = {
    "VideoMAE": Target(videomae_run(), VIDEOMAE_HEAD, per_channel, "channel"),
    "VideoMAE, normalised": Target(
        videomae_run(normlize_target=True), VIDEOMAE_HEAD, per_channel, "channel"
    ),
    "VideoMAE, pixels": Target(
        videomae_run(normlize_target=False), VIDEOMAE_HEAD, unit_pixels, "pixels"
    ),
    "image MAE": still_target(image_run(None), IMAGENET, "patch", IMAGENET),
    "image MAE, normalised": still_target(
        image_run({"norm_pix_loss": True, "input_size": 64}), IMAGENET, "patch", IMAGENET
    ),
    "image MAE, pixels": still_target(
        image_run({"norm_pix_loss": False, "input_size": 64}), IMAGENET, "pixels"
    ),
    "reference": still_target(partial(reference_run, True), KINETICS, "patch"),
    "reference, pixels": still_target(partial(reference_run, False), KINETICS, "pixels"),
    "first release": still_target(
        formats.first_release, KINETICS, "patch", u=2, file="video-mae-100x4-joint.pth"
    ),
    "first release, pixels": still_target(
        formats.first_release, KINETICS, "pixels", u=2, file="video-mae-200x4-nonorm.pth"
    ),
    "PySlowFast": pyslowfast_target({}, "patch"),
    "PySlowFast, pixels": pyslowfast_target(RAW, "pixels"),
    "PySlowFast, all frames": pyslowfast_target(ALL_FRAMES, "patch"),
    "PySlowFast, ImageNet": pyslowfast_target(OTHER_NORM, "patch", IMAGENET),
    "PySlowFast, ImageNet, pixels": pyslowfast_target(RAW | OTHER_NORM | ALL_FRAMES, "pixels"),
}


def tiled(frames: int, side: int, content: str, moves: bool = True) -> Tensor:
    """Make a clip, uint8 [1, T, H, W, 3], of equal patches of 2 x 16 x 16.

    A faint one is grey but for one pixel, so that the 1e-6 of every rule decides its numbers.
    """
    rng = np.random.default_rng(3)
    patch = rng.normal((60, 120, 200), (8, 25, 40), (2, 16, 16, 3)).clip(0, 255)
    if content != "coloured":
        patch[:] = 120
        patch[:, 3, 5] += content == "faint"
    patch[1] = patch[int(moves)]
    clip = np.tile(patch.round(), (frames // 2, side // 16, side // 16, 1))
    return torch.from_numpy(clip).to(torch.uint8).unsqueeze(0)


def to_pixels(clip: Tensor) -> Tensor:
    """Turn a clip into pixels in [0, 1], float64 [1, 3, T, H, W]."""
    return clip.permute(0, 4, 1, 2, 3).double() / 255


# of the loss; the deviation of a flat patch is nothing but rounding, over 1e-6
BOUNDS = {"coloured": 1e-11, "faint": 1e-11, "flat": 1e-2}


def assert_perfect(path: str, clip: Tensor, expected: Target, content: str) -> None:
    """Check that a model that predicts its project's target has no loss, and shows the clip."""
    model = autoencoder(path)
    assert model.target == model.arguments["target"] == expected.target
    assert "norm_pix_loss" not in read_weights(path).arguments
    norm = read_weights(path).arguments.get("target_norm")
    assert norm == expected.target_norm or np.allclose(norm, expected.target_norm)
    shown = reconstruct(model, clip, 0.75, paste_visible=False)
    assert shown.loss.max() < BOUNDS[content]
    change = shown.reconstruction.int() - shown.original.int()
    assert change.abs().max() <= 1
    assert model(clip.permute(0, 4, 1, 2, 3), 0.75)[0] < BOUNDS[content]


@torch.no_grad()
@pytest.mark.parametrize("content", ["coloured", "faint"])
@pytest.mark.parametrize("name", TARGETS)
def test_a_perfect_prediction_has_no_loss(tmp_path, name, content):
    """The file's decoder always predicts one patch, by its own project's rule."""
    case = TARGETS[name]
    checkpoint = case.make()
    state = next(v for v in checkpoint.values() if isinstance(v, dict))
    frames = 16 if "image" in name or "first" in name else 8
    clip = tiled(frames, 224 if "first" in name else 64, content, case.moves)
    wanted = case.rule(to_pixels(clip))
    assert (wanted - wanted[:, :1]).abs().max() < 1e-6  # all patches are the same
    state[f"{case.head}.weight"].zero_()
    assert state[f"{case.head}.bias"].shape == wanted[0, 0].shape
    state[f"{case.head}.bias"] = wanted[0, 0].float()
    assert_perfect(saved(tmp_path / case.file, checkpoint), clip, case, content)


HF_SIZES = {"image_size": 64, "patch_size": 16, "num_frames": 8}


@torch.no_grad()
@pytest.mark.parametrize("content", BOUNDS)
@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_hugging_face_targets(tmp_path, transformers, norm_pix_loss, content):
    """The loss in transformers is 0, too, and of any other prediction the same as ours."""
    config = hf_config(
        transformers, **HF_SIZES, norm_pix_loss=norm_pix_loss, use_mean_pooling=False
    )
    original = randomised(transformers.VideoMAEForPreTraining(config))
    original.save_pretrained(tmp_path / "drawn")
    clip = tiled(8, 64, content)
    masked = torch.ones(1, 64, dtype=torch.bool)
    if content == "coloured":
        model = autoencoder(str(tmp_path / "drawn"))
        pred, keep = predict(model, ours(to_pixels(clip)).float())
        masked[0, keep] = False
        loss = model.forward_loss(clip.permute(0, 4, 1, 2, 3), pred, masked.float())
        theirs = original(imagenet(to_pixels(clip)).float().transpose(1, 2), masked).loss
        theirs = theirs if norm_pix_loss else theirs / 0.225**2  # our pixels are over 0.225
        torch.testing.assert_close(loss, theirs, rtol=1e-4, atol=0)
    masked[0, ::4] = False
    rule = per_channel if norm_pix_loss else unit_pixels
    original.decoder.head.weight.zero_()
    original.decoder.head.bias[:] = rule(to_pixels(clip))[0, 0]
    loss = original(imagenet(to_pixels(clip)).float().transpose(1, 2), masked).loss
    assert loss < max(1e-5, BOUNDS[content])  # it takes its float32 clips back to pixels
    original.save_pretrained(tmp_path / "hf")
    target = "channel" if norm_pix_loss else "pixels"
    expected = Target(dict, "", rule, target)
    assert_perfect(str(tmp_path / "hf"), clip, expected, content)


@pytest.mark.parametrize("says, target", [
    ({"normlize_target": False}, "pixels"), ({"normlize_target": 0}, "pixels"),
    ({"normlize_target": True}, "channel"), ({"target": "kinetics"}, "channel"),
    ({"target": "kinetics", "normlize_target": False}, "pixels"),
])  # fmt: skip
def test_records_of_targets(says, target):
    checkpoint = formats.videomae("pretrain")
    vars(checkpoint["args"]).update(says)
    assert interpret(checkpoint, "in.pth").arguments["target"] == target


def test_norm_pix_loss_replaces_the_target_of_a_file(tmp_path):
    """As torch.hub passes it on; a target of its own decides over both."""
    weights = interpret(formats.image_mae("full"), "in.pth")
    assert weights.autoencoder_arguments()["target_norm"]
    for given, target in (
        ({"norm_pix_loss": False}, "pixels"), ({"norm_pix_loss": True}, "patch"),
        ({"norm_pix_loss": True, "target": "channel"}, "channel"),
    ):  # fmt: skip
        model = MaskedAutoencoderViT(**weights.autoencoder_arguments(**given))
        assert model.target == target


# --- heads that read one token


def image_head(folder) -> tuple[str, Tensor]:
    checkpoint = formats.image_mae("class token")
    image = imagenet(pixels(2)[:, :, :1].double())[:, :, 0]
    expected = formats.image_classify(double(checkpoint["model"]), image)
    return saved(folder / "in.pth", checkpoint), expected


def videomae_head(folder) -> tuple[str, Tensor]:
    checkpoint = formats.videomae("first token", frames=2)
    expected = formats.videomae_classify(
        double(checkpoint["module"]),
        imagenet(pixels(2)[:, :, :1].double().expand(-1, -1, 2, -1, -1)),
    )
    return saved(folder / "in.pth", checkpoint), expected


def own_head(folder) -> tuple[str, Tensor]:
    model = vit_tiny_patch8(img_size=64, num_frames=2, num_classes=7, pool="cls").eval()
    clips = ours(pixels(2)[:, :, :1].expand(-1, -1, 2, -1, -1))
    content = {"model": model.state_dict(), "arguments": model.arguments}
    return saved(folder / "in.pth", content), model(clips).detach()


@torch.no_grad()
@pytest.mark.parametrize("fused_bias", [False, True])
def test_videomae_with_learned_positions_and_without_biases(tmp_path, fused_bias):
    checkpoint = formats.videomae("finetune")
    state = {k: v for k, v in checkpoint["module"].items() if not k.endswith("_bias")}
    if fused_bias:
        state |= {f"blocks.{i}.attn.qkv.bias": torch.rand(384) for i in range(2)}
    state["pos_embed"] = torch.rand(1, 64, 128)
    path = saved(tmp_path / "in.pth", checkpoint | {"module": state})
    model, clips = classifier(path), pixels()
    assert model.pos_embed.requires_grad and model.pool == "mean"
    x = formats.patches(double(state), imagenet(clips.double())) + state["pos_embed"].double()
    x = formats.run_blocks(double(state), formats.numbered("blocks", 2), x, 2).mean(1)
    x = formats.layer_norm(double(state), "fc_norm", x)
    assert_close(model(ours(clips)), formats.linear(double(state), "head", x))


@torch.no_grad()
def test_positions_of_images_without_a_class_row(tmp_path):
    """timm's no_embed_class: the class token has no position."""
    checkpoint = formats.image_mae("class token")
    checkpoint["model"]["pos_embed"][:, 0] = 0
    whole = classifier(saved(tmp_path / "whole.pth", checkpoint), num_frames=2)
    checkpoint["model"]["pos_embed"] = checkpoint["model"]["pos_embed"][:, 1:].clone()
    model = classifier(saved(tmp_path / "in.pth", checkpoint), num_frames=2)
    assert torch.equal(model(ours(pixels(2))), whole(ours(pixels(2))))


@torch.no_grad()
@pytest.mark.parametrize("make", [image_head, videomae_head, own_head])
def test_heads_on_one_token(tmp_path, capsys, make):
    """The file says which token its head reads; the clip is still."""
    path, expected = make(tmp_path)
    clips = ours(pixels(2)[:, :, :1].expand(-1, -1, 2, -1, -1))
    assert "--pool cls " in flags_of(path)
    weights = read_weights(path)
    assert weights.arguments["pool"] == "cls" and "pool" in weights.stated
    assert_close(classifier(path, num_frames=2)(clips), expected)
    args = main_test.parse_args(["--finetune", path, "--num_frames", "2"])
    assert_close(main_test.load_model(args, weights).eval()(clips), expected)
    out = str(tmp_path / "out")
    convert.main([path, out, "--to", "safetensors"])
    assert_close(classifier(out, num_frames=2)(clips), expected)

    # flags that contradict the file
    wrong = r"pool is cls in the file and mean here; the file needs --pool cls"
    args = main_test.parse_args(["--finetune", path, "--pool", "mean"])
    with pytest.raises(UserError, match=wrong):
        main_test.load_model(args, weights)
    with pytest.raises(UserError, match=wrong):
        classifier(path, pool="mean")
    classifier(path, keep_head=False, pool="mean")


@pytest.mark.parametrize("project", ["VideoMAE", "image MAE"])
def test_heads_on_the_mean(tmp_path, project):
    """fc_norm is known to come after the mean."""
    path = saved(tmp_path / "in.pth", FINETUNED[project]())
    assert "--pool mean " in flags_of(path)
    wrong = r"pool is mean in the file and cls here; the file needs --pool mean"
    with pytest.raises(UserError, match=wrong):
        classifier(path, pool="cls")


@torch.no_grad()
@pytest.mark.parametrize("use_mean_pooling", [True, False])
def test_hugging_face_heads(tmp_path, transformers, use_mean_pooling):
    config = hf_config(transformers, **HF_SIZES, num_labels=7, use_mean_pooling=use_mean_pooling)
    original = randomised(transformers.VideoMAEForVideoClassification(config))
    original.save_pretrained(tmp_path)
    pool = "mean" if use_mean_pooling else "cls"
    assert f"--pool {pool} " in flags_of(str(tmp_path))
    clips = pixels(clips=2)
    expected = original(imagenet(clips).transpose(1, 2)).logits
    assert_close(classifier(str(tmp_path))(ours(clips)), expected)


# --- files in pieces, and with more in them than one model


@pytest.fixture(scope="module", params=["model.safetensors", "pytorch_model.bin"])
def sharded(request, tmp_path_factory, transformers):
    """Write a Hugging Face folder in two files; returns it, the index's name and the model."""
    folder, name = tmp_path_factory.mktemp("sharded"), request.param
    original = randomised(
        transformers.VideoMAEForVideoClassification(
            hf_config(transformers, **HF_SIZES, num_labels=7)
        )
    )
    original.save_pretrained(folder)
    state = safetensors.torch.load_file(folder / "model.safetensors")
    os.remove(folder / "model.safetensors")
    stem, ending = name.split(".")
    shards = [f"{stem}-0000{i}-of-00002.{ending}" for i in (1, 2)]
    parts = {shard: dict(list(state.items())[i::2]) for i, shard in enumerate(shards)}
    for shard, part in parts.items():
        if ending == "bin":
            torch.save(part, folder / shard)
        else:
            safetensors.torch.save_file(part, folder / shard, {"format": "pt"})
    table = {key: shard for shard, part in parts.items() for key in part}
    size = sum(tensor.nbytes for tensor in state.values())
    index = {"metadata": {"total_size": size}, "weight_map": table}
    (folder / f"{name}.index.json").write_text(json.dumps(index))
    return folder, f"{name}.index.json", original


@torch.no_grad()
@pytest.mark.parametrize("by", ["folder", "index"])
def test_sharded_folders(tmp_path, transformers, sharded, by):
    folder, index, original = sharded
    again = transformers.VideoMAEForVideoClassification.from_pretrained(folder).eval()
    path = str(folder if by == "folder" else folder / index)
    clips = pixels(clips=2)
    expected = original(imagenet(clips).transpose(1, 2)).logits
    assert torch.equal(again(imagenet(clips).transpose(1, 2)).logits, expected)  # a real folder
    weights = read_weights(path)
    assert weights.arguments["num_heads"] == 4 and "num_heads" in weights.stated  # config.json
    assert_close(classifier(path)(ours(clips)), expected)
    args = main_test.parse_args(["--finetune", path])
    assert_close(main_test.load_model(args, weights).eval()(ours(clips)), expected)
    convert.main([path, str(tmp_path / "out"), "--to", "safetensors"])
    assert_close(classifier(str(tmp_path / "out"))(ours(clips)), expected)


@pytest.mark.parametrize(
    "damage", ["lost", "stale", "outside", "absolute", "odd", "text", "itself"]
)
def test_damaged_sharded_folders(tmp_path, capsys, sharded, damage):
    source, name, _ = sharded
    folder = tmp_path / "hf"
    folder.mkdir()
    for file in os.listdir(source):
        (folder / file).write_bytes((source / file).read_bytes())
    index = json.loads((folder / name).read_text())
    table = index["weight_map"]
    shard = next(iter(table.values()))
    says = shard
    if damage == "lost":
        os.remove(folder / shard)
    elif damage == "stale":  # the index is of other files
        table["videomae.encoder.layer.2.layernorm_before.bias"] = shard
        says = "layer.2.layernorm_before.bias"
    elif damage in ("outside", "absolute"):
        (tmp_path / "outside").write_bytes((folder / shard).read_bytes())
        says = "../outside" if damage == "outside" else str(tmp_path / "outside")
        index["weight_map"] = {k: says if v == shard else v for k, v in table.items()}
    elif damage == "itself":
        index["weight_map"], says = {"norm.bias": name}, name
    elif damage == "odd":
        index["weight_map"], says = [1], name
    (folder / name).write_text(json.dumps(index))
    if damage == "text":
        (folder / name).write_text("{")
        says = name
    error = refusal(tmp_path, capsys, None, str(folder))
    assert says in error


HYPER = {"lr": 1e-3, "backbone": "vit", "betas": [0.9, 0.95]}


def lightning(state: State) -> dict[str, Any]:
    """Return what Lightning writes for a module with this model and a loss with a weight."""
    inner = {f"model.{name}": tensor for name, tensor in state.items()}
    inner["loss_fn.weight"] = torch.rand(7)
    return {
        "epoch": 3, "global_step": 400, "pytorch-lightning_version": "2.4.0", "state_dict": inner,
        "loops": {"fit_loop": {"state_dict": {}}}, "callbacks": {}, "optimizer_states": [{}],
        "lr_schedulers": [], "hparams_name": "kwargs", "hyper_parameters": HYPER,
    }  # fmt: skip


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
@pytest.mark.parametrize("kind", ["reference", "VideoMAE", "pre-training", "image MAE"])
def test_lightning_files(tmp_path, capsys, kind, prefix):
    checkpoint = formats.videomae("pretrain") if kind == "pre-training" else FINETUNED[kind]()
    key = next(k for k, v in checkpoint.items() if isinstance(v, dict))
    state = {prefix + name: tensor for name, tensor in checkpoint[key].items()}
    plain = interpret({key: checkpoint[key]}, "in.pth")
    path = saved(tmp_path / "last.ckpt", lightning(state))
    weights = read_weights(path)
    assert (weights.source, weights.arguments) == (plain.source, plain.arguments)
    assert weights.state.keys() == plain.state.keys()
    assert all(torch.equal(weights.state[k], plain.state[k]) for k in plain.state)
    assert [name for name in weights.unused if name.endswith("loss_fn.weight")]
    classifier(path, keep_head=weights.has_head)
    assert "loss_fn.weight" in capsys.readouterr().out


@pytest.mark.parametrize("wrapper", ["_fsdp_wrapped_module.", "_checkpoint_wrapped_module."])
def test_wrappers_inside_names(wrapper):
    state = formats.reference(decoder=False)["model"]
    wrapped = {wrapper + k.replace(".attn.", f".{wrapper}attn."): v for k, v in state.items()}
    assert interpret({"model": wrapped}, "in.pth").state.keys() == state.keys()


def test_a_head_beside_the_model_of_lightning():
    state = formats.reference(decoder=False)["model"]
    content = lightning({k: v for k, v in state.items() if not k.startswith("head.")})
    content["state_dict"] |= {k: v for k, v in state.items() if k.startswith("head.")}
    assert interpret(content, "in.pth").has_head


def test_two_tensors_of_one_name():
    state = formats.reference(decoder=False)["model"]
    with pytest.raises(UserError, match="two tensors of one name"):
        interpret({"model": state | {f"module.{k}": v for k, v in state.items()}}, "in.pth")


AVERAGES: dict[str, Callable[[State, State], dict[str, Any]]] = {
    "model_ema": lambda state, average: {"model": state, "model_ema": average},
    "wrapped": lambda state, average: {"model": state, "model_ema": {"module": average}},
    "prefix": lambda state, average: {
        "model": state, "model_ema": {f"module.{k}": v for k, v in average.items()}
    },
    "timm": lambda state, average: {"state_dict": state, "state_dict_ema": average},
    "first": lambda state, average: {"model_ema": average, "model": state},
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("kind", AVERAGES)
def test_moving_averages(tmp_path, kind):
    """The weights are read, unless the average is asked for; neither is taken for the other."""
    state = formats.reference(decoder=False)["model"]
    average = {name: tensor + 0.1 for name, tensor in state.items()}
    path = saved(tmp_path / "in.pth", AVERAGES[kind](state, average))
    for use_ema in (False, True, False):
        weights = read_weights(path, use_ema=use_ema)
        wanted = average if use_ema else state
        assert weights.state.keys() == wanted.keys()
        assert all(torch.equal(weights.state[k], wanted[k]) for k in wanted)
        assert any("--use_ema" in note for note in weights.notes) != use_ema

    # of what checkpoint_flags has just read, only the same part is used again
    for first, second in ((True, False), (False, True)):
        assert "--num_classes 7 " in flags_of(path, use_ema=first)
        found = read_weights(path, use_ema=second).state["head.bias"]
        assert torch.equal(found, (average if second else state)["head.bias"])

    args = main_test.parse_args(["--finetune", path, "--use_ema"])
    assert args.use_ema and args.num_classes == 7
    convert.main([path, str(tmp_path / "out"), "--to", "safetensors", "--use_ema"])
    assert torch.equal(read_weights(str(tmp_path / "out")).state["head.bias"], average["head.bias"])


@pytest.mark.parametrize(
    "more", [{}, {"model_ema": None}, {"model_ema": {}}, {"ema": {"decay": 0.999, "step": 3}}]
)
def test_files_without_a_moving_average(tmp_path, capsys, more):
    path = saved(tmp_path / "in.pth", formats.reference(decoder=False) | more)
    assert not any("--use_ema" in note for note in read_weights(path).notes)
    for read in (read_weights, checkpoint_flags):
        with pytest.raises(UserError, match=r"in\.pth .*moving average") as caught:
            read(path, use_ema=True)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="moving average"):
        main_test.parse_args(["--finetune", path, "--use_ema"])
    with pytest.raises(SystemExit):
        convert.main([path, str(tmp_path / "out"), "--to", "safetensors", "--use_ema"])
    assert "moving average" in capsys.readouterr().err
    assert read_weights(path).has_head  # the refusal leaves nothing behind


# --- the wrong --model

SIZES: dict[str, Any] = {"img_size": 32, "num_frames": 4}


def test_the_error_names_the_model_of_the_file(tmp_path):
    model = vit_tiny_patch8(**SIZES)
    path = saved(tmp_path / "in.pth", {"model": model.state_dict(), "arguments": model.arguments})
    with pytest.raises(UserError, match=r"the file needs .*--model vit_tiny_patch8\b"):
        apply_weights(vit_small_patch16(**SIZES), read_weights(path), keep_head=True)
    with pytest.raises(UserError, match=r"is not a vit_small_patch16: .*\bvit_tiny_patch8\b"):
        hubconf.vit_small_patch16(pretrained=path)

    model = mae_vit_tiny_patch8(pred_t_dim=2, **SIZES)
    path = saved(tmp_path / "mae.pth", {"model": model.state_dict(), "arguments": model.arguments})
    other = mae_vit_small_patch16(pred_t_dim=2, **SIZES)
    with pytest.raises(UserError, match=r"the file needs .*--model mae_vit_tiny_patch8\b"):
        apply_weights(other, read_weights(path), keep_head=True)
    with pytest.raises(UserError, match=r"\bmae_vit_tiny_patch8\b"):
        hubconf.mae_vit_small_patch16(pretrained=path)


def huge() -> State:
    """Return a ViT-H of patch 16 as PySlowFast names it; a tensor takes one number of memory."""
    with torch.device("meta"):
        model = VisionTransformer(embed_dim=1280, depth=32, num_heads=16)
    state = {k: torch.zeros(1).expand(v.shape) for k, v in model.state_dict().items()}
    return {k: v for k, v in state.items() if not k.startswith("head.")}


def test_the_released_huge_model_has_patches_of_16(tmp_path):
    path = saved(tmp_path / "in.pth", {"model_state": huge()})
    assert os.path.getsize(path) < 10**6
    with torch.device("meta"):
        model = vit_huge_patch14()
    with pytest.raises(UserError, match=r"the file needs .*--model vit_huge_patch16\b"):
        apply_weights(model, read_weights(path), keep_head=False)
    with pytest.raises(UserError, match=r"\bvit_huge_patch16\b"):
        hubconf.vit_huge_patch14(pretrained=path)


def test_a_model_without_a_name_is_described(tmp_path):
    model = VisionTransformer(**SIZES, patch_size=8, embed_dim=96, depth=1, num_heads=2)
    path = saved(tmp_path / "in.pth", {"model": model.state_dict(), "arguments": model.arguments})
    with pytest.raises(UserError, match="a --model with patch_size 8, embed_dim 96, depth 1"):
        apply_weights(vit_small_patch16(**SIZES), read_weights(path), keep_head=True)


# --- files that hold more than plain data


class Bomb:
    """Run code when unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


ODD: dict[str, Any] = {
    "args": argparse.Namespace(output_dir=pathlib.PurePosixPath("/run"), lr=1e-3),
    "best": np.float64(3),
    "date": datetime.datetime(2026, 1, 1),
    "rng": {"numpy": [np.random.default_rng(0)]},
}
WAY_OUT = r"python -m util\.convert .* --to safetensors --trust"


@torch.no_grad()
@pytest.mark.parametrize("entries", [["args"], ["best"], ["date"], ["rng"], ["args", "best"]])
def test_files_with_more_than_plain_data(tmp_path, capsys, entries):
    checkpoint = formats.reference(decoder=False)
    checkpoint |= {entry: ODD[entry] for entry in entries}
    path = saved(tmp_path / "in.pth", checkpoint)
    error = refusal(tmp_path, capsys, checkpoint)
    assert re.search(WAY_OUT, error)
    assert any(re.search(rf"\b{entry}\b", error.replace(str(tmp_path), "")) for entry in entries)
    out = str(tmp_path / "out.safetensors")
    convert.main([path, out, "--to", "safetensors", "--trust"])
    expected = formats.reference_classify(double(checkpoint["model"]), ours(pixels().double()))
    assert_close(classifier(out)(ours(pixels())), expected)


@pytest.mark.parametrize("place", ["whole", "args", "inside"])
def test_only_trust_runs_the_code_of_a_file(tmp_path, capsys, place):
    crater = tmp_path / "crater"
    checkpoint: Any = formats.reference(decoder=False)
    checkpoint["args"] = {"args": Bomb(crater), "inside": {"a": [Bomb(crater)]}}.get(place)
    checkpoint = Bomb(crater) if place == "whole" else checkpoint
    path = saved(tmp_path / "bomb.pth", checkpoint)
    assert "mkdir" in refusal(tmp_path, capsys, checkpoint)
    doors: list[Callable[[], object]] = [
        lambda: checkpoint_flags(path),
        lambda: read_weights(path),
        lambda: hubconf.vit_tiny_patch8(pretrained=path),
    ]
    for door in doors:
        with pytest.raises(UserError, match="bomb"):
            door()
    assert not crater.exists()
    with pytest.raises(SystemExit) if place == "whole" else contextlib.nullcontext():
        convert.main([path, str(tmp_path / "out"), "--to", "safetensors", "--trust"])
    assert crater.exists()  # the bomb is real


def test_a_trusted_file_may_hold_a_whole_model_and_numbers_of_numpy(tmp_path):
    model = vit_tiny_patch8(img_size=32, num_frames=4, num_heads=2)
    said = model.arguments | {"num_heads": np.int64(2)}
    args = argparse.Namespace(
        sampling_rate=np.int64(8), output_dir=pathlib.PurePosixPath("/run"), betas=np.ones(2)
    )
    path = saved(tmp_path / "in.pth", {"model": model, "arguments": said, "args": args})
    out = str(tmp_path / "out")
    convert.main([path, out, "--to", "safetensors", "--trust"])
    back = read_weights(out)
    assert back.arguments["num_heads"] == 2 and back.flags == {"sampling_rate": 8}
    assert torch.equal(back.state["norm.weight"], model.norm.weight)


def test_a_trusted_file_of_a_module_that_is_not_installed(tmp_path, capsys, monkeypatch):
    module = types.ModuleType("elsewhere")
    module.Thing = type("Thing", (), {"__module__": "elsewhere"})
    monkeypatch.setitem(sys.modules, "elsewhere", module)
    path = saved(tmp_path / "in.pth", formats.reference() | {"thing": module.Thing()})
    monkeypatch.delitem(sys.modules, "elsewhere")
    with pytest.raises(SystemExit):
        convert.main([path, str(tmp_path / "out"), "--to", "safetensors", "--trust"])
    says = r"in\.pth cannot be read, even if it is trusted: No module named 'elsewhere'"
    assert re.search(says, capsys.readouterr().err)


# --- records that make no sense


@pytest.mark.parametrize("rate", [None, [4], "x", 0, -1, 10**9, 2.5])
def test_sampling_rates_that_make_no_sense(rate):
    checkpoint = formats.pyslowfast_run()
    checkpoint["cfg"] = formats.changed_cfg(checkpoint["cfg"], {"DATA.SAMPLING_RATE": rate})
    assert "sampling_rate" not in interpret(checkpoint, "in.pyth").flags


def test_weights_that_are_whole_numbers():
    checkpoint = formats.reference(decoder=False)
    checkpoint["model"]["norm.weight"] = torch.ones(128, dtype=torch.int8)
    with pytest.raises(UserError, match=r"norm\.weight holds torch\.int8"):
        interpret(checkpoint, "in.pth")


def peak() -> int:
    """Return the most memory that this process has had, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def read_all(paths: list[str]) -> tuple[list[str], int]:
    """Build models from files, in 16 GiB of address space; return refusals and growth in MB."""
    resource.setrlimit(resource.RLIMIT_AS, (16 * 2**30,) * 2)
    refusals, before = [], peak()
    for path in paths:
        try:
            checkpoint_flags(path)
            weights = read_weights(path)
            if weights.has_decoder:
                model = MaskedAutoencoderViT(**weights.autoencoder_arguments())
            else:
                model = VisionTransformer(**weights.classifier_arguments())
            apply_weights(model, weights, keep_head=True)
        except (UserError, ValueError) as error:
            refusals.append(str(error))
    return refusals, peak() - before


# 9 ** 12 entries, by names for the same ones
LAUGHS = ["a0: &a0 {x: 1}"]
for i in range(12):
    LAUGHS.append(f"a{i + 1}: &a{i + 1} {{{', '.join(f'k{j}: *a{i}' for j in range(9))}}}")
ABSURD: list[tuple[str, dict[str, Any]]] = [
    ("cfg", {"cfg": "\n".join(LAUGHS)}),
    ("cfg", {"cfg": "DATA: {NUM_FRAMES: 1000000000, TRAIN_CROP_SIZE: 10000000}"}),
    ("finetune", {"num_frames": 10**9}),
    ("finetune", {"input_size": 10**7}),
    ("pretrain", {"num_frames": 10**9, "input_size": 10**7}),
    ("own", {"mlp_ratio": 1e9}),
    ("own", {"pred_t_dim": 10**9}),
    ("own", {"pred_t_dim": 10**6}),
    ("own", {"num_frames": 10**9}),
    ("own", {"decoder_num_heads": 10**9}),
]


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's limit of memory")
def test_absurd_records_take_no_memory(tmp_path):
    """They are ignored, or refused in a sentence that is not the allocator's."""
    paths = []
    for kind, records in ABSURD:
        if kind == "own":
            model = mae_vit_tiny_patch8(pred_t_dim=2, **SIZES)
            checkpoint = {"model": model.state_dict(), "arguments": model.arguments | records}
        elif kind == "cfg":
            checkpoint = formats.pyslowfast_run() | records
        else:
            checkpoint = formats.videomae(kind)
            vars(checkpoint["args"]).update(records)
        paths.append(saved(tmp_path / f"{len(paths)}.pth", checkpoint))
    with ProcessPoolExecutor(1, FORK) as pool:
        refusals, grew = pool.submit(read_all, paths).result(timeout=60)
    assert refusals and grew < 300  # MB
    assert not re.search("alloc|memory", " ".join(refusals))
