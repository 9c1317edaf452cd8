"""What a real TensorBoard shows of real runs; reports on classes; predictions of a test."""

import argparse
import contextlib
import csv
import io
import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import main_finetune
import main_pretrain
import main_test
import models_mae
from tests.test_scripts import FINETUNE, PRETRAIN, assert_same_weights, call
from util import slurm
from util.args import NOT_COMPARED
from util.kinetics import Kinetics, VideoIndex
from util.meters import RunLog, epoch_1000x, last_x
from util.report import BLUE, RED, count_confusions, draw_confusion, report_classes, worst_classes
from util.visualize import FixedClips

CPU = torch.device("cpu")


def read_events(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder), size_guidance={"images": 0, "histograms": 0})
    return events.Reload()


# --- class by class -----------------------------------------------------------------------------

CONFUSION = np.array([[3, 1, 0], [0, 0, 0], [2, 2, 0]])


def test_count_confusions():
    labels, predictions = torch.tensor([0, 0, 2, 1, 2]), torch.tensor([0, 1, 0, 1, 3])
    assert count_confusions(labels, predictions, 3).tolist() == [
        [1, 1, 0, 0], [0, 1, 0, 0], [1, 0, 0, 1]
    ]  # fmt: skip


def test_report_of_classes():
    first, second, third = report_classes(CONFUSION)
    assert first == (0, 4, 75.0, 1, 1)
    assert second[:2] == (1, 0) and np.isnan(second.accuracy) and second.confused_with is None
    assert third == (2, 4, 0.0, 0, 2)  # the first among equals
    first, second, _ = report_classes(CONFUSION, unpredicted=np.array([1, 1, 0]))
    assert (first.videos, first.accuracy) == (5, 60.0)
    assert (second.videos, second.accuracy, second.confused_with) == (1, 0.0, None)


def test_worst_classes_come_first():
    lines = worst_classes(report_classes(CONFUSION), ["a", "b", "c|d"], count=5).splitlines()
    assert lines[2:] == ["| c\\|d | 4 | 0.0 | a (2 x) |", "| a | 4 | 75.0 | b (1 x) |"]
    assert len(worst_classes(report_classes(CONFUSION), ["a", "b", "c"], 1).splitlines()) == 3


def test_confusion_is_drawn_to_scale():
    pixels = draw_confusion(np.diag([5, 0, 1]))
    assert pixels.shape == (426, 426, 3) and pixels.dtype == np.uint8
    corner = 24 + 2  # margin
    assert pixels[corner, corner].tolist() == list(BLUE)
    assert (pixels[corner + 134, corner + 134] == 255).all()  # a class without videos
    wrong = draw_confusion(np.array([[0, 4], [1, 1]]))
    assert wrong[corner, corner + 200].tolist() == list(RED)  # row: label; column: prediction
    assert (wrong[corner, corner] == 255).all()
    half = wrong[corner + 200, corner]
    assert np.allclose(half, [255 + (c - 255) / 2 for c in RED], atol=1)
    named = draw_confusion(np.diag([5, 0, 1]), ["a", "saut \\xe0 la perche" * 9, "c"])
    margin = len(named) - 402
    assert 60 < margin < 150 and named.shape[1] == len(named)
    ink = (named[margin:, :margin] < 128).any(axis=-1).sum(axis=(1)).reshape(3, 134).sum(axis=1)
    above = (named[:margin, margin:] < 128).any(axis=-1).sum(axis=0).reshape(3, 134).sum(axis=1)
    assert ink.tolist() == above.tolist() and ink[1] > 5 * max(ink[0], ink[2]) > 0
    assert named[margin + 2, margin + 2].tolist() == list(BLUE)
    assert draw_confusion(np.eye(400, dtype=int)).shape == (400, 400, 3)
    assert draw_confusion(np.eye(700, dtype=int)).shape == (700, 700, 3)


def test_flags_of_a_job_are_not_compared():
    """Where a run is computed does not change what it learns."""
    parser = argparse.ArgumentParser()
    slurm.add_slurm_args(parser)
    job = {name for name in vars(parser.parse_args([])) if name != "output_dir"}
    assert job <= set(NOT_COMPARED)


# --- fixed clips --------------------------------------------------------------------------------


def make_fixed_clips(
    csv_path: Path, **options
) -> tuple[FixedClips, models_mae.MaskedAutoencoderViT]:
    dataset = Kinetics(VideoIndex(str(csv_path)), "test", 32, 16, 4)
    args = Namespace(
        mask_ratio=0.75, mask_type="random", vis_period=2, epochs=5, precision="fp32",
        repeat_aug=2, num_frames=16, sampling_rate=4,
    )  # fmt: skip
    vars(args).update(options)
    torch.manual_seed(0)
    model = models_mae.MODELS["mae_vit_tiny_patch8"](img_size=32, num_frames=16, pred_t_dim=8)
    return FixedClips(dataset, args, CPU), model


def test_clips_are_shown_every_period_and_at_the_end(videos, tmp_path):
    fixed, model = make_fixed_clips(videos / "train.csv")
    model.train()
    log = RunLog(str(tmp_path), 1, CPU)
    state = torch.get_rng_state()
    for epoch in range(5):
        fixed.show(model, epoch, log)
    log.close()
    assert torch.equal(torch.get_rng_state(), state) and model.training
    events = read_events(tmp_path)
    names = [f"fixed_clips/{kind}_{i}" for kind in ("frames", "video") for i in range(4)]
    assert sorted(events.Tags()["images"]) == names
    for name in names:
        assert [event.step for event in events.Images(name)] == [3999, 7999, 9999]
    gif = Image.open(io.BytesIO(events.Images("fixed_clips/video_0")[0].encoded_image_string))
    assert (gif.format, gif.n_frames, gif.size) == ("GIF", 8, (3 * 96 + 2 * 4, 96))
    assert gif.info["duration"] == 270  # 3.75 per second: in the video's time
    strip = Image.open(io.BytesIO(events.Images("fixed_clips/frames_0")[0].encoded_image_string))
    assert strip.size == (4 * 96 + 3 * 4, 3 * 96 + 2 * 4)
    histogram = events.Histograms("fixed_clips/patch_loss")[0].histogram_value
    assert histogram.num == 4 * 96  # 96 of 128 patches of each clip are removed
    loss = events.Scalars("fixed_clips/loss")[0].value
    assert histogram.sum / histogram.num == pytest.approx(loss, rel=1e-5)
    # the same weights give the same pictures: clips and masks are fixed
    first, last = (events.Images("fixed_clips/frames_1")[i].encoded_image_string for i in (0, 2))
    assert first == last


@pytest.mark.parametrize("options", [{"vis_period": 0}, {"vis_period": 9, "epochs": 20}])
def test_nothing_is_read_until_it_is_shown(videos, tmp_path, options):
    fixed, model = make_fixed_clips(videos / "train.csv", **options)
    log = RunLog(str(tmp_path), 1, CPU)
    fixed.show(model, 0, log)
    fixed.show(model, 7, log)
    assert fixed.clips is None


def test_unreadable_videos_are_passed_over(videos, tmp_path, capsys):
    rows = ["missing.mp4", *(f"{videos}/v{i}.mp4" for i in (5, 2)), "rubbish.mp4"]
    (tmp_path / "rubbish.mp4").write_text("no video")
    (tmp_path / "train.csv").write_text("\n".join(rows))
    fixed, model = make_fixed_clips(tmp_path / "train.csv")
    log = RunLog(str(tmp_path / "board"), 1, CPU)
    fixed.show(model, 1, log)
    log.close()
    out = capsys.readouterr().out
    assert out.count("not shown in TensorBoard") == 2 and "missing.mp4" in out
    assert len(fixed.clips) == 2
    direct = Kinetics(VideoIndex(str(videos / "train.csv")), "test", 32, 16, 4)
    assert torch.equal(fixed.clips, torch.stack([direct[0, 5].clips[0], direct[0, 2].clips[0]]))

    (tmp_path / "train.csv").write_text("missing.mp4\n")
    fixed, model = make_fixed_clips(tmp_path / "train.csv")
    fixed.show(model, 1, RunLog(str(tmp_path / "none"), 1, CPU))  # nothing to show is no error


def test_weights_that_are_no_numbers_do_not_stop_a_run(videos, tmp_path, capsys):
    """With --skip_nonfinite a run goes on; pictures of its predictions only decorate it."""
    fixed, model = make_fixed_clips(videos / "train.csv")
    torch.nn.init.constant_(model.decoder_pred.bias, float("nan"))
    fixed.show(model, 1, RunLog(str(tmp_path), 1, CPU))
    assert "WARNING: reconstructions are not shown in TensorBoard" in capsys.readouterr().out


# --- runs ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(videos, tmp_path_factory) -> Path:
    """Pre-train for two epochs, fine-tune for two, and return the folder of both."""
    out = tmp_path_factory.mktemp("runs")
    call(main_pretrain, "--path_to_data_dir", videos, "--output_dir", out / "pretrain", *PRETRAIN,
         "--epochs", 2, "--vis_period", 1)  # fmt: skip
    start = out / "pretrain/checkpoint-00001.pth"
    call(main_finetune, "--path_to_data_dir", videos, "--output_dir", out / "finetune",
         "--finetune", start, *FINETUNE)  # fmt: skip
    return out


def test_pictures_change_nothing_in_the_training(runs, videos, tmp_path):
    call(main_pretrain, "--path_to_data_dir", videos, "--output_dir", tmp_path, *PRETRAIN,
         "--epochs", 2, "--vis_period", 0)  # fmt: skip
    for name in ("checkpoint-00000.pth", "checkpoint-00001.pth"):
        assert_same_weights(tmp_path / name, runs / "pretrain" / name)
    assert (tmp_path / "log.txt").read_text() == (runs / "pretrain/log.txt").read_text()
    assert not read_events(tmp_path / "tensorboard").Tags()["images"]


def test_confusion_is_that_of_the_validation(runs):
    events = read_events(runs / "finetune/tensorboard")
    records = [json.loads(line) for line in (runs / "finetune/log.txt").open()]
    xs = [last_x(epoch, 2) for epoch in range(2)]
    assert [e.step for e in events.Images("val/confusion")] == xs == [1999, 3999]
    for key in ("acc1", "acc5", "loss", "mean_class_acc"):
        logged = [(e.step, e.value) for e in events.Scalars(f"val/{key}")]
        values = [record[f"val_{key}"] for record in records]
        assert logged == [(x, pytest.approx(value)) for x, value in zip(xs, values, strict=True)]
    for event, record in zip(events.Histograms("val/class_acc"), records, strict=True):
        histogram = event.histogram_value
        assert histogram.num == 3
        # classes of two videos each: their mean is the accuracy
        assert histogram.sum / 3 == pytest.approx(record["val_acc1"], abs=1e-3)
        assert record["val_mean_class_acc"] == pytest.approx(record["val_acc1"])


def test_resumed_run_leaves_each_point_once(videos, tmp_path, monkeypatch):
    """Killed after validation, or two epochs past a checkpoint: the points of one whole run."""
    monkeypatch.setattr("util.checkpoint.superfluous", lambda *_: [])  # as if killed before that
    argv = ["--path_to_data_dir", videos, *FINETUNE, "--epochs", 3, "--output_dir"]
    call(main_finetune, *argv, tmp_path / "whole")
    whole = read_events(tmp_path / "whole/tensorboard")
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    names = ("checkpoint-00002.pth", "checkpoint-00002-00000003.pth", "checkpoint-00001.pth")
    for count, lost in enumerate((names[:1], names), start=2):
        for name in lost:
            (tmp_path / "parts" / name).unlink()
        time.sleep(1.1)  # event files are ordered by the second
        call(main_finetune, *argv, tmp_path / "parts")
        assert len(list((tmp_path / "parts/tensorboard").iterdir())) == count
        parts = read_events(tmp_path / "parts/tensorboard")
        assert parts.Tags() == whole.Tags()
        for tag in ("train/loss", "val/acc1", "val/mean_class_acc"):
            expected = [(e.step, e.value) for e in whole.Scalars(tag)]
            assert [(e.step, e.value) for e in parts.Scalars(tag)] == expected, tag
        assert [e.step for e in parts.Images("val/confusion")] == [1999, 3999, 5999]
        assert [e.step for e in parts.Histograms("val/class_acc")] == [1999, 3999, 5999]


def test_results_of_an_epoch_come_before_the_next():
    assert [last_x(epoch, 4) for epoch in (0, 1)] == [3999, 7999]
    assert last_x(3, 2) < epoch_1000x(4, 2)


# --- a real TensorBoard -------------------------------------------------------------------------


@contextlib.contextmanager
def serve(folder: Path):
    """Run TensorBoard on a free port of this machine; yield a function that calls its HTTP API."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(folder)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--load_fast=false"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def ask(path: str, body: dict | None = None, raw: bool = False, **query: str):
        address = f"http://127.0.0.1:{port}/{path}?{urllib.parse.urlencode(query)}"
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(address, data, headers)
        with urllib.request.urlopen(request, timeout=30) as reply:
            content = reply.read()
        return content if raw else json.loads(content)

    try:
        deadline = time.monotonic() + 90
        while True:
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline
            with contextlib.suppress(urllib.error.URLError, ConnectionError):
                if len(ask("data/runs")) >= 2:
                    break
            time.sleep(0.2)
        yield ask
    finally:
        process.terminate()
        process.communicate()


def test_tensorboard_shows_both_runs(runs):
    with serve(runs) as ask:
        pretrain, finetune = "pretrain/tensorboard", "finetune/tensorboard"
        assert set(ask("data/runs")) == {pretrain, finetune}

        scalars = ask("data/plugin/scalars/tags")
        common = {"train/loss", "train/lr", "train/grad_norm"}
        common |= {"speed/clips_per_s", "speed/data_share", "speed/memory_mib"}
        assert set(scalars[pretrain]) == common | {"epoch/loss", "fixed_clips/loss"}
        names = ("loss", "acc1", "acc5", "mean_class_acc", "bad", "not_finite")
        values = {f"val/{name}" for name in names} | {"epoch/val_acc1", "epoch/val_loss"}
        assert set(scalars[finetune]) == common | values
        points = ask("data/plugin/scalars/scalars", run=pretrain, tag="epoch/loss")
        records = [json.loads(line) for line in (runs / "pretrain/log.txt").open()]
        shown = [(step, pytest.approx(value, rel=1e-6)) for _, step, value in points]
        assert shown == [(1999, records[0]["train_loss"]), (3999, records[1]["train_loss"])]

        images = ask("data/plugin/images/tags")
        assert set(images[finetune]) == {"val/confusion"}
        assert "fixed_clips/video_3" in images[pretrain]
        listed = ask(
            "data/plugin/images/images", run=pretrain, tag="fixed_clips/video_0", sample="0"
        )
        assert [image["step"] for image in listed] == [1999, 3999]
        gif = ask("data/plugin/images/individualImage?" + listed[-1]["query"], raw=True)
        assert Image.open(io.BytesIO(gif)).n_frames == 2

        histograms = ask("data/plugin/histograms/tags")
        assert set(histograms[pretrain]) == {"fixed_clips/patch_loss"}
        assert set(histograms[finetune]) == {"val/class_acc"}

        texts = ask("data/plugin/text/tags")
        assert texts[finetune] == ["val/worst_classes/text_summary"]
        text = ask("data/plugin/text/text", run=finetune, tag=texts[finetune][0])
        assert "<table>" in text[-1]["text"] and "mostly taken for" in text[-1]["text"]

        experiment = ask("data/plugin/hparams/experiment", body={"experimentName": ""})
        names = {info["name"] for info in experiment["hparamInfos"]}
        assert {"lr", "model", "batch_size", "ranks", "norm_pix_loss", "layer_decay"} <= names
        assert not {"output_dir", "num_workers", "notice"} & names
        metrics = [info["name"]["tag"] for info in experiment["metricInfos"]]
        assert metrics[:3] == ["epoch/loss", "epoch/val_acc1", "epoch/val_loss"]  # it shows five
        assert "val/acc1" in metrics
        differing = {info["name"] for info in experiment["hparamInfos"] if info.get("differs")}
        assert {"model", "beta"} <= differing and "jitter_aspect_relative" not in differing
        request = {
            "experimentName": "", "startIndex": 0, "sliceSize": 10,
            "colParams": [{"metric": {"tag": tag}} for tag in metrics],
            "allowedStatuses": ["STATUS_SUCCESS"],
        }  # fmt: skip
        groups = ask("data/plugin/hparams/session_groups", body=request)["sessionGroups"]
        assert len(groups) == 2
        for group in groups:
            (session,) = group["sessions"]
            run = session["name"]
            final = {m["name"]["tag"]: m["value"] for m in session["metricValues"]}
            model, beta = group["hparams"]["model"], group["hparams"]["beta"]
            assert beta == ("0.9 0.95" if run == pretrain else "0.9 0.999")
            if run == pretrain:
                assert model == "mae_vit_tiny_patch8"
                assert final["epoch/loss"] == pytest.approx(records[-1]["train_loss"])
            else:
                assert run == finetune and model == "vit_tiny_patch8"
                last = json.loads((runs / "finetune/log.txt").read_text().splitlines()[-1])
                assert final["val/acc1"] == pytest.approx(last["val_acc1"])
                assert final["epoch/val_acc1"] == pytest.approx(last["val_acc1"])


# --- main_test.py -------------------------------------------------------------------------------


def test_predictions_and_classes_of_a_test(runs, videos, tmp_path):
    """Unreadable videos appear as such and count as wrong; classes without videos have no score."""
    (tmp_path / "classes.txt").write_text("up\ndown\nround\n")
    rows = [*(f"{videos}/v{i}.mp4 {i % 2}" for i in range(4)), "missing, one.mp4 1"]
    (tmp_path / "test.csv").write_text("\n".join(rows))
    out = tmp_path / "out"
    call(main_test, "--path_to_data_dir", tmp_path, "--num_clips", 3, "--num_crops", 2,
         "--finetune", runs / "finetune/checkpoint-00001.pth", "--output_dir", out,
         "--num_workers", 0, "--device", "cpu")  # fmt: skip
    scores = np.load(out / "scores.npz")["scores"] / 6
    with (out / "predictions.csv").open() as file:
        *good, bad = csv.DictReader(file)
    for row, score in zip(good, scores, strict=False):
        order = np.argsort(-score).tolist()
        assert row["prediction"] == str(order[0]) and row["error"] == ""
        assert row["top5"] == " ".join(map(str, order))  # three classes
        assert float(row["score"]) == pytest.approx(score.max(), abs=1e-4)
        assert row["correct"] == str(int(row["prediction"] == row["label"]))
    assert bad["video"].endswith("missing, one.mp4") and "no such file" in bad["error"]
    assert (bad["prediction"], bad["correct"], bad["score"], bad["top5"]) == ("", "0", "", "")
    with (out / "classes.csv").open() as file:
        classes = list(csv.DictReader(file))
    assert [c["name"] for c in classes] == ["up", "down", "round"]
    assert [(c["videos"], c["unreadable"]) for c in classes] == [("2", "0"), ("3", "1"), ("0", "0")]
    predicted = [int(row["prediction"]) for row in good]
    for label, entry in enumerate(classes[:2]):
        own = [p for p, row in zip(predicted, good, strict=True) if row["label"] == str(label)]
        assert float(entry["top1"]) == pytest.approx(
            100 * own.count(label) / int(entry["videos"]), abs=0.01
        )
        wrong = [p for p in own if p != label]
        names = {
            classes[p]["name"] for p in wrong if wrong.count(p) == max(map(wrong.count, wrong))
        }
        assert entry["confused_with"] in (names or {""})
    assert float(classes[1]["top5"]) == pytest.approx(
        66.67
    )  # the unreadable one is wrong there too
    assert classes[2]["top1"] == classes[2]["confused_with"] == ""
    assert not list(out.glob("*.tmp*"))
