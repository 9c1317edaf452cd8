"""Test util/checkpoint.py: saving, resuming, pruning, and the checkpoints that it refuses."""

import argparse
import contextlib
import json
import os
import re
import resource
import signal
import time
from pathlib import Path

import pytest
import torch

from models_mae import MaskedAutoencoderViT
from tests import golden
from util import file_io
from util.checkpoint import (
    Checkpoints,
    HostCopy,
    Progress,
    list_checkpoints,
    load_latest,
    newest_checkpoint,
    read_intact,
    superfluous,
)
from util.errors import UserError
from util.lr_sched import set_learning_rate
from util.meters import append_log, write_log
from util.optim import WeightAverage, make_optimizer, optim_step, param_groups_weight_decay
from util.signals import STOP_SIGNALS, signals_restored

CPU = torch.device("cpu")
LOADING = golden.table("ckpt_loading.json")
MAE = {"kwargs": LOADING["mae_kwargs"], "layernorm_eps": LOADING["layernorm_eps"]}
DATA = 1234  # the fingerprint of the videos


def flags(**overrides):
    defaults = {
        "model": "mae_tiny", "output_dir": "", "resume": "", "batch_size": 2, "accum_iter": 1,
        "epochs": 9, "seed": 0, "checkpoint_period": 1, "checkpoint_minutes": 0, "keep_last": 0,
        "keep_every": 0, "dist_timeout": 30, "beta": (0.9, 0.95), "lr": None,
    }  # fmt: skip
    return argparse.Namespace(**(defaults | overrides))


class Training:
    """A small autoencoder in training, with everything a checkpoint keeps."""

    def __init__(self, init, fingerprint=DATA, decoder=(), decay=0.0, **overrides):
        torch.manual_seed(init)
        self.args = flags(**overrides)
        self.model = golden.build(MaskedAutoencoderViT, MAE, **dict(decoder))
        groups = param_groups_weight_decay(self.model, 0.05)
        self.optimizer = make_optimizer(groups, (0.9, 0.95), CPU)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
        self.average = WeightAverage(self.model, decay, self.optimizer) if decay else None
        state = self.model, self.optimizer, self.scaler, fingerprint, (), self.average
        self.checkpoints = Checkpoints(self.args, *state)

    def train(self, *steps):
        for step in steps:
            torch.manual_seed(step)
            set_learning_rate(self.optimizer, 1e-3)
            loss = self.model(torch.randn(2, 3, 4, 32, 32), 0.75)[0]
            self.scaler.scale(loss).backward()
            optim_step(self.optimizer, self.scaler, list(self.model.parameters()), clip_grad=1.0)

    def save(self, folder, **progress):
        self.args.output_dir = str(folder)
        place = {"epoch": 4, "updates": 40} | progress
        self.checkpoints.progress = Progress(**place)
        self.checkpoints.save()
        self.checkpoints.wait()
        step = place.get("step", 0)
        name = f"{place['epoch']:05d}-{step:08d}" if step else f"{place['epoch'] - 1:05d}"
        return Path(folder) / f"checkpoint-{name}.pth"

    def resume(self, path):
        self.checkpoints.resume(str(path), read_intact(str(path)))
        return self.checkpoints.progress

    def state(self):
        """Return everything as one flat dict of tensors."""
        flat = dict(self.model.state_dict())
        for number, values in self.optimizer.state_dict()["state"].items():
            flat |= {f"{number}/{name}": value for name, value in values.items()}
        if self.average is not None:
            flat |= {f"average/{k}": v for k, v in self.average.module.state_dict().items()}
            flat["updates"] = torch.tensor(self.average.updates)
        return flat | {"scale": torch.tensor(self.scaler.get_scale())}


def assert_bitwise_equal(a, b):
    assert a.keys() == b.keys()
    assert [k for k in a if not torch.equal(a[k], b[k])] == []


def latest(args):
    """Return the path that a run with these flags resumes from."""
    found = load_latest(args)
    return found and found[0]


@pytest.fixture(scope="module")
def trained():
    training = Training(init=0)
    training.train(0, 1)
    return training


# --- saving and resuming


@pytest.mark.parametrize(("step", "decay"), [(0, 0.0), (7, 0.0), (7, 0.9)])
def test_resuming_continues_bit_for_bit(tmp_path, capsys, step, decay):
    uninterrupted = Training(init=0, decay=decay)
    uninterrupted.train(0, 1)
    line = {"epoch": 3, "train_loss": 0.1}
    place = {"step": step, "sums": {"loss": 0.3}, "counts": {"loss": 7}, "log": [line]}
    path = uninterrupted.save(tmp_path, **place, best_epoch=2)
    assert f"saved {path}" in capsys.readouterr().out
    uninterrupted.train(2, 3)

    (tmp_path / "log.txt").write_text("of after the checkpoint\n")
    resumed = Training(init=1, output_dir=str(tmp_path), decay=decay)
    progress = resumed.resume(newest_checkpoint(str(tmp_path)))
    assert progress == Progress(4, updates=40, best_epoch=2, **place)
    where = "epoch 4, step 7" if step else "epoch 4"
    assert f"resumed from {path}: going on at {where}\n" in capsys.readouterr().out
    assert json.loads((tmp_path / "log.txt").read_text()) == line
    resumed.train(2, 3)
    assert_bitwise_equal(resumed.state(), uninterrupted.state())
    assert resumed.scaler.state_dict() == uninterrupted.scaler.state_dict()


def test_checkpoint_is_of_the_moment_of_save_though_training_goes_on(tmp_path, monkeypatch):
    training = Training(init=0)
    training.train(0)
    then = {k: v.clone() for k, v in training.state().items()}
    write = file_io.write_atomically

    def slow_write(path, writer):
        training.train(1)  # in the writing thread, so between copy and write
        write(path, writer)

    monkeypatch.setattr("util.checkpoint.write_atomically", slow_write)
    path = training.save(tmp_path)
    resumed = Training(init=1)
    resumed.resume(path)
    assert_bitwise_equal(resumed.state(), then)


def test_a_step_waits_for_the_copy_that_is_under_way(tmp_path, monkeypatch):
    training = Training(init=0, output_dir=str(tmp_path), decay=0.9)
    training.train(0)
    then = {k: v.clone() for k, v in training.state().items()}
    copy = HostCopy._copy

    def slow_copy(self, state):
        time.sleep(0.3)
        return copy(self, state)

    monkeypatch.setattr(HostCopy, "_copy", slow_copy)
    training.checkpoints.progress = Progress(4)
    began = time.monotonic()
    training.checkpoints.save()
    assert time.monotonic() - began < 0.2  # the caller does not wait
    training.train(1)
    training.checkpoints.wait()
    resumed = Training(init=1, decay=0.9)
    resumed.resume(newest_checkpoint(str(tmp_path)))
    assert_bitwise_equal(resumed.state(), then)


def test_a_moving_average_that_begins_or_ends_when_a_run_is_resumed(tmp_path, capsys):
    without = Training(init=0, model_ema=0.0)
    without.train(0)
    begun = Training(init=1, decay=0.9, model_ema=0.9)
    begun.resume(without.save(tmp_path))
    out = capsys.readouterr().out
    assert "--model_ema 0.0 -> 0.9\n" in out
    assert "the moving average of the weights begins with these weights\n" in out
    weights = without.model.state_dict()
    assert_bitwise_equal(begun.average.module.state_dict(), weights)
    begun.train(1, 2)
    ended = Training(init=1, model_ema=0.0)
    ended.resume(begun.save(tmp_path))
    out = capsys.readouterr().out
    assert "--model_ema 0.9 -> 0.0\n" in out
    assert "the moving average of the weights is dropped\n" in out
    assert_bitwise_equal(ended.model.state_dict(), begun.model.state_dict())


def test_checkpoint_has_the_keys_of_the_family_and_plain_flags(tmp_path, trained):
    checkpoint = torch.load(trained.save(tmp_path), weights_only=True)  # no allowed classes at all
    assert {"args", "epoch", "model", "optimizer", "scaler", "step"} <= set(checkpoint)
    assert (checkpoint["epoch"], checkpoint["step"]) == (3, 40)
    assert checkpoint["args"] == vars(trained.args)
    assert list(checkpoint["model"]) == list(trained.model.state_dict())


def test_resuming_reads_the_reference_training_files(tmp_path, trained):
    """Its args are an argparse.Namespace; it counts no steps and may hold no scaler state."""
    checkpoint = {
        "model": trained.model.state_dict(),
        "optimizer": trained.optimizer.state_dict(),
        "epoch": 7,
        "scaler": {},
        "args": argparse.Namespace(model="mae_tiny", lr=1e-3),
    }
    for group in checkpoint["optimizer"]["param_groups"]:
        group["fused"] = None  # their optimiser has no such option
    torch.save(checkpoint, tmp_path / "checkpoint-00007.pth")
    resumed = Training(init=1)
    assert resumed.resume(tmp_path / "checkpoint-00007.pth") == Progress(epoch=8)
    own = trained.state()
    assert_bitwise_equal(resumed.state(), own | {"scale": torch.tensor(2.0**10)})
    resumed.train(2)


def refused(path, other, match):
    """Check that a training refuses a checkpoint and is left as it was."""
    before = {k: v.clone() for k, v in other.state().items()}
    with pytest.raises(UserError, match=match):
        other.resume(path)
    assert_bitwise_equal(other.state(), before)


def test_resuming_another_model_is_refused(tmp_path, trained):
    other = Training(init=1, model="mae_small")
    refused(trained.save(tmp_path), other, "of --model mae_tiny, not mae_small")


def test_resuming_another_size_is_refused(tmp_path, trained):
    path = trained.save(tmp_path)
    other = Training(init=1, decoder={"decoder_embed_dim": 16})
    with pytest.raises(UserError, match=r"00003\.pth does not fit the model; .*decoder_cls_token"):
        other.resume(path)


def test_resuming_another_optimizer_is_refused(tmp_path, trained):
    path = trained.save(tmp_path)
    other = Training(init=1)
    optimizer = make_optimizer([{"params": other.model.parameters()}], (0.9, 0.95), CPU)
    other.checkpoints.optimizer = optimizer
    with pytest.raises(UserError, match=r"00003\.pth does not fit the model.*parameter group"):
        other.resume(path)


@pytest.mark.parametrize("key", ["model", "optimizer", "epoch"])
def test_resuming_weights_alone_is_refused(tmp_path, trained, key):
    checkpoint = torch.load(trained.save(tmp_path))
    del checkpoint[key]
    torch.save(checkpoint, tmp_path / "weights.pth")
    with pytest.raises(UserError, match=rf"weights\.pth .*no '{key}'.*--finetune"):
        Training(init=1).resume(tmp_path / "weights.pth")


def test_resuming_on_other_videos_is_refused(tmp_path, trained):
    other = Training(init=1, fingerprint=DATA + 1)
    refused(trained.save(tmp_path), other, "trained on other videos than train.csv lists now")


@pytest.mark.parametrize("change", [{"batch_size": 4}, {"accum_iter": 2}, {"seed": 1}])
def test_another_batch_goes_on_at_the_end_of_an_epoch_alone(tmp_path, trained, change):
    match = r"within an epoch of 2 videos.*--accum_iter 1 and --seed 0; now they are \d, \d and"
    refused(trained.save(tmp_path, step=3), Training(init=1, **change), match)
    assert Training(init=1, **change).resume(trained.save(tmp_path)).epoch == 4


def test_paths_may_be_relative(tmp_path, monkeypatch, trained):
    monkeypatch.chdir(tmp_path)
    trained.save(Path("output"))
    assert newest_checkpoint("output") == "output/checkpoint-00003.pth"
    assert Training(init=1).resume("output/checkpoint-00003.pth") == Progress(4, updates=40)


# --- which checkpoint


def test_newest_checkpoint(tmp_path):
    assert newest_checkpoint("") is None
    assert newest_checkpoint(str(tmp_path / "missing")) is None
    assert newest_checkpoint(str(tmp_path)) is None
    names = ["checkpoint-00009.pth", "checkpoint-00010.pth", "checkpoint-00002.pth"]
    names += ["checkpoint-00010-00000900.pth"]  # in that epoch, not after it
    others = ["checkpoint-00011.pth.tmp77", "checkpoint-best.pth", "old-checkpoint-00099.pth"]
    for name in names + others:
        (tmp_path / name).write_bytes(b"")
    assert newest_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-00010.pth")
    (tmp_path / "checkpoint-00011-00000001.pth").write_bytes(b"")
    assert newest_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-00011-00000001.pth")
    for name in ("checkpoint-99999.pth", "checkpoint-100000.pth"):
        (tmp_path / name).write_bytes(b"")
    assert newest_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-100000.pth")


def flip_byte_of_a_weight(path):
    """Change one bit that only the checksum can detect."""
    data = bytearray(path.read_bytes())
    weight = torch.load(path)["model"]["mask_token"].numpy().tobytes()
    data[data.index(weight)] ^= 1
    path.write_bytes(bytes(data))


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [flip_byte_of_a_weight, truncate, empty])
def test_a_damaged_newest_is_reported_and_the_one_before_it_taken(
    tmp_path, trained, capsys, damage
):
    older, newest = trained.save(tmp_path, epoch=4), trained.save(tmp_path, epoch=5, step=3)
    args = flags(output_dir=str(tmp_path))
    assert latest(args) == str(newest)
    damage(newest)
    assert latest(args) == str(older)
    assert f"WARNING: {newest} is damaged" in capsys.readouterr().out
    with pytest.raises(UserError, match="is damaged"):
        Training(init=1).resume(newest)
    damage(older)
    assert latest(args) is None


def bytes_read():
    """Return the bytes that this process has asked the system to read so far."""
    return int(re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())[1])


@pytest.mark.skipif(not os.path.exists("/proc/self/io"), reason="needs Linux's /proc")
@pytest.mark.parametrize("main, times", [(True, 1.0), (False, 0.0)])
def test_resuming_reads_the_newest_file_once(tmp_path, trained, monkeypatch, main, times):
    """The main rank checks every byte of the file; the others map it into memory."""
    trained.save(tmp_path, epoch=3)
    newest = str(trained.save(tmp_path, epoch=4))
    resumed = Training(init=1, output_dir=str(tmp_path))
    monkeypatch.setattr("util.checkpoint.is_main", lambda: main)
    monkeypatch.setattr("util.checkpoint.broadcast_object", lambda _: (newest, ""))
    before = bytes_read()
    resumed.checkpoints.resume(*load_latest(resumed.args))
    read = (bytes_read() - before) / os.path.getsize(newest)
    assert times <= read < times + 0.35
    assert_bitwise_equal(resumed.state(), trained.state())


def test_a_resumed_run_does_not_depend_on_its_file(tmp_path, trained):
    """The file is mapped into memory; what training goes on with must be copies."""
    path = trained.save(tmp_path)
    resumed = Training(init=1)
    resumed.resume(path)
    with open(path, "r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert_bitwise_equal(resumed.state(), trained.state())


def test_an_empty_file_is_not_taken_for_none(tmp_path):
    """Else the run would start anew and overwrite it."""
    path = tmp_path / "checkpoint-00000.pth"
    torch.save({}, path)
    found = load_latest(flags(output_dir=str(tmp_path)))
    assert found == (str(path), {})
    with pytest.raises(UserError, match="is not a training checkpoint"):
        Training(init=1).checkpoints.resume(*found)


def test_resume_flag_gives_way_to_what_the_same_command_saved_since(tmp_path, trained):
    start = str(trained.save(tmp_path, epoch=4))
    trained.save(tmp_path, epoch=8)  # by an earlier command, without --resume
    args = flags(output_dir=str(tmp_path), resume=start)
    assert latest(args) == start
    again = Training(init=0, resume=start)
    own = again.save(tmp_path, epoch=5)
    assert latest(args) == str(own)


@pytest.mark.parametrize(
    "then, now, told",
    [
        ({"norm_pix_loss": True}, {"norm_pix_loss": True, "target": "patch"}, ""),
        ({"norm_pix_loss": False}, {"norm_pix_loss": False, "target": "pixels"}, ""),
        ({"norm_pix_loss": True}, {"target": "channel"}, "--target patch -> channel"),
        ({}, {"pool": "mean"}, ""),
        ({}, {"pool": "cls"}, "--pool mean -> cls"),
        ({}, {"mask_type": "random", "mask_ratio_end": None}, ""),
        ({}, {"mask_type": "tube"}, "--mask_type random -> tube"),
        ({}, {"mask_ratio_end": 0.95}, "--mask_ratio_end None -> 0.95"),
        ({}, {"crop": "random", "color_jitter": 0.0, "finetune": "", "use_ema": False}, ""),
        ({}, {"crop": "center"}, "--crop random -> center"),
        ({}, {"color_jitter": 0.4}, "--color_jitter 0.0 -> 0.4"),
        ({}, {"freeze": 0, "model_ema": 0.0}, ""),
        ({}, {"freeze": 2, "model_ema": 0.9}, "--freeze 0 -> 2, --model_ema 0.0 -> 0.9"),
        ({}, {"finetune": "a.pth", "resume": "b.pth"}, "--finetune  -> a.pth"),  # else refused
    ],
)
def test_flags_that_older_runs_lack(tmp_path, capsys, then, now, told):
    older = Training(init=0, **then)
    older.train(1)
    path = older.save(tmp_path)
    Training(init=1, **now).resume(path)
    out = capsys.readouterr().out
    assert told in out and ("WARNING" in out) == bool(told)


def test_flags_that_changed_are_told(tmp_path, trained, capsys):
    path = trained.save(tmp_path)
    again = Training(init=1, accum_iter=2, keep_last=3)
    capsys.readouterr()
    again.resume(path)
    out = capsys.readouterr().out
    assert f"WARNING: some flags differ from those of {path}: --accum_iter 1 -> 2\n" in out
    finished = Training(init=1, epochs=4)
    finished.resume(path)
    assert "all 4 epochs are done; to train longer raise --epochs" in capsys.readouterr().out


# --- pruning


def names(*numbers):
    return [f"x/checkpoint-{n}.pth" for n in numbers]


def test_superfluous_checkpoints():
    epochs = ["00000", "00001", "00002", "00003"]
    paths = names(*epochs)
    assert superfluous(paths, paths[-1], 0, 0, None) == []
    assert superfluous(paths, paths[-1], 1, 0, None) == paths[:3]
    assert superfluous(paths, paths[-1], 2, 0, None) == paths[:2]
    assert superfluous(paths, paths[-1], 1, 0, 1) == [paths[0], paths[2]]  # the best one stays
    assert superfluous(paths, paths[-1], 1, 2, None) == [paths[0], paths[2]]  # epochs 2, 4, ...
    assert superfluous(paths, paths[2], 1, 0, None) == paths[:2]  # later ones stay
    middle = names("00003", "00004-00000010", "00004-00000020", "00004-00000030")
    assert superfluous(middle, middle[-1], 1, 0, None) == middle[1:2]
    assert superfluous(middle, middle[-2], 0, 0, None) == []
    ended = [*middle[-2:], *names("00004")]
    assert superfluous(ended, ended[-1], 0, 0, None) == ended[:1]
    # the end of an epoch makes all others of it superfluous: if another end stays, or at the last
    before = [*middle, *names("00004")]
    for keep_last in (0, 2):
        assert superfluous(before, before[-1], keep_last, 0, None) == middle[1:]
    assert superfluous(before, before[-1], 1, 0, None) == middle[:3]
    assert superfluous(before, before[-1], 1, 0, 3) == middle[1:]
    assert superfluous(before, before[-1], 1, 0, None, True) == middle
    assert superfluous(ended, ended[-1], 0, 0, None, True) == ended[:2]
    assert superfluous(middle, middle[-1], 0, 0, None, True) == middle[1:2]  # after a signal
    assert superfluous(paths[:3], paths[3], 1, 0, None) == paths[:3]  # not listed yet


def test_the_best_epoch_is_saved_between_periods(tmp_path):
    training = Training(
        init=0, output_dir=str(tmp_path), checkpoint_period=5, keep_last=1, epochs=10
    )
    training.train(0)
    for epoch in range(10):
        record = {"epoch": epoch, "val_acc1": {1: 30.0, 6: 40.0}.get(epoch, 20.0 - epoch)}
        training.checkpoints.finish_epoch(record, steps=3, metric="val_acc1")
    training.checkpoints.wait()
    left = [os.path.basename(path) for path in list_checkpoints(str(tmp_path))]
    assert left == ["checkpoint-00006.pth", "checkpoint-00009.pth"]


def test_keep_last_and_every_and_best_in_a_run(tmp_path):
    training = Training(init=0, output_dir=str(tmp_path), keep_last=2, keep_every=4, epochs=10)
    training.train(0)
    for epoch in range(10):
        record = {"epoch": epoch, "val_acc1": 40.0 if epoch == 4 else 20.0}
        training.checkpoints.finish_epoch(record, steps=3, metric="val_acc1")
        if epoch == 6:  # as after a kill: the best epoch must come from the checkpoint
            resumed = Training(init=0, **vars(training.args))
            training.checkpoints.wait()
            resumed.resume(newest_checkpoint(str(tmp_path)))
            training = resumed
    training.checkpoints.wait()
    left = [os.path.basename(path) for path in list_checkpoints(str(tmp_path))]
    assert left == [f"checkpoint-0000{epoch}.pth" for epoch in (3, 4, 7, 8, 9)]
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == list(range(10))
    assert training.checkpoints.progress.updates == 30


def left_by(training, folder, epochs):
    """Finish epochs and return the numbers of those whose checkpoints are left."""
    training.train(0)
    for epoch in epochs:
        training.checkpoints.finish_epoch({"epoch": epoch}, steps=3)
    training.checkpoints.wait()
    return [int(path[-9:-4]) for path in list_checkpoints(str(folder))]


@pytest.mark.parametrize(
    ("then", "now", "left"),
    [
        ({"keep_last": 0, "keep_every": 0}, {}, [0, 1, 2, 3, 4, 5, 6]),  # when that was the default
        (None, {}, [0, 1, 2, 3, 4, 5, 6]),  # older still
        ({"keep_last": 0, "keep_every": 0}, {"keep_last": 2}, [5, 6]),
        ({"keep_last": 1, "keep_every": 2}, {}, [1, 3, 5, 6]),
        ({}, {}, [4, 5, 6]),
        ({}, {"keep_last": 0}, [1, 2, 3, 4, 5, 6]),
    ],
)
def test_a_resumed_run_keeps_files_as_before_unless_told(tmp_path, capsys, then, now, left):
    unset, folder = {"keep_last": None, "keep_every": None}, {"output_dir": str(tmp_path)}
    training = Training(init=0, **unset | folder | ({"keep_last": 0} if then is None else then))
    left_by(training, tmp_path, range(4))
    newest = newest_checkpoint(str(tmp_path))
    if then is None:
        checkpoint = torch.load(newest)
        del checkpoint["args"]["keep_last"], checkpoint["args"]["keep_every"]
        torch.save(checkpoint, newest)
    capsys.readouterr()
    for epochs in (range(4, 6), range(6, 7)):  # the second resumes what the first has written
        again = Training(init=0, **unset | folder | now)
        again.resume(newest_checkpoint(str(tmp_path)))
        found = left_by(again, tmp_path, epochs)
    assert found == left
    kept = "checkpoints are kept as until now: --keep_last 0 --keep_every 0\n"
    expected = 2 * (then != {} and now == {} and left[0] == 0)
    assert capsys.readouterr().out.count(kept) == expected


def test_by_default_every_fiftieth_epoch_is_kept(tmp_path):
    folder = {"output_dir": str(tmp_path), "keep_last": None, "keep_every": None}
    training = Training(init=0, **folder, checkpoint_period=10)
    assert left_by(training, tmp_path, range(130)) == [49, 99, 109, 119, 129]


def test_files_of_another_run_stay(tmp_path, trained):
    """--resume takes one file into a folder that has files of another run, too."""
    for epoch in range(3):
        (tmp_path / f"checkpoint-0000{epoch}.pth").touch()
    resume = trained.save(tmp_path / "elsewhere")
    training = Training(init=0, output_dir=str(tmp_path), keep_last=1, resume=resume)
    training.resume(resume)
    assert left_by(training, tmp_path, (4, 5)) == [0, 1, 2, 5]


# --- log.txt


def test_log_txt_has_a_json_line_per_epoch(tmp_path):
    records = [{"epoch": 0, "train_loss": 0.5, "note": "é\n"}, {"epoch": 1, "train_loss": 1e-7}]
    for record in records:
        append_log(str(tmp_path), record)
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert [json.loads(line) for line in lines] == records
    write_log(str(tmp_path), records[:1])
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert [json.loads(line) for line in lines] == records[:1]


def test_a_validation_loss_that_is_no_number_is_logged_as_null(tmp_path):
    """JSON has no NaN; a run whose fp16 validation overflows goes on and can be resumed."""
    training = Training(init=0, output_dir=str(tmp_path))
    record = {"epoch": 0, "val_loss": float("nan"), "val_acc1": 12.5}
    training.train(0)
    training.checkpoints.finish_epoch(record, steps=3)
    training.checkpoints.wait()
    Training(init=1, output_dir=str(tmp_path)).resume(tmp_path / "checkpoint-00000.pth")
    (line,) = (tmp_path / "log.txt").read_text().splitlines()
    assert json.loads(line) == {"epoch": 0, "val_loss": None, "val_acc1": 12.5}
    assert "NaN" not in line


# --- writes that fail


@contextlib.contextmanager
def full_disk(free_bytes=5000):
    """Limit the size of files, so that the system refuses to write more."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (free_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@contextlib.contextmanager
def failing_replace():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", lambda *paths: (_ for _ in ()).throw(OSError(28, "No space")))
        yield


@pytest.mark.parametrize("failure", [full_disk, failing_replace])
def test_a_failing_write_warns_and_leaves_the_old_file(tmp_path, trained, capsys, failure):
    path = trained.save(tmp_path)
    before = path.read_bytes()
    capsys.readouterr()
    with failure():
        trained.save(tmp_path)
        trained.save(tmp_path, epoch=5)
    out = capsys.readouterr().out
    assert f"WARNING: could not save {path}: " in out and "saved" not in out
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]  # no half-written and no temporary file


def test_a_lost_folder_warns(tmp_path, trained, capsys):
    (tmp_path / "file").write_text("")
    trained.save(tmp_path / "file" / "output")
    assert "WARNING: could not save" in capsys.readouterr().out
    write_log(str(tmp_path / "file" / "output"), [{"epoch": 0}])
    assert "WARNING: could not write" in capsys.readouterr().out


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "checkpoint-00000.pth"
    path.write_bytes(b"old")

    def write(file):
        file.write(b"half of the new")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        file_io.write_atomically(str(path), write)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == [path.name]


def test_the_final_name_appears_only_with_the_whole_file(tmp_path):
    path = tmp_path / "checkpoint-00000.pth"

    def write(file):
        file.write(b"all")
        file.flush()
        assert not path.exists()

    file_io.write_atomically(str(path), write)
    assert path.read_bytes() == b"all" and os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_files_and_folders_follow_the_umask(tmp_path, trained, umask):
    before = os.umask(umask)
    try:
        path = trained.save(tmp_path / "output")
        write_log(str(tmp_path / "output"), [{"epoch": 0}])
    finally:
        os.umask(before)
    assert (tmp_path / "output").stat().st_mode & 0o777 == 0o777 & ~umask
    for file in (path, tmp_path / "output" / "log.txt"):
        assert file.stat().st_mode & 0o777 == 0o666 & ~umask


def test_signals_are_given_back_after_an_error(tmp_path):
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    with pytest.raises(UserError), signals_restored():
        checkpoints = Training(init=0, output_dir=str(tmp_path)).checkpoints
        assert [signal.getsignal(n) for n in STOP_SIGNALS] == [checkpoints.interruption._note] * 4
        raise UserError("a bad step")
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before
