"""submitit_pretrain.py on a real Slurm of two nodes, started on this machine by slurm_up.sh."""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.test_scripts import PRETRAIN, ROOT, assert_same_weights, finish, spawn

HERE = Path(__file__).parent
EPOCHS = 6
LAST = f"checkpoint-{EPOCHS - 1:05d}.pth"
FLAGS = [*PRETRAIN, "--epochs", EPOCHS, "--batch_size", 1, "--checkpoint_minutes", 1e-6]

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(os.geteuid() != 0, reason="starting Slurm's daemons needs root"),
    pytest.mark.skipif(
        not (shutil.which("slurmctld") or os.environ.get("CI")),
        reason="needs Debian's slurm-wlm; tests/slurm/slurm_up.sh installs it",
    ),
]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory) -> Iterator[dict[str, str]]:
    """Start Slurm and return the environment of its commands."""
    state = {"SLURM_STATE": str(tmp_path_factory.mktemp("slurm"))}
    environment = {**os.environ, **state, "OMP_NUM_THREADS": "1", "MKL_CBWR": "COMPATIBLE"}
    up = subprocess.run(
        [HERE / "slurm_up.sh"], env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    try:
        yield environment | {"SLURM_CONF": up.stdout.strip().partition("=")[2]}
    finally:
        subprocess.run([HERE / "slurm_down.sh"], env=environment, check=True)


@pytest.fixture(scope="module")
def uninterrupted(videos, tmp_path_factory) -> Path:
    """Run the same two ranks under torchrun, undisturbed."""
    out = tmp_path_factory.mktemp("whole")
    flags = [*FLAGS, "--path_to_data_dir", videos, "--output_dir", out]
    finish(spawn("main_pretrain.py", *flags, ranks=2))
    return out


def submit(slurm: dict[str, str], videos: Path, folder: Path, *job: object) -> tuple[str, Path]:
    """Submit a job of two nodes with one task each; return its id and its folder."""
    command = [
        sys.executable, ROOT / "submitit_pretrain.py", *FLAGS, "--path_to_data_dir", videos,
        "--nodes", 2, "--ngpus", 0, "--cpus_per_task", 1, "--job_dir", folder / "%j", *job,
    ]  # fmt: skip
    out = subprocess.run(
        list(map(str, command)), env=slurm, capture_output=True, text=True, check=True
    ).stdout
    job_id = re.search(r"job (\d+)", out)[1]
    return job_id, folder / job_id


def read_logs(folder: Path) -> str:
    return "\n".join(path.read_text() for path in sorted(folder.glob("*_log.*")))


def wait_for(what, folder: Path, seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, read_logs(folder)
        time.sleep(0.1)


def assert_same_run(part: Path, whole: Path) -> None:
    assert_same_weights(part / LAST, whole / LAST)
    assert (part / "log.txt").read_text() == (whole / "log.txt").read_text()


def state_of(slurm: dict[str, str], job_id: str) -> str:
    command = ["scontrol", "show", "job", job_id]
    out = subprocess.run(command, env=slurm, capture_output=True, text=True, check=True).stdout
    return re.search(r"JobState=(\w+)", out)[1]


def wait_for_end(slurm: dict[str, str], job_id: str, folder: Path) -> None:
    wait_for(lambda: (folder / LAST).exists(), folder)
    wait_for(lambda: state_of(slurm, job_id) in ("COMPLETED", "FAILED"), folder)
    assert state_of(slurm, job_id) == "COMPLETED", read_logs(folder)


def test_a_requeued_job_goes_on(slurm, uninterrupted, videos, tmp_path):
    """`scontrol requeue`, as a preempting partition does it: SIGTERM, and the job starts again."""
    job_id, folder = submit(slurm, videos, tmp_path)
    wait_for(lambda: list(folder.glob("checkpoint-00001*.pth")), folder)
    subprocess.run(["scontrol", "requeue", job_id], env=slurm, check=True)
    wait_for_end(slurm, job_id, folder)
    assert "resumed from" in read_logs(folder)
    assert_same_run(folder, uninterrupted)


def test_a_time_limit_requeues_the_job(slurm, uninterrupted, videos, tmp_path):
    """The warning by SIGUSR2 stops both ranks after a step, and submitit's hook requeues the job.

    Slurm would send it a minute or so before the limit: here scancel sends it, by the same way.
    """
    job_id, folder = submit(slurm, videos, tmp_path)
    wait_for(lambda: list(folder.glob("checkpoint-00001*.pth")), folder)
    subprocess.run(["scancel", "--signal", "USR2", job_id], env=slurm, check=True)
    wait_for_end(slurm, job_id, folder)
    logs = read_logs(folder)
    assert "SIGUSR2: stopping after this step with a checkpoint" in logs
    assert f"Requeued job {job_id}" in logs
    assert "resumed from" in logs
    assert_same_run(folder, uninterrupted)
