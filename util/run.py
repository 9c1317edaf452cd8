"""How a script starts and ends: flags, device, ranks; errors become one sentence and a status."""

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
    """End the process according to what the body raises.

    A UserError ends it with its sentence and status, and so does a failure of the machine. When
    the body returns, or stops for a signal, all ranks do so together and leave their group; an
    error may happen on one rank alone.
    """
    try:
        yield
    except SystemExit:
        dist.shutdown()
        raise
    except BaseException as error:
        known = error if isinstance(error, UserError) else explain(error)
        several = dist.world_size() > 1
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
    else:
        dist.shutdown()


def explain(error: BaseException) -> UserError | None:
    """Say in a sentence that a file system has failed or another process is gone, else None."""
    if not isinstance(error, RuntimeError | OSError):
        return None
    text = " ".join(str(error).split())
    if isinstance(error, OSError):
        return UserError(text or type(error).__name__, status=1)
    if text.startswith("DataLoader worker"):
        reason = text.partition(". ")[0]
        sentence = (
            f"a loader process was killed ({reason}): most likely memory or /dev/shm has run out; "
            "lower --num_workers or --batch_size, or give the container more (--shm-size)"
        )
    elif re.search("[Tt]imed out waiting", text):
        sentence = f"another rank did not answer within --dist_timeout ({text[:200]})"
    elif re.search("Connection (closed|reset) by peer", text):
        sentence = f"another rank is gone; its own message says why ({text[:200]})"
    elif "connectFullMesh failed" in text:
        sentence = (
            "another rank is gone, or cannot be reached from here: GLOO_SOCKET_IFNAME names the "
            f"network interface to use ({text[:200]})"
        )
    else:
        return None
    return UserError(sentence + "; the same command goes on from the newest checkpoint", status=1)


def start(args: Namespace) -> torch.device:
    """Join the other ranks, choose device and precision, and print the flags.

    Raises:
        UserError: the machine has no such device.
    """
    dist.adopt_slurm_step()
    with usage_errors():
        device = dist.get_device(args.device)
    dist.init_distributed(device.type, args.dist_timeout)
    args.precision = choose_precision(args.precision, device)
    flags = {k: v for k, v in sorted(vars(args).items()) if k != "notice"}
    print0(" ".join(f"--{k} {v}" for k, v in flags.items()))
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
