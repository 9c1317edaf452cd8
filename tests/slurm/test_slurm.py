"""submitit_pretrain.py on a real Slurm of two nodes, started on this machine by slurm_up.sh."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.test_prepare_jobs import contents
from tests.test_scripts import PRETRAIN, ROOT, assert_same_weights, finish, spawn
from tests.video_files import moving_frames, write_video

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


def handles(number: int, task: int) -> bool:
    """Return whether the Python process of a task of an array has a handler for a signal by now."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has just ended
            words, variables = (process / name for name in ("cmdline", "environ"))
            if not words.read_bytes().startswith(sys.executable.encode()):
                continue
            if f"SLURM_ARRAY_TASK_ID={task}".encode() in variables.read_bytes().split(b"\0"):
                caught = re.search(r"SigCgt:\s*(\w+)", (process / "status").read_text())[1]
                if int(caught, 16) >> (number - 1) & 1:
                    return True
    return False


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


def tasks_of(job_id: str) -> list[int]:
    """Find the processes of a job's tasks, on this machine; srun is not one of them."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (folder / "cmdline").read_bytes().split(b"\0")
            environment = (folder / "environ").read_bytes().split(b"\0")
            own = f"SLURM_JOB_ID={job_id}".encode() in environment
            if own and b"python" in words[0] and b"submitit.core._submit" in words:
                found.append(int(folder.name))
    return found


def is_stopped(pid: int) -> bool:
    return bool(re.search(r"State:\s*T", Path(f"/proc/{pid}/status").read_text()))


def has_got(pid: int, number: signal.Signals) -> bool:
    """Return whether a signal has reached a stopped process, which may have ended by it."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        pending = int(re.search(r"ShdPnd:\s*(\w+)", status)[1], 16)
        return bool(pending >> (number - 1) & 1) or not is_stopped(pid)
    except FileNotFoundError:
        return True


def test_a_time_limit_requeues_the_job(slurm, uninterrupted, videos, tmp_path):
    """The warning by SIGUSR2 stops both ranks after a step, and submitit's hook requeues the job.

    The limit is real; the tasks are stopped in the meantime, so as to have work left when it nears.
    """
    job_id, folder = submit(slurm, videos, tmp_path, "--time", 3, "--signal_delay_s", 60)
    wait_for(lambda: list(folder.glob("checkpoint-*.pth")), folder)
    tasks = tasks_of(job_id)
    assert len(tasks) == 2
    for pid in tasks:
        os.kill(pid, signal.SIGSTOP)
    # a process that waits for the disk, as these often do, stops only when the disk is done
    wait_for(lambda: all(map(is_stopped, tasks)), folder)
    wait_for(lambda: all(has_got(pid, signal.SIGUSR2) for pid in tasks), folder)
    for pid in tasks:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
    wait_for_end(slurm, job_id, folder)
    logs = read_logs(folder)
    assert "SIGUSR2: stopping after this step with a checkpoint" in logs
    assert f"Requeued job {job_id}" in logs
    assert "resumed from" in logs
    assert_same_run(folder, uninterrupted)


# --- batch scripts of one's own


SCRIPTS = re.findall(r"```sbatch\n(.*?)```", (ROOT / "PRETRAIN.md").read_text(), re.S)


@pytest.mark.parametrize(("script", "told"), [(0, []), (1, ["--batch"])], ids=["srun", "torchrun"])
def test_a_documented_batch_script(slurm, uninterrupted, videos, tmp_path, script, told):
    """The scripts of PRETRAIN.md, with the sizes of this Slurm, are told to stop and come back."""
    text = SCRIPTS[script]
    out = tmp_path / "out"
    for old, new in (
        ("--nodes=8", "--nodes=2"),
        ("--ntasks-per-node=8", "--ntasks-per-node=1"),
        ("--gpus-per-node=8 ", ""),
        ("--cpus-per-task=80", "--cpus-per-task=1"),
        ("--cpus-per-task=10", "--cpus-per-task=1"),
        ("--nnodes 8 --nproc_per_node 8", "--nnodes 2 --nproc_per_node 1"),
        (" torchrun ", f" {sys.executable} -m torch.distributed.run "),
        ("python main_pretrain.py", f"{sys.executable} main_pretrain.py"),
        ("main_pretrain.py", str(ROOT / "main_pretrain.py")),
        ("/data/k400", str(videos)),
        ("--output_dir output/run1", f"--output_dir {out} {' '.join(map(str, FLAGS))}"),
    ):
        text = text.replace(old, new)
    path = tmp_path / "job.sh"
    path.write_text(text)
    log = tmp_path / "0_log.out"
    command = ["sbatch", "--parsable", f"--output={log}", str(path)]
    done = subprocess.run(command, env=slurm, capture_output=True, text=True, check=True)
    job_id = done.stdout.strip()
    wait_for(lambda: list(out.glob("checkpoint-00001*.pth")), tmp_path)
    subprocess.run(["scancel", *told, "--signal", "USR2", job_id], env=slurm, check=True)
    wait_for(lambda: (out / LAST).exists(), tmp_path)
    wait_for(lambda: state_of(slurm, job_id) in ("COMPLETED", "FAILED"), tmp_path)
    assert state_of(slurm, job_id) == "COMPLETED", read_logs(tmp_path)
    logs = read_logs(tmp_path)
    assert "stopping after this step with a checkpoint" in logs
    assert logs.count("Epoch [0/") and "resumed from" in logs
    assert_same_run(out, uninterrupted)


# --- a shell within a step


@pytest.mark.skipif(not shutil.which("script"), reason="needs util-linux's script, for a terminal")
def test_a_shell_of_srun_pty_says_what_it_waits_for(slurm, videos, tmp_path):
    """`srun --pty bash` with two tasks: the second shell ends at once, so rank 1 is missing."""
    flags = [*FLAGS, "--path_to_data_dir", videos, "--output_dir", tmp_path / "out"]
    command = [sys.executable, ROOT / "main_pretrain.py", *flags, "--dist_timeout", 0.05]
    process = subprocess.Popen(
        ["salloc", "-N2", "-n2", "script", "-qec", "srun --pty bash", "/dev/null"],
        env=slurm, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True,
    )  # fmt: skip
    process.stdin.write(f"{' '.join(map(str, command))}; echo status=$?; exit\n")
    process.stdin.flush()  # closing it would end the terminal
    out = "".join(process.stdout)
    process.stdin.close()
    process.wait(timeout=60)
    assert re.search(r"waiting for 2 ranks at n1:\d+; start all ranks", out)
    assert "main_pretrain.py: error: 2 ranks did not meet at n1:" in out
    assert re.search(r"^status=1\b", out, re.M) and "Traceback" not in out


# --- preparing a data set


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> tuple[Path, dict[str, bytes]]:
    """Write videos; return their folder, and the lists and shards that one process makes of them.

    A unit has one video and takes about a second.
    """
    folder = tmp_path_factory.mktemp("prepare")
    for i in range(12):
        path = folder / f"v/{'train' if i < 8 else 'val'}/a/{i}.avi"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_video(path, moving_frames(60, 300, 400, seed=i), codec="mpeg4")
    assert start_preparing(os.environ, folder / "v", folder / "whole").wait() == 0
    return folder / "v", contents(folder / "whole")


def start_preparing(environment, videos: Path, out: Path, *words: object) -> subprocess.Popen:
    words = ["folders", videos, out, "--reencode", "--pack", out / "shards", "--shard_mb", 0.01,
             "--short_side", 290, "--workers", 1, *words]  # fmt: skip
    return subprocess.Popen(
        [sys.executable, "-m", "util.prepare_kinetics", *map(str, words)],
        env={**environment, "PYTHONPATH": str(ROOT)}, cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


QUEUE = "--cluster", "slurm", "--jobs", 3, "--cpus_per_task", 1, "--partition", "main"


def finish_preparing(slurm, videos: Path, out: Path) -> str:
    process = start_preparing(slurm, videos, out, *QUEUE)
    text = process.communicate(timeout=300)[0]
    assert process.returncode == 0, text
    return text


def arrays(out: Path) -> set[str]:
    """Return the ids of the arrays that were submitted for a data set."""
    return {p.name.partition("_")[0] for p in (out / "shards/jobs").glob("*_submitted.pkl")}


def test_jobs_write_the_lists_and_shards_of_one_machine(slurm, prepared, tmp_path):
    """Two jobs are requeued, and the command is killed: the same command goes on beside the jobs.

    One job gets SIGUSR2, as before a time limit; the other one is preempted.
    """
    videos, whole = prepared
    process = start_preparing(slurm, videos, tmp_path, *QUEUE)
    wait_for((tmp_path / "shards/train-000000.json").exists, tmp_path / "shards/jobs")
    array = arrays(tmp_path).pop()
    wait_for(lambda: handles(signal.SIGUSR2, task=0), tmp_path / "shards/jobs")
    subprocess.run(["scancel", "--signal=USR2", f"{array}_0"], env=slurm, check=True)
    subprocess.run(["scontrol", "requeue", f"{array}_1"], env=slurm, check=True)
    process.kill()
    out = process.communicate()[0]
    assert re.search(rf"submitted 3 jobs, {array}_0 to {array}_2", out)
    finish_preparing(slurm, videos, tmp_path)
    assert contents(tmp_path) == whole
    for number in (0, 1):
        command = ["scontrol", "show", "job", f"{array}_{number}"]
        shown = subprocess.run(command, env=slurm, capture_output=True, text=True, check=True)
        assert "Restarts=1 " in shown.stdout
    out = finish_preparing(slurm, videos, tmp_path)  # nothing is left to do
    assert "0 of 12 videos to copy" in out and "submitted" not in out


def test_cancelled_jobs_are_an_error_and_the_same_command_goes_on(slurm, prepared, tmp_path):
    videos, whole = prepared
    process = start_preparing(slurm, videos, tmp_path, *QUEUE)
    wait_for(lambda: arrays(tmp_path), tmp_path / "shards/jobs")
    array = arrays(tmp_path).pop()
    subprocess.run(["scancel", array], env=slurm, check=True)  # before they have begun
    out = process.communicate(timeout=300)[0]
    assert process.returncode == 1 and "units are not done" in out, out
    assert "shards/jobs/*_log.err say why" in out
    assert not (tmp_path / "train.csv").exists()
    finish_preparing(slurm, videos, tmp_path)
    assert contents(tmp_path) == whole and len(arrays(tmp_path)) == 2
