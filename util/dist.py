"""Process groups: started by torchrun, by srun or by nobody, with the same code."""

import os
import sys
import threading
from datetime import timedelta
from typing import Any, NoReturn

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

SAVING = "saving"  # name of the thread that writes a checkpoint


def rank() -> int:
    """Return the number of this process among all, 0 when there is one."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Tell whether this process prints, logs and saves."""
    return rank() == 0


def print0(*values: Any, **options: Any) -> None:
    """Print in the main process alone."""
    if is_main():
        print(*values, flush=True, **options)


def adopt_slurm_step() -> None:
    """Translate the variables of a job step (srun) of several tasks into those of torchrun."""
    if "RANK" in os.environ or int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) == 1:
        return
    from submitit.slurm.slurm import SlurmJobEnvironment  # knows how node lists are written

    tasks, nodes = (int(os.environ[f"SLURM_STEP_NUM_{what}"]) for what in ("TASKS", "NODES"))
    # steps of one job that run side by side must not meet at one port
    port = 20000 + (int(os.environ["SLURM_JOB_ID"]) * 7 + int(os.environ["SLURM_STEP_ID"])) % 20000
    os.environ |= {
        "RANK": os.environ["SLURM_PROCID"],
        "WORLD_SIZE": str(tasks),
        "LOCAL_RANK": os.environ["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(tasks // nodes),
        "MASTER_ADDR": SlurmJobEnvironment().hostnames[0],
        "MASTER_PORT": os.environ.get("MASTER_PORT", str(port)),
    }


def init_distributed(device_type: str, timeout_minutes: float) -> None:
    """Join the process group described by the environment, or none for a single process.

    It is described by RANK, WORLD_SIZE, MASTER_ADDR ...; NCCL carries CUDA tensors, Gloo all
    others. A collective that waits longer than the timeout ends the process with an error instead
    of hanging for ever; NCCL's later, as its way of ending says less than that of
    util.signals.Interruption.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        nccl = device_type == "cuda"
        dist.init_process_group(
            "nccl" if nccl else "gloo",
            timeout=timedelta(minutes=timeout_minutes + (5 if nccl else 0)),
        )


def warn_of_stale_store() -> None:
    """Say what restarts by torchrun need; without it they may fail to connect.

    torchrun hands its store to every new set of ranks with the addresses that the last ones left
    there (https://github.com/pytorch/pytorch/issues/135712).
    """
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))
    if restarts and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        print0(
            "WARNING: for --max-restarts set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 before torchrun; "
            "else restarted ranks may look for each other at old addresses"
        )


def shutdown() -> None:
    """Leave the process group, if there is one, together with all other ranks."""
    if dist.is_initialized():
        dist.destroy_process_group()


def exit_alone(status: int) -> NoReturn:
    """End this process at once, after a save that is under way: the other ranks do not end yet.

    NCCL leaves a group only when no rank is in a collective any more, and the others wait in one
    for this process. That it is gone is what tells them and the launcher.
    """
    for thread in threading.enumerate():
        if thread.name == SAVING:
            thread.join()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def get_device(name: str) -> torch.device:
    """Return the device of this process: cuda (one per local rank), mps, cpu, or the best for auto.

    Raises:
        ValueError: the machine has no such device, or fewer GPUs than processes, or one GPU is
            named for several processes.
    """
    if name == "auto":
        name = "cpu"
        if torch.cuda.is_available():
            name = "cuda"
        elif torch.backends.mps.is_available():
            name = "mps"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device {name} is not a device; use cuda, mps, cpu or auto") from None
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if count == 0:
            raise ValueError(f"--device {name} asks for a GPU and PyTorch sees none; use cpu")
        index = device.index
        if index is not None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError(
                f"--device {name} names one GPU for all processes; with cuda each takes its own"
            )
        if index is None:
            local_rank = int(os.environ.get("LOCAL_RANK", "0"))
            # srun may show each task its own GPU alone; torchrun does not
            alone = count == 1 and "TORCHELASTIC_RUN_ID" not in os.environ
            index = 0 if alone else local_rank
        if index >= count:
            raise ValueError(f"GPU {index} was asked for and this machine has {count}")
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
    elif device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError("--device mps is not available on this machine; use cpu")
    return device


def all_reduce_mean(x: Tensor) -> Tensor:
    """Average a tensor over all processes (in place, where there are several)."""
    if world_size() > 1:
        dist.all_reduce(x)
        x /= world_size()
    return x


def all_reduce_sum(x: Tensor) -> Tensor:
    """Add a tensor over all processes (in place, where there are several)."""
    if world_size() > 1:
        dist.all_reduce(x)
    return x


def gather_objects(value: Any) -> list[Any]:
    """Collect a picklable value of every process, in rank order, in every process."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast_object(value: Any) -> Any:
    """Hand the main process's picklable value to every process."""
    if world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def barrier() -> None:
    """Wait until every process is here."""
    if world_size() > 1:
        # else NCCL takes the GPU numbered as the rank, which may be another process's
        nccl = dist.get_backend() == "nccl"
        dist.barrier(device_ids=[torch.cuda.current_device()] if nccl else None)


def seed_step(*key: int) -> None:
    """Seed PyTorch's generators from integers such as (seed, epoch, step, rank).

    Called before every training step, it makes masks, drop path, dropout and noise functions of
    the step alone, so that a resumed run continues with the very ones it would have drawn.
    """
    state = np.random.SeedSequence(key).generate_state(2, np.uint32)
    torch.manual_seed(int(state[0]) << 32 | int(state[1]))
