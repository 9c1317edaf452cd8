"""Test faults around a run: killed workers, ranks that hang or die, taken ports, bad flags."""

import contextlib
import errno
import os
import re
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch

import main_finetune
import main_pretrain
import main_test
import submitit_finetune
import submitit_pretrain
import submitit_test
from models_vit import vit_tiny_patch8
from tests.conftest import FORK
from tests.test_kills import argv, children, kill_all, rank_pid, wait_for_line
from tests.test_scripts import (
    FINETUNE,
    PRETRAIN,
    ROOT,
    assert_same_weights,
    call,
    fails,
    finish,
    spawn,
)
from util import run, slurm
from util.errors import UserError


@pytest.fixture(scope="module")
def classifier(tmp_path_factory) -> Path:
    """Write an untrained classifier of three classes."""
    path = tmp_path_factory.mktemp("classifier") / "vit.pth"
    sizes = {"img_size": 32, "num_frames": 4, "num_classes": 3}
    model = vit_tiny_patch8(**sizes)
    torch.save({"model": model.state_dict(), "arguments": model.arguments}, path)
    return path


def loader_workers(pid: int) -> list[int]:
    """Find the loader's workers: as forks they have the command line of their parent."""
    own = Path(f"/proc/{pid}/cmdline").read_bytes()
    return [p for p in children(pid) if Path(f"/proc/{p}/cmdline").read_bytes() == own]


@pytest.mark.parametrize(
    "number", [signal.SIGKILL, pytest.param(signal.SIGBUS, marks=pytest.mark.slow)]
)
def test_a_killed_loader_worker_ends_in_one_sentence(videos, tmp_path, number):
    """The OOM killer sends SIGKILL; a full /dev/shm causes SIGBUS."""
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
    process = spawn("main_pretrain.py", *flags, "--dist_timeout", 0.3, ranks=2)
    try:
        wait_for_line(process, r"Epoch \[1/5000\]")
        os.kill(rank_pid(process, 1), signal.SIGSTOP)
        began = time.monotonic()
        out = wait_for_line(process, "--dist_timeout")
        assert time.monotonic() - began < 60
        assert re.search(r"rank 0.*error: another rank did not answer", out), out
        # torchrun kills the other rank after 30 s, because a stopped process cannot exit
        process.communicate(timeout=120)
        assert process.returncode == 1
    finally:
        kill_all(process)


FAILS_ALONE = """
import threading, time
from pathlib import Path
import torch
from util import dist, run

def save():
    time.sleep(1)
    Path("saved").touch()

def main(args):
    device = dist.get_device({device!r})
    dist.init_distributed(device.type, 30)
    dist.barrier()
    if device.type == "cpu":  # as NCCL, wait for the others to leave their collectives
        torch.distributed.destroy_process_group = lambda: time.sleep(1000)
    if dist.rank() == 1:
        threading.Thread(target=save, name=dist.SAVING).start()
        raise AssertionError("of rank 1 alone")
    dist.all_reduce_sum(torch.zeros(1, device=device)).item()

run.run(main, lambda argv: None)
"""


@pytest.mark.parametrize(
    "device",
    [
        pytest.param("cpu", marks=pytest.mark.slow),
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
            ],
        ),
    ],
)
def test_a_rank_that_fails_alone_leaves_at_once(tmp_path, device):
    """The other ranks wait for it in a collective: it must wait for its save, but not for them."""
    script = tmp_path / "fails.py"
    script.write_text(FAILS_ALONE.format(device=device))
    began = time.monotonic()
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    process = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
         str(script)],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True,
        timeout=240,
    )  # fmt: skip
    assert process.returncode == 1
    assert "AssertionError: of rank 1 alone" in process.stderr
    assert (tmp_path / "saved").exists()
    assert time.monotonic() - began < 100


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
                with contextlib.suppress(FileNotFoundError):  # it was closed in the meantime
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


def alive(pid: int) -> bool:
    """Return whether a process exists and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
def test_loader_workers_die_with_the_trainer(videos, tmp_path):
    """Workers ignore launchers' signals, so they must notice themselves that the trainer died."""
    flags = argv("main_pretrain.py", videos, tmp_path, 1, 2)
    flags[flags.index("--epochs") + 1] = 500
    process = spawn("main_pretrain.py", *flags)
    wait_for_line(process, r"Epoch \[1/500\]")
    workers = loader_workers(process.pid)
    assert len(workers) == 2
    for pid in workers:
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT):
            os.kill(pid, number)
    wait_for_line(process, r"Epoch \[3/500\]")
    assert loader_workers(process.pid) == workers
    process.kill()
    process.communicate(timeout=60)
    deadline = time.monotonic() + 60
    while any(map(alive, workers)):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_help_of_the_launchers_shows_the_flags_of_script_and_job(capsys):
    launchers = (
        (submitit_pretrain, "--mask_ratio"),
        (submitit_finetune, "--mixup"),
        (submitit_test, "--num_crops"),
    )
    for module, own in launchers:
        with pytest.raises(SystemExit) as caught:
            module.parse_args(["--help"])
        assert caught.value.code == 0
        text = capsys.readouterr().out
        for flag in (own, "--path_to_data_dir", "--cluster", "--nodes", "--ngpus", "--job_dir"):
            assert flag in text


@pytest.mark.parametrize("flag", ["--job_dir", "--output_dir", "--log_dir"])
def test_a_job_with_another_placeholder_is_not_submitted(tmp_path, flag):
    args = submitit_pretrain.parse_args([flag, f"{tmp_path}/%A", "--cluster", "local"])
    with pytest.raises(UserError, match=f"{flag} .* has the placeholder %A: only %j is"):
        slurm.submit("main_pretrain", args)


@pytest.mark.parametrize(
    ("given", "folder"), [([], "jobs/5"), (["--output_dir", "%j/out"], "5/out"),
                          (["--output_dir", ""], "")]
)  # fmt: skip
def test_the_folder_of_a_job(monkeypatch, given, folder):
    """A job fills in its own id, on Slurm or not; an empty --output_dir saves nothing."""
    seen = []
    monkeypatch.setattr(main_pretrain, "main", seen.append)
    environment = Namespace(job_id="5", num_tasks=1)
    monkeypatch.setattr(slurm.submitit, "JobEnvironment", lambda: environment)
    args = submitit_pretrain.parse_args(["--job_dir", "jobs/%j", "--log_dir", "%j/log", *given])
    slurm.Job("main_pretrain", args)()
    assert [(args.output_dir, args.log_dir) for args in seen] == [(folder, "5/log")]


@pytest.mark.slow
def test_a_local_job_of_two_tasks(videos, tmp_path):
    """Submit two CPU tasks without Slurm; checkpoints go to the job's own folder."""
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


@pytest.mark.slow
def test_a_local_job_that_fails_says_so_in_a_sentence(tmp_path):
    out = finish(
        spawn(
            "submitit_pretrain.py", *PRETRAIN, "--path_to_data_dir", tmp_path / "nowhere",
            "--cluster", "local", "--ngpus", 0, "--job_dir", tmp_path / "%j",
        ),
        status=1,
    )  # fmt: skip
    assert "submitit_pretrain.py: error: the job failed; the logs in" in out
    (log,) = tmp_path.glob("*/*_0_log.err")
    assert "main_pretrain.py: error: cannot open" in log.read_text()
    assert "Traceback" not in out + log.read_text()


def wait_until(what: Callable[[], object], printed: Callable[[], str], seconds=120.0) -> None:
    """Poll until a condition holds; after the timeout fail with what the processes printed."""
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, printed()
        time.sleep(0.01)


# --- two runs in one folder


def lock_and_wait(folder: Path, names: tuple[str, ...], pipe: Connection) -> None:
    for name in names:
        run.lock_folder(str(folder), 0, name)
    pipe.send("locked")
    time.sleep(1000)


@contextlib.contextmanager
def held(folder: Path, *names: str) -> Iterator[int]:
    """Lock files in a folder in another process; gives its id."""
    here, there = FORK.Pipe()
    process = FORK.Process(target=lock_and_wait, args=(folder, names, there), daemon=True)
    process.start()
    assert here.poll(60) and here.recv() == "locked"
    yield process.ident
    process.kill()
    process.join()


@pytest.fixture(scope="module")
def holder(tmp_path_factory):
    """Lock a folder in another process, as a training run and as a test; return both."""
    folder = tmp_path_factory.mktemp("run")
    with held(folder, ".lock", ".lock_test") as pid:
        yield folder, pid


def test_a_training_run_need_not_wait_for_a_test(videos, tmp_path):
    with held(tmp_path, ".lock_test"):
        call(main_pretrain, "--path_to_data_dir", videos, "--output_dir", tmp_path, *PRETRAIN,
             "--epochs", 1)  # fmt: skip


@pytest.mark.parametrize(
    ("module", "flags"), [(main_pretrain, PRETRAIN), (main_finetune, FINETUNE), (main_test, [])]
)
def test_a_second_run_in_a_folder_is_refused(
    videos, holder, classifier, monkeypatch, capsys, module, flags
):
    monkeypatch.setattr(run, "LOCK_SECONDS", 0.3)
    folder, pid = holder
    before = {path: path.read_bytes() for path in folder.iterdir()}
    argv = ["--path_to_data_dir", videos, "--output_dir", folder, "--device", "cpu", *flags]
    argv += ["--finetune", classifier] if module is main_test else []
    status, text = fails(capsys, module, *argv)
    assert status == 1
    assert f"another run (process {pid} on " in text and f"uses {folder}" in text
    call(module, *argv, "--dry_run")  # writes nothing, as --eval
    if module is main_finetune:
        call(module, *argv, "--eval", "--resume", classifier)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.slow
def test_the_lock_dies_with_its_process_not_with_its_workers(videos, tmp_path, monkeypatch, capsys):
    """After SIGKILL the workers live on for seconds, but the next run need not wait for them."""
    flags = argv("main_pretrain.py", videos, tmp_path, 1, 2)
    flags[flags.index("--epochs") + 1] = 500
    first = spawn("main_pretrain.py", *flags)
    wait_for_line(first, r"Epoch \[1/500\]")
    workers = loader_workers(first.pid)
    for pid in workers:
        os.kill(pid, signal.SIGSTOP)
    flags[flags.index("--epochs") + 1] = 2
    told = []

    def tell(words):
        told.append(words)
        first.kill()

    monkeypatch.setattr(run, "print0", lambda *words: "another run" in words[0] and tell(words[0]))
    try:
        call(main_pretrain, *flags)
        assert all(map(alive, workers))
    finally:
        for pid in workers:
            os.kill(pid, signal.SIGKILL)
        kill_all(first)
    (words,) = told
    assert re.match(rf"another run \(process {first.pid} on .*; trying again", words)
    assert "resumed from" in capsys.readouterr().out


@pytest.mark.slow
def test_every_rank_ends_when_the_folder_is_in_use(videos, holder):
    folder, _ = holder
    flags = argv("main_pretrain.py", videos, folder, 2, 0)
    out = finish(spawn("main_pretrain.py", *flags, "--dist_timeout", 0.1, ranks=2), status=1)
    assert "trying again for 3 seconds" in out
    for rank in (0, 1):
        assert f"[rank {rank}] main_pretrain.py: error: another run (process" in out


def test_one_process_may_run_in_a_folder_again(tmp_path):
    for _ in range(2):
        run.lock_folder(str(tmp_path), 0)
        run.lock_folder(str(tmp_path), 0)
        with run.ending("main_pretrain.py"):
            assert len(run.locks) == 1
        assert not run.locks
    assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} on ")


def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch, capsys):
    def lockf(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(run.fcntl, "lockf", lockf)
    with run.ending("main_pretrain.py"):
        run.lock_folder(str(tmp_path), 0)
        run.lock_folder("s3://bucket/run", 0)
    warning = f"WARNING: {tmp_path} cannot be locked against a second run: "
    assert capsys.readouterr().out.startswith(warning)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 ..."),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be ..."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
    ids=["allocator", "driver", "cuBLAS"],
)
def test_full_memory_of_a_gpu_is_one_sentence(capsys, error):
    with pytest.raises(SystemExit) as caught, run.ending("main_pretrain.py"):
        raise error
    assert caught.value.code == 1
    err = capsys.readouterr().err
    assert "error: the GPU's memory is full: lower --batch_size" in err and err.count("\n") == 1


# --- torchrun over two hosts made of network namespaces


HOSTS = ("mae1", "mae2")


def ip(*words: object) -> None:
    subprocess.run(["ip", *map(str, words)], check=True)


@pytest.fixture(scope="module")
def hosts():
    """Connect two network namespaces; each can look up both host names."""
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    try:
        ip("netns", "add", HOSTS[0])
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        pytest.skip(f"cannot make network namespaces: {error}")
    try:
        ip("netns", "add", HOSTS[1])
        ip("link", "add", "maeA", "netns", HOSTS[0], "type", "veth",
           "peer", "name", "maeB", "netns", HOSTS[1])  # fmt: skip
        names = "127.0.0.1 localhost\n10.78.0.1 mae1\n10.78.0.2 mae2\n"
        for number, (host, device) in enumerate(zip(HOSTS, ("maeA", "maeB"), strict=True), 1):
            ip("-n", host, "addr", "add", f"10.78.0.{number}/24", "dev", device)
            for link in (device, "lo"):
                ip("-n", host, "link", "set", link, "up")
            folder = Path("/etc/netns", host)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "hosts").write_text(names)  # `ip netns exec` binds it over /etc/hosts
        yield HOSTS
    finally:
        for host in HOSTS:
            subprocess.run(["ip", "netns", "del", host], check=False)
            (Path("/etc/netns", host) / "hosts").unlink(missing_ok=True)
            if Path("/etc/netns", host).is_dir():
                Path("/etc/netns", host).rmdir()


def torchrun_on(host: str, log: Path, *flags: object) -> subprocess.Popen:
    """Start torchrun with one rank on a host, under the host's name, and print to a file."""
    command = [
        "ip", "netns", "exec", host, "unshare", "--uts", "sh", "-c",
        f'hostname {host}; exec "$@"', "sh", sys.executable, "-m", "torch.distributed.run",
        "--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", "--rdzv_endpoint=mae1:29500",
        "--rdzv_id=1", "--max-restarts=2", ROOT / "main_pretrain.py", *flags,
    ]  # fmt: skip
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "MKL_CBWR": "COMPATIBLE",
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # see PRETRAIN.md
    }  # fmt: skip
    with log.open("w") as file:
        return subprocess.Popen(
            list(map(str, command)), stdout=file, stderr=subprocess.STDOUT, env=environment
        )


@pytest.mark.slow
def test_two_hosts_restart_by_themselves_after_a_kill(hosts, videos, tmp_path):
    """After SIGKILL to a rank, torchrun restarts both ranks from the newest checkpoint."""
    whole, part = tmp_path / "whole", tmp_path / "part"
    flags = [*PRETRAIN, "--epochs", 12, "--batch_size", 1, "--path_to_data_dir", videos]
    flags += ["--checkpoint_minutes", 1e-6, "--dist_timeout", 1, "--keep_last", 2]
    finish(spawn("main_pretrain.py", *flags, "--output_dir", whole, ranks=2))
    logs = [tmp_path / f"{host}.txt" for host in hosts]
    agents = [
        torchrun_on(host, log, *flags, "--output_dir", part)
        for host, log in zip(hosts, logs, strict=True)
    ]

    def printed() -> str:
        return "\n".join(log.read_text() for log in logs)

    try:
        wait_until(lambda: list(part.glob("checkpoint-00002*.pth")), printed)
        (victim,) = children(agents[1].pid)
        os.kill(victim, signal.SIGKILL)
        wait_until(lambda: all(agent.poll() is not None for agent in agents), printed)
    finally:
        for agent in agents:
            kill_all(agent)
    assert [agent.returncode for agent in agents] == [0, 0], printed()
    assert "resumed from" in printed()
    last = "checkpoint-00011.pth"
    assert_same_weights(part / last, whole / last)
    assert (part / "log.txt").read_text() == (whole / "log.txt").read_text()


# --- bad steps


@pytest.mark.parametrize("module", [main_pretrain, main_finetune])
def test_no_step_is_skipped_by_default(module):
    args = module.parse_args(["--path_to_data_dir", "X"])
    assert args.skip_nonfinite == 0
