"""Tests of reading, loading and converting checkpoints: files of every format of the field.

The files come from tests/formats.py, which also holds a plain forward pass for each; Hugging Face's
own implementation is the judge of its format.
"""

import argparse
import hashlib
import json
import os
import re
from functools import partial

import numpy as np
import pytest
import safetensors.torch
import torch
import yaml
from torch import Tensor

import main_finetune
import main_test
from models_mae import MaskedAutoencoderViT, mae_vit_tiny_patch8
from models_vit import VisionTransformer, vit_tiny_patch8
from tests import formats, golden
from tests.test_scripts import FINETUNE, call
from util import convert, file_io, pos_embed
from util.convert import is_decoder
from util.errors import UserError
from util.formats import METADATA, PYSLOWFAST, model_state, num_heads
from util.kinetics import Kinetics, VideoIndex
from util.weights import apply_weights, interpret, read_checkpoint, read_weights

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
IMAGENET_MEAN, IMAGENET_STD = (torch.tensor(part).view(3, 1, 1, 1) for part in IMAGENET)
LAYER_NORM = partial(torch.nn.LayerNorm, eps=1e-6)
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def saved(path, checkpoint) -> str:
    torch.save(checkpoint, path)
    return str(path)


def saved_model(path, model: torch.nn.Module) -> str:
    """Save a model with its arguments, as our own checkpoints do."""
    return saved(path, {"model": model.state_dict(), "arguments": model.arguments})


def converted(path: str, out, to: str, *flags: str) -> str:
    convert.main([path, str(out), "--to", to, *flags])
    return str(out)


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    assert [k for k in left if not torch.equal(left[k], right[k])] == []


def refusal(capsys, path: str, out, to: str) -> str:
    """Return the sentence with which a conversion is refused, and check that nothing is written."""
    with pytest.raises(SystemExit):
        converted(path, out, to)
    assert not os.path.exists(out)
    return " ".join(capsys.readouterr().err.split())


def pixels(frames=8, side=64, clips=1) -> Tensor:
    return torch.rand(clips, 3, frames, side, side, generator=torch.Generator().manual_seed(9))


def ours(clips: Tensor) -> Tensor:
    return (clips - 0.45) / 0.225


def imagenet(clips: Tensor) -> Tensor:
    return (clips - IMAGENET_MEAN) / IMAGENET_STD


def autoencoder(path: str, **overrides) -> MaskedAutoencoderViT:
    weights = read_weights(path)
    model = MaskedAutoencoderViT(**weights.autoencoder_arguments(**overrides)).eval()
    apply_weights(model, weights, keep_head=False)
    return model


def classifier(path: str, keep_head=True, **overrides) -> VisionTransformer:
    weights = read_weights(path)
    model = VisionTransformer(**weights.classifier_arguments(**overrides)).eval()
    apply_weights(model, weights, keep_head=keep_head)
    return model


@torch.no_grad()
def predict(model: MaskedAutoencoderViT, clip: Tensor, ratio=0.75) -> tuple[Tensor, Tensor]:
    """Return pred [1, L, ...] and the numbers of the visible tokens."""
    tokens = model.patch_embed.num_patches
    noise = torch.rand(1, tokens, generator=torch.Generator().manual_seed(5))
    with golden.masking_noise(noise):
        _, pred, mask = model(clip, ratio)
    keep = noise[0].argsort()[: int(tokens * (1 - ratio))]
    assert (mask[0, keep] == 0).all()
    return pred, keep


# --- decoding and classifying as the original does


@pytest.mark.parametrize("kind", ["separate", "fused", "reference"])
def test_pretraining_files(tmp_path, kind):
    checkpoint, decode = formats.pyslowfast(fused=kind == "fused"), formats.pyslowfast_decode
    if kind == "reference":
        checkpoint, decode = formats.reference(), formats.reference_decode
    model = autoencoder(saved(tmp_path / "checkpoint-00099.pth", checkpoint))
    clip = ours(pixels())
    pred, keep = predict(model, clip)
    state = checkpoint["model" if kind == "reference" else "model_state"]
    torch.testing.assert_close(pred, decode(state, clip, keep), **CLOSE)
    arguments = model.arguments
    if kind == "reference":
        assert arguments["decoder_num_heads"] == 16
        return
    assert (arguments["num_heads"], arguments["decoder_num_heads"]) == (2, 2)
    assert arguments["cls_through_decoder"] and not arguments["decoder_sep_pos_embed"]
    frames = model.target_frames(torch.arange(8).view(1, 1, 8, 1, 1).expand(1, 3, -1, 64, 64))
    assert frames[0, 0, :, 0, 0].tolist() == [0, 2, 4, 6]


def test_first_release(tmp_path):
    checkpoint = formats.first_release()
    assert interpret(checkpoint, "video-mae-100x4-joint.pth").arguments["target"] == "patch"
    model = autoencoder(saved(tmp_path / "video-mae-200x4-nonorm.pth", checkpoint))
    assert model.target == "pixels"
    clip = ours(pixels(16, 224))
    pred, keep = predict(model, clip, 0.95)
    expected = formats.first_release_decode(checkpoint["model"], clip, keep)
    torch.testing.assert_close(pred, expected, **CLOSE)
    assert torch.equal(model.target_frames(clip), clip)
    fixed = [k for k, p in model.named_parameters() if not p.requires_grad]
    assert fixed == ["pos_embed", "decoder_pos_embed"]


def test_image_mae_sees_a_still_video_as_the_image(tmp_path):
    """With one step in time there are as many tokens as in the image: all of it must agree."""
    checkpoint = formats.image_mae("full")
    path = saved(tmp_path / "mae.pth", checkpoint)
    still = pixels(1).expand(-1, -1, 2, -1, -1)
    pred, keep = predict(autoencoder(path, num_frames=2), ours(still))
    image = imagenet(still)[:, :, 0]
    expected = formats.image_decode(checkpoint["model"], image, keep)
    torch.testing.assert_close(pred, expected, **CLOSE)

    weights = read_weights(path)
    kernel = checkpoint["model"]["patch_embed.proj.weight"]
    assert torch.equal(weights.state["patch_embed.proj.weight"][:, :, 0], kernel / 2)
    assert torch.equal(weights.state["patch_embed.proj.weight"][:, :, 1], kernel / 2)
    assert weights.arguments["num_frames"] == 16
    assert not weights.state["pos_embed_temporal"].any()


def test_image_mae_finetuned_and_huge_patches(tmp_path):
    path = saved(tmp_path / "mae.pth", formats.image_mae("fine-tuned", p=14, side=3))
    model = classifier(path, num_frames=4)
    assert model.arguments["patch_size"] == 14 and model.arguments["img_size"] == 42
    assert model(torch.zeros(1, 3, 4, 42, 42)).shape == (1, 7)
    assert not model.patch_embed.proj.weight.isnan().any()


def test_videomae_pretraining(tmp_path):
    """It was trained on ImageNet's normalisation: the same pixels must give the same result."""
    checkpoint = formats.videomae("pretrain")
    model = autoencoder(saved(tmp_path / "videomae.pth", checkpoint))
    pred, keep = predict(model, ours(pixels()))
    expected = formats.videomae_decode(checkpoint["model"], imagenet(pixels()), keep)
    removed = [i for i in range(64) if i not in keep.tolist()]
    torch.testing.assert_close(pred[:, removed], expected, **CLOSE)


@pytest.mark.parametrize("project", ["PySlowFast", "VideoMAE"])
def test_finetuned_classifiers(tmp_path, project):
    clips = pixels(clips=2)
    if project == "PySlowFast":
        checkpoint = formats.pyslowfast(decoder=False)
        expected = formats.pyslowfast_classify(checkpoint["model_state"], ours(clips))
    else:
        checkpoint = formats.videomae("finetune")
        expected = formats.videomae_classify(checkpoint["module"], imagenet(clips))
    model = classifier(saved(tmp_path / "finetuned.pth", checkpoint))
    torch.testing.assert_close(model(ours(clips)).detach(), expected, **CLOSE)
    assert project != "VideoMAE" or not model.pos_embed.requires_grad


# --- Hugging Face


def hf_config(transformers, **changes):
    small = {
        "image_size": 32, "patch_size": 8, "num_frames": 4, "hidden_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96,
        "decoder_hidden_size": 32, "decoder_num_hidden_layers": 1,
        "decoder_num_attention_heads": 4, "decoder_intermediate_size": 64,
    }  # fmt: skip
    return transformers.VideoMAEConfig(**(small | changes))


def loaded_whole(model_class, folder) -> torch.nn.Module:
    model, info = model_class.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def randomised(model: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def removed(keep: Tensor, tokens=32) -> Tensor:
    """Return transformers' mask [1, L] of the patches that are not kept."""
    return torch.ones(1, tokens, dtype=torch.bool).index_fill(1, keep, False)


@torch.no_grad()
@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_hugging_face_pretraining_reads_and_writes(tmp_path, transformers, norm_pix_loss):
    config = hf_config(transformers, use_mean_pooling=False, norm_pix_loss=norm_pix_loss)
    original = randomised(transformers.VideoMAEForPreTraining(config))
    original.save_pretrained(tmp_path / "hf")
    path = str(tmp_path / "hf/model.safetensors")
    model = autoencoder(path)
    assert (model.arguments["num_heads"], model.arguments["decoder_num_heads"]) == (4, 4)
    clip = pixels(4, 32)
    pred, keep = predict(model, ours(clip))
    masked = removed(keep)
    expected = original(imagenet(clip).transpose(1, 2), masked)
    loss = model.forward_loss(ours(clip), pred, masked.float())
    if norm_pix_loss:
        torch.testing.assert_close(pred[masked].unsqueeze(0), expected.logits, **CLOSE)
    else:  # theirs are pixels from 0 to 1
        found = pred[masked].unsqueeze(0) * 0.225 + 0.45
        torch.testing.assert_close(found, expected.logits, **CLOSE)
        loss = loss * 0.225**2
    torch.testing.assert_close(loss, expected.loss, rtol=1e-5, atol=0)

    converted(path, tmp_path / "again", "videomae-hf")
    again = loaded_whole(transformers.VideoMAEForPreTraining, tmp_path / "again")
    assert_same(original.state_dict(), again.state_dict())
    assert again.config.norm_pix_loss == norm_pix_loss


@torch.no_grad()
@pytest.mark.parametrize("use_mean_pooling", [True, False])
def test_hugging_face_classifiers_are_written_as_they_are(tmp_path, transformers, use_mean_pooling):
    config = hf_config(transformers, num_labels=7, use_mean_pooling=use_mean_pooling)
    original = randomised(transformers.VideoMAEForVideoClassification(config))
    original.save_pretrained(tmp_path / "hf")
    path = converted(str(tmp_path / "hf"), tmp_path / "own.pth", "mae_st")
    pool = "mean" if use_mean_pooling else "cls"
    assert read_weights(path).arguments["pool"] == pool
    converted(str(tmp_path / "hf"), tmp_path / "again", "videomae-hf")
    again = loaded_whole(transformers.VideoMAEForVideoClassification, tmp_path / "again")
    assert_same(original.state_dict(), again.state_dict())
    assert again.config.use_mean_pooling == use_mean_pooling
    clips = pixels(4, 32, clips=2)
    expected = original(imagenet(clips).transpose(1, 2)).logits
    torch.testing.assert_close(classifier(path)(ours(clips)), expected, **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_hugging_face_classifier_reads(tmp_path, transformers, file):
    original = randomised(
        transformers.VideoMAEForVideoClassification(hf_config(transformers, num_labels=7))
    )
    original.save_pretrained(tmp_path)
    if file.endswith(".bin"):
        state = safetensors.torch.load_file(tmp_path / "model.safetensors")
        torch.save(state, tmp_path / file)
    model = classifier(str(tmp_path / file))
    clips = pixels(4, 32, clips=2)
    expected = original(imagenet(clips).transpose(1, 2)).logits
    torch.testing.assert_close(model(ours(clips)), expected, **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["pretrain", "finetune"])
def test_original_videomae_loads_in_transformers(tmp_path, transformers, kind):
    checkpoint = formats.videomae(kind)
    path = saved(tmp_path / "videomae.pth", checkpoint)
    converted(path, tmp_path / "hf", "videomae-hf")
    clips = imagenet(pixels()).transpose(1, 2)
    processor = transformers.VideoMAEImageProcessor.from_pretrained(tmp_path / "hf")
    assert tuple(processor.image_mean) == (0.485, 0.456, 0.406)
    if kind == "finetune":
        model = transformers.VideoMAEForVideoClassification.from_pretrained(tmp_path / "hf")
        expected = formats.videomae_classify(checkpoint["module"], imagenet(pixels()))
        torch.testing.assert_close(model.eval()(clips).logits, expected, **CLOSE)
        return
    model = transformers.VideoMAEForPreTraining.from_pretrained(tmp_path / "hf").eval()
    keep = torch.arange(0, 64, 4)
    masked = torch.ones(1, 64, dtype=torch.bool)
    masked[0, keep] = False
    expected = formats.videomae_decode(checkpoint["model"], imagenet(pixels()), keep)
    torch.testing.assert_close(model(clips, masked).logits, expected, **CLOSE)
    features = transformers.VideoMAEModel.from_pretrained(tmp_path / "hf").eval()(clips)
    own = autoencoder(path).forward_features(ours(pixels()))
    torch.testing.assert_close(features.last_hidden_state, own, **CLOSE)


SINCOS = {
    "img_size": 32, "patch_size": 8, "num_frames": 4, "embed_dim": 48, "depth": 2, "num_heads": 4,
    "sep_pos_embed": False, "cls_embed": False, "sincos_pos_embed": True,
}  # fmt: skip
DECODER = {"decoder_embed_dim": 32, "decoder_depth": 1, "decoder_num_heads": 4, "pred_t_dim": 4}


@torch.no_grad()
@pytest.mark.parametrize("no_qkv_bias, pool", [(False, "mean"), (True, "mean"), (False, "cls")])
def test_a_model_trained_here_has_its_features_in_transformers(
    tmp_path, transformers, no_qkv_bias, pool
):
    """Their key bias is always zero; ours is random, and softmax does not see it."""
    own = VisionTransformer(**SINCOS, num_classes=7, no_qkv_bias=no_qkv_bias, pool=pool)
    own = randomised(own)
    own.pos_embed[0] = pos_embed.sincos_pos_embed(32, 48)
    path = saved_model(tmp_path / "own.pth", own)
    converted(path, tmp_path / "hf", "videomae-hf")
    theirs = loaded_whole(transformers.VideoMAEForVideoClassification, tmp_path / "hf")
    clips = ours(pixels(4, 32, clips=2))
    result = theirs(clips.transpose(1, 2), output_hidden_states=True)
    torch.testing.assert_close(result.hidden_states[-1], own.forward_features(clips), **CLOSE)
    torch.testing.assert_close(result.logits, own(clips), **CLOSE)

    back = read_weights(str(tmp_path / "hf/model.safetensors"))
    assert back.mean is None  # the file says that it wants our normalisation
    state = {k: v for k, v in own.state_dict().items() if not k.endswith("attn.k.bias")}
    assert_same(state, {k: back.state[k] for k in state})


@torch.no_grad()
@pytest.mark.parametrize("target", ["channel", "pixels"])
def test_a_model_trained_here_has_its_loss_in_transformers(tmp_path, transformers, target):
    """Their loss takes clips normalised as ImageNet's for granted where the target is pixels."""
    own = randomised(MaskedAutoencoderViT(**SINCOS, **DECODER, target=target))
    own.decoder_embed.bias.zero_()
    for name, width in (("pos_embed", 48), ("decoder_pos_embed", 32)):
        getattr(own, name)[0] = pos_embed.sincos_pos_embed(32, width)
    path = saved_model(tmp_path / "own.pth", own)
    converted(path, tmp_path / "hf", "videomae-hf")
    theirs = loaded_whole(transformers.VideoMAEForPreTraining, tmp_path / "hf")
    processor = transformers.VideoMAEImageProcessor.from_pretrained(tmp_path / "hf")
    mean, std = (
        torch.tensor(v).view(3, 1, 1, 1) for v in (processor.image_mean, processor.image_std)
    )
    clip = pixels(4, 32)
    pred, keep = predict(own, ours(clip))
    result = theirs(((clip - mean) / std).transpose(1, 2), removed(keep))
    loss = own.forward_loss(ours(clip), pred, removed(keep).float())
    loss = loss * 0.225**2 if target == "pixels" else loss
    torch.testing.assert_close(result.loss, loss, rtol=1e-5, atol=0)

    back = read_weights(str(tmp_path / "hf"))
    assert back.arguments["target"] == target
    if target == "channel":  # bit by bit
        state = {k: v for k, v in own.state_dict().items() if not k.endswith("attn.k.bias")}
        assert_same(state, {k: back.state[k] for k in state})


def test_a_decoder_that_others_lack_can_be_left_out(tmp_path, capsys):
    model = MaskedAutoencoderViT(**SINCOS, **DECODER)
    torch.nn.init.ones_(model.decoder_embed.bias)
    path = saved_model(tmp_path / "own.pth", model)
    assert refusal(capsys, path, tmp_path / "pyslowfast", "pyslowfast")
    assert "decoder_embed has no bias" in refusal(capsys, path, tmp_path / "hf", "videomae-hf")
    converted(path, tmp_path / "hf", "videomae-hf", "--drop_decoder")
    config = json.loads((tmp_path / "hf/config.json").read_text())
    assert config["architectures"] == ["VideoMAEModel"]
    again = read_weights(str(tmp_path / "hf/model.safetensors"))
    assert not again.has_decoder and torch.equal(again.state["norm.bias"], model.norm.bias)


# --- round trips

SEPARABLE = {"img_size": 32, "patch_size": 8, "num_frames": 4, "embed_dim": 64, "depth": 1,
             "num_heads": 4}  # fmt: skip


def fused(state: dict[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """Join q, k and v of the tensors whose names start with prefix."""
    result = {}
    for name, tensor in state.items():
        if name.startswith(prefix) and re.search(r"\.attn\.[qkv]\.", name):
            whole = re.sub(r"\.[qkv]\.", ".qkv.", name)
            result[whole] = torch.cat([result[whole], tensor] if whole in result else [tensor])
        else:
            result[name] = tensor
    return result


PYSLOWFAST_MODELS = {
    "separate": formats.pyslowfast()["model_state"],
    "fused": formats.pyslowfast(fused=True)["model_state"],
    "fine-tuned": formats.pyslowfast(decoder=False)["model_state"],
    "joint": formats.pyslowfast_run({"MVIT.SEP_POS_EMBED": False}, decoder=True)["model_state"],
    "separable decoder": formats.pyslowfast_run(
        {"MASK.DECODER_SEP_POS_EMBED": True, "MASK.TIME_STRIDE_LOSS": False}, decoder=True
    )["model_state"],
    "no class token": formats.pyslowfast_run({"MVIT.CLS_EMBED_ON": False})["model_state"],
}


@pytest.mark.parametrize("through", ["mae_st", "safetensors", "pyslowfast-separate"])
@pytest.mark.parametrize("name", PYSLOWFAST_MODELS)
def test_round_trips_of_pyslowfast_are_bitwise(tmp_path, name, through):
    """Its q, k and v are fused everywhere, or in the decoder alone."""
    sizes = {"DATA": {"NUM_FRAMES": 8, "TRAIN_CROP_SIZE": 64}}
    checkpoint = {"model_state": PYSLOWFAST_MODELS[name], "cfg": sizes}
    path = saved(tmp_path / "in.pth", checkpoint)
    middle = converted(path, tmp_path / "middle", through)
    back = read_checkpoint(converted(middle, tmp_path / "out.pth", "pyslowfast"))["model_state"]
    assert_same(back, fused(checkpoint["model_state"]))
    if name != "fused":
        back = converted(middle, tmp_path / "again.pth", "pyslowfast-separate")
        if "attn.qkv" not in " ".join(checkpoint["model_state"]):
            expected = fused(checkpoint["model_state"], "pred_head.")
            assert_same(read_checkpoint(back)["model_state"], expected)
    arguments = read_weights(path).arguments
    for file in (middle, tmp_path / "out.pth"):
        assert read_weights(str(file)).arguments == arguments


@pytest.mark.parametrize("through", ["mae_st", "safetensors"])
@pytest.mark.parametrize("decoder", [True, False])
def test_round_trips_of_our_own_files_are_bitwise(tmp_path, decoder, through):
    checkpoint = formats.reference(decoder=decoder)
    path = saved(tmp_path / "in.pth", checkpoint)
    middle = converted(path, tmp_path / "middle", through)
    out = converted(middle, tmp_path / "out.pth", "mae_st")
    assert_same(checkpoint["model"], read_checkpoint(out)["model"])
    assert read_weights(path).arguments == read_weights(middle).arguments


NAMES = ["run", "saut \udce0 la perche", "ça"]  # as bytes, the second is not UTF-8


@pytest.mark.parametrize("to", convert.FORMATS)
def test_the_sampling_rate_is_kept(tmp_path, to):
    positions = {} if to == "videomae-hf" else {"sincos_pos_embed": False, "sep_pos_embed": True}
    own = VisionTransformer(**{**SINCOS, **positions})
    content = {"model": own.state_dict(), "arguments": own.arguments, "args": {"sampling_rate": 8}}
    converted(saved(tmp_path / "own.pth", content), tmp_path / "out", to)
    assert "--sampling_rate 8" in " ".join(main_test.checkpoint_flags(str(tmp_path / "out")))


@pytest.mark.parametrize("to", convert.FORMATS)
def test_names_of_classes_are_kept(tmp_path, to):
    positions = {} if to == "videomae-hf" else {"sincos_pos_embed": False, "sep_pos_embed": True}
    own = VisionTransformer(**{**SINCOS, "num_classes": 3, **positions})
    path, out = tmp_path / "own.pth", tmp_path / "out"
    content = {"model": own.state_dict(), "arguments": own.arguments, "classes": NAMES}
    torch.save(content, path)
    assert read_weights(str(path)).classes == NAMES
    converted(str(path), out, to)
    assert read_weights(str(out)).classes == NAMES


@pytest.mark.parametrize(
    ("names", "noted"),
    [
        (["run", "swim"], True),
        (["run", "swim", "run"], True),
        ("abc", False),
        ([1, 2, 3], False),
        ([], False),
        (None, False),
        (["LABEL_0", "LABEL_1", "LABEL_2"], False),  # of transformers, for a model without names
    ],
)
def test_names_that_do_not_fit_the_head_are_left_out(tmp_path, names, noted):
    own = VisionTransformer(**{**SINCOS, "num_classes": 3})
    content = {"model": own.state_dict(), "arguments": own.arguments, "classes": names}
    torch.save(content, tmp_path / "own.pth")
    weights = read_weights(str(tmp_path / "own.pth"))
    assert weights.classes == []
    assert any("names of classes" in note for note in weights.notes) == noted


WRITABLE = {  # what PySlowFast can express, and entries of its configuration
    "as released": (
        {}, {"MVIT.SEP_POS_EMBED": True, "MASK.DECODER_SEP_POS_EMBED": False,
             "MASK.TIME_STRIDE_LOSS": True},
    ),
    "other sizes": (
        {"num_frames": 8, "img_size": 48, "depth": 1, "num_heads": 4},
        {"DATA.NUM_FRAMES": 8, "DATA.TRAIN_CROP_SIZE": 48, "DATA.TEST_CROP_SIZE": 48,
         "MVIT.DEPTH": 1, "MVIT.NUM_HEADS": 4},
    ),
    "pixels": ({"target": "pixels"}, {"MASK.NORM_PRED_PIXEL": False}),
    "patch": ({"target": "patch"}, {"MASK.NORM_PRED_PIXEL": True}),
    "all frames": ({"pred_t_dim": 4}, {"MASK.TIME_STRIDE_LOSS": False}),
    "no class token": (
        {"cls_embed": False, "cls_through_decoder": False}, {"MVIT.CLS_EMBED_ON": False}
    ),
    "joint": ({"sep_pos_embed": False}, {"MVIT.SEP_POS_EMBED": False}),
    "fixed": (
        {"sep_pos_embed": False, "sincos_pos_embed": True, "cls_embed": False,
         "cls_through_decoder": False},
        {"MVIT.USE_FIXED_SINCOS_POS": True, "MVIT.SEP_POS_EMBED": False},
    ),
    "separable decoder": ({"decoder_sep_pos_embed": True}, {"MASK.DECODER_SEP_POS_EMBED": True}),
    "no biases": ({"no_qkv_bias": True}, {"MVIT.QKV_BIAS": False}),
}  # fmt: skip


def pyslowfast_loaded(path: str) -> tuple[dict[str, Tensor], dict]:
    """Load a file into a plain PySlowFast model of its cfg: nothing is missing or left over."""
    written = read_checkpoint(path)
    sections = yaml.safe_load(written["cfg"])
    cfg = {f"{k}.{name}": v for k, section in sections.items() for name, v in section.items()}
    assert cfg["MVIT.PATCH_KERNEL"] == cfg["MVIT.PATCH_STRIDE"] == [2, 16, 16]
    assert (cfg["DATA.MEAN"], cfg["DATA.STD"]) == ([0.45] * 3, [0.225] * 3)
    model = formats.pyslowfast_run(cfg, decoder="MASK" in sections)["model_state"]
    if not cfg["MVIT.QKV_BIAS"]:
        model = {k: v for k, v in model.items() if not re.search(r"attn\.(q|k|v|qkv)\.bias", k)}
    state = written["model_state"]
    assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in model.items()}
    return state, cfg


@torch.no_grad()
@pytest.mark.parametrize("to", ["pyslowfast", "pyslowfast-separate"])
@pytest.mark.parametrize("kind", WRITABLE)
def test_pyslowfast_loads_and_computes_what_is_written(tmp_path, kind, to):
    changes, entries = WRITABLE[kind]
    arguments = {
        "img_size": 64, "num_frames": 4, "embed_dim": 128, "depth": 2, "num_heads": 2,
        "decoder_embed_dim": 128, "decoder_num_heads": 2, "cls_through_decoder": True,
        "decoder_sep_pos_embed": False, "target": "patch", "norm_layer": LAYER_NORM,
        "strided_targets": True,
    } | changes  # fmt: skip
    arguments = {"pred_t_dim": arguments["num_frames"] // 2} | arguments
    own = randomised(MaskedAutoencoderViT(**arguments))
    file = {"model": own.state_dict(), "arguments": own.arguments, "args": {"sampling_rate": 7}}
    path = converted(saved(tmp_path / "own.pth", file), tmp_path / "out.pyth", to)
    state, cfg = pyslowfast_loaded(path)
    entries = entries | {"MVIT.SEPARATE_QKV": "separate" in to, "DATA.SAMPLING_RATE": 7}
    assert {k: cfg[k] for k in entries} == entries

    clip = ours(pixels(arguments["num_frames"], arguments["img_size"]))
    pred, keep = predict(own, clip)
    expected = formats.pyslowfast_decode(state, clip, keep, heads=arguments["num_heads"])
    torch.testing.assert_close(pred, expected, **CLOSE)
    back = read_weights(path)
    assert back.arguments.items() <= own.arguments.items() and back.flags["sampling_rate"] == 7
    assert_same(back.state, own.state_dict())


@torch.no_grad()
@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_pyslowfast_classifies_by_the_token_that_the_file_says(tmp_path, pool):
    sizes = {"img_size": 64, "num_frames": 8, "embed_dim": 128, "depth": 2, "num_heads": 2}
    own = randomised(VisionTransformer(**sizes, num_classes=7, pool=pool, norm_layer=LAYER_NORM))
    path = converted(saved_model(tmp_path / "own.pth", own), tmp_path / "out", "pyslowfast")
    state, cfg = pyslowfast_loaded(path)
    assert (cfg["MVIT.USE_MEAN_POOLING"], cfg["MODEL.NUM_CLASSES"]) == (pool == "mean", 7)
    clips = ours(pixels(clips=2))
    expected = formats.pyslowfast_classify(state, clips, pool)
    torch.testing.assert_close(own(clips), expected, **CLOSE)
    torch.testing.assert_close(classifier(path)(clips), expected, **CLOSE)


OURS = ["mae_st", "safetensors"]


@pytest.mark.parametrize("to", OURS)
@pytest.mark.parametrize(
    "model",
    [
        MaskedAutoencoderViT(**SINCOS, **DECODER, target="channel"),
        MaskedAutoencoderViT(**SINCOS, **DECODER, target="patch", target_norm=IMAGENET),
        MaskedAutoencoderViT(**SINCOS, **DECODER),
        VisionTransformer(**SINCOS, num_classes=7, pool="cls"),
    ],
    ids=["channel", "patch of ImageNet", "pixels", "cls"],
)
def test_our_own_formats_carry_targets_and_pools(tmp_path, model, to):
    path = converted(saved_model(tmp_path / "own.pth", model), tmp_path / "out", to)
    back = read_weights(path)
    build = classifier if "pool" in back.arguments else autoencoder
    found = build(path)
    for name in ("target", "target_norm", "pool"):
        values = (m.arguments.get(name) for m in (found, model))
        first, second = map(json.dumps, values)  # tuples come back as lists
        assert first == second
    assert_same(found.state_dict(), model.state_dict())


@pytest.mark.parametrize("to", [*OURS, "videomae-hf", "pyslowfast"])
def test_clips_of_other_channels(tmp_path, to):
    own = VisionTransformer(**SINCOS, num_classes=7, in_chans=2)
    path = converted(saved_model(tmp_path / "own.pth", own), tmp_path / "out", to)
    back = read_weights(path)
    assert back.mean is None and back.arguments["in_chans"] == 2
    assert torch.equal(back.state["patch_embed.proj.weight"], own.patch_embed.proj.weight)


class Bomb:
    def __reduce__(self):
        return os.mkdir, (self.path,)

    def __init__(self, path):
        self.path = str(path)


@pytest.mark.parametrize("to", convert.FORMATS)
def test_trusted_files_become_plain_ones(tmp_path, capsys, to):
    """The code in a file runs when it is trusted, and what it made is not in the copy."""
    own = VisionTransformer(**SINCOS, num_classes=3)
    args = argparse.Namespace(output_dir=tmp_path, lr=np.float64(3), sampling_rate=2)
    classes = list(np.array(["a", "b", "c"]))
    content = {"model": own.state_dict(), "arguments": own.arguments, "args": args}
    path = saved(tmp_path / "in.pth", content | {"classes": classes, "x": Bomb(tmp_path / "boom")})
    assert "--trust" in refusal(capsys, path, tmp_path / "out", to)
    assert not (tmp_path / "boom").exists()
    out = converted(path, tmp_path / "out", to, "--trust")
    assert (tmp_path / "boom").exists()
    back = read_weights(out)
    assert back.classes == ["a", "b", "c"]
    assert_same(
        {k: v for k, v in back.state.items() if "attn.k.bias" not in k},
        {k: v for k, v in own.state_dict().items() if "attn.k.bias" not in k},
    )
    if to == "mae_st":
        assert back.flags["output_dir"] == str(tmp_path) and back.flags["lr"] == 3


@pytest.mark.parametrize("to", convert.FORMATS)
def test_moving_averages_are_written_when_asked(tmp_path, capsys, to):
    own, average = (VisionTransformer(**SINCOS, num_classes=3) for _ in range(2))
    content = {"model": own.state_dict(), "model_ema": average.state_dict()}
    path = saved(tmp_path / "in.pth", content | {"arguments": own.arguments})
    for flags, model in (([], own), (["--use_ema"], average)):
        out = converted(path, tmp_path / f"out{len(flags)}", to, *flags)
        assert torch.equal(read_weights(out).state["head.weight"], model.head.weight)


@pytest.mark.parametrize("to", [*OURS, "pyslowfast", "pyslowfast-separate"])
def test_blocks_of_another_width_are_named_and_nothing_is_written(tmp_path, capsys, to):
    """The width and the MLP are taken from the first block; a Hiera's later ones are wider."""
    narrow, wide = (
        VisionTransformer(**SEPARABLE | {"embed_dim": D, "depth": 2}) for D in (64, 128)
    )
    later = {k: v for k, v in wide.state_dict().items() if k.startswith("blocks.1.")}
    path = saved(tmp_path / "in.pth", {"model": narrow.state_dict() | later})
    error = refusal(capsys, path, tmp_path / "out", to)
    assert "no model known here: blocks.1.norm1.weight is [128], not [64]" in error


def test_videomae_here_and_back_differs_in_the_folded_patch_embedding_alone(tmp_path):
    path = saved(tmp_path / "in.pth", formats.videomae("finetune"))
    own = converted(path, tmp_path / "own.pth", "mae_st")
    first, second = read_weights(path), read_weights(own)
    differ = [k for k in first.state if not torch.equal(first.state[k], second.state[k])]
    assert differ == ["patch_embed.proj.weight", "patch_embed.proj.bias"]
    clips = ours(pixels())
    assert torch.equal(classifier(path)(clips), classifier(own)(clips))


WITHOUT_CLASS = SEPARABLE | {"cls_embed": False, "decoder_num_heads": 1}


@pytest.mark.parametrize(
    "to, arguments, reason",
    [
        ("videomae-hf", SINCOS | {"cls_embed": True, "sincos_pos_embed": False},
         "VideoMAE has no class token"),
        ("videomae-hf", SINCOS | {"sep_pos_embed": True, "sincos_pos_embed": False},
         "its pos_embed is not VideoMAE's joint fixed sine-cosine table; its decoder_pos_embed is"),
        ("videomae-hf", SINCOS | {"sincos_pos_embed": False},
         "its pos_embed is not VideoMAE's joint fixed sine-cosine table; its decoder_pos_embed is"),
        ("videomae-hf", SINCOS | {"pred_t_dim": 2}, "VideoMAE predicts all.*--drop_decoder"),
        ("videomae-hf", SINCOS | {"target": "patch"}, "over all channels.*--drop_decoder"),
        ("videomae-hf", SINCOS | {"in_chans": 1}, "other colours than red"),
        ("pyslowfast", SEPARABLE, "class token of its own"),
        ("pyslowfast", SEPARABLE | {"cls_through_decoder": True}, "64 channels per head"),
        ("pyslowfast", WITHOUT_CLASS | {"target": "channel"}, "normalised in another way.*--drop"),
        ("pyslowfast", WITHOUT_CLASS | {"target": "hog"}, "its target is 'hog', not pix.*--drop"),
        ("videomae-hf", SINCOS | {"target": "motion"}, "target is 'motion', not pix.*--drop"),
        ("pyslowfast-separate", WITHOUT_CLASS | {"target": "patch", "target_norm": IMAGENET},
         "normalised in another way"),
        ("pyslowfast", WITHOUT_CLASS | {"t_patch_size": 4, "pred_t_dim": 2},
         "predicts neither one nor all frames of a patch"),
        ("pyslowfast", WITHOUT_CLASS | {"pred_t_dim": 2}, "predicts other frames than the first"),
        ("pyslowfast", WITHOUT_CLASS | {"decoder_embed_dim": 640, "decoder_num_heads": 8},
         "has 8 heads, not PySlowFast's 64 channels per head"),
    ],
)  # fmt: skip
def test_what_other_projects_cannot_express_is_refused(tmp_path, capsys, to, arguments, reason):
    model = MaskedAutoencoderViT(**(DECODER | arguments))
    error = refusal(capsys, saved_model(tmp_path / "own.pth", model), tmp_path / "out", to)
    project = "VideoMAE" if to == "videomae-hf" else "PySlowFast"
    assert re.search(f"{project} cannot express this model: .*{reason}", error)


def test_a_head_on_the_first_patch_is_not_for_pyslowfast(tmp_path, capsys):
    own = VisionTransformer(**SEPARABLE, cls_embed=False, pool="cls")
    path = saved_model(tmp_path / "own.pth", own)
    assert "head reads the first patch" in refusal(capsys, path, tmp_path / "out", "pyslowfast")


# --- positions and patch kernels


def test_spatial_resizing_is_the_reference_one():
    grid = golden.tensor("pos_embed_interp.npz", "in")[:, 1:]
    expected = golden.tensor("pos_embed_interp.npz", "out")[:, 1:]
    resized = pos_embed.resize_spatial(grid, (4, 4), (8, 8))
    torch.testing.assert_close(resized, expected, rtol=0, atol=1e-6)
    assert pos_embed.resize_spatial(grid, (4, 4), (4, 4)) is grid


def test_temporal_resizing_is_linear():
    ramp = torch.tensor([0.0, 1.0, 2.0, 3.0]).view(1, 4, 1)
    assert pos_embed.resize_temporal(ramp, 8).flatten().tolist() == [
        0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3,
    ]  # fmt: skip


def test_joint_and_separable_resizing_agree():
    torch.manual_seed(0)
    spatial, temporal = torch.randn(1, 16, 5), torch.randn(1, 4, 5)
    old, new = (4, 4, 4), (6, 5, 5)
    joint = pos_embed.resize_joint(pos_embed.join(spatial, temporal), old, new)
    space = pos_embed.resize_spatial(spatial, (4, 4), (5, 5))
    expected = pos_embed.join(space, pos_embed.resize_temporal(temporal, 6))
    torch.testing.assert_close(joint, expected, rtol=0, atol=1e-5)
    parts = pos_embed.split(joint, new)
    torch.testing.assert_close(pos_embed.join(*parts), joint, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match=r"\d+\.\d% would be lost"):
        pos_embed.split(torch.randn(1, 64, 5), (4, 4, 4))


def test_sincos_table():
    expected = formats.sinusoids(50, 6)
    torch.testing.assert_close(pos_embed.sincos_pos_embed(50, 6), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("old, new", [(1, 2), (2, 4), (4, 2), (2, 1), (2, 3), (3, 2)])
def test_patch_kernels_keep_the_tokens_of_still_clips(old, new):
    kernel = torch.randn(5, 3, old, 4, 4)
    resized = pos_embed.resize_kernel(kernel, new)
    assert resized.shape == (5, 3, new, 4, 4)
    torch.testing.assert_close(resized.sum(2), kernel.sum(2), rtol=0, atol=1e-5)


def test_other_clips_resize_positions(tmp_path, capsys):
    path = saved(tmp_path / "in.pth", formats.reference(decoder=False))
    weights = read_weights(path)
    model = VisionTransformer(
        **weights.classifier_arguments(num_frames=16, img_size=96, t_patch_size=4)
    )
    apply_weights(model, weights, keep_head=True)
    out = capsys.readouterr().out
    assert "resized: 4 x 4 x 4 -> 4 x 6 x 6 tokens: pos_embed_spatial" in out
    assert "resized: 2 -> 4 frames: patch_embed.proj.weight" in out
    spatial = pos_embed.resize_spatial(weights.state["pos_embed_spatial"], (4, 4), (6, 6))
    assert torch.equal(model.pos_embed_spatial, spatial)
    assert model(torch.zeros(1, 3, 16, 96, 96)).shape == (1, 7)


def test_joint_positions_of_the_model(tmp_path):
    """Separable ones become joint ones, and back; the model computes the same."""
    path = saved(tmp_path / "in.pth", formats.reference(decoder=False))
    clips = ours(pixels())
    separate, joint = classifier(path), classifier(path, sep_pos_embed=False)
    torch.testing.assert_close(joint(clips), separate(clips), **CLOSE)
    path = saved_model(tmp_path / "joint.pth", joint)
    again = classifier(path, sep_pos_embed=True)
    torch.testing.assert_close(again(clips), separate(clips), **CLOSE)
    larger = classifier(path, img_size=96), classifier(path, img_size=96, sep_pos_embed=True)
    clips = ours(pixels(side=96))
    torch.testing.assert_close(larger[0](clips), larger[1](clips), **CLOSE)


def test_positions_that_are_no_sum_are_not_split(tmp_path):
    path = saved(tmp_path / "videomae.pth", formats.videomae("finetune"))
    with pytest.raises(
        UserError, match=r"videomae\.pth: joint positions are not a sum.*--no-sep_pos"
    ):
        classifier(path, sep_pos_embed=True, sincos_pos_embed=False)


@pytest.mark.parametrize(
    "side, frames, words",
    [(20, 18, "7200 x 16 x 16"), (12, 20, r"may be .*20 x 192 x 192.*frames x height x width")],
)
def test_joint_positions_of_unknown_grids_are_not_guessed(tmp_path, capsys, side, frames, words):
    checkpoint = formats.first_release()
    rows = side * side * frames // 2
    for name, width in (("pos_embed", 128), ("decoder_pos_embed", 64)):
        checkpoint["model"][name] = torch.zeros(1, rows, width)
    path = saved(tmp_path / "in.pth", checkpoint)
    for make in (autoencoder, classifier):
        with pytest.raises(UserError, match=r"does not say the size of its clips.*" + words):
            make(path)
    error = refusal(capsys, path, tmp_path / "out.pth", "safetensors")
    assert "does not say the size of its clips" in error
    with pytest.raises(UserError, match=r"does not say the size of its clips"):
        autoencoder(path, num_frames=frames, img_size=2 * side * 16)  # nor does it fit


JOINT = {"patch_size": 8, "embed_dim": 64, "depth": 1, "num_heads": 1, "sep_pos_embed": False}


@pytest.mark.parametrize("cls_embed", [False, True])
@pytest.mark.parametrize("frames, side", [(4, 32), (4, 64), (8, 32), (8, 64), (32, 256)])
@pytest.mark.parametrize("args", [{}, {"num_frames": 4, "input_size": 224}])
def test_joint_positions_of_the_models_own_number_stay(args, frames, side, cls_embed):
    """A bare file may be of many grids; into the model that wrote it, it goes as it is."""
    sizes = JOINT | {"img_size": side, "num_frames": frames, "cls_embed": cls_embed}
    small_decoder = {"decoder_embed_dim": 32, "decoder_depth": 1, "decoder_num_heads": 2}
    for model_class, arguments in (
        (MaskedAutoencoderViT, sizes | small_decoder | {"pred_t_dim": frames}),
        (VisionTransformer, sizes),
    ):
        torch.manual_seed(0)
        written, read = model_class(**arguments), model_class(**arguments)
        torch.nn.init.normal_(written.pos_embed)
        weights = interpret({"model": written.state_dict(), "args": args}, "in.pth")
        apply_weights(read, weights, keep_head=True)
        assert_same(read.state_dict(), written.state_dict())


def test_flags_settle_the_size_of_clips_that_a_file_leaves_open(tmp_path):
    """main_test.py takes no size from a guess: without flags its own defaults do not fit."""
    written = VisionTransformer(img_size=32, num_frames=8, num_classes=3, **JOINT)
    path = saved(tmp_path / "in.pth", {"model": written.state_dict()})
    assert read_weights(path).doubt
    told = main_test.checkpoint_flags(path)
    assert "--input_size" not in told and "--num_frames" not in told and "--num_classes" in told
    model = classifier(path, img_size=32, num_frames=8)
    assert torch.equal(model.pos_embed, written.pos_embed)


def test_stated_sizes_decide_over_equal_numbers_of_positions(tmp_path):
    """8 x 2 x 2 tokens and 2 x 4 x 4 are as many, but the file says which."""
    written = VisionTransformer(img_size=16, num_frames=16, **JOINT)
    torch.nn.init.normal_(written.pos_embed)
    path = saved_model(tmp_path / "in.pth", written)
    model = VisionTransformer(img_size=32, num_frames=4, **JOINT)
    apply_weights(model, read_weights(path), keep_head=True)
    expected = pos_embed.resize_joint(written.pos_embed[:, 1:], (8, 2, 2), (2, 4, 4))
    assert torch.equal(model.pos_embed[:, 1:], expected)


def test_a_table_that_is_not_stored_is_made_for_the_model(tmp_path):
    checkpoint = formats.videomae("finetune")
    del checkpoint["args"]
    path = saved(tmp_path / "in.pth", checkpoint)
    model = classifier(path, img_size=64, num_frames=4)
    expected = pos_embed.sincos_pos_embed(2 * 4 * 4, 128)
    assert torch.equal(model.pos_embed[0], expected)


# --- what is loaded, missing, dropped


PREFIXES = """
    module. backbone. encoder. _orig_mod. module._orig_mod. _orig_mod.module. encoder.module.
    encoder.backbone. module.encoder.backbone. encoder._orig_mod.
""".split()


@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes_of_training_wrappers_are_stripped(prefix):
    state = formats.reference(decoder=False)["model"]
    wrapped = {prefix + name: tensor for name, tensor in state.items()}
    assert model_state({"model": wrapped}, "in.pth") == state  # the same tensors
    compiled = {name.replace("attn.", "attn._orig_mod."): tensor for name, tensor in state.items()}
    assert model_state({"model": compiled}, "in.pth").keys() == state.keys()


def test_every_dropped_tensor_is_named(tmp_path, capsys):
    path = saved(tmp_path / "in.pth", formats.reference())
    classifier(path, keep_head=False)
    dropped = re.search(r"dropped: (.*)", capsys.readouterr().out)[1]
    names = {re.sub(r"blocks\.\d+", "blocks.*", k) for k in formats.reference()["model"]}
    assert {name for name in names if is_decoder(name)} == set(dropped.split(", "))


def test_heads_that_are_guessed_are_told():
    model = VisionTransformer(img_size=16, num_frames=4, embed_dim=48, depth=1, num_heads=4)
    state = {"model": model.state_dict()}
    assert any("num_heads 1 is a guess" in note for note in interpret(state, "in.pth").notes)
    told = interpret(state | {"arguments": model.arguments}, "in.pth")
    assert told.arguments["num_heads"] == 4 and not told.notes
    assert not interpret(formats.reference(decoder=False), "b.pth").notes


def test_every_tensor_is_accounted_for(tmp_path, capsys):
    path = saved(tmp_path / "ps.pyth", formats.pyslowfast(fused=True))
    classifier(path, keep_head=False, num_classes=5, num_frames=16)
    out = capsys.readouterr().out
    assert f"loaded 40 of 42 tensors from {path} (PySlowFast format)" in out
    lines = [line for line in out.splitlines()[1:] if "note: " not in line]
    rows = dict(line.split(": ", 1)[::-1] for line in lines)
    counts = {text: int(row.split()[0]) for text, row in rows.items()}
    assert sum(counts.values()) == 42 + sum("decoder" in k for k in read_weights(path).state) + 1
    assert "missing, left as drawn: head.weight, head.bias" in out
    assert "converted: split from qkv: blocks.*.attn.q.weight" in out
    assert "resized: 4 x 4 x 4 -> 8 x 4 x 4 tokens: pos_embed_spatial, pos_embed_temporal" in out
    assert "dropped: decoder_pos_embed" in out or "dropped: decoder_embed" in out


@pytest.mark.parametrize("lost", ["blocks.1.attn.proj.bias", "norm.bias", "blocks.0.norm1.weight"])
def test_missing_encoder_weights_need_permission(capsys, lost):
    weights = interpret({"model": without(tiny().state_dict(), lost)}, "in.pth")
    model = VisionTransformer(**TINY)
    drawn = model.state_dict()[lost].clone()
    with pytest.raises(UserError, match=rf"lacks 1 weights .*{re.escape(lost)}"):
        apply_weights(model, weights, keep_head=True)
    apply_weights(model, weights, keep_head=True, allow_missing=True)
    assert "WARNING" in capsys.readouterr().out
    assert_same(model.state_dict(), weights.state | {lost: drawn})


def videomae_file(folder) -> str:
    """Write a file of mae_vit_tiny_patch8 in VideoMAE's format."""
    sizes = {"img_size": 32, "num_frames": 4, "pred_t_dim": 4}
    like = {"cls_embed": False, "sep_pos_embed": False, "sincos_pos_embed": True}
    model = mae_vit_tiny_patch8(**sizes, **like, decoder_sep_pos_embed=False, decoder_num_heads=1)
    return converted(saved_model(folder / "own.pth", model), folder / "hf", "videomae-hf")


def default_file(folder) -> str:
    """Write a file of the default kind of model, for longer clips."""
    return saved_model(folder / "own.pth", vit_tiny_patch8(img_size=32))


def joint_without_biases(folder) -> str:
    """Write a file that does not say the size of its clips: 32 frames of 32 x 32 pixels."""
    model = vit_tiny_patch8(img_size=32, num_frames=32, no_qkv_bias=True, sep_pos_embed=False)
    torch.nn.init.normal_(model.pos_embed, std=0.02)
    return saved(folder / "own.pth", {"model": model.state_dict()})


ALL_OF_VIDEOMAE = "--no-cls_embed --no-sep_pos_embed --sincos_pos_embed"
TINY_MODEL = "--model vit_tiny_patch8"


@pytest.mark.parametrize(
    "write, flags, needs",
    [
        (videomae_file, "", ALL_OF_VIDEOMAE),
        (videomae_file, "--no-cls_embed", "--no-sep_pos_embed --sincos_pos_embed"),
        (videomae_file, "--input_size 48 --num_frames 8 --t_patch_size 4", ALL_OF_VIDEOMAE),
        (videomae_file, "--model vit_small_patch16", f"{ALL_OF_VIDEOMAE} and {TINY_MODEL}"),
        (default_file, "--model vit_small_patch16", TINY_MODEL),
        (joint_without_biases, "", "--no-sep_pos_embed --no_qkv_bias"),
    ],
)
def test_the_first_error_names_all_flags_that_the_file_needs(
    tmp_path, videos, capsys, write, flags, needs
):
    path = write(tmp_path)
    command = [*FINETUNE, "--path_to_data_dir", videos, "--finetune", path, "--dry_run"]
    command += ["--output_dir", tmp_path, *flags.split()]
    with pytest.raises(SystemExit):
        call(main_finetune, *command)
    error, told = re.search(r"(.*); the file needs (.*)\n", capsys.readouterr().err).groups()
    assert told == needs
    command += told.replace(" and ", " ").split()
    command += ["--num_frames", 32] if "may be 512 x 8 x 8, " in error else []
    call(main_finetune, *command)


def test_dropping_the_class_token(tmp_path):
    path = saved(tmp_path / "in.pth", formats.reference(decoder=False))
    model = classifier(path, cls_embed=False)
    assert not hasattr(model, "cls_token")
    assert torch.equal(model.pos_embed_spatial, read_weights(path).state["pos_embed_spatial"])


def test_files_without_positions_or_transformers():
    checkpoint = formats.reference(decoder=False)
    state = {k: v for k, v in checkpoint["model"].items() if "pos_embed" not in k}
    with pytest.raises(UserError, match="no position embeddings"):
        interpret({"model": state}, "a.pth")
    with pytest.raises(UserError, match=r"b\.pth holds no vision transformer.*conv1\.weight"):
        interpret({"conv1.weight": torch.zeros(1)}, "b.pth")


def test_heads_of_the_published_sizes():
    assert [num_heads(w) for w in (384, 768, 1024, 1280, 512, 640)] == [6, 12, 16, 16, 8, 8]
    assert [num_heads(w) for w in (1152, 1408, 1664)] == [16, 16, 16]


@pytest.mark.parametrize("hidden, width", [(6144, 1408), (4096, 1024), (96, 48), (49 * 3, 49)])
def test_hidden_widths_survive_the_ratio(hidden, width):
    checkpoint = formats.reference(decoder=False)
    for i in range(2):
        checkpoint["model"][f"blocks.{i}.mlp.fc1.weight"] = torch.empty(hidden, 1)
    checkpoint["model"]["patch_embed.proj.weight"] = torch.empty(width, 3, 2, 16, 16)
    ratio = interpret(checkpoint, "x").arguments["mlp_ratio"]
    assert int(width * ratio) == hidden


# --- the scripts

SCRIPT = "--input_size 32 --num_frames 4 --num_workers 0 --device cpu".split()
STILL = "--lr 0 --min_lr 0 --epochs 1 --warmup_epochs 0 --batch_size 2 --repeat_aug 1".split()


def run_script(module, *argv) -> None:
    module.main(module.parse_args([str(a) for a in argv]))


@pytest.mark.parametrize("keep_head, classes", [(True, 7), (True, 6), (False, 7)])
def test_finetuning_keeps_the_head_when_asked_and_when_it_fits(
    tmp_path, videos, keep_head, classes
):
    checkpoint = formats.pyslowfast(depth=4, grid=(2, 4, 4), p=8, decoder=False)
    path = saved(tmp_path / "ps.pyth", checkpoint)
    flags = ["--keep_head"] if keep_head else []
    run_script(
        main_finetune, "--path_to_data_dir", videos, "--output_dir", tmp_path / "out", *SCRIPT,
        *STILL, "--model", "vit_tiny_patch8", "--num_classes", classes, "--finetune", path, *flags,
    )  # fmt: skip
    trained = read_checkpoint(str(tmp_path / "out/checkpoint-00000.pth"))["model"]
    state = model_state(checkpoint, path)
    assert all(torch.equal(trained[k], state[k]) for k in trained if not k.startswith("head."))
    if keep_head and classes == 7:
        assert torch.equal(trained["head.weight"], state["head.weight"])
    else:
        assert 0 < trained["head.weight"].abs().max() < 2e-4  # truncated normal 2e-5


@pytest.mark.parametrize("kind", ["PySlowFast", "VideoMAE"])
def test_multi_view_test_rebuilds_any_classifier_from_its_file_alone(tmp_path, videos, kind):
    if kind == "PySlowFast":
        checkpoint = formats.pyslowfast(grid=(2, 2, 2), decoder=False)
    else:
        checkpoint = formats.videomae("finetune", side=2, frames=4)
    path = saved(tmp_path / "finetuned.pth", checkpoint)
    run_script(
        main_test, "--path_to_data_dir", videos, "--output_dir", tmp_path, "--finetune", path,
        "--num_clips", 2, "--num_crops", 1, "--num_workers", 0, "--device", "cpu",
        "--precision", "fp32",
    )  # fmt: skip
    with np.load(tmp_path / "scores.npz") as file:
        scores = torch.from_numpy(file["scores"])
    index = VideoIndex(str(videos / "test.csv"))
    dataset = Kinetics(index, "test", 32, 4, 4, num_clips=2, num_crops=1)
    clips = dataset[0, 0].clips.permute(0, 4, 1, 2, 3) / 255
    if kind == "PySlowFast":
        logits = formats.pyslowfast_classify(checkpoint["model_state"], ours(clips))
    else:
        logits = formats.videomae_classify(checkpoint["module"], imagenet(clips))
    expected = logits.softmax(-1).sum(0)
    torch.testing.assert_close(scores[0].float(), expected, rtol=1e-3, atol=1e-3)


# --- a real size


@pytest.mark.slow
def test_vit_base_of_pyslowfast(tmp_path):
    """ViT-B, 16 frames of 224 x 224: the parameters that PySlowFast's own file holds."""
    checkpoint = formats.pyslowfast(D=768, depth=12, d=512, grid=(8, 14, 14), fused=True)
    state = checkpoint["model_state"]
    assert sum(v.numel() for v in state.values()) == 100_596_736
    path = saved(tmp_path / "VIT_B_16x4_MAE_PT.pyth", checkpoint)
    weights = read_weights(path)
    known = ("num_heads", "decoder_num_heads", "depth", "img_size", "num_frames", "pred_t_dim")
    assert [weights.arguments[k] for k in known] == [12, 8, 12, 224, 16, 8]
    model = MaskedAutoencoderViT(**weights.autoencoder_arguments()).eval()
    assert sum(p.numel() for p in model.parameters()) == 100_596_736
    apply_weights(model, weights, keep_head=False)
    clip = ours(pixels(16, 224))
    pred, keep = predict(model, clip, 0.9)
    expected = formats.pyslowfast_decode(state, clip, keep)
    torch.testing.assert_close(pred, expected, **CLOSE)
    converted(path, tmp_path / "out.pth", "pyslowfast")
    written = torch.load(tmp_path / "out.pth", weights_only=True, mmap=True)["model_state"]
    assert_same(written, state)


# --- damaged, incomplete and odd files

TINY = {
    "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 1, "num_classes": 3,
    "img_size": 32, "num_frames": 4,
}  # fmt: skip


def tiny(**changes) -> VisionTransformer:
    torch.manual_seed(0)
    return randomised(VisionTransformer(**(TINY | changes)))


def without(state: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    assert state.keys() >= set(names)
    return {k: v for k, v in state.items() if k not in names}


@pytest.mark.parametrize(
    "frames, side, patch, args, doubtful",
    [
        (4, 32, 8, {}, True),
        (16, 112, 16, {}, True),
        (16, 224, 16, {}, False),
        (4, 32, 8, {"num_frames": 4}, False),
        (4, 32, 8, {"input_size": 32}, False),
    ],
)
def test_grids_are_guessed_where_one_fits_all_assumptions(frames, side, patch, args, doubtful):
    sizes = {"num_frames": frames, "img_size": side, "patch_size": patch, "depth": 1}
    state = tiny(sep_pos_embed=False, **sizes).state_dict()
    weights = interpret({"model": state, "args": argparse.Namespace(**args)}, "in.pth")
    assert bool(weights.doubt) == doubtful
    if not doubtful:
        assert [weights.arguments[k] for k in ("num_frames", "img_size")] == [frames, side]


FILES = {
    "pyslowfast": (formats.pyslowfast(fused=True), "model_state"),
    "reference": (formats.reference(), "model"),
    "image": (formats.image_mae("full"), "model"),
    "videomae": (formats.videomae("pretrain"), "model"),
}


LOST = {  # the file's name of a tensor, and ours where it differs
    "pyslowfast": """
        cls_token pos_embed_class pos_embed_spatial patch_embed.proj.weight decoder_pos_embed
        blocks.0.attn.qkv.bias=blocks.0.attn.q.bias blocks.0.mlp.fc1.weight blocks.0.norm1.weight
        pred_head.projections.0.weight=decoder_pred.weight
    """,
    "reference": "decoder_cls_token decoder_embed.bias decoder_pos_embed_temporal",
    "image": "patch_embed.proj.bias cls_token",
    "videomae": """
        encoder.patch_embed.proj.bias=patch_embed.proj.bias
        encoder.blocks.0.attn.q_bias=blocks.0.attn.q.bias
    """,
}


@pytest.mark.parametrize("kind, lost", [(kind, x) for kind in LOST for x in LOST[kind].split()])
def test_every_lost_tensor_is_named_and_nothing_is_written(tmp_path, capsys, kind, lost):
    lost, _, ours = lost.partition("=")
    name = ours or lost
    checkpoint, key = FILES[kind]
    path = saved(tmp_path / "in.pth", checkpoint | {key: without(checkpoint[key], lost)})
    says = rf"lacks .*{re.escape(name)}"
    with pytest.raises(UserError, match=says):
        autoencoder(path)
    for to in ("mae_st", "pyslowfast"):
        assert re.search(says, refusal(capsys, path, tmp_path / "out", to))
    if name.startswith("decoder_"):
        classifier(path, keep_head=False)


def test_a_missing_row_of_joint_positions_is_missing(capsys):
    state = without(tiny().state_dict(), "pos_embed_class")
    weights = interpret({"model": state}, "in.pth")
    model = VisionTransformer(**TINY, sep_pos_embed=False)
    torch.nn.init.ones_(model.pos_embed)
    with pytest.raises(UserError, match=r"lacks 1 weights of the model \(pos_embed_class"):
        apply_weights(model, weights, keep_head=True)
    apply_weights(model, weights, keep_head=True, allow_missing=True)
    assert model.pos_embed[0, 0].eq(1).all() and not model.pos_embed[0, 1:].eq(1).any()
    out = capsys.readouterr().out
    assert "the class token's row is missing and left as drawn: pos_embed" in out
    weights = interpret({"model": tiny().state_dict()}, "in.pth")
    without_class = VisionTransformer(**TINY, sep_pos_embed=False, cls_embed=False)
    apply_weights(without_class, weights, keep_head=True)
    assert "dropped: cls_token, pos_embed_class" in capsys.readouterr().out


@pytest.mark.parametrize("change, name", [({"num_heads": 2}, "num_heads"), ({"depth": 3}, "depth")])
def test_other_heads_and_deeper_files_are_refused(change, name):
    other = tiny(**change)
    checkpoint = {"model": other.state_dict(), "arguments": other.arguments}
    weights = interpret(checkpoint, "in.pth")
    with pytest.raises(UserError, match=rf"{name} is {change[name]} in the file and \d here"):
        apply_weights(tiny(), weights, keep_head=True)


@pytest.mark.parametrize("to", ["mae_st", "safetensors", "pyslowfast"])
def test_tensors_of_any_storage_are_written(tmp_path, to):
    """Transposed, in a larger storage, expanded, and shared by two blocks."""
    state = tiny().state_dict()
    state["head.weight"] = state["head.weight"].t().contiguous().t()
    state["norm.weight"] = torch.arange(128.0).view(64, 2).t()[0]
    state["norm.bias"] = torch.ones(1).expand(64)
    state |= {k: state[k.replace("s.1", "s.0")] for k in state if k.startswith("blocks.1")}
    path = saved(tmp_path / "in.pth", {"model": state})
    assert_same(read_weights(converted(path, tmp_path / "out", to)).state, state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(tmp_path, dtype):
    def stored(state, to):
        return {k: v.to(dtype).to(to) for k, v in state.items()}

    state = formats.videomae("finetune")["module"]
    args = argparse.Namespace(input_size=64, num_frames=8)
    model = [
        classifier(saved(tmp_path / "in.pth", {"module": stored(state, to), "args": args}))
        for to in (dtype, torch.float32)
    ]
    assert torch.equal(*(m.patch_embed.proj.weight for m in model))
    assert torch.equal(*(m.patch_embed.proj.bias for m in model))

    state = tiny().state_dict()
    other = TINY | {"img_size": 48, "num_frames": 8, "t_patch_size": 4}
    for changes in ({}, {"sep_pos_embed": False}):
        half, single = VisionTransformer(**other, **changes), VisionTransformer(**other, **changes)
        for model, to in ((half, dtype), (single, torch.float32)):
            weights = interpret({"model": stored(state, to)}, "in.pth")
            apply_weights(model, weights, keep_head=True)
        assert_same(half.state_dict(), single.state_dict())
    path = saved(tmp_path / "half.pth", {"model": stored(state, dtype)})
    out = converted(path, tmp_path / "out", "pyslowfast")  # renamed: bitwise
    written = model_state(read_checkpoint(out), out)
    assert all(v.dtype == dtype and torch.equal(v, state[k].to(dtype)) for k, v in written.items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounded_positions_are_known_as_sums_and_tables(tmp_path, dtype):
    joint = tiny(sep_pos_embed=False)
    whole = tiny().state_dict()
    apply_weights(joint, interpret({"model": whole}, "in.pth"), keep_head=True)
    state = {k: v.to(dtype) for k, v in joint.state_dict().items()}
    path = saved(tmp_path / "in.pth", {"model": state, "arguments": joint.arguments})
    classifier(path, sep_pos_embed=True)
    converted(path, tmp_path / "out", "pyslowfast")
    fixed = VisionTransformer(**SINCOS)
    state = {k: v.to(dtype) for k, v in fixed.state_dict().items()}
    path = saved(tmp_path / "in.pth", {"model": state, "arguments": fixed.arguments})
    converted(path, tmp_path / "hf", "videomae-hf")


@pytest.mark.parametrize("prefix", ["encoder.", "module.encoder.", "encoder.encoder."])
@pytest.mark.parametrize("kind", ["image", "videomae", "fine-tuned", "first release"])
def test_formats_are_known_under_prefixes(kind, prefix):
    checkpoint = {
        "image": formats.image_mae("full"),
        "videomae": formats.videomae("pretrain"),
        "fine-tuned": formats.videomae("finetune"),
        "first release": formats.first_release(),
    }[kind]
    key = next(iter(checkpoint))
    plain = interpret(checkpoint, "in.pth")
    prefixed = {prefix + k: v for k, v in checkpoint[key].items()}
    weights = interpret(checkpoint | {key: prefixed}, "in.pth")
    assert (weights.source, weights.arguments) == (plain.source, plain.arguments)
    assert weights.state.keys() == plain.state.keys()


def test_pyslowfast_files_keep_what_no_shape_shows(tmp_path):
    arguments = {"embed_dim": 64, "depth": 1, "num_heads": 4, "img_size": 16, "patch_size": 8}
    decoder = {"decoder_embed_dim": 64, "decoder_depth": 1, "decoder_num_heads": 1}
    frames = {"num_frames": 8, "pred_t_dim": 4, "cls_through_decoder": True, "mlp_ratio": 2.0}
    frames["strided_targets"] = True
    model = MaskedAutoencoderViT(**arguments, **decoder, **frames)
    path = saved_model(tmp_path / "in.pth", model)
    out = converted(path, tmp_path / "out.pyth", "pyslowfast")
    assert yaml.safe_load(read_checkpoint(out)["cfg"])["MVIT"]["MLP_RATIO"] == 2.0
    back = read_weights(out).arguments
    for name in ("num_heads", "layer_norm_eps", "target", "strided_targets"):
        assert back[name] == model.arguments[name], name


COLOUR = torch.tensor([0.1, 0.8, 0.95])


def test_predicted_pixels_have_the_colours_of_the_file(tmp_path):
    """A decoder that always predicts one colour, in the file's own normalisation."""
    checkpoint = formats.image_mae("full")
    state = checkpoint["model"]
    state["decoder_pred.weight"].zero_()
    colour = (COLOUR - IMAGENET_MEAN.flatten()) / IMAGENET_STD.flatten()
    state["decoder_pred.bias"] = colour.repeat(256)
    model = autoencoder(saved(tmp_path / "mae_visualize.pth", checkpoint))
    expected = ours(COLOUR).repeat(256)
    torch.testing.assert_close(model.decoder_pred.bias.detach(), expected)
    model = autoencoder(saved(tmp_path / "mae.pth", checkpoint))  # normalised patch by patch
    assert torch.equal(model.decoder_pred.bias, state["decoder_pred.bias"])


def test_videomae_predicts_pixels_from_0_to_1(tmp_path):
    """Also when it is written from a model that predicts normalised ones."""
    own = MaskedAutoencoderViT(**SINCOS, **DECODER)
    own.decoder_pred.bias.data[:] = ours(COLOUR).repeat(128)
    path = saved_model(tmp_path / "own.pth", own)
    converted(path, tmp_path / "hf", "videomae-hf")
    written = safetensors.torch.load_file(tmp_path / "hf/model.safetensors")
    torch.testing.assert_close(written["decoder.head.bias"], COLOUR.repeat(128))
    back = autoencoder(str(tmp_path / "hf"))  # a folder will do
    torch.testing.assert_close(back.decoder_pred.bias, own.decoder_pred.bias)
    torch.testing.assert_close(back.decoder_pred.weight, own.decoder_pred.weight)
    torch.testing.assert_close(back.patch_embed.proj.weight, own.patch_embed.proj.weight)
    torch.testing.assert_close(back.patch_embed.proj.bias, own.patch_embed.proj.bias)


@pytest.mark.parametrize(
    "name, text, says",
    [
        ("config.json", "{", "config.json is damaged"),
        ("config.json", "[1]", "config.json is damaged"),
        ("config.json", '{"image_size": [32, 24]}', "not square"),
        ("config.json", '{"hidden_act": "relu"}', "relu"),
        ("config.json", '{"image_size": [32, 32], "num_frames": 4}', ""),
        ("config.json", '{"image_size": 32, "num_frames": 4, "num_attention_heads": "8"}', ""),
        ("preprocessor_config.json", '{"image_mean": 0.5, "image_std": 0.5}', (0.5, 0.5)),
        ("preprocessor_config.json", '{"do_normalize": false}', (0.0, 1.0)),
        (
            "preprocessor_config.json",
            '{"do_rescale": false, "image_mean": 127.5, "image_std": 51}',
            (0.5, 0.2),
        ),
    ],
)
def test_descriptions_of_hugging_face_may_be_odd(tmp_path, name, text, says):
    own = VisionTransformer(**SINCOS, num_classes=7)
    path = saved_model(tmp_path / "own.pth", own)
    converted(path, tmp_path / "hf", "videomae-hf")
    state = safetensors.torch.load_file(tmp_path / "hf/model.safetensors")
    safetensors.torch.save_file(state, tmp_path / "hf/model.safetensors")  # no header of ours
    (tmp_path / "hf" / name).write_text(text)
    if isinstance(says, str) and says:
        with pytest.raises(UserError, match=says):
            read_weights(str(tmp_path / "hf"))
        return
    weights = read_weights(str(tmp_path / "hf"))
    assert [weights.arguments[k] for k in ("img_size", "num_frames")] == [32, 4]
    if says:
        assert (weights.mean, weights.std) == ((says[0],) * 3, (says[1],) * 3)


KERNEL = "patch_embed.proj.weight"


@pytest.mark.parametrize(
    "change, says",
    [
        ({0: torch.zeros(1)}, ""),
        ({KERNEL: torch.zeros(64, 192)}, "patch_embed"),
        ({"pos_embed_spatial": torch.zeros(16, 64)}, "pos_embed_spatial has the shape"),
        ({"blocks.0.attn.qkv.weight": torch.zeros(2, 64)}, "2 rows"),
        ({"blocks.x.norm1.weight": torch.zeros(64)}, "blocks.x.norm1.weight"),
        ({"head.weight": torch.tensor(1.0)}, "0-d"),
        ({"norm.bias": torch.zeros(64).to_sparse()}, "sparse"),
    ],
)
def test_odd_tensors_give_a_sentence(change, says):
    checkpoint = {"model": tiny().state_dict() | change}
    if not says:
        interpret(checkpoint, "in.pth")
        return
    with pytest.raises(UserError, match=rf"^in\.pth .*{says}"):
        interpret(checkpoint, "in.pth")


@pytest.mark.parametrize(
    "odd",
    [{"arguments": None}, {"arguments": ["a"]}, {"metadata": "x"}, {"args": "--x"},
     {"arguments": {"num_heads": "2", "layer_norm_eps": None, "cls_embed": 1}},
     {"args": {"num_frames": "8", "input_size": [24, 24]}}],
)  # fmt: skip
def test_odd_records_are_as_good_as_none(odd):
    state = tiny().state_dict()
    plain = interpret({"model": state}, "in.pth")
    assert interpret({"model": state} | odd, "in.pth").arguments == plain.arguments


@pytest.mark.filterwarnings("ignore:.*TorchScript")
def test_damaged_records_and_programs_give_a_sentence(tmp_path):
    content = {"model": tiny().state_dict(), "metadata": {METADATA: "{"}}
    with pytest.raises(UserError, match=r"^in\.pth is damaged or not a known checkpoint"):
        interpret(content, "in.pth")
    path = str(tmp_path / "program.pth")
    torch.jit.script(torch.nn.Linear(2, 2)).save(path)
    with pytest.raises(UserError, match="PyTorch does not recognise it") as caught:
        read_checkpoint(path)
    assert "weights_only" not in str(caught.value)


def test_damaged_downloads_are_fetched_again(server):
    folder, address, _ = server
    whole = saved(folder / "in.pth", formats.reference(decoder=False))
    with open(whole, "rb") as file:
        content = file.read()
    (folder / "in.pth").write_bytes(content[:-1000])
    with pytest.raises(UserError, match="removed from the cache, try again"):
        read_weights(f"{address}/in.pth")
    (folder / "in.pth").write_bytes(content)
    assert read_weights(f"{address}/in.pth").has_head


def test_names_of_released_files_and_pages_with_byte_order_marks(monkeypatch):
    fetched = []
    monkeypatch.setattr(file_io, "local_path", lambda address: fetched.append(address) or "")
    with pytest.raises(FileNotFoundError):
        file_io.fetch("mae_pretrain_vit_large_k400")
    assert fetched == [file_io.ADDRESS.format(size="vit_large", data="k400")]
    for page in ("<html>".encode("utf-16"), b"\xef\xbb\xbf<html>"):
        with pytest.raises(UserError, match="web page"):
            file_io.refuse_other_kinds(page, "in.pth")
    # 15392 bytes of header begin with a blank and "<"
    file_io.refuse_other_kinds((15392).to_bytes(8, "little") + b'{"', "in.safetensors")


# --- addresses and names


def test_addresses_are_cached(server):
    folder, address, requested = server
    saved(folder / "in.pth", formats.reference(decoder=False))
    first = read_weights(f"{address}/in.pth")
    file_io.fetch.cache_clear()
    second = read_weights(f"{address}/in.pth")
    assert first.arguments == second.arguments
    assert len([path for path in requested if path.endswith("in.pth")]) == 1
    with pytest.raises(UserError, match=r"missing\.pth"):
        read_weights(f"{address}/missing.pth")
    other_host = address.replace("127.0.0.1", "localhost")
    saved(folder / "in.pth", formats.pyslowfast())
    assert read_weights(f"{other_host}/in.pth").source == PYSLOWFAST


@pytest.mark.parametrize(
    "name, digits",
    [
        ("mae_pretrain_vit_large_k400.pth?download=1", "edf3a5"),
        ("mae_pretrain_vit_large_k400.pth", "edf3a5"),
        ("vit_h/k700_400ep_rep4_mr9_16x4.pyth", "4c4e3c"),
    ],
)
def test_released_files_must_have_their_md5(server, name, digits, monkeypatch):
    folder, address, requested = server
    file_name = folder / name.partition("?")[0]
    file_name.parent.mkdir(exist_ok=True)
    path = saved(file_name, formats.pyslowfast())
    with open(path, "rb") as file:
        md5 = hashlib.md5(file.read()).hexdigest()
    for _ in range(2):  # the wrong file does not stay in the cache
        with pytest.raises(UserError, match=f"its md5 is {md5} and should start with {digits}"):
            read_weights(f"{address}/{name}")
    assert len([path for path in requested if path.endswith(name)]) == 2
    size = "k400/vit_large" if "large" in name else "k700/vit_huge"
    monkeypatch.setitem(file_io.MD5, size, md5[:6])
    assert read_weights(f"{address}/{name}").source == PYSLOWFAST


def test_released_names(server, monkeypatch):
    folder, address, _ = server
    path = saved(folder / "mae_pretrain_vit_huge_k600.pth", formats.pyslowfast())
    with open(path, "rb") as file:
        monkeypatch.setitem(file_io.MD5, "k600/vit_huge", hashlib.md5(file.read()).hexdigest()[:6])
    assert file_io.ADDRESS.startswith("https://dl.fbaipublicfiles.com/video-mae/pretrain/")
    monkeypatch.setattr(file_io, "ADDRESS", f"{address}/mae_pretrain_{{size}}_{{data}}.pth")
    assert read_weights("k600/vit_huge").source == PYSLOWFAST
    with pytest.raises(UserError, match=r"k400/vit_base is neither a file nor a released name: k4"):
        read_weights("k400/vit_base")


def test_a_web_page_is_not_a_checkpoint(server):
    folder, address, _ = server
    (folder / "page.pth").write_text("\n<!DOCTYPE html><html>Sign in</html>")
    for path in (f"{address}/page.pth", str(folder / "page.pth")):
        with pytest.raises(UserError, match=r"page\.pth is damaged.*it is a web page"):
            read_weights(path)
    saved(folder / "page.pth", formats.reference(decoder=False))  # the page was not cached
    assert read_weights(f"{address}/page.pth").has_head
    (folder / "lfs.pth").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(UserError, match="Git LFS pointer"):
        read_weights(str(folder / "lfs.pth"))


def test_damaged_safetensors(tmp_path):
    content = safetensors.torch.save({"a": torch.zeros(9)})
    (tmp_path / "a.safetensors").write_bytes(content[:-5])
    with pytest.raises(UserError, match=r"a\.safetensors is damaged or not a checkpoint"):
        read_checkpoint(str(tmp_path / "a.safetensors"))
    assert not file_io.is_remote(str(tmp_path))
