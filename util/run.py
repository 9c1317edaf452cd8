"""How a script starts and ends: flags, device, ranks, and errors as one sentence and a status."""

import contextlib
import io
import re
import sys
import traceback
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from util import dist
from util.dist import print0
from util.errors import UserError
from util.file_io import make_dirs
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
    dist.shutdown()


def explain(error: BaseException) -> UserError | None:
    """Describe a failed file system or a lost process; return None for an unknown error."""
    if isinstance(error, UserError):
        return error
    text = " ".join(str(error).split())
    if isinstance(error, OSError):
        return UserError(text or type(error).__name__, status=1)
    if isinstance(error, RuntimeError):
        for pattern, happened in FAILURES.items():
            if re.search(pattern, text):
                go_on = "the same command continues from the newest checkpoint"
                return UserError(f"{happened} ({text[:200]}); {go_on}", status=1)
    return None


def start(args: Namespace) -> torch.device:
    """Join the other ranks, choose device and precision, and print the flags."""
    dist.adopt_slurm_step()
    with usage_errors():
        device = dist.get_device(args.device)
    dist.init_distributed(device.type, args.dist_timeout)
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
    if args.output_dir and dist.is_main():
        make_dirs(args.output_dir)
    return device


@contextlib.contextmanager
def usage_errors() -> Iterator[None]:
    """Turn a ValueError about sizes or flags into a UserError with the same words."""
    try:
        yield
    except ValueError as error:
        raise UserError(str(error)) from error
