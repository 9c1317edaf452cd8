"""How a script starts and ends: flags, device, ranks, and errors as one sentence and a status."""

import contextlib
import fcntl
import io
import os
import re
import socket
import sys
import time
import traceback
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO

import torch

from util import dist
from util.dist import print0
from util.errors import UserError
from util.file_io import is_remote, make_dirs
from util.optim import choose_precision, has_fast_bf16
from util.signals import signals_restored

# regular expressions for PyTorch's errors, and what has happened then
FAILURES = {
    "^DataLoader worker": "a loader process was killed: memory or /dev/shm has probably run out; "
    "lower --num_workers or --batch_size, or give the container more with --shm-size",
    "[Tt]imed out waiting": "another rank did not answer within --dist_timeout",
    "Connection (closed|reset) by peer": "another rank is gone; its own message says why",
    "connectFullMesh failed": "another rank is gone, or cannot be reached from here: "
    "GLOO_SOCKET_IFNAME names the network interface to use",
}
# what Slurm or submitit fill in; "90%noise" and "50%job" have none
PLACEHOLDER = re.compile(r"(?<!%)%(\d*j|[JAaNnstux])(?![A-Za-z0-9])")
LOCK_SECONDS = 10  # a requeued or restarted run may begin before its predecessor has ended
HOST = socket.gethostname()
LEASE_SECONDS = 120  # file servers free the locks of a machine that is gone only after a while
locks: dict[str, IO[bytes]] = {}  # files that this process has locked


@signals_restored()
def run(
    main: Callable[[Namespace], None], parse: Callable[[Sequence[str] | None], Namespace]
) -> None:
    """Parse flags and call main; on every rank a UserError ends the process with its status."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files may be any bytes
    with ending(Path(sys.argv[0]).name):
        main(parse(None))


@contextlib.contextmanager
def ending(script: str) -> Iterator[None]:
    """Leave the process group after the body; after an error, print it and exit with its status.

    When the body returns, or stops for a signal, all ranks leave the group together. An error may
    happen on one rank alone, which then exits without waiting for the others.
    """
    try:
        yield
    except SystemExit:
        dist.shutdown()
        raise
    except BaseException as error:
        known, several = explain(error), dist.world_size() > 1
        if known is not None:
            status = known.status
            prefix = f"[rank {dist.rank()}] " if several else ""
            print(f"{prefix}{script}: error: {known}", file=sys.stderr, flush=True)
        elif isinstance(error, KeyboardInterrupt):
            status = 130
        elif several:
            status = 1
            traceback.print_exc()
        else:
            raise
        if several:
            dist.exit_alone(status)
        sys.exit(status)
    finally:
        dist.finish_save()
        while locks:
            locks.popitem()[1].close()
    dist.shutdown()


def explain(error: BaseException) -> UserError | None:
    """Describe failed files, full memory or a lost process; return None for an unknown error."""
    if isinstance(error, UserError):
        return error
    text = " ".join(str(error).split())
    if isinstance(error, (OSError, MemoryError)):
        return UserError(text or type(error).__name__, status=1)
    if isinstance(error, RuntimeError):
        if re.search("^(CUDA|HIP)( error:)? out of memory|CUBLAS_STATUS_ALLOC_FAILED", text):
            lower = "lower --batch_size (in training, --accum_iter makes up for it, and "
            lower += "--grad_checkpointing saves memory)"
            return UserError(f"the GPU's memory is full: {lower}: {text[:200]}", status=1)
        for pattern, happened in FAILURES.items():
            if re.search(pattern, text):
                go_on = "the same command continues from the newest checkpoint"
                return UserError(f"{happened} ({text[:200]}); {go_on}", status=1)
    return None


def start(args: Namespace, lock: str = ".lock") -> torch.device:
    """Join the other ranks, choose device and precision, print the flags, lock --output_dir.

    `lock` is the file to lock there; runs that may share a folder have different ones.
    """
    fill_placeholders(args, os.environ.get("SLURM_JOB_ID", ""))
    dist.adopt_slurm_step()
    with usage_errors():
        device = dist.get_device(args.device)
    dist.init_distributed(device.type, args.dist_timeout)
    if getattr(args, "ranks", None) and dist.world_size() > 1:
        raise UserError("--ranks stands for ranks that do not run: give it to a single process")
    args.precision = choose_precision(args.precision, device)
    print0(" ".join(f"--{k} {v}" for k, v in sorted(vars(args).items()) if k != "notice"))
    if args.notice:
        print0(args.notice)
    dist.warn_of_stale_store()
    tf32 = " (fp32 matrix products in TF32)" if device.type == "cuda" else ""
    print0(f"{dist.world_size()} process(es) on {device.type}, {args.precision}{tf32}")
    if args.precision == "bf16" and device.type == "cpu" and not has_fast_bf16(device):
        print0("WARNING: this CPU has no bf16 arithmetic: expect steps to be tens of times slower")
    torch.set_float32_matmul_precision("high")
    if not (args.dry_run or getattr(args, "time_loader", None) or getattr(args, "eval", False)):
        open_output(args, lock)
    return device


def fill_placeholders(
    args: Namespace, job_id: str, names: Sequence[str] = ("output_dir", "log_dir")
) -> None:
    """Replace %j in the names of folders by the id of Slurm's job; refuse other placeholders."""
    for name in names:
        path = getattr(args, name, None) or ""  # None: not given to a launcher
        for placeholder in PLACEHOLDER.findall(path):
            if placeholder != "j" or not job_id:
                only = "only %j is filled in, by the id of a Slurm job, and only within the job"
                raise UserError(f"--{name} {path} has the placeholder %{placeholder}: {only}")
            setattr(args, name, PLACEHOLDER.sub(job_id, path))


def open_output(args: Namespace, lock: str) -> None:
    """Create --output_dir and lock it; every rank raises UserError if that fails."""
    error = None
    if not args.output_dir:
        curves = " but TensorBoard's files" if getattr(args, "log_dir", "") else ""
        print0(f"--output_dir is empty: this run writes nothing{curves}")
    elif dist.is_main():
        try:
            make_dirs(args.output_dir)
            lock_folder(args.output_dir, 30 * args.dist_timeout, lock)
        except UserError as caught:
            error = caught
    if error := dist.broadcast_object(error):
        raise error


def lock_folder(folder: str, most: float, name: str = ".lock") -> None:
    """Lock a folder until `ending`; raise UserError if another process keeps it.

    This waits for LOCK_SECONDS, or LEASE_SECONDS for another machine, but not over `most` seconds.
    A POSIX lock ends with its process, however that dies, and loader workers do not inherit it.
    Object stores have no locks. Where a file system has none, this warns.
    """
    path = os.path.join(folder, name)
    if is_remote(folder) or path in locks:
        return
    begin, told = time.monotonic(), False
    try:
        file = locks[path] = open(path, "a+b", buffering=0)  # noqa: SIM115  (`ending` closes it)
        while True:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except (BlockingIOError, PermissionError):  # both mean that it is locked
                file.seek(0)
                process = file.read(999).decode(errors="replace")
                holder, is_here = f"another run ({process}) uses {folder}", HOST in process
                seconds = min(most, LOCK_SECONDS if is_here else LEASE_SECONDS)
                if time.monotonic() - begin > seconds:
                    way_out = f"use another --output_dir (if that machine is gone, delete {path})"
                    raise UserError(f"{holder}; {way_out}", status=1) from None
                if not told:
                    print0(f"{holder}; trying again for {seconds:g} seconds")
                told = True
                time.sleep(0.1)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {HOST}".encode())
    except OSError as error:
        print0(f"WARNING: {folder} cannot be locked against a second run: {error}")


@contextlib.contextmanager
def usage_errors() -> Iterator[None]:
    """Turn a ValueError about sizes or flags into a UserError with the same words."""
    try:
        yield
    except ValueError as error:
        raise UserError(str(error)) from error
