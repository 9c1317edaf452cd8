"""Continue pre-training: main_pretrain.py --finetune, with files of several kinds."""

import shutil
from functools import partial
from pathlib import Path

import pytest
import simplejson
import torch

import main_pretrain
import models_mae
from models_vit import VisionTransformer
from tests import formats
from tests.test_scripts import PRETRAIN, call, fails, weights
from util.formats import is_decoder
from util.weights import read_weights

STILL = ["--epochs", 1, "--lr", 0, "--min_lr", 0]  # the weights stay as they are loaded


@pytest.fixture(scope="module")
def start(videos, tmp_path_factory) -> Path:
    """Pre-train for some epochs and return the checkpoint."""
    out = tmp_path_factory.mktemp("start")
    call(main_pretrain, "--path_to_data_dir", videos, "--output_dir", out, *PRETRAIN,
         "--epochs", 8, "--lr", 3e-3, "--keep_last", 1, "--vis_period", 0)  # fmt: skip
    return out / "checkpoint-00007.pth"


def pretrain(videos: Path, out: Path, *argv: object) -> tuple[dict[str, torch.Tensor], float]:
    """Run an epoch without learning; return the weights and the mean loss."""
    call(main_pretrain, "--path_to_data_dir", videos, "--output_dir", out, *PRETRAIN, *STILL,
         "--vis_period", 0, *argv)  # fmt: skip
    loss = simplejson.loads((out / "log.txt").read_text())["train_loss"]
    return weights(out / "checkpoint-00000.pth"), loss


def assert_started_from(found: dict, file: dict, drawn: dict, keeps_decoder: bool) -> None:
    """The encoder is the file's; the decoder too, or as a run without --finetune draws it."""
    assert found.keys() == drawn.keys()
    for name, tensor in found.items():
        expected = drawn if is_decoder(name) and not keeps_decoder else file
        assert torch.equal(tensor, expected[name]), name


def test_a_run_goes_on_with_the_weights_of_another(videos, start, tmp_path, capsys):
    drawn, fresh_loss = pretrain(videos, tmp_path / "fresh")
    found, loss = pretrain(videos, tmp_path / "continued", "--finetune", start)
    assert_started_from(found, weights(start), drawn, keeps_decoder=True)
    assert loss < 0.9 * fresh_loss
    out = capsys.readouterr().out
    loaded = f"loaded {len(found)} of {len(found)} tensors from"
    assert f"{loaded} {start} (MAE format)\n" in out
    assert "starts afresh" not in out


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ("--decoder_depth 2", "decoder_depth is 1 in the file and 2 here"),
        ("--decoder_depth 0", "decoder_depth is 1 in the file and 0 here"),
        ("--decoder_embed_dim 64", "decoder_embed_dim is 32 in the file and 64 here"),
        ("--decoder_num_heads 4", "decoder_num_heads is 2 in the file and 4 here"),
        ("--target pixels", "target is patch in the file and pixels here"),
        ("--pred_t_dim 4", "decoder_pred.weight is [192, 32] in the file and [384, 32] here"),
    ],
)
def test_a_decoder_that_does_not_fit_the_flags_starts_afresh(
    videos, start, tmp_path, capsys, flags, reason
):
    drawn = main_pretrain.build_model(main_pretrain.parse_args([*PRETRAIN, *flags.split()]))
    found, _ = pretrain(videos, tmp_path, "--finetune", start, *flags.split())
    assert_started_from(found, weights(start), drawn.state_dict(), keeps_decoder=False)
    assert f"the decoder starts afresh: {reason}\n" in capsys.readouterr().out


def test_a_classifier_has_no_decoder_to_go_on_with(videos, tmp_path, capsys):
    drawn = main_pretrain.build_model(main_pretrain.parse_args(PRETRAIN)).state_dict()
    model = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=128, depth=4, num_heads=4, num_frames=4, num_classes=3
    )
    file = tmp_path / "vit.pth"
    torch.save({"model": model.state_dict(), "arguments": model.arguments}, file)
    found, _ = pretrain(videos, tmp_path / "out", "--finetune", file)
    assert_started_from(found, model.state_dict(), drawn, keeps_decoder=False)
    assert "the decoder starts afresh: the file has no decoder\n" in capsys.readouterr().out


OF_VIDEOMAE = "--pred_t_dim 8 --no-cls_embed --no-sep_pos_embed --sincos_pos_embed"


@pytest.mark.parametrize(
    ("file", "flags", "reason"),
    [
        (formats.reference(), "", ""),
        (formats.pyslowfast(d=64), "", "cls_through_decoder is True in the file and False here"),
        (formats.image_mae("encoder"), "", "the file has no decoder"),
        (formats.videomae("pretrain"), f"{OF_VIDEOMAE} --target channel", ""),
        (formats.videomae("pretrain"), OF_VIDEOMAE, "target is channel in the file and patch here"),
    ],
    ids=["reference", "PySlowFast", "image MAE", "VideoMAE", "VideoMAE, other target"],
)
def test_files_of_other_projects(videos, tmp_path, monkeypatch, capsys, file, flags, reason):
    build = partial(models_mae.MaskedAutoencoderViT, embed_dim=128, depth=2, num_heads=2)
    monkeypatch.setitem(models_mae.MODELS, "mae_vit_test", build)
    sizes = "--model mae_vit_test --input_size 64 --num_frames 8 --pred_t_dim 4 --mask_ratio 0.75"
    sizes += " --decoder_embed_dim 64 --decoder_depth 4 --decoder_num_heads 1"
    torch.save(file, path := tmp_path / "file.pth")
    found, _ = pretrain(videos, tmp_path, "--finetune", path, *sizes.split(), *flags.split())
    state = read_weights(str(path)).state
    kept = [k for k in found if k.endswith("mlp.fc2.weight") and not (reason and is_decoder(k))]
    assert len(kept) == (2 if reason else 6)
    assert all(torch.equal(found[k], state[k]) for k in kept)
    afresh = f"the decoder starts afresh: {reason}\n" if reason else "starts afresh"
    assert (afresh in capsys.readouterr().out) == bool(reason)


def test_positions_are_resized_to_other_clips(videos, start, tmp_path, capsys):
    sizes = "--input_size 48 --num_frames 8 --pred_t_dim 4".split()
    found, _ = pretrain(videos, tmp_path, "--finetune", start, *sizes)
    out = capsys.readouterr().out
    assert "resized: 2 x 4 x 4 -> 4 x 6 x 6 tokens" in out and "starts afresh" not in out
    file = weights(start)
    for name, tensor in found.items():
        resized = "pos_embed_spatial" in name or "pos_embed_temporal" in name
        assert resized or torch.equal(tensor, file[name]), name
    assert found["decoder_pos_embed_spatial"].shape == (1, 36, 32)


def test_a_continued_run_resumes_exactly_and_without_its_file(videos, start, tmp_path, capsys):
    """Up to the last bits, which differ within a process (see spawn); updates are 1e-3 large."""
    file = shutil.copy(start, tmp_path / "start.pth")
    argv = ["--path_to_data_dir", videos, *PRETRAIN, "--finetune", file, "--epochs", 2]
    argv += ["--lr", 1e-3, "--warmup_epochs", 0]
    call(main_pretrain, *argv, "--output_dir", tmp_path / "whole")
    (tmp_path / "parts").mkdir()
    shutil.copy(tmp_path / "whole/checkpoint-00000.pth", tmp_path / "parts")
    file.unlink()
    capsys.readouterr()
    call(main_pretrain, *argv, "--output_dir", tmp_path / "parts")
    out = capsys.readouterr().out
    assert "resumed from" in out
    small = "6 updates are few"  # of this run; none about the file
    warned = [line for line in out.splitlines() if line.startswith("WARNING: ")]
    assert all(line.removeprefix("WARNING: ").startswith(small) for line in warned), warned
    whole, parts = (weights(tmp_path / f"{x}/checkpoint-00001.pth") for x in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert max((whole[k] - parts[k]).abs().max() for k in whole) < 1e-5


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            "--model mae_vit_small_patch16 --mask_ratio 0.5",
            "cls_token is [1, 1, 128] in the file and [1, 1, 384]",
        ),
        ("--no-sep_pos_embed --sincos_pos_embed --no_qkv_bias", "has no place here"),
        ("--use_ema", "holds no moving average of its weights"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(capsys, videos, start, tmp_path, flags, words):
    status, text = fails(capsys, main_pretrain, "--path_to_data_dir", videos, "--output_dir",
                         tmp_path, *PRETRAIN, "--finetune", start, "--dry_run",
                         *flags.split())  # fmt: skip
    assert status == 2 and words in text
    assert not list(tmp_path.glob("*.pth"))


@pytest.mark.parametrize("older", [False, True])  # without a record of --finetune
def test_another_start_in_the_folder_of_a_run_is_refused(capsys, videos, start, tmp_path, older):
    checkpoint = torch.load(start, weights_only=False)
    if older:
        del checkpoint["args"]["finetune"]
    torch.save(checkpoint, tmp_path / start.name)
    common = ["--path_to_data_dir", videos, "--output_dir", tmp_path, *PRETRAIN]
    status, text = fails(capsys, main_pretrain, *common, "--finetune", "k400/vit_large")
    assert status == 2 and "started from --finetune (nothing), not from k400/vit_large" in text
