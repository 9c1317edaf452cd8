"""Test util/meters.py: averages, errors, printed lines and TensorBoard."""

import math
import os
import re

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from util.checkpoint import Progress
from util.errors import UserError
from util.meters import Meters, RunLog, epoch_1000x, last_x, memory_mib
from util.optim import NonFiniteError
from util.report import topk_correct

CPU = torch.device("cpu")


def rows(*numbers):
    return torch.tensor(numbers)


# --- meters


def test_meters_average_every_step_once():
    meters = Meters(CPU)
    assert meters.flush() == [] and meters.means() == {}
    meters.update(0, rows(0), loss=torch.tensor(1.0), lr=0.5)
    meters.update(1, rows(1), loss=torch.tensor(2.0), lr=0.25, grad_norm=torch.tensor(8.0))
    assert meters.flush() == [
        (0, {"loss": 1.0, "lr": 0.5}),
        (1, {"loss": 2.0, "lr": 0.25, "grad_norm": 8.0}),
    ]
    assert meters.flush() == []  # each value is read once
    meters.update(2, rows(2), loss=torch.tensor(6.0), lr=0.0)
    assert meters.flush() == [(2, {"loss": 6.0, "lr": 0.0})]
    assert meters.latest == {"loss": 6.0, "lr": 0.0, "grad_norm": 8.0}  # those of the last update
    assert meters.means() == {"loss": 3.0, "lr": 0.25, "grad_norm": 8.0}


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["loss", "grad_norm"])
def test_a_value_that_is_not_finite_names_its_step_and_batch(name, bad):
    meters = Meters(CPU)
    for step in range(4):
        values = {"loss": torch.tensor(1.0), "grad_norm": torch.tensor(2.0)}
        if step in (1, 3):  # the first one is reported
            values[name] = torch.tensor(bad)
        meters.update(step, rows(10 * step, 10 * step + 1), **values)
    with pytest.raises(NonFiniteError, match="gradient of step 1 is not finite") as caught:
        meters.flush()
    error = caught.value
    assert error.step == 1 and error.samples.tolist() == [10, 11]
    assert isinstance(error, UserError) and error.status == 1


def test_large_finite_values_are_no_error():
    meters = Meters(CPU)
    meters.update(0, rows(0), loss=torch.tensor(3e38), lr=0.0)
    assert meters.flush()[0][1]["loss"] == pytest.approx(3e38)


@pytest.mark.parametrize(
    "epoch, repeat_aug, x", [(0.0, 4, 0), (0.5, 1, 500), (2.0, 4, 8000), (1 + 1 / 3, 2, 2666)]
)
def test_epoch_1000x(epoch, repeat_aug, x):
    assert epoch_1000x(epoch, repeat_aug) == x


def test_topk_correct():
    logits = torch.tensor([[0.1, 0.9, 0.5, 0.3], [4.0, 3.0, 2.0, 1.0], [1.0, 2.0, 3.0, 4.0]])
    labels = torch.tensor([1, 2, 0])
    counts = [topk_correct(logits, labels, k).item() for k in (1, 2, 3, 4)]
    assert counts == [1, 1, 2, 3]
    assert topk_correct(logits, labels, 5).item() == 3  # with four classes, all are in the top five


def test_memory_is_that_of_this_process():
    block = np.ones(40 * 2**20, dtype=np.uint8)
    assert 100 < memory_mib(CPU) < 100_000
    del block


# --- progress lines


def run_log(log_dir="", print_freq=2, **options):
    return RunLog(str(log_dir), print_freq, CPU, **options)


def run_epoch(log, steps, epoch=0, repeat_aug=1):
    """Record loss = step + epoch in every step, as the engines do."""
    seen, progress = [], Progress(epoch=epoch)
    batches = [f"batch {i}" for i in range(steps)]
    log.repeat_aug = repeat_aug
    for step, batch in log.every(batches, f"Epoch [{epoch}/2]", 8, progress):
        seen.append((step, batch))
        log.meters.update(step, rows(step), loss=torch.tensor(float(step + epoch)), lr=0.5)
    assert seen == list(enumerate(batches))
    return log.meters.means()


def test_plain_lines_where_there_is_no_terminal(capfd):
    means = run_epoch(run_log(), steps=5)
    assert means == {"loss": 2.0, "lr": 0.5}
    out, err = capfd.readouterr()
    assert err == ""  # no progress bar
    *lines, last = out.splitlines()
    assert len(lines) == 3
    for line, (done, loss) in zip(lines, [(2, 1), (4, 3), (5, 4)], strict=True):
        assert re.fullmatch(
            rf"Epoch \[0/2\]  \[{done}/5\]  eta \d:\d\d:\d\d  loss {loss}  lr 0\.5  "
            r"clips/s [\d.]+  data \d+%  mem \d+M",
            line,
        ), line
    assert re.fullmatch(r"Epoch \[0/2\]  done in \d:\d\d:\d\d  loss 2", last)


def test_speed_and_share_of_waiting_for_data(capfd, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])

    class Loader:
        def __len__(self):
            return 4

        def __iter__(self):
            for _ in range(4):
                now[0] += 3.0  # seconds to load
                yield None

    log = run_log()
    for step, _ in log.every(Loader(), "Test", clips_per_step=8):
        now[0] += 1.0  # seconds to compute
        log.meters.update(step, rows(step), loss=0.0)
    assert capfd.readouterr().out.count("clips/s 2.0  data 75%") == 2


def test_means_are_those_of_the_last_loop(capfd):
    log = run_log()
    run_epoch(log, steps=3, epoch=0)
    assert run_epoch(log, steps=3, epoch=1)["loss"] == 2.0


def test_a_bar_on_a_terminal(capfd, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    run_epoch(run_log(), steps=5)
    out, err = capfd.readouterr()
    assert "5/5" in err and "loss=4" in err and "clips/s=" in err
    assert len(out.splitlines()) == 1 and "done in" in out


def test_errors_of_a_step_come_out_of_the_loop():
    log = run_log()
    with pytest.raises(NonFiniteError, match="step 1"):
        for step, _ in log.every(range(10), "Epoch", 1):
            assert step < 2  # noticed at the next printed line
            log.meters.update(step, rows(step), loss=math.nan if step else 1.0)


# --- files


def test_tensorboard_runs_over_thousandths_of_an_epoch(tmp_path):
    log = run_log(log_dir=tmp_path / "board", print_freq=3)
    for epoch in range(2):
        run_epoch(log, steps=4, epoch=epoch, repeat_aug=2)
    log.scalar("val/acc1", 12.5, last_x(1, 2))
    log.close()

    events = EventAccumulator(str(tmp_path / "board"))
    events.Reload()
    tags = {"train/loss", "train/lr", "val/acc1"}
    tags |= {"speed/clips_per_s", "speed/data_share", "speed/memory_mib"}
    assert set(events.Tags()["scalars"]) == tags
    loss = [(event.step, event.value) for event in events.Scalars("train/loss")]
    # x = int((step / steps_per_epoch + epoch) * 1000 * repeat_aug)
    first = [(0, 0.0), (500, 1.0), (1000, 2.0), (1500, 3.0)]
    second = [(2000, 1.0), (2500, 2.0), (3000, 3.0), (3500, 4.0)]
    assert loss == first + second
    assert [event.step for event in events.Scalars("speed/clips_per_s")] == [1000, 1500, 3000, 3500]
    assert [(e.step, e.value) for e in events.Scalars("val/acc1")] == [(3999, 12.5)]


def test_tensorboard_is_on_disk_after_every_epoch(tmp_path):
    log = run_log(log_dir=tmp_path / "board")
    log.scalar("train/loss", 1.0, 7)
    log.flush()
    events = EventAccumulator(str(tmp_path / "board"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(7, 1.0)]
    log.close()


def test_nothing_is_written_without_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    log = run_log()
    run_epoch(log, steps=2)
    log.scalar("train/loss", 1.0, 0)
    log.flush()
    log.close()
    assert os.listdir(tmp_path) == []


def test_training_goes_on_when_the_tensorboard_file_cannot_be_written(tmp_path, capsys):
    log = run_log(log_dir=tmp_path / "board")
    log.writer.add_scalar = lambda *_: (_ for _ in ()).throw(OSError(28, "No space left"))
    log.scalar("train/loss", 1.0, 0)
    log.scalar("train/loss", 1.0, 1)
    log.flush()
    assert capsys.readouterr().out.count("WARNING: TensorBoard's file cannot be written") == 1
