"""Ranks: the same code runs under torchrun, under srun and as a single process."""

import os
import re
import socket
import sys
import threading
import time
from datetime import timedelta
from typing import Any, NoReturn

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from util.errors import UserError

SAVING = "saving"  # name of the thread that writes a checkpoint
HOW_TO_START = (
    "start all ranks with torchrun or `srun python ...` (a shell of `srun --pty` is one task), or "
    "unset RANK, WORLD_SIZE and SLURM_STEP_NUM_TASKS for a single process"
)


def rank() -> int:
    """Return the number of this process, 0 if it is the only one."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Return whether this process is the one that prints, logs and saves."""
    return rank() == 0


def print0(*values: Any, **options: Any) -> None:
    """Print in the main process only."""
    if is_main():
        print(*values, flush=True, **options)


def launch_text(name: str, default: str = "") -> str:
    """Return a variable of the launcher's environment; raise UserError if there is none."""
    text = os.environ.get(name) or default
    if not text:
        raise UserError(f"the environment variable {name} is missing; {HOW_TO_START}", status=1)
    return text


def launch_number(name: str, low: int, high: int = 2**32 - 1, default: str = "") -> int:
    """Return such a variable as a whole number; raise UserError unless it is from low to high."""
    text = launch_text(name, default)
    if re.fullmatch(r"\d{1,10}", text) and low <= int(text) <= high:
        return int(text)
    problem = f"is {text!r}, not a whole number from {low} to {high}"
    raise UserError(f"the environment variable {name} {problem}; {HOW_TO_START}", status=1)


def adopt_slurm_step() -> None:
    """Under srun with several tasks, set the environment variables that torchrun would set."""
    tasks = 1 if "RANK" in os.environ else launch_number("SLURM_STEP_NUM_TASKS", 1, default="1")
    if tasks == 1:
        return
    from submitit.slurm.slurm import _parse_node_list

    nodes = launch_number("SLURM_STEP_NUM_NODES", 1, tasks)
    job, step = (launch_number(f"SLURM_{what}_ID", 0) for what in ("JOB", "STEP"))
    # a step may run on some of the job's nodes; submitit's public reader knows only the job's list
    hosts = os.environ.get("SLURM_STEP_NODELIST") or launch_text("SLURM_JOB_NODELIST")
    os.environ |= {
        "RANK": str(launch_number("SLURM_PROCID", 0, tasks - 1)),
        "WORLD_SIZE": str(tasks),
        "LOCAL_RANK": str(launch_number("SLURM_LOCALID", 0, tasks - 1)),
        "LOCAL_WORLD_SIZE": str(tasks // nodes),
        "MASTER_ADDR": _parse_node_list(hosts)[0],
        # several steps of a job may run at the same time: each needs a port of its own
        "MASTER_PORT": os.environ.get("MASTER_PORT", str(20000 + (job * 7 + step) % 20000)),
    }


def init_distributed(device_type: str, timeout_minutes: float) -> None:
    """Join the process group that RANK, WORLD_SIZE, MASTER_ADDR ... describe, if there is one.

    NCCL carries CUDA tensors, Gloo all others. A collective that waits longer than the timeout ends
    the process with an error, so that nothing hangs for ever. NCCL gets five minutes more: the
    exchange in util.signals.Interruption then fails first, and its error says more.

    Raise UserError if a variable is missing or wrong, or if the ranks do not meet in time.
    """
    ranks = launch_number("WORLD_SIZE", 1, default="" if "RANK" in os.environ else "1")
    if ranks == 1 or dist.is_initialized():
        return
    number = launch_number("RANK", 0, ranks - 1)
    launch_number("LOCAL_WORLD_SIZE", 1, default="1")  # the loader reads it
    host, port = launch_text("MASTER_ADDR"), launch_number("MASTER_PORT", 1, 65535)
    backend, extra = ("nccl", 5) if device_type == "cuda" else ("gloo", 0)
    waiting = f"{f'rank {number}: ' if number else ''}waiting for {ranks} ranks at {host}:{port}"
    if "SLURM_PTY_PORT" in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ:
        waiting += f"; {HOW_TO_START}"
    if number == 0 or launch_number("LOCAL_RANK", 0, default="0") == 0:  # one of each node
        print(waiting, flush=True)
    try:
        if number:
            _wait_for_port(host, port, 60 * timeout_minutes)
        dist.init_process_group(backend, timeout=timedelta(minutes=timeout_minutes + extra))
    except (OSError, dist.DistStoreError, dist.DistNetworkError) as error:
        reason = " ".join(str(error).split())[:200]
        missed = f"{ranks} ranks did not meet at {host}:{port} ({reason})"
        if "EADDRINUSE" in reason:
            raise UserError(f"{missed}; give another MASTER_PORT", status=1) from error
        limit = f"within --dist_timeout {timeout_minutes:g} minutes"
        raise UserError(f"{missed} {limit}; {HOW_TO_START}", status=1) from error


def _wait_for_port(host: str, port: int, seconds: float) -> None:
    """Wait until rank 0 listens; PyTorch would print pages of C++ when it gives up."""
    end = time.monotonic() + seconds
    while True:
        try:
            return socket.create_connection((host, port), timeout=5).close()
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.2)


def warn_of_stale_store() -> None:
    """Warn when torchrun may restart ranks and its setting for that is missing.

    torchrun hands its store on to the restarted ranks, with the addresses that the previous ones
    left there (https://github.com/pytorch/pytorch/issues/135712).
    """
    shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if shared and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")):
        print0(
            "WARNING: for --max-restarts set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 before torchrun; "
            "else restarted ranks may look for each other at old addresses"
        )


def shutdown() -> None:
    """Leave the process group, together with all other ranks."""
    if dist.is_initialized():
        dist.destroy_process_group()


def finish_save() -> None:
    """Wait for the thread that writes a checkpoint, if there is one."""
    for thread in threading.enumerate():
        if thread.name == SAVING:
            thread.join()


def exit_alone(status: int) -> NoReturn:
    """End this process while the other ranks still run; finish a save in progress first.

    NCCL could not leave its group: another rank may wait in a collective, for this process. Once
    this process is gone, the other ranks and the launcher notice that something is wrong.
    """
    finish_save()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def get_device(name: str) -> torch.device:
    """Return the device of this process: cuda (one GPU per local rank), mps or cpu; auto: the best.

    Raise ValueError if the machine has no such device, or if processes would share a GPU.
    """
    if name == "auto":
        found = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
        name = next((kind for kind in found if found[kind]), "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device {name} is not a device; use cuda, mps, cpu or auto") from None
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError("--device mps is not available on this machine; use cpu")
    if device.type != "cuda":
        return device

    count, index = torch.cuda.device_count(), device.index
    if count == 0:
        raise ValueError(f"--device {name} asks for a GPU, but PyTorch sees none; use cpu")
    if index is None:
        # srun may let each task see only its own GPU; torchrun does not
        alone = count == 1 and "TORCHELASTIC_RUN_ID" not in os.environ
        index = 0 if alone else launch_number("LOCAL_RANK", 0, default="0")
    elif launch_number("WORLD_SIZE", 1, default="1") > 1:
        raise ValueError(f"--device {name} is one GPU for all processes; cuda gives each its own")
    if index >= count:
        raise ValueError(f"GPU {index} was asked for, but this machine has {count}")
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def all_reduce_sum(x: Tensor) -> Tensor:
    """Sum a tensor over all processes, in place."""
    if world_size() > 1:
        dist.all_reduce(x)
    return x


def all_reduce_mean(x: Tensor) -> Tensor:
    """Average a floating-point tensor over all processes, in place."""
    return all_reduce_sum(x).div_(world_size())


def gather_objects(value: Any) -> list[Any]:
    """Return the picklable values of all processes, in rank order, to every process."""
    values = [value] * world_size()
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


def broadcast_object(value: Any) -> Any:
    """Return the main process's picklable value to every process."""
    values = [value]
    if world_size() > 1:
        dist.broadcast_object_list(values)
    return values[0]


def barrier() -> None:
    """Wait until every process has arrived here."""
    if world_size() > 1:
        # without device_ids NCCL takes GPU number `rank`, which may be another process's
        nccl = dist.get_backend() == "nccl"
        dist.barrier(device_ids=[torch.cuda.current_device()] if nccl else None)


def seed_step(*key: int) -> None:
    """Seed PyTorch's generators from integers such as (seed, epoch, step, rank).

    Masks, drop path, dropout and noise then depend on the step alone, and a resumed run draws the
    same ones as a run that was never stopped.
    """
    state = np.random.SeedSequence(key).generate_state(2, np.uint32)
    torch.manual_seed(int(state[0]) << 32 | int(state[1]))
