"""Kill and signal runs at random moments: a resumed run must equal an undisturbed one, bitwise."""

import contextlib
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from tests.test_scripts import FINETUNE, PRETRAIN, assert_same_weights, finish, spawn
from util.signals import REQUEUE_STATUS

EPOCHS = 4
SCRIPTS = {
    "main_pretrain.py": [*PRETRAIN, "--epochs", EPOCHS, "--mask_ratio_end", 0.5],
    "main_finetune.py": [*FINETUNE, "--epochs", EPOCHS, "--model_ema", 0.9],
}
LAST = f"checkpoint-{EPOCHS - 1:05d}.pth"


def argv(script: str, videos: Path, out: Path, ranks: int, workers: int) -> list[object]:
    """Return flags for 6 videos: one rank takes 6 steps per epoch, two take 3; every step saves."""
    return [
        *SCRIPTS[script], "--path_to_data_dir", videos, "--output_dir", out,
        "--batch_size", 1, "--num_workers", workers, "--checkpoint_minutes", 1e-6,
    ]  # fmt: skip


def children(pid: int) -> list[int]:
    try:
        return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


def family(pid: int) -> list[int]:
    """List a process and all its descendants, as torchrun's ranks have their own sessions."""
    return [pid] + [p for child in children(pid) for p in family(child)]


def kill_all(process: subprocess.Popen) -> str:
    """Kill a run with its ranks and workers; return what it printed until then."""
    for pid in family(process.pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return process.communicate(timeout=120)[0]


def wait_for_line(process: subprocess.Popen, pattern: str) -> str:
    """Read what a run prints up to the first line that matches."""
    seen = ""
    for line in process.stdout:
        seen += line
        if re.search(pattern, line):
            return seen
    raise AssertionError(seen)


def assert_same_run(part: Path, whole: Path) -> None:
    assert_same_weights(part / LAST, whole / LAST)
    assert (part / "log.txt").read_text() == (whole / "log.txt").read_text()


_whole: dict[tuple[str, int], tuple[Path, float]] = {}


@pytest.fixture
def uninterrupted(videos, tmp_path_factory):
    """Return a function that gives the folder of an undisturbed run and its training's seconds."""

    def run(script: str, ranks: int) -> tuple[Path, float]:
        if (script, ranks) not in _whole:
            out = tmp_path_factory.mktemp("whole")
            process = spawn(script, *argv(script, videos, out, ranks, 0), ranks=ranks)
            wait_for_line(process, r"Epoch \[0/")
            began = time.monotonic()
            finish(process)
            _whole[script, ranks] = out, time.monotonic() - began
        return _whole[script, ranks]

    return run


# Where a kill falls: at a random share of the training's time, in a save, or between epochs.
MOMENTS = ("step", "save", "epoch")


def kill_at(
    process: subprocess.Popen,
    out: Path,
    moment: str,
    rng: np.random.Generator,
    epoch: int | None = None,
) -> str:
    """Kill a run at the named moment and return what it had printed; it may end before that."""
    if epoch is None:
        epoch = rng.integers(EPOCHS - 1)
    if moment == "save":  # a temporary file is there while a checkpoint is written
        while process.poll() is None and not list(out.glob("*.tmp*")):
            time.sleep(0.0005)
        seen = ""
    else:
        pattern = rf"Epoch \[{epoch}/\d+\]  " + ("done" if moment == "epoch" else r"\[")
        seen = wait_for_line(process, pattern)
        time.sleep(rng.uniform(0, 0.15))
    return seen + kill_all(process)


def kills(videos, uninterrupted, tmp_path, script, ranks, workers, moments, seed) -> None:
    """Kill a run at each moment in turn, then let it end: it must equal the uninterrupted run."""
    rng = np.random.default_rng(seed)
    whole, _ = uninterrupted(script, ranks)
    flags = argv(script, videos, tmp_path, ranks, workers)
    for number, moment in enumerate(moments):
        process = spawn(script, *flags, ranks=ranks)
        if number == 0:
            out = kill_at(process, tmp_path, moment, rng)
        else:  # a random time after the start; the epochs may be over by then
            wait_for_line(process, "resumed from|WARNING|Epoch")
            time.sleep(rng.uniform(0, 0.5))
            out = kill_all(process)
        assert "Traceback" not in out, out
    out = finish(spawn(script, *flags, ranks=ranks))
    assert_same_run(tmp_path, whole)


@pytest.mark.slow  # a fast one is with the signals below
@pytest.mark.parametrize(
    ("script", "moment"), [("main_pretrain.py", "step"), ("main_finetune.py", "save")]
)
def test_a_killed_run_resumes_bitwise(videos, uninterrupted, tmp_path, script, moment):
    kills(videos, uninterrupted, tmp_path, script, 1, 0, [moment], seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("script", SCRIPTS)
def test_twelve_kills(videos, uninterrupted, tmp_path, script, ranks, workers):
    """Kill 12 times: 2 scripts x (1, 2 ranks) x (0, 2 workers), one or two kills in each."""
    case = [*SCRIPTS].index(script) * 4 + (ranks - 1) * 2 + workers // 2
    moments = [MOMENTS[case % 3]] + ["anywhere"] * (case % 2)
    kills(videos, uninterrupted, tmp_path, script, ranks, workers, moments, seed=case)


# --- signals


def rank_pid(process: subprocess.Popen, rank: int) -> int:
    """Find a rank among the children of torchrun."""
    for _ in range(1000):
        for child in children(process.pid):
            environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
            if f"RANK={rank}".encode() in environment:
                return int(child)
        time.sleep(0.01)
    raise AssertionError("no such rank")


@pytest.mark.parametrize(
    ("ranks", "number"),
    [
        (1, signal.SIGTERM),
        pytest.param(1, signal.SIGINT, marks=pytest.mark.slow),
        pytest.param(1, signal.SIGUSR1, marks=pytest.mark.slow),
        pytest.param(1, signal.SIGUSR2, marks=pytest.mark.slow),
        pytest.param(2, signal.SIGTERM, marks=pytest.mark.slow),  # torchrun forwards it
        pytest.param(2, signal.SIGINT, marks=pytest.mark.slow),
    ],
)
def test_a_signal_to_all_processes_stops_with_a_checkpoint(
    videos, uninterrupted, tmp_path, ranks, number
):
    """Launchers, schedulers and `timeout` also send signals to loader workers.

    The run that goes on is killed, too; the third equals an undisturbed one.
    """
    whole, _ = uninterrupted("main_pretrain.py", ranks)
    flags = argv("main_pretrain.py", videos, tmp_path, ranks, 2)
    flags[flags.index("--checkpoint_minutes") + 1] = 0  # only the signal saves within an epoch
    process = spawn("main_pretrain.py", *flags, ranks=ranks, start_new_session=True)
    out = wait_for_line(process, rf"Epoch \[1/4\]  \[1/{6 // ranks}\]")
    os.killpg(process.pid, number)
    began = time.monotonic()
    out += process.communicate(timeout=120)[0]
    assert f"{number.name}: stopping after this step" in out
    assert out.count("the same command continues from here") == 1, out
    if ranks == 1:
        assert process.returncode == (130 if number == signal.SIGINT else REQUEUE_STATUS)
        assert "Traceback" not in out
    else:  # torchrun ends with a traceback; it must not need to kill, for which it waits 30 s
        assert process.returncode != 0
        assert "forcefully exiting" not in out
        assert time.monotonic() - began < 30
    (saved,) = tmp_path.glob("checkpoint-*-*.pth")
    flags[flags.index("--checkpoint_minutes") + 1] = 1e-6  # now every step saves
    process = spawn("main_pretrain.py", *flags, ranks=ranks)
    out = kill_at(process, tmp_path, "step", np.random.default_rng(0), epoch=2)
    assert f"going on at epoch 1, step {int(saved.stem[-8:])}\n" in out
    assert "resumed from" in finish(spawn("main_pretrain.py", *flags, ranks=ranks))
    assert_same_run(tmp_path, whole)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM])
def test_a_signal_to_a_run_that_saves_nothing(videos, tmp_path, number):
    flags = argv("main_pretrain.py", videos, "", 1, 0)
    process = spawn("main_pretrain.py", *flags, cwd=tmp_path)
    out = wait_for_line(process, r"Epoch \[1/4\]")
    process.send_signal(number)
    out += finish(process, REQUEUE_STATUS)
    assert f"{number.name}: stopping after this step\n" in out
    assert "stopped; nothing was saved (exit status 75)" in out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "place"),
    [
        pytest.param("main_pretrain.py", r"Epoch \[1/4\]  \[1/3\]", id="step"),
        pytest.param("main_finetune.py", r"Epoch \[1/4\]  done", id="validation"),
    ],
)
def test_a_signal_to_one_rank_stops_both_after_the_same_step(
    videos, uninterrupted, tmp_path, script, place
):
    whole, _ = uninterrupted(script, 2)
    flags = argv(script, videos, tmp_path, 2, 0)
    process = spawn(script, *flags, ranks=2)
    seen = wait_for_line(process, place)
    os.kill(rank_pid(process, 1), signal.SIGUSR2)
    out = seen + process.communicate(timeout=120)[0]  # torchrun's own status is 1
    assert out.count("stopped; the same command") == 1, out
    statuses = re.findall(r"exitcode\s*: (\d+)", out)
    assert statuses and set(statuses) == {str(REQUEUE_STATUS)}, out
    assert "resumed from" in finish(spawn(script, *flags, ranks=2))
    assert_same_run(tmp_path, whole)
