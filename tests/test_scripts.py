"""Run the scripts as a user does: one process, ranks of torchrun, kills, resumes and bad input."""

import argparse
import csv
import inspect
import os
import re
import resource
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import simplejson
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import main_finetune
import main_pretrain
import main_test
import submitit_finetune
from engine_finetune import combine_views
from models_vit import VisionTransformer
from tests import golden
from util import run, slurm
from util.errors import UserError
from util.kinetics import VideoIndex
from util.report import VideoScores
from util.weights import read_weights

ROOT = Path(__file__).parent.parent
FOLDERS = "*.py util/**/*.py demo/*.py benchmarks/*.py".split()
SCRIPTS = sorted(path for pattern in FOLDERS for path in ROOT.glob(pattern)
                 if '__name__ == "__main__"' in path.read_text())  # fmt: skip
SIZES = "--input_size 32 --num_frames 4 --sampling_rate 4 --num_workers 0 --device cpu".split()
PRETRAIN = [
    *SIZES,
    *"--model mae_vit_tiny_patch8 --decoder_embed_dim 32 --decoder_depth 1".split(),
    *"--decoder_num_heads 2 --pred_t_dim 2 --batch_size 2 --repeat_aug 2".split(),
    *"--warmup_epochs 1 --print_freq 1".split(),
]
FINETUNE = [
    *SIZES,
    *"--model vit_tiny_patch8 --num_classes 3 --batch_size 2 --repeat_aug 2".split(),
    *"--warmup_epochs 1 --epochs 2 --print_freq 1 --no-hflip".split(),
]
VIEWS = "--num_clips 2 --num_crops 1 --num_workers 0 --device cpu".split()


def call(module, *argv: object) -> None:
    """Run a script in this process, as its __main__ does."""
    run.run(module.main, lambda _: module.parse_args([str(a) for a in argv]))


def spawn(script: str | Path, *argv: object, ranks: int = 1, **kwargs) -> subprocess.Popen:
    """Start a script as a process, or as ranks under torchrun."""
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command = [*launcher, str(ROOT / script), *map(str, argv)]
    # without MKL_CBWR the last bit of a matrix product depends on its operands' addresses
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_CBWR": "COMPATIBLE"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
        **kwargs,
    )  # fmt: skip


def finish(process: subprocess.Popen, status: int = 0) -> str:
    """Wait for a script and return what it printed, checking its exit status."""
    out, _ = process.communicate(timeout=240)
    assert process.returncode == status, out
    return out


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def weights(path: Path, key: str = "model") -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True).get(key, {})


def assert_same_weights(a: Path, b: Path) -> None:
    """Compare two checkpoints: the weights and, if there is one, their moving average."""
    for key in ("model", "model_ema"):
        left, right = weights(a, key), weights(b, key)
        assert left.keys() == right.keys()
        for name in left:
            assert torch.equal(left[name], right[name]), (key, name)


@pytest.fixture(scope="module")
def pretrained(videos, tmp_path_factory) -> Path:
    """Pre-train for three epochs without interruption and return the output folder."""
    out = tmp_path_factory.mktemp("pretrain")
    call(main_pretrain, "--path_to_data_dir", videos, "--output_dir", out, "--epochs", 3, *PRETRAIN)
    return out


@pytest.fixture(scope="module")
def finetuned(videos, pretrained, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("finetune")
    start = pretrained / "checkpoint-00002.pth"
    call(main_finetune, "--path_to_data_dir", videos, "--output_dir", out, "--finetune", start,
         *FINETUNE)  # fmt: skip
    return out


# --- what a run leaves --------------------------------------------------------------------------


def test_pretraining_leaves_checkpoints_and_logs(pretrained):
    names = sorted(p.name for p in pretrained.glob("*.pth"))
    assert names == [f"checkpoint-0000{i}.pth" for i in range(3)]
    checkpoint = torch.load(pretrained / names[-1], weights_only=True)
    keys = {"model", "optimizer", "scaler", "epoch", "step", "args", "arguments"}
    keys |= {"classes", "progress", "identity"}
    assert set(checkpoint) == keys
    assert (checkpoint["epoch"], checkpoint["step"]) == (2, 9)
    assert checkpoint["args"]["model"] == "mae_vit_tiny_patch8"
    lines = [simplejson.loads(line) for line in (pretrained / "log.txt").open()]
    assert [line["epoch"] for line in lines] == [0, 1, 2]
    assert all(np.isfinite(line["train_loss"]) for line in lines)
    assert list((pretrained / "tensorboard").glob("events*"))


def test_learning_rate_arithmetic(videos, tmp_path, capsys):
    """Pre-training counts videos in a batch; fine-tuning also counts their repeated clips."""
    for module, flags, rate in (
        (main_pretrain, PRETRAIN, "1.6e-3 x 4 / 256 = 2.5e-05"),
        (main_finetune, FINETUNE, "1.6e-3 x 8 / 256 = 5e-05"),
    ):
        out = tmp_path / module.__name__
        call(module, "--path_to_data_dir", videos, "--output_dir", out, *flags, "--epochs", 1,
             "--blr", "1.6e-3", "--accum_iter", 2)  # fmt: skip
        printed = capsys.readouterr().out
        assert rate.split(" = ")[1] in printed.split("learning rate:")[1].splitlines()[0]
        assert "clips per update: 4 x 2 = 8" in printed
        assert "WARNING: --warmup_epochs 1 do not end within --epochs 1" in printed
        assert (
            "WARNING: --accum_iter 2 does not divide the 3 steps of an epoch: the last 1" in printed
        )


def test_an_accumulation_that_divides_the_epoch_is_no_warning(videos, capsys):
    call(main_pretrain, "--path_to_data_dir", videos, *PRETRAIN, "--accum_iter", 3, "--dry_run")
    assert "does not divide" not in capsys.readouterr().out


def test_classes_without_videos_are_told(videos, tmp_path, capsys):
    call(main_finetune, "--path_to_data_dir", videos, "--output_dir", tmp_path, *FINETUNE,
         "--num_classes", 400, "--dry_run")  # fmt: skip
    assert "WARNING: 400 classes, but the largest label is 2" in capsys.readouterr().out


def test_clips_that_pretraining_has_not_seen_are_told(videos, pretrained, capsys):
    argv = "--path_to_data_dir", videos, *FINETUNE, "--dry_run"
    start = pretrained / "checkpoint-00002.pth"
    call(main_finetune, *argv, "--finetune", start)
    assert "has seen clips" not in capsys.readouterr().out
    call(main_finetune, *argv, "--finetune", start, "--sampling", "segments")
    words = f"WARNING: {start} has seen clips of --sampling dense, not segments\n"
    assert words in capsys.readouterr().out


@pytest.mark.parametrize("module", [main_pretrain, main_finetune])
def test_a_dry_run_refuses_lists_without_files(tmp_path, capsys, module):
    for split in ("train", "val"):
        (tmp_path / f"{split}.csv").write_text("".join(f"v{i}.mp4 {i % 3}\n" for i in range(8)))
    flags = PRETRAIN if module is main_pretrain else FINETUNE
    status, text = fails(capsys, module, "--path_to_data_dir", tmp_path, *flags, "--dry_run")
    words = f"the files of {tmp_path}/train.csv do not exist, {tmp_path}/v0.mp4 for example"
    assert status == 2 and words in text


def test_flags_by_hand_override_those_of_a_file(tmp_path):
    (tmp_path / "x.args").write_text("--batch_size 7 --epochs 3\n")
    file, data = f"@{tmp_path}/x.args", ["--path_to_data_dir", "X"]
    for argv in (["--epochs", "5", *data, file], [file, *data, "--epochs", "5"]):
        args = main_pretrain.parse_args(argv)
        assert (args.batch_size, args.epochs) == (7, 5)


def test_a_quote_without_its_end_in_a_file_of_flags(tmp_path, capsys):
    (tmp_path / "x.args").write_text("--epochs '3\n")
    assert fails(capsys, main_pretrain, f"@{tmp_path}/x.args")[1].endswith("No closing quotation")


def test_finetuning_validates_and_logs(finetuned):
    lines = [simplejson.loads(line) for line in (finetuned / "log.txt").open()]
    assert len(lines) == 2
    assert {"epoch", "train_loss", "val_loss", "val_acc1", "val_acc5"} <= set(lines[0])
    assert lines[0]["val_acc5"] == 100.0  # three classes


@pytest.mark.parametrize("epochs", [1, 2])
def test_a_finished_run_leaves_only_the_ends_of_epochs(videos, tmp_path, epochs):
    """Not what it has saved before validation and within epochs."""
    call(main_finetune, "--path_to_data_dir", videos, "--output_dir", tmp_path, *FINETUNE,
         "--epochs", epochs, "--checkpoint_minutes", 1e-6)  # fmt: skip
    names = sorted(path.name for path in tmp_path.glob("*.pth"))
    assert names == [f"checkpoint-0000{i}.pth" for i in range(epochs)]


def test_multi_view_test_needs_only_the_checkpoint(videos, finetuned, tmp_path, capsys):
    """The checkpoint gives the model's flags; unreadable videos are listed and count as wrong."""
    rows = [f"{videos}/v{i}.mp4 {i % 3}" for i in range(6)] + ["missing.mp4 0"]
    (tmp_path / "test.csv").write_text("\n".join(rows))
    best = finetuned / "checkpoint-00001.pth"
    for ensemble in ("sum", "max"):
        out = tmp_path / ensemble
        call(main_test, "--path_to_data_dir", tmp_path, "--finetune", best, "--num_clips", 3,
             "--num_crops", 2, "--output_dir", out, "--num_workers", 0, "--device", "cpu",
             "--ensemble", ensemble)  # fmt: skip
        printed = capsys.readouterr().out
        with (out / "predictions.csv").open() as file:
            predictions = list(csv.DictReader(file))
        assert [p["video"] for p in predictions] == [
            *(str(videos / f"v{i}.mp4") for i in range(6)), str(tmp_path / "missing.mp4")
        ]  # fmt: skip
        assert predictions[-1]["prediction"] == ""
        correct = sum(int(p["correct"]) for p in predictions)
        assert f"top-1 {100 * correct / 7:.2f} %" in printed
        assert "1 unreadable" in printed
        assert "missing.mp4: no such file" in printed
        scores = np.load(out / "scores.npz")["scores"]
        assert scores.shape == (7, 3)
        if ensemble == "sum":
            assert np.allclose(scores[:6].sum(1), 6, atol=1e-4)  # six softmax views
    assert not np.array_equal(
        np.load(tmp_path / "sum/scores.npz")["scores"],
        np.load(tmp_path / "max/scores.npz")["scores"],
    )


@pytest.mark.parametrize("ensemble", ["sum", "max"])
def test_accuracy_of_views_is_the_golden_one(tmp_path, ensemble):
    arrays, expected = golden.arrays("test_meter.npz"), golden.table("test_meter.json")
    rows = [f"{i}.mp4 {label}\n" for i, label in enumerate(arrays["labels"])]
    (tmp_path / "test.csv").write_text("".join(rows))
    index = VideoIndex(str(tmp_path / "test.csv"))
    views = torch.from_numpy(arrays["softmax"]).unflatten(0, (5, 30))
    scores = torch.stack([combine_views(v, ensemble) for v in views]).numpy()
    np.testing.assert_allclose(scores, arrays[f"video_preds_{ensemble}"], rtol=1e-6)
    args = Namespace(num_clips=10, num_crops=3, ensemble=ensemble, finetune="x", precision="fp32")
    for seen, accuracy in ((5, expected[ensemble]), (2, expected["missing"]["only_first_60"])):
        if seen < 5 and ensemble == "max":
            continue  # the table has only the sum
        args.output_dir = str(tmp_path / str(seen))
        os.mkdir(args.output_dir)
        readable = np.arange(5) < seen
        errors = ["" if good else "gone" for good in readable]
        result, names = VideoScores(scores * readable[:, None], readable, errors), ["c"] * 12
        main_test.report(result, index, args, names)
        record = simplejson.loads((tmp_path / str(seen) / "log.txt").read_text())
        assert f"{record['test_acc1']:.2f}" == accuracy["top1_acc"]
        assert f"{record['test_acc5']:.2f}" == accuracy["top5_acc"]
        assert (record["finetune"], record["ensemble"]) == ("x", ensemble)


def test_eval_flag_validates_and_changes_nothing(videos, finetuned, capsys):
    """--eval of an older checkpoint in the same folder leaves the log and curves as they are."""

    def content() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in finetuned.rglob("*") if path.is_file()}

    before = content()
    for epoch in (0, 1):
        call(main_finetune, "--path_to_data_dir", videos, "--output_dir", finetuned,
             "--device", "cpu", "--eval",
             "--resume", finetuned / f"checkpoint-0000{epoch}.pth")  # fmt: skip
        line = simplejson.loads((finetuned / "log.txt").read_text().splitlines()[epoch])
        validation = f"validation: top-1 {line['val_acc1']:.2f} %  top-5 100.00 %  loss "
        assert f"{validation}{line['val_loss']:.4f}\n" in capsys.readouterr().out
    assert content() == before


def test_eval_needs_no_training_videos(videos, finetuned, tmp_path, capsys):
    (tmp_path / "val.csv").write_text(f"{videos}/v1.mp4 1\n")
    call(main_finetune, "--path_to_data_dir", tmp_path, "--device", "cpu", "--output_dir", "",
         "--eval", "--resume", finetuned / "checkpoint-00001.pth")  # fmt: skip
    assert "validation: top-1 " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "target"),
    [([], "patch"), (["--no-norm_pix_loss"], "pixels"), (["--target", "pixels"], "pixels"),
     (["--target", "channel"], "channel"), (["--norm_pix_loss", "--target", "patch"], "patch"),
     (["--no-norm_pix_loss", "--target", "pixels"], "pixels"),
     (["--no-norm_pix_loss", "--target", "motion"], "motion"), (["--target", "hog"], "hog")],
)  # fmt: skip
def test_the_target_that_the_flags_choose(flags, target):
    args = main_pretrain.parse_args([*PRETRAIN, *flags])
    assert args.target == main_pretrain.build_model(args).target == target


@pytest.mark.parametrize("target", ["channel", "hog", "motion"])
def test_pretraining_on_other_targets_resumes_and_draws(videos, tmp_path, capsys, target):
    flags = ["--path_to_data_dir", videos, "--output_dir", tmp_path, *PRETRAIN, "--vis_period", 1]
    call(main_pretrain, *flags, "--target", target, "--epochs", 1)
    call(main_pretrain, *flags, "--target", target, "--epochs", 2)
    out = capsys.readouterr().out
    assert "some flags differ" in out and "--epochs 1 -> 2\n" in out  # and no others
    assert out.count("hog has no pictures") == 2 * (target == "hog")  # once in each run
    content = torch.load(tmp_path / "checkpoint-00001.pth", weights_only=True)
    assert content["arguments"]["target"] == content["args"]["target"] == target
    log = [simplejson.loads(line) for line in (tmp_path / "log.txt").read_text().splitlines()]
    assert all(0 < record["train_loss"] < 3 for record in log) and len(log) == 2
    shown = EventAccumulator(str(tmp_path / "tensorboard"), {"images": 0}).Reload().Tags()
    assert ("fixed_clips/frames_0" in shown["images"]) == (target != "hog")
    if target != "hog":  # of its own width
        call(main_pretrain, *flags, "--epochs", 2)
        assert f"--target {target} -> patch" in capsys.readouterr().out


def test_crop_and_colours_change_what_is_learnt(videos, tmp_path):
    """Without learning, the loss of an epoch depends only on the clips."""
    losses = []
    for i, flags in enumerate(["", "--crop center", "--color_jitter 0.4"]):
        call(main_pretrain, "--path_to_data_dir", videos, "--output_dir", tmp_path / str(i),
             *PRETRAIN, "--epochs", 1, "--lr", 0, "--min_lr", 0, *flags.split())  # fmt: skip
        losses.append(simplejson.loads((tmp_path / str(i) / "log.txt").read_text())["train_loss"])
    assert len(set(losses)) == 3


@pytest.mark.parametrize("cls_embed", ["--cls_embed", "--no-cls_embed"])
def test_a_classifier_that_reads_one_token_is_validated_and_tested_as_trained(
    videos, tmp_path, capsys, cls_embed
):
    flags = ["--path_to_data_dir", videos, "--output_dir", tmp_path, "--device", "cpu"]
    call(main_finetune, *flags, *FINETUNE, "--pool", "cls", cls_embed, "--lr", 1e-3)
    record = simplejson.loads((tmp_path / "log.txt").read_text().splitlines()[-1])
    path = tmp_path / "checkpoint-00001.pth"
    capsys.readouterr()
    call(main_finetune, *flags, "--eval", "--resume", path)
    assert f"loss {record['val_loss']:.4f}\n" in capsys.readouterr().out
    evaluated = main_finetune.parse_args(list(map(str, [*flags, "--eval", "--resume", path])))
    tested = main_test.parse_args(list(map(str, [*flags, "--finetune", path])))
    assert main_finetune.build_model(evaluated).pool == "cls"
    assert main_test.load_model(tested, read_weights(str(path))).pool == "cls"


@pytest.mark.parametrize(
    ("module", "argv"),
    [(main_test, ["--finetune"]), (main_finetune, ["--eval", "--resume"]),
     (main_finetune, [*FINETUNE, "--epochs", 1, "--finetune"])],
    ids=["test", "eval", "finetune"],
)  # fmt: skip
def test_use_ema_is_asked_of_whatever_reads_the_file(
    monkeypatch, videos, finetuned, tmp_path, module, argv
):
    asked = []

    def spied(read):
        def spy(*args, **kwargs):
            call = inspect.signature(read).bind(*args, **kwargs)
            asked.append(call.arguments.pop("use_ema"))
            return read(*call.args, **call.kwargs)  # the file has no moving average

        return spy

    readers = ["read_weights"] if "--epochs" in argv else ["read_weights", "checkpoint_flags"]
    for name in readers:
        monkeypatch.setattr(module, name, spied(getattr(module, name)))
    call(module, "--path_to_data_dir", videos, "--output_dir", tmp_path, "--device", "cpu",
         "--use_ema", *argv, finetuned / "checkpoint-00001.pth")  # fmt: skip
    assert asked == [True] * len(readers)


def test_use_ema_without_weights_to_start_from_is_refused(capsys, videos):
    flags = ["--path_to_data_dir", videos, *FINETUNE, "--use_ema"]
    status, text = fails(capsys, main_finetune, *flags)
    assert status == 2
    assert "--use_ema needs --finetune, or --eval with --resume" in text


@pytest.mark.parametrize("curves", [False, True])
@pytest.mark.parametrize(
    ("module", "argv"), [(main_pretrain, [*PRETRAIN, "--vis_period", 1]), (main_finetune, FINETUNE)]
)
def test_without_an_output_folder_nothing_is_written(
    videos, tmp_path, monkeypatch, capsys, module, argv, curves
):
    """Neither here nor elsewhere; with --log_dir there are TensorBoard's files."""
    monkeypatch.chdir(tmp_path)
    log_dir = ["--log_dir", "curves"] if curves else []
    call(module, "--path_to_data_dir", videos, *argv, "--epochs", 2, "--output_dir", "", *log_dir,
         "--checkpoint_minutes", 1e-6)  # fmt: skip
    written = "--output_dir is empty: this run writes nothing"
    assert capsys.readouterr().out.count(written + " but TensorBoard's files" * curves) == 1
    names = {path.relative_to(tmp_path).parts[0] for path in tmp_path.rglob("*")}
    assert names == ({"curves"} if curves else set())


@pytest.mark.parametrize(
    ("folder", "expected"),
    [("out/%j", "out/17"), ("%j-%j/x", "17-17/x"), ("mask90%", "mask90%"), ("%", "%"),
     ("90%noise", "90%noise"), ("50%_a", "50%_a"), ("50%job", "50%job"), ("a%A0", "a%A0"),
     ("%A_%a", "%A"), ("x/%t", "%t"), ("%4j", "%4j"),
     ("%x-%j", "%x"), ("log-%N.d", "%N")],
)  # fmt: skip
@pytest.mark.parametrize("job_id", ["17", None])
def test_the_id_of_the_job_is_filled_in(tmp_path, monkeypatch, folder, expected, job_id):
    """The id stays the same when a job is requeued; no other placeholder is taken as a name."""
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    if job_id:
        monkeypatch.setenv("SLURM_JOB_ID", job_id)
    argv = ["--path_to_data_dir", "X", "--device", "cpu", "--output_dir", f"{tmp_path}/{folder}"]
    args = main_pretrain.parse_args([*argv, "--log_dir", f"{tmp_path}/{folder}"])
    refused = expected.startswith("%") and expected != "%"
    if refused or (expected != folder and not job_id):
        with pytest.raises(
            UserError, match=f"--output_dir .* {expected if refused else '%j'}: only"
        ):
            run.start(args)
        assert os.listdir(tmp_path) == []
        return
    with run.ending("main_pretrain.py"):
        run.start(args)
    assert args.output_dir == args.log_dir == f"{tmp_path}/{expected}"
    assert os.path.isdir(args.output_dir)


# --- kills and resumes --------------------------------------------------------------------------


def wait_for(path: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.slow  # test_kills.py has a fast one, with signals
def test_killed_run_resumes_to_the_same_weights(videos, tmp_path):
    """After SIGKILL in the second epoch, the same command gives the uninterrupted run, bitwise."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    argv = ["--path_to_data_dir", videos, "--epochs", 3, *PRETRAIN, "--output_dir"]
    finish(spawn("main_pretrain.py", *argv, whole))
    process = spawn("main_pretrain.py", *argv, parts)
    wait_for(parts / "checkpoint-00000.pth", process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (parts / "checkpoint-00002.pth").exists()
    out = finish(spawn("main_pretrain.py", *argv, parts))
    assert "resumed from" in out
    assert_same_weights(parts / "checkpoint-00002.pth", whole / "checkpoint-00002.pth")
    assert (parts / "log.txt").read_text() == (whole / "log.txt").read_text()


def test_finished_run_does_nothing_more(videos, pretrained, capsys):
    before = (pretrained / "checkpoint-00002.pth").stat().st_mtime_ns
    call(main_pretrain, "--path_to_data_dir", videos, "--output_dir", pretrained, "--epochs", 3,
         *PRETRAIN)  # fmt: skip
    assert "Epoch [" not in capsys.readouterr().out
    assert (pretrained / "checkpoint-00002.pth").stat().st_mtime_ns == before


# --- ranks --------------------------------------------------------------------------------------


# Each rank runs command lines one after the other, each as a script's __main__. Their groups meet
# at different ports, and not in torchrun's store, which keeps the addresses of the group before.
COMMANDS = """
import json, os, runpy, sys
os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"
for port, argv in json.loads(sys.argv[1]):
    os.environ["MASTER_PORT"], sys.argv = str(port), argv
    print("command:", *argv, flush=True)
    runpy.run_path(argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def two_ranks(videos, pretrained, finetuned, tmp_path_factory) -> tuple[Path, int, str]:
    """Train, test and fail in two gloo ranks of one torchrun; return folder, status and output.

    Its folders are pretrain, finetune, test, and nan, whose checkpoint has a NaN in its weights.
    """
    folder = tmp_path_factory.mktemp("ranks")
    rows = "".join(f"{videos}/v{i}.mp4 {i % 3}\n" for i in range(5))  # odd: one rank has more
    for split in ("train", "val", "test"):
        (folder / f"{split}.csv").write_text(rows)
    checkpoint = torch.load(pretrained / "checkpoint-00000.pth", weights_only=True)
    checkpoint["model"]["decoder_pred.bias"][0] = float("nan")
    (folder / "nan").mkdir()
    torch.save(checkpoint, folder / "nan.pth")
    shutil.copy(folder / "nan.pth", folder / "nan/checkpoint-00000.pth")
    commands = [
        ["main_pretrain.py", "pretrain", "--path_to_data_dir", videos, *PRETRAIN, "--epochs", 1,
         "--batch_size", 1, "--accum_iter", 3, "--vis_period", 1],
        ["main_finetune.py", "finetune", "--path_to_data_dir", folder, *FINETUNE, "--epochs", 1,
         "--finetune", pretrained / "checkpoint-00000.pth"],
        ["main_test.py", "test", "--path_to_data_dir", folder, *VIEWS,
         "--finetune", finetuned / "checkpoint-00001.pth"],
        ["main_pretrain.py", "nan", "--path_to_data_dir", videos, *PRETRAIN, "--epochs", 3,
         "--batch_size", 1],
    ]  # fmt: skip
    lines = [
        (free_port(), [str(ROOT / script), "--output_dir", str(folder / name), *map(str, flags)])
        for script, name, *flags in commands
    ]
    (folder / "commands.py").write_text(COMMANDS)
    process = spawn(folder / "commands.py", simplejson.dumps(lines), ranks=2)
    out, _ = process.communicate(timeout=240)
    return folder, process.returncode, out


def test_two_ranks_pretrain(two_ranks):
    """One log, joint batches; only the main rank makes pictures."""
    folder, _, out = two_ranks
    assert "2 process(es)" in out, out
    assert "clips per update: 6 x 2 = 12" in out
    assert (folder / "pretrain/log.txt").read_text().count("\n") == 1
    assert torch.load(folder / "pretrain/checkpoint-00000.pth", weights_only=True)["step"] == 1
    assert len(list((folder / "pretrain/tensorboard").iterdir())) == 1


def test_two_ranks_finetune(two_ranks):
    """Confusions are added over ranks."""
    folder, _, out = two_ranks
    record = simplejson.loads((folder / "finetune/log.txt").read_text())
    events = EventAccumulator(str(folder / "finetune/tensorboard")).Reload()
    text = events.Tensors("val/worst_classes/text_summary")[0].tensor_proto.string_val[0].decode()
    table = [line.strip("| ").split(" | ") for line in text.splitlines()[2:]]
    assert {row[0]: int(row[1]) for row in table} == {"0": 2, "1": 2, "2": 1}, out
    right = sum(int(row[1]) * float(row[2]) for row in table) / 5
    assert record["val_acc1"] == pytest.approx(right) and record["val_bad"] == 0


def test_two_ranks_test_every_video_once(two_ranks, finetuned, tmp_path):
    folder, _, out = two_ranks
    call(main_test, "--path_to_data_dir", folder, "--output_dir", tmp_path, *VIEWS,
         "--finetune", finetuned / "checkpoint-00001.pth")  # fmt: skip
    one, two = (np.load(path / "scores.npz")["scores"] for path in (tmp_path, folder / "test"))
    assert one.shape == (5, 3), out
    np.testing.assert_allclose(two, one, rtol=0, atol=1e-6)  # the last bit may differ, see spawn


def test_non_finite_loss_stops_every_rank(two_ranks):
    """A NaN weight makes the loss NaN; both ranks name the step, the files and the checkpoint."""
    folder, status, out = two_ranks
    assert status == 1, out
    assert out.count("epoch 1: the loss or gradient of step 0 is not finite") == 2, out
    assert f"last good checkpoint: {folder}/nan/checkpoint-00000.pth" in out
    told = out[out.index("is not finite") :]
    assert sum(f"v{i}.mp4" in told for i in range(6)) == 2  # the joint batch
    (checkpoint,) = (folder / "nan").glob("checkpoint*")
    assert checkpoint.read_bytes() == (folder / "nan.pth").read_bytes()


# --- bad input ----------------------------------------------------------------------------------


def fails(capsys, module, *argv: object) -> tuple[int, str]:
    """Run a script that must end with one sentence on stderr; return status and sentence."""
    with pytest.raises(SystemExit) as caught:
        call(module, *argv)
    lines = capsys.readouterr().err.strip().splitlines()
    return caught.value.code, lines[-1]


@pytest.mark.parametrize(
    ("module", "flags"), [(main_pretrain, PRETRAIN), (main_finetune, FINETUNE)]
)
def test_missing_csv(capsys, tmp_path, module, flags):
    status, text = fails(capsys, module, "--path_to_data_dir", tmp_path / "no", *flags,
                         "--output_dir", tmp_path)  # fmt: skip
    assert status == 2
    assert f"cannot open {tmp_path}/no/train.csv" in text


def pretrain_fails(capsys, videos, tmp_path, *argv: object) -> tuple[int, str]:
    common = ["--path_to_data_dir", videos, "--output_dir", tmp_path]
    return fails(capsys, main_pretrain, *common, *PRETRAIN, *argv)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--model", "mae_vit_enormous"], ["--model", "mae_vit_enormous"]),
        (["--device", "cuda:99"], ["cuda:99"] if not torch.cuda.is_available() else ["99"]),
        (["--device", "abacus"], ["abacus", "cpu"]),
        (["--no-norm_pix_loss", "--target", "channel"], ["--no-norm_pix_loss", "--target channel"]),
        (["--target", "patches"], ["--target", "patches"]),
        (["--crop", "center", "--jitter_scales_relative", "0.08", "1"],
         ["--jitter_scales_relative has no effect with --crop center"]),
        (["--crop", "center", "--jitter_aspect_relative", "1", "1"],
         ["--jitter_aspect_relative has no effect with --crop center"]),
        (["--use_ema"], ["--use_ema needs --finetune"]),
        (["--num_frames", "5"], ["num_frames = 5", "t_patch_size = 2"]),
        (["--input_size", "36"], ["img_size = 36", "patch_size = 8"]),
        (["--pred_t_dim", "3"], ["pred_t_dim", "num_frames"]),
        (["--decoder_num_heads", "3"], ["num_heads = 3"]),
        (["--mask_ratio", "0"], ["mask_ratio", "32 of 32"]),
        (["--mask_ratio", "0.99"], ["mask_ratio", "0 of 32"]),
        (["--mask_ratio_end", "0.99"], ["--mask_ratio_end 0.99: ", "0 of 32", "0.968"]),
        (["--mask_type", "time"], ["mask_ratio = 0.9", "mask_type = 'time' is 0.5"]),
        (["--mask_type", "cube"], ["--mask_type", "cube"]),
        (["--resume", "/nowhere.pth"], ["/nowhere.pth"]),
        (["--batch_size", "7"], ["6 videos", "--batch_size 7"]),
        (["--batch_size", "0"], ["--batch_size", "0"]),
        (["--epochs", "many"], ["--epochs", "many"]),
        (["--learning_rate", "1"], ["--learning_rate"]),
    ],
)  # fmt: skip
def test_bad_flags_end_in_one_sentence(capsys, videos, tmp_path, argv, words):
    status, text = pretrain_fails(capsys, videos, tmp_path, *argv)
    assert status == 2
    for word in words:
        assert word in text


def test_resume_from_another_model(capsys, videos, tmp_path, pretrained):
    status, text = pretrain_fails(capsys, videos, tmp_path, "--decoder_embed_dim", "64",
                                  "--resume", pretrained / "checkpoint-00000.pth")  # fmt: skip
    assert status == 2
    assert "does not fit the model" in text
    assert "decoder_cls_token" in text


def test_finetune_from_other_weights_in_the_folder_of_a_run(capsys, videos, finetuned):
    """Otherwise the run in the folder would resume and look like one from the other weights."""
    common = ["--path_to_data_dir", videos, "--output_dir", finetuned, *FINETUNE]
    status, text = fails(capsys, main_finetune, *common, "--finetune", "k600/vit_large")
    assert status == 2
    assert "was started from --finetune" in text and "not from k600/vit_large" in text


def test_finetune_from_another_shape_and_from_rubbish(capsys, videos, tmp_path, pretrained):
    common = ["--path_to_data_dir", videos, "--output_dir", tmp_path, *FINETUNE, "--finetune"]
    status, text = fails(capsys, main_finetune, *common, pretrained / "checkpoint-00000.pth",
                         "--model", "vit_small_patch16")  # fmt: skip
    assert status == 2
    assert "cls_token is [1, 1, 128] in the file and [1, 1, 384] here" in text
    rubbish = tmp_path / "rubbish.pth"
    rubbish.write_text("<html>404</html>")
    status, text = fails(capsys, main_finetune, *common, rubbish)
    assert status == 2
    assert str(rubbish) in text


def test_results_that_cannot_be_written_are_printed_at_least(capsys, videos, finetuned, tmp_path):
    (tmp_path / "predictions.csv").mkdir()
    with pytest.raises(SystemExit) as end:
        call(main_test, "--path_to_data_dir", videos, "--output_dir", tmp_path, *VIEWS,
             "--finetune", finetuned / "checkpoint-00001.pth")  # fmt: skip
    out, err = capsys.readouterr()
    assert end.value.code == 1
    assert re.search(r"top-1 [\d.]+ %", out)
    assert "error: [Errno 21] Is a directory" in err and err.count("\n") == 1


def test_an_epoch_without_an_update_is_refused(capsys, videos, tmp_path):
    status, text = pretrain_fails(capsys, videos, tmp_path, "--accum_iter", "4")
    assert status == 2
    assert "an epoch has 3 steps, too few for an update every --accum_iter 4 steps" in text


@pytest.mark.parametrize(
    ("module", "rates", "peak"),
    [
        (main_pretrain, ["--blr", "1e-4", "--min_lr", "1e-5"], "7.81e-07"),
        (main_pretrain, ["--lr", "0"], "0"),
        (main_finetune, ["--lr", "2e-6", "--min_lr", "1e-5"], "2e-06"),
    ],
)  # fmt: skip
def test_a_rate_that_would_rise_to_the_end_is_refused(capsys, videos, module, rates, peak):
    argv = ["--path_to_data_dir", videos, *(FINETUNE if module is main_finetune else PRETRAIN)]
    argv += ["--epochs", "2", *rates, "--dry_run"]
    status, text = fails(capsys, module, *argv)
    assert status == 2
    smallest = rates[rates.index("--min_lr") + 1] if "--min_lr" in rates else "1e-06"
    assert f"the peak learning rate {peak} must be" in text
    assert f"--min_lr {float(smallest):g}" in text


def test_a_constant_rate_is_allowed(videos):
    call(main_pretrain, "--path_to_data_dir", videos, *PRETRAIN, "--lr", "0", "--min_lr", "0",
         "--dry_run")  # fmt: skip


def test_main_test_without_checkpoint(capsys, videos):
    status, text = fails(capsys, main_test, "--path_to_data_dir", videos)
    assert status == 2
    assert "--finetune" in text


def test_full_disk_leaves_old_checkpoints_and_ends_with_status_1(
    videos, pretrained, tmp_path, capsys
):
    """A limit on file size replaces a full disk: with both, a write fails half-way."""
    full = (pretrained / "checkpoint-00000.pth").stat().st_size // 2
    argv = ["--path_to_data_dir", videos, "--output_dir", tmp_path, "--epochs", 2, *PRETRAIN]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (full, before[1]))
    try:
        with pytest.raises(SystemExit) as end:
            call(main_pretrain, *argv)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    out, err = capsys.readouterr()
    assert end.value.code == 1
    assert "error: the run's last checkpoint is lost: could not save" in err
    assert out.count("WARNING: could not save") == 2
    assert [p.name for p in tmp_path.glob("checkpoint*")] == []
    assert (tmp_path / "log.txt").read_text().count("\n") == 2


def test_help_names_every_flag(capsys):
    for module in (main_pretrain, main_finetune, main_test):
        with pytest.raises(SystemExit) as caught:
            module.parse_args(["--help"])
        assert caught.value.code == 0
        text = capsys.readouterr().out
        names = [f"--{action.dest}" for action in module.get_args_parser()._actions]
        assert len(names) > 20 and all(name in text for name in names)


def flags_of(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Return all flags and words of a parser and of its commands."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from flags_of(command)
        else:
            yield action


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_flag_of_every_script_has_a_help_text(path, monkeypatch):
    class Parsed(Exception):
        pass

    def stop(parser, *_, **__):
        raise Parsed(parser)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    monkeypatch.setattr(sys, "argv", [str(path), "--finetune", "x"])
    with pytest.raises(Parsed) as caught:
        runpy.run_path(str(path), run_name="__main__")
    flags = list(flags_of(caught.value.args[0]))
    assert len(flags) > 1
    assert [flag.option_strings or flag.dest for flag in flags if not flag.help] == []


@pytest.mark.parametrize(
    "flags",
    [
        "--seed -1", "--clip_grad -1", "--weight_decay -0.1", "--dropout 1.5", "--keep_last -1",
        "--jitter_scales_relative 0.2 0.1", "--jitter_aspect_relative 0 1", "--warmup_epochs nan",
        "--remode const", "--recount 3", "--mixup_mode elem", "--cutmix_minmax 0.8 0.2",
        "--beta 0.9 1.0", "--beta nan 0.9", "--mask_ratio nan", "--mask_ratio 1", "--mask_ratio -1",
        "--jitter_scales_relative 0 1", "--jitter_aspect_relative inf inf", "--lr 1e300",
        "--dist_timeout 1e300", "--item_timeout 1e300", "--layer_decay 1e300", "--seed 2**70",
        f"--seed {2**70}", "--num_workers 100000", "--input_size 1000000", "--num_frames 10000000",
        "--repeat_aug 1000000", "--sampling_rate 1000000", "--time 0", "--mem_gb nan", "--nodes -1",
        "--ngpus -1", "--signal_delay_s 70000", "--tasks_per_node 0", "--cpus_per_task 0",
    ],
)  # fmt: skip
def test_values_out_of_range_are_refused_where_they_are_given(flags, capsys):
    with pytest.raises(SystemExit) as caught:
        submitit_finetune.parse_args(flags.split())
    assert caught.value.code == 2
    assert f"argument {flags.split()[0]}" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    "flags",
    ["--decoder_embed_dim 0", "--decoder_depth -1", "--decoder_num_heads 0", "--pred_t_dim 0",
     "--mask_ratio nan", "--mask_ratio 1.5", "--decoder_mask_ratio nan", "--decoder_mask_ratio 1",
     "--mask_ratio_end nan", "--mask_ratio_end 1",
     "--color_jitter 1.5", "--color_jitter -0.1"],
)  # fmt: skip
def test_values_of_the_autoencoder_are_refused_where_they_are_given(flags, capsys):
    with pytest.raises(SystemExit) as caught:
        main_pretrain.parse_args(flags.split())
    assert caught.value.code == 2
    assert f"argument {flags.split()[0]}" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("module", [main_pretrain, main_finetune, main_test])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "-1", "1e999", "many", ""])
def test_no_number_is_below_zero_infinite_or_none(module, value, capsys):
    parser = module.get_args_parser()
    slurm.add_slurm_args(parser)
    numbers = [action for action in parser._actions if action.type]
    assert len(numbers) > 15
    for action in numbers:
        with pytest.raises(SystemExit) as caught:
            count = action.nargs or 1
            parser.parse_args([f"{action.option_strings[0]}={value}"] if count == 1
                              else [action.option_strings[0], *["1", value][:count]])  # fmt: skip
        assert caught.value.code == 2
        assert f"argument {action.option_strings[0]}" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("policy", ["randx", "rand-n1" + "0" * 400, "rand-m99999", "rand-mstdnan"])
def test_a_policy_is_refused_before_a_job_is_queued(capsys, videos, policy):
    status, text = fails(capsys, main_finetune, "--path_to_data_dir", videos, "--aa", policy)
    assert status == 2
    assert "RandAugment config" in text


def test_erasing_is_a_part_of_randaugment():
    flags = ["--path_to_data_dir", "X"]
    assert main_finetune.parse_args(flags).reprob == 0.25
    assert main_finetune.parse_args([*flags, "--no-rand_aug"]).reprob == 0


# --- the reference's command lines --------------------------------------------------------------


REFERENCE = golden.table("cli_defaults.json")


@pytest.mark.parametrize(
    ("script", "name"),
    [(main_pretrain, "pretrain"), (main_finetune, "finetune"), (main_test, "test")],
)
def test_every_flag_of_the_reference_is_known(script, name, tmp_path):
    model = VisionTransformer(img_size=16, embed_dim=64, depth=1, num_heads=1, num_frames=4)
    path = tmp_path / "vit.pth"
    torch.save({"model": model.state_dict(), "arguments": model.arguments}, path)
    others = {"no_pin_mem": False, "cls_token": False}  # these set pin_mem and global_pool
    for flag, default in (REFERENCE[name] | others).items():
        values = default if isinstance(default, list) else [default]
        if isinstance(default, bool):
            values = []
        elif default in (None, ""):
            values = {"beta": [0.9, 0.95], "cutmix_minmax": [0.2, 0.8]}.get(flag, ["1"])
        if flag in ("finetune", "resume"):
            continue
        values = {"mixup_mode": ["batch"], "remode": ["pixel"]}.get(flag, values)
        given = ["--path_to_data_dir", "X", "--finetune", path, f"--{flag}", *values]
        if name == "pretrain":
            given[2:4] = []
        script.parse_args(list(map(str, given)))


def test_documented_command_lines_of_the_reference_parse(capsys):
    args = main_pretrain.parse_args(REFERENCE["PRETRAIN_md_argv"])
    assert args.notice == "no longer needed, ignored: --distributed --no_env --pin_mem"
    assert (args.epochs, args.warmup_epochs, args.norm_pix_loss) == (100, 5, True)
    args = main_finetune.parse_args(["--path_to_data_dir", "X", *REFERENCE["FINETUNE_md_argv"]])
    assert (args.precision, args.layer_decay, args.clip_grad) == ("fp32", 0.75, 5.0)
    assert "--dist_eval" in args.notice


def test_color_jitter_is_a_flag_of_pretraining_and_ignored_elsewhere(monkeypatch):
    argv = ["--path_to_data_dir", "X", "--color_jitter", "0.4"]
    args = main_pretrain.parse_args(argv)
    assert (args.color_jitter, args.notice) == (0.4, "")
    monkeypatch.setattr(main_test, "checkpoint_flags", lambda path, **_: [])
    for module in (main_finetune, main_test):
        args = module.parse_args([*argv, "--finetune", "x.pth"])
        assert args.notice == "no longer needed, ignored: --color_jitter"
        assert not hasattr(args, "color_jitter")


def test_defaults_are_the_recipe():
    """This is the paper's recipe for ViT-L on Kinetics-400; a change here changes that recipe."""
    args = main_pretrain.parse_args(["--path_to_data_dir", "X"])
    expected = {
        "model": "mae_vit_large_patch16", "input_size": 224, "num_frames": 16, "sampling_rate": 4,
        "t_patch_size": 2, "mask_ratio": 0.9, "mask_ratio_end": None, "mask_type": "random",
        "decoder_embed_dim": 512, "decoder_depth": 4,
        "decoder_num_heads": 16, "norm_pix_loss": True, "target": "patch", "pred_t_dim": 8,
        "blr": 1.6e-3, "beta": (0.9, 0.95), "weight_decay": 0.05, "clip_grad": 0.02,
        "jitter_scales_relative": (0.5, 1.0), "sep_pos_embed": True, "cls_embed": True,
        "repeat_aug": 4, "crop": "random", "color_jitter": 0.0, "finetune": "",
    }  # fmt: skip
    assert {k: getattr(args, k) for k in expected} == expected
    assert args.epochs * args.repeat_aug == 800
    assert args.warmup_epochs * args.repeat_aug == 120
    args = main_finetune.parse_args(["--path_to_data_dir", "X"])
    expected = {
        "model": "vit_large_patch16", "epochs": 50, "warmup_epochs": 5, "layer_decay": 0.75,
        "drop_path_rate": 0.2, "dropout": 0.3, "repeat_aug": 2, "beta": (0.9, 0.999),
        "clip_grad": 5.0, "mixup": 0.8, "cutmix": 1.0, "smoothing": 0.1, "reprob": 0.25,
        "aa": "rand-m7-mstd0.5-inc1", "rand_aug": True, "jitter_scales_relative": (0.08, 1.0),
        "min_lr": 1e-5, "blr": 2.4e-3, "num_classes": None, "pool": "mean", "use_ema": False,
    }  # fmt: skip
    assert {k: getattr(args, k) for k in expected} == expected
