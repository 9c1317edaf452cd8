"""Faults around a run: workers that are killed, ranks that hang or die, ports, bad flags."""

import os
import re
import signal
import time
from pathlib import Path

import pytest

import main_finetune
import main_pretrain
import submitit_finetune
import submitit_pretrain
from tests.test_kills import argv, children, kill_all, rank_pid, wait_for_line
from tests.test_scripts import PRETRAIN, finish, spawn


def loader_workers(pid: int) -> list[int]:
    """Find the loader's workers: forked, they have the command line of their parent."""
    own = Path(f"/proc/{pid}/cmdline").read_bytes()
    return [p for p in children(pid) if Path(f"/proc/{p}/cmdline").read_bytes() == own]


@pytest.mark.parametrize(
    "number", [signal.SIGKILL, pytest.param(signal.SIGBUS, marks=pytest.mark.slow)]
)
def test_a_killed_loader_worker_ends_in_one_sentence(videos, tmp_path, number):
    """SIGKILL is what the OOM killer sends, SIGBUS what a full /dev/shm gives."""
    flags = argv("main_pretrain.py", videos, tmp_path, 1, 2)
    flags[flags.index("--epochs") + 1] = 500
    process = spawn("main_pretrain.py", *flags)
    wait_for_line(process, r"Epoch \[1/500\]")
    os.kill(loader_workers(process.pid)[0], number)
    out = finish(process, 1)
    assert out.count("main_pretrain.py: error: a loader process was killed") == 1, out
    assert "Traceback" not in out


@pytest.mark.slow
def test_a_rank_that_hangs_ends_the_run_within_the_timeout(videos, tmp_path):
    flags = argv("main_pretrain.py", videos, tmp_path, 2, 0)
    flags[flags.index("--epochs") + 1] = 5000
    process = spawn("main_pretrain.py", *flags, "--dist_timeout", 0.1, ranks=2)
    wait_for_line(process, r"Epoch \[1/5000\]")
    hung = rank_pid(process, 1)
    os.kill(hung, signal.SIGSTOP)
    began = time.monotonic()
    try:
        out = wait_for_line(process, "--dist_timeout")
        assert time.monotonic() - began < 60
        assert re.search(r"rank 0.*error: another rank did not answer", out), out
    finally:
        kill_all(process)


@pytest.mark.slow
def test_nothing_listens_on_a_port(videos, tmp_path):
    flags = argv("main_pretrain.py", videos, tmp_path, 1, 2)
    flags[flags.index("--epochs") + 1] = 500
    process = spawn("main_pretrain.py", *flags)
    try:
        wait_for_line(process, r"Epoch \[1/500\]")
        own = set()
        for pid in [process.pid, *children(process.pid)]:
            for fd in Path(f"/proc/{pid}/fd").iterdir():
                own.add(os.readlink(fd))
        listening = []
        for table in ("tcp", "tcp6"):
            for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == "0A" and f"socket:[{fields[9]}]" in own:
                    listening.append(fields[1])
        assert listening == []
    finally:
        kill_all(process)


def test_help_of_the_launchers_shows_the_flags_of_script_and_job(capsys):
    for module, own in ((submitit_pretrain, "--mask_ratio"), (submitit_finetune, "--mixup")):
        with pytest.raises(SystemExit) as caught:
            module.parse_args(["--help"])
        assert caught.value.code == 0
        text = capsys.readouterr().out
        for flag in (own, "--path_to_data_dir", "--cluster", "--nodes", "--ngpus", "--job_dir"):
            assert flag in text


@pytest.mark.slow
def test_a_local_job_of_two_tasks(videos, tmp_path):
    """Without Slurm: two CPU tasks, checkpoints in the job's own folder."""
    out = finish(
        spawn(
            "submitit_pretrain.py", *PRETRAIN, "--epochs", 1, "--path_to_data_dir", videos,
            "--cluster", "local", "--ngpus", 0, "--tasks_per_node", 2, "--job_dir", tmp_path / "%j",
        )
    )  # fmt: skip
    job_id = re.search(r"job (\d+)", out)[1]
    folder = tmp_path / job_id
    assert (folder / "checkpoint-00000.pth").exists()
    assert "2 process(es)" in (folder / f"{job_id}_0_log.out").read_text()


# --- bad steps


@pytest.mark.parametrize("module", [main_pretrain, main_finetune])
def test_guards_are_off_by_default(module):
    args = module.parse_args(["--path_to_data_dir", "X"])
    assert (args.skip_nonfinite, args.kill_loss_factor) == (0, 0.0)
