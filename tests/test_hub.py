"""Tests of hubconf.py through torch.hub, from this folder."""

import importlib
import pickle
import subprocess
import sys
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
    # what torch.hub.list shows
    listed = {k for k, v in vars(hubconf).items() if callable(v) and not k.startswith("_")}
    assert listed == {"load_clips", *models_mae.MODELS, *models_vit.MODELS}
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


# --- in a program with modules of the same names


CASES = {  # the caller's modules and their files
    "package": {"util": "util/__init__.py", "util.misc": "util/misc.py"},
    "folder": {"util.misc": "util/misc.py"},  # without __init__.py
    "file": {"util": "util.py"},
    "models": {"models_mae": "models_mae.py"},
}


def same_names() -> dict:
    tops = ("util", "models_mae", "models_vit")
    return {k: v for k, v in sys.modules.items() if k.split(".")[0] in tops}


@pytest.fixture
def caller(tmp_path, monkeypatch) -> Path:
    """Hide this project from imports, and return the folder that a caller imports from instead."""
    modules = dict(sys.modules)
    paths = [path for path in sys.path if Path(path).resolve() != Path(ROOT)]
    monkeypatch.setattr(sys, "path", [str(tmp_path), *paths])
    finders = [finder for finder in sys.meta_path if "ditable" not in repr(finder)]
    monkeypatch.setattr(sys, "meta_path", finders)
    for name in same_names():
        del sys.modules[name]
    yield tmp_path
    for name in same_names():
        del sys.modules[name]
    sys.modules.update(modules)


def import_theirs(folder: Path, files: dict[str, str]) -> None:
    for file in files.values():
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_text("theirs = True\n")
    importlib.invalidate_caches()
    assert all(importlib.import_module(name).theirs for name in files)


@pytest.mark.parametrize("hub_first", [False, True], ids=["caller first", "hub first"])
@pytest.mark.parametrize("files", CASES.values(), ids=CASES)
def test_modules_of_a_caller_with_the_same_names_stay_the_callers(caller, files, hub_first):
    if not hub_first:
        import_theirs(caller, files)
    before, path = same_names(), list(sys.path)
    model = load("mae_vit_tiny_patch8", pred_t_dim=2, **SIZES)
    classifier = load("vit_tiny_patch8", num_classes=5, **SIZES)
    assert same_names() == before
    assert sys.path == path
    if hub_first:
        import_theirs(caller, files)
    with pytest.raises(Exception, match="num_frames = 3 must be"):
        load("vit_tiny_patch8", img_size=32, num_frames=3)
    again = load("mae_vit_tiny_patch8", pred_t_dim=2, **SIZES)
    assert type(again) is type(model)
    assert type(classifier.blocks[0]) is type(model.blocks[0])

    clips = torch.randn(2, 3, 4, 32, 32)
    model(clips)[0].backward()
    classifier.eval()
    logits = classifier(clips)
    torch.testing.assert_close(pickle.loads(pickle.dumps(classifier))(clips), logits)
    for block in classifier.blocks:
        block.compile(backend="eager")
    torch.testing.assert_close(classifier(clips), logits)
    import_theirs(caller, files)


def test_an_importable_project_is_imported_once():
    assert type(load("vit_tiny_patch8", **SIZES)) is models_vit.VisionTransformer


def test_a_downloaded_repository(caller, monkeypatch):
    monkeypatch.setattr(torch.hub, "_hub_dir", str(caller))
    (caller / "owner_project_main").symlink_to(ROOT)
    import_theirs(caller, CASES["package"])
    for _ in range(2):
        model = torch.hub.load(
            "owner/project:main", "vit_tiny_patch8", trust_repo=True, skip_validation=True, **SIZES
        )
    assert model(torch.zeros(1, 3, 4, 32, 32)).shape == (1, 400)


@pytest.mark.slow
def test_a_fresh_program(caller):
    """Everything that the models need is imported for the first time, after the caller's util."""
    import_theirs(caller, CASES["package"])
    code = f"""import sys
sys.meta_path = [finder for finder in sys.meta_path if "ditable" not in repr(finder)]
import util
import torch
model = torch.hub.load({ROOT!r}, "vit_tiny_patch8", source="local", img_size=32, num_frames=4)
import util.misc
print(model.head.out_features, util.theirs, util.misc.theirs)"""
    command = [sys.executable, "-c", code]
    environment = {"PATH": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=caller, env=environment, capture_output=True, text=True)
    assert done.stdout == "400 True True\n", done.stderr
