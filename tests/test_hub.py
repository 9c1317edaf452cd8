"""Tests of hubconf.py through torch.hub, from this folder."""

from pathlib import Path

import pytest
import torch

import hubconf
import models_mae
import models_vit
from tests import formats, golden
from util import weights
from util.errors import UserError
from util.weights import interpret

ROOT = str(Path(__file__).parent.parent)
SIZES = {"img_size": 32, "num_frames": 4}


def load(name, **arguments):
    return torch.hub.load(ROOT, name, source="local", **arguments)


def saved(path, model) -> str:
    torch.save({"model": model.state_dict(), "arguments": model.arguments}, path)
    return str(path)


def test_list_and_help():
    listed = {k for k, v in vars(hubconf).items() if callable(v) and not k.startswith("_")}
    assert listed == {*models_mae.MODELS, *models_vit.MODELS}  # what torch.hub.list shows
    assert "pretrained" in (hubconf.vit_large_patch16.__doc__ or "")


def test_fresh_models():
    model = load("mae_vit_tiny_patch8", pred_t_dim=4, **SIZES)
    assert model.forward_features(torch.zeros(2, 3, 4, 32, 32)).shape == (2, 32, 128)
    assert load("vit_tiny_patch8", num_classes=5, **SIZES).head.out_features == 5


@torch.no_grad()
def test_autoencoder_from_a_file_and_its_encoder_as_a_classifier(tmp_path):
    trained = models_mae.mae_vit_tiny_patch8(pred_t_dim=2, **SIZES).eval()
    path = saved(tmp_path / "mae.pth", trained)
    clips = torch.randn(1, 3, 4, 32, 32)
    model = load("mae_vit_tiny_patch8", pretrained=path)
    assert not model.training
    features = model.forward_features(clips)
    assert torch.equal(features, trained.forward_features(clips))
    noise = torch.rand(1, 32)
    with golden.masking_noise(noise, noise):
        assert torch.equal(model(clips)[1], trained(clips)[1])
    classifier = load("vit_tiny_patch8", pretrained=path, num_classes=3)
    tokens = classifier.forward_features(clips)  # the autoencoder's last norm comes after them
    torch.testing.assert_close(trained.norm(tokens), features, rtol=1e-5, atol=1e-5)
    longer = load("mae_vit_tiny_patch8", pretrained=path, num_frames=8)
    assert longer.forward_features(torch.zeros(1, 3, 8, 32, 32)).shape == (1, 64, 128)


@torch.no_grad()
def test_finetuned_classifier_keeps_its_head_where_it_fits(tmp_path):
    trained = models_vit.vit_tiny_patch8(num_classes=5, dropout=0.5, **SIZES).eval()
    path = saved(tmp_path / "vit.pth", trained)
    clips = torch.randn(2, 3, 4, 32, 32)
    assert torch.equal(load("vit_tiny_patch8", pretrained=path)(clips), trained(clips))
    assert load("vit_tiny_patch8", pretrained=path, num_classes=3)(clips).shape == (2, 3)


def test_heads_of_bare_files_are_those_of_the_name(tmp_path):
    trained = models_mae.mae_vit_tiny_patch8(pred_t_dim=2, **SIZES).state_dict()
    torch.save({"model": trained}, tmp_path / "bare.pth")
    path = str(tmp_path / "bare.pth")
    model = load("mae_vit_tiny_patch8", pretrained=path)
    assert [model.arguments[k] for k in ("num_heads", "decoder_num_heads")] == [4, 4]
    assert load("vit_tiny_patch8", pretrained=path).arguments["num_heads"] == 4
    with pytest.raises(UserError, match="num_frames = 7 must be"):
        load("vit_tiny_patch8", pretrained=path, num_frames=7)


def test_names_of_released_weights(monkeypatch):
    paths = []

    def read_weights(path):
        paths.append(path)
        return interpret(formats.pyslowfast(), path)

    monkeypatch.setattr(weights, "read_weights", read_weights)
    for name in ("mae_vit_large_patch16", "vit_huge_patch16"):
        with pytest.raises(UserError, match=rf"is not a {name}: it has .*'embed_dim': 128"):
            load(name, pretrained="k700")
    assert paths == ["k700/vit_large", "k700/vit_huge"]
    for name in ("mae_vit_base_patch16", "vit_huge_patch14"):
        message = f"no released weights of {name}; there are some of mae_vit_l"
        with pytest.raises(UserError, match=message):
            load(name, pretrained="k400")
    with pytest.raises(UserError, match="pretrained = True must be k400, k600, k700 or a path"):
        load("mae_vit_large_patch16", pretrained=True)
