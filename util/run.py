"""What every script does around its own work: errors, device, data folders, ranks."""

import contextlib
import io
import re
import sys
import traceback
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from util import dist
from util.checkpoint import Checkpoints, newest_checkpoint
from util.dist import print0
from util.errors import UserError
from util.file_io import make_dirs
from util.kinetics import VideoIndex
from util.optim import NonFiniteError, choose_precision, has_fast_bf16
from util.signals import signals_restored
from util.video_vit import Encoder


@signals_restored()
def run(
    main: Callable[[Namespace], None], parse: Callable[[Sequence[str] | None], Namespace]
) -> None:
    """Parse flags and call main; a UserError ends with its sentence and status, on every rank."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files may be any bytes
    with ending(Path(sys.argv[0]).name):
        main(parse(None))


@contextlib.contextmanager
def ending(script: str) -> Iterator[None]:
    """End the process as what comes out of the body says, or leave the group of ranks.

    A UserError ends it with a sentence and its status, and so does what happens to a machine. All
    ranks return together, and stop together for a signal; an error may be one rank's alone.
    """
    try:
        yield
    except SystemExit:
        dist.shutdown()
        raise
    except BaseException as error:
        mendable = error if isinstance(error, UserError) else what_happened(error)
        several = dist.world_size() > 1
        if mendable is not None:
            status = mendable.status
            prefix = f"[rank {dist.rank()}] " if several else ""
            print(f"{prefix}{script}: error: {mendable}", file=sys.stderr, flush=True)
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


def what_happened(error: BaseException) -> UserError | None:
    """Say in a sentence that a file system failed, or that another process is gone; else None."""
    if not isinstance(error, RuntimeError | OSError):
        return None
    text = " ".join(str(error).split())
    if isinstance(error, OSError):
        return UserError(text or type(error).__name__, status=1)
    if text.startswith("DataLoader worker"):
        reason = text.partition(". ")[0]
        sentence = (
            f"a loader process was killed ({reason}): memory or /dev/shm has run out, most likely; "
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
    """Join the other ranks, pick device and precision, and print the flags.

    Raises:
        UserError: the device is not there.
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
        print0("WARNING: this CPU has no arithmetic for bf16: expect steps tens of times slower")
    torch.set_float32_matmul_precision("high")
    if args.output_dir and dist.is_main():
        make_dirs(args.output_dir)
    return device


@contextlib.contextmanager
def usage_errors() -> Iterator[None]:
    """Turn the ValueErrors of what is built from flags into UserErrors with the same words."""
    try:
        yield
    except ValueError as error:
        raise UserError(str(error)) from error


def prepare(
    model: Encoder, device: torch.device, args: Namespace, dynamic: bool | None = None
) -> nn.Module:
    """Do as --grad_checkpointing and --compile say, and average gradients over several ranks.

    Args:
        dynamic: see Encoder.compile_blocks.

    Raises:
        UserError: torch.compile does not work on this machine (no C++ compiler, no Triton ...).
    """
    model.grad_checkpointing = args.grad_checkpointing
    if args.compile:
        try:
            torch.compile(torch.sin)(torch.zeros(2, device=device))  # fails now, not hours later
        except Exception as error:  # of whatever compiler there is
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"--compile: torch.compile does not work here: {reason}") from error
        model.compile_blocks(dynamic)
    if dist.world_size() == 1:
        return model
    return DistributedDataParallel(
        model,
        device_ids=[device.index] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
    )


def bad_step_report(
    error: NonFiniteError, checkpoints: Checkpoints, index: VideoIndex
) -> UserError:
    """Name the step, the files of the batch and the last good checkpoint; call it on every rank."""
    own = [] if error.samples is None else [index.path(int(i)) for i in error.samples]
    checkpoints.wait()
    files = [path for paths in dist.gather_objects(own) for path in paths]
    last = newest_checkpoint(checkpoints.args.output_dir)
    return UserError(
        f"epoch {checkpoints.progress.epoch}: {error.problem}; videos of the batch: "
        f"{', '.join(files) or 'unknown (the gradient alone is at fault)'}; last good checkpoint: "
        f"{last or 'none'}; nothing was saved since. Try a smaller --blr, --clip_grad, or "
        "--precision fp32",
        status=1,
    )
