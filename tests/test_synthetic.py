"""Tests of the embedded data set: files, determinism, and that only motion tells the class."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.conftest import FORK
from util import synthetic
from util.synthetic import MOVEMENTS, render_video, write_dataset

SMALL = {
    "num_videos": 20,
    "num_labelled": 8,
    "num_val": 4,
    "num_test": 8,
    "num_classes": 4,
    "size": 32,
    "num_frames": 6,
    "num_workers": 2,
}


def decode(path: Path) -> np.ndarray:
    """Read all frames of a video as uint8 [T, H, W, 3]."""
    with av.open(str(path)) as container:
        assert container.streams.video[0].codec_context.name == "h264"
        return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])


def read_csv(path: Path) -> list[tuple[Path, int]]:
    rows = [line.rsplit(" ", 1) for line in path.read_text().splitlines()]
    return [((path.parent / name).resolve(), int(label)) for name, label in rows]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("synthetic") / "set", **SMALL)


# --- files --------------------------------------------------------------------------------------


def test_layout(small: Path):
    classes = (small / "classes.txt").read_text().splitlines()
    assert classes == list(MOVEMENTS)[:4]
    pretrain = read_csv(small / "pretrain/train.csv")
    train, val, test = (read_csv(small / f"finetune/{s}.csv") for s in ("train", "val", "test"))
    assert [len(rows) for rows in (pretrain, train, val, test)] == [20, 8, 4, 8]
    assert set(train) < set(pretrain), "the labelled videos are a part of the training videos"
    assert len({path for path, _ in pretrain + val + test}) == 20 + 4 + 8, "held out"
    assert len({path.read_bytes() for path, _ in pretrain + val + test}) == 20 + 4 + 8
    for path, label in pretrain + val + test:
        assert path.parent.name == classes[label]
    for rows in (pretrain, train, val, test):
        assert np.ptp(np.bincount([label for _, label in rows], minlength=4)) == 0, "balanced"


def test_videos_are_h264_of_the_asked_size(small: Path):
    for path, _ in read_csv(small / "finetune/test.csv"):
        assert decode(path).shape == (6, 32, 32, 3)


def test_encoded_frames_are_the_rendered_ones(small: Path):
    path, label = read_csv(small / "pretrain/train.csv")[5]
    expected = render_video(np.random.default_rng((0, 0, 5)), list(MOVEMENTS)[label], 32, 6)
    error = np.abs(decode(path).astype(int) - expected)
    assert error.mean() < 8  # lossy, with colour at half resolution
    swapped = np.abs(decode(path)[::-1].astype(int) - expected)
    assert swapped.mean() > 1.5 * error.mean()


def test_same_seed_same_frames_whatever_the_workers(small: Path, tmp_path: Path):
    again = write_dataset(tmp_path / "again", **{**SMALL, "num_workers": 1})
    other = write_dataset(tmp_path / "other", **SMALL, seed=1)
    for split in ("pretrain/train.csv", "finetune/test.csv"):
        rows = zip(*(read_csv(root / split) for root in (small, again, other)), strict=True)
        for (a, _), (b, _), (c, _) in rows:
            assert a.name == b.name == c.name
            np.testing.assert_array_equal(decode(a), decode(b))
            assert not np.array_equal(decode(a), decode(c))


def test_second_call_does_nothing(small: Path):
    before = {path: path.stat().st_mtime_ns for path in small.rglob("*")}
    assert write_dataset(small, **SMALL) == small
    assert {path: path.stat().st_mtime_ns for path in small.rglob("*")} == before


def test_other_parameters_are_refused(small: Path):
    with pytest.raises(FileExistsError, match=r"seed=0 \(asked for: 3\)"):
        write_dataset(small, **SMALL, seed=3)


def test_foreign_folder_is_refused_and_kept(tmp_path: Path):
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(FileExistsError, match="holds no synthetic data set"):
        write_dataset(tmp_path, **SMALL)
    assert (tmp_path / "mine.txt").read_text() == "precious"


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_interrupted_writing_leaves_nothing(tmp_path: Path, monkeypatch, error: BaseException):
    write_video, calls = synthetic.write_video, []

    def fail_at_tenth(*args):
        calls.append(args)
        if len(calls) == 10:
            raise error
        write_video(*args)

    monkeypatch.setattr(synthetic, "write_video", fail_at_tenth)
    with pytest.raises(type(error)):
        write_dataset(tmp_path / "set", **{**SMALL, "num_workers": 1})
    assert list(tmp_path.iterdir()) == []
    assert len(calls) < 32, "the rest is not written first"


def test_a_folder_whose_name_cannot_be_printed(tmp_path: Path, monkeypatch, capsys):
    out = tmp_path / os.fsdecode(b"caf\xe9")
    flags = [f"--{name}={value}" for name, value in SMALL.items()]
    monkeypatch.setattr(sys, "argv", ["synthetic", str(out), *flags])
    synthetic.main()
    assert f"{tmp_path}/caf\\udce9: 20 for training" in capsys.readouterr().out


def test_two_processes_at_once(tmp_path: Path):
    write = partial(write_dataset, tmp_path / "set", **SMALL)
    processes = [FORK.Process(target=write) for _ in "ab"]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert [path.name for path in tmp_path.iterdir()] == ["set"]
    assert json.loads((tmp_path / "set/dataset.json").read_text())["num_videos"] == 20


@pytest.mark.parametrize(
    ("name", "value"),
    [("num_classes", 1), ("num_classes", 99), ("num_labelled", 21), ("num_test", 0), ("size", 33)],
)
def test_bad_parameter_is_named(tmp_path: Path, name: str, value: int):
    with pytest.raises(ValueError, match=f"{name} .*{value}"):
        write_dataset(tmp_path / "set", **{**SMALL, name: value})
    assert list(tmp_path.iterdir()) == []


# --- only motion tells the class ----------------------------------------------------------------


@pytest.fixture(scope="module")
def grey(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Tensor, Tensor]]:
    """Write and decode a set: grey videos [N, 12, 32, 32] and labels [N] of train and test."""
    root = write_dataset(
        tmp_path_factory.mktemp("motion") / "set",
        num_videos=320,
        num_labelled=320,
        num_val=1,
        num_test=240,
        num_classes=8,
        size=32,
        num_frames=12,
        num_workers=2,
    )
    result = {}
    for split in ("train", "test"):
        rows = read_csv(root / f"finetune/{split}.csv")
        videos = np.stack([decode(path).mean(axis=-1) for path, _ in rows]) / 64 - 2
        result[split] = torch.from_numpy(videos).float(), torch.tensor([y for _, y in rows])
    return result


def held_out_accuracy(
    grey: dict[str, tuple[Tensor, Tensor]], view: Callable[[Tensor], Tensor]
) -> list[float]:
    """Train a small convnet on K views of 4 frames of each video; return the K test accuracies.

    view maps videos [N, 12, H, W] to [N, K, 4, H, W].
    """
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(4, 24, 7, stride=2, padding=3),
        nn.ReLU(),
        nn.Conv2d(24, 48, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(48, 8),
    )
    videos, labels = grey["train"]
    views = view(videos)
    steps = 200
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, steps)
    for _ in range(steps):
        batch, k = torch.randint(len(views), (32,)), torch.randint(views.shape[1], (32,))
        loss = F.cross_entropy(model(views[batch, k]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    videos, labels = grey["test"]
    with torch.no_grad():
        answers = [model(x).argmax(1) for x in view(videos).unbind(1)]
    return [(answer == labels).float().mean().item() for answer in answers]


@pytest.mark.slow
def test_one_frame_says_nothing(grey: dict[str, tuple[Tensor, Tensor]]):
    # 240 answers by chance: 12.5 % with a deviation of 2.1 %, for each of the 12 frames
    accuracy = held_out_accuracy(grey, lambda x: x.unsqueeze(2).expand(-1, -1, 4, -1, -1))
    assert len(accuracy) == 12
    assert max(accuracy) < 0.125 + 0.08, accuracy
    assert np.mean(accuracy) < 0.125 + 0.04, accuracy


@pytest.mark.slow
def test_four_frames_tell_the_class(grey: dict[str, tuple[Tensor, Tensor]]):
    # the same network with the same training: the task is not out of its reach
    accuracy = held_out_accuracy(grey, lambda x: x.unflatten(1, (3, 4)))
    assert min(accuracy) > 0.5, accuracy


@pytest.mark.parametrize("movement", MOVEMENTS)
def test_shapes_are_anywhere_in_every_frame(movement: str):
    """The mean position of the shapes must not drift with the class: they wrap around."""
    paths = [
        MOVEMENTS[movement](np.arange(20) * 2.5, np.arange(20) / 2 + start) for start in (0, 1)
    ]
    for path in paths:
        assert path.shape == (20, 2)
        steps = np.hypot(*np.diff(path, axis=0).T)
        assert steps.max() < 2.5 * 1.4, "no jumps"
    layer = np.zeros((1, 32, 32))
    layer[0, 4:9, 20:27] = 1
    moved = synthetic.shift(layer, paths[0])
    np.testing.assert_allclose(moved.sum((1, 2, 3)), layer.sum(), rtol=1e-5)


def test_shift_by_whole_pixels_is_a_roll():
    layers = np.random.default_rng(0).normal(size=(2, 32, 32))
    moved = synthetic.shift(layers, np.array([[0, 0], [3, -5], [32, 64]]))
    np.testing.assert_allclose(moved[0], layers, atol=1e-5)
    np.testing.assert_allclose(moved[1], np.roll(layers, (3, -5), axis=(1, 2)), atol=1e-5)
    np.testing.assert_allclose(moved[2], layers, atol=1e-5)


# --- the project installed without its checkout


ROOT = Path(synthetic.__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Build a wheel from the tracked files."""
    folder = tmp_path_factory.mktemp("build")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    for name in listed.stdout.splitlines():
        (folder / "src" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / "src" / name)
    build = "-m pip wheel -q --no-deps --no-build-isolation --no-index -w . ./src"
    subprocess.run([sys.executable, *build.split()], cwd=folder, check=True)
    return next(folder.glob("*.whl"))


def test_the_wheel_has_all_modules_and_recipes(wheel):
    patterns = ("main_*.py", "submitit_*.py", "models_*.py", "engine_*.py", "util/**/*.py")
    files = {path for pattern in (*patterns, "recipes/*") for path in ROOT.glob(pattern)}
    assert {str(path.relative_to(ROOT)) for path in files} <= {*zipfile.ZipFile(wheel).namelist()}


@pytest.mark.slow
def test_the_installed_scripts_run_in_an_empty_folder(wheel, tmp_path):
    """The environment has the libraries of this one but, in place of the checkout, the wheel."""
    venv.create(tmp_path / "venv", symlinks=True)
    python = tmp_path / "venv/bin/python"
    (packages,) = (tmp_path / "venv").glob("lib/*/site-packages")
    install = ["-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", packages, wheel]
    subprocess.run([sys.executable, *install], check=True)
    (packages / "shared.pth").write_text(sysconfig.get_path("purelib"))
    (tmp_path / "empty").mkdir()
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}

    def run(*words: str) -> str:
        command = [python, *words]
        done = subprocess.run(
            command, cwd=tmp_path / "empty", env=environment, capture_output=True, text=True
        )
        assert not done.returncode, done.stderr
        return done.stdout

    assert run("-c", "import util; print(util.__file__)").startswith(str(packages))
    flags = "--dry_run --device cpu --num_workers 0".split()
    for script in ("main_pretrain", "main_finetune"):
        out = run("-m", script, *flags)
        assert "FLOPs per clip forward" in out
        assert f"videos in {tmp_path}/empty/data/synthetic" in out
