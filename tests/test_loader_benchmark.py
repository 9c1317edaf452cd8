"""The benchmark of the data pipeline runs, and --check tells a missed target."""

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import loader

torch.set_num_threads(1)


def run(videos, *words: str) -> int:
    flags = ["--videos", str(videos), "--num_videos", "2", "--rounds", "1", *words]
    return loader.main(loader.get_args_parser().parse_args(flags))


@pytest.mark.slow
def test_it_prints_every_method_and_the_split(videos, monkeypatch, capsys):
    monkeypatch.setattr(loader, "WORKER_SECONDS", 1.0)
    assert run(videos, "--workers", "1") == 0
    out = capsys.readouterr().out
    for line in ("pretrain  textbook", "test      again", "finetune  PIL", "1 workers: "):
        assert out.count(line) == 2  # as given and with short groups of pictures
    for part in ("opening", "decoding", "conversion", "resizing", "augmentation", "packing"):
        assert f"{part} " in out
    assert "worker to trainer" in out


@pytest.mark.slow
@pytest.mark.parametrize(("least", "status"), [(0.0, 0), (1e9, 1)])
def test_check_compares_with_the_targets(videos, monkeypatch, capsys, least, status):
    monkeypatch.setattr(loader, "TARGETS", [("finetune", "PIL", least)])
    monkeypatch.setattr(loader, "MAX_TRANSPORT_MS", 1000)
    assert run(videos, "--work", "finetune", "--workers", "--check") == status
    assert ("target missed: as given: finetune" in capsys.readouterr().out) == bool(status)


def test_the_usual_ways_make_the_same_clips_as_ours(videos):
    """A comparison is fair only if both do the same work."""
    csv_path = str(videos / "train.csv")
    ours = loader.data_set("pretrain", csv_path)
    methods = loader.methods_for("pretrain", ours, 1, 3, torch.empty(ours.clips_shape).byte())
    clips = loader.to_float(methods["ours"]().clips.flatten(0, 1).numpy())
    textbook = methods["textbook"]().flatten(0, 1)
    assert (clips - textbook).abs().mean() < 0.3 / 255 / 0.225

    ours = loader.data_set("finetune", csv_path)
    ours.reprob = 0.0
    for epoch in range(6):
        out = torch.empty(ours.clips_shape).byte()
        methods = loader.methods_for("finetune", ours, 2, epoch, out)
        sample = methods["ours"]()
        clips = torch.where(sample.flip[:, None, None, None, None], out.flip(3), out)
        usual = methods["PIL"]()
        ours_float = torch.stack([loader.to_float(clip.numpy()) for clip in clips])
        assert (ours_float - usual).abs().mean() < 0.5 / 255 / 0.225


def test_synthetic_clips_are_in_kinetics_form(tmp_path):
    frames = list(loader.moving_texture(np.random.default_rng(0), num_frames=3))
    assert len(frames) == 3 and frames[0].shape == (256, 340, 3) and frames[0].dtype == np.uint8
    assert 0 < np.abs(frames[0].astype(int) - frames[2]).mean() < 30
    assert frames[0].std() > 20


def test_speeds_are_drawn(tmp_path, monkeypatch):
    speeds = {"pretrain": {"bare": 0.8, "textbook": 4.5}, "test": {"bare": 0.7, "again": 54.0}}
    path = tmp_path / "speed.png"
    loader.plot({"as given": speeds, "30-frame GOPs": speeds}, str(path))
    with Image.open(path) as picture:
        assert picture.size == (960, 432)
        colours = {colour for _, colour in picture.convert("RGB").getcolors(1 << 20)}
    assert {(31, 119, 180), (255, 127, 14)} <= colours  # bars of both kinds
    monkeypatch.setattr(loader, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="needs matplotlib"):
        run(tmp_path, "--plot", str(path))
