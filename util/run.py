"""What every script does around its own work: errors, device, data folders, ranks."""

import contextlib
import io
import os
import re
import sys
import traceback
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from util import dist
from util.args import NOT_COMPARED
from util.dist import print0
from util.errors import UserError
from util.file_io import make_dirs
from util.kinetics import VideoIndex
from util.lr_sched import scaled_lr
from util.meters import BadStepError, RunLog, epoch_1000x, last_x
from util.optim import choose_precision, has_fast_bf16
from util.resume import Checkpoints, Progress, newest_checkpoint
from util.signals import signals_restored
from util.video_vit import Encoder

ROOT = Path(__file__).parent.parent


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


def synthetic_recipe(name: str) -> Callable[[Namespace], Sequence[str]]:
    """Return the default flags of runs without --path_to_data_dir: the embedded videos' recipe."""

    def default_flags(args: Namespace) -> Sequence[str]:
        return [] if args.path_to_data_dir else [f"@{ROOT / 'recipes' / name}"]

    return default_flags


def data_dir(args: Namespace, task: str) -> str:
    """Return the folder of csvs: --path_to_data_dir, or the synthetic videos, written if needed.

    Args:
        task: "pretrain" (all videos) or "finetune" (the few labelled ones).
    """
    if args.path_to_data_dir:
        return args.path_to_data_dir
    from util.synthetic import write_dataset

    folder = ROOT / "data" / "synthetic"
    print0(
        f"no --path_to_data_dir: using the embedded synthetic videos in {folder}, and "
        f"recipes/synthetic_{task}.args for flags that are not given"
    )
    if dist.is_main():
        write_dataset(str(folder))
    dist.barrier()
    return str(folder / task)


def clip_options(args: Namespace) -> dict[str, Any]:
    """Return what the flags say of the clips of every data set, for Kinetics."""
    names = "input_size num_frames sampling_rate sampling max_pixels item_timeout"
    return {name: getattr(args, name) for name in names.split()}


def effective_lr(args: Namespace, counted: str, steps: int) -> float:
    """Print the arithmetic of batch size and learning rate, and return the peak rate.

    Args:
        counted: "videos" or their "clips", which the rule of the recipe calls the batch.
        steps: of an epoch.

    Raises:
        UserError: an epoch is too short for a single update.
    """
    if steps < args.accum_iter:
        raise UserError(
            f"an epoch has {steps} steps, too few for an update every --accum_iter "
            f"{args.accum_iter} steps; lower it, or use more videos"
        )
    ranks = dist.world_size()
    videos = args.batch_size * args.accum_iter * ranks
    batch = {"videos": videos, "clips": videos * args.repeat_aug}
    lr = scaled_lr(args.blr, batch[counted]) if args.lr is None else args.lr
    print0(
        f"videos per update: {args.batch_size} per rank x {args.accum_iter} accumulated x {ranks} "
        f"ranks = {videos}; clips per update: {videos} x {args.repeat_aug} = {batch['clips']}"
    )
    if args.lr is None:
        size = f"{batch[counted]} {counted}"
        print0(f"learning rate: blr {args.blr:g} x batch of {size} / 256 = {lr:.3g}")
    else:
        print0(f"learning rate: {lr:.3g} by --lr")
    if args.warmup_epochs >= args.epochs:
        reached = lr * args.epochs / args.warmup_epochs
        print0(
            f"WARNING: --warmup_epochs {args.warmup_epochs:g} do not end within --epochs "
            f"{args.epochs}: the learning rate rises to {reached:.3g} and never falls"
        )
    return lr


def print_flops(model: nn.Module, args: Namespace, **options: float) -> None:
    """Print what one clip costs; the end of a --dry_run, as the model is of no use afterwards."""
    from util.flops import count_flops

    shape = (3, args.num_frames, args.input_size, args.input_size)
    gflops = count_flops(model, shape, **options)
    print0(f"{gflops:.1f} GFLOPs per clip forward (multiply-adds counted once); dry run: stopping")


def open_log(
    args: Namespace,
    device: torch.device,
    progress: Progress,
    steps_per_epoch: int,
) -> RunLog:
    """Open the log of a training run; TensorBoard drops what a killed process wrote after it."""
    done = epoch_1000x(progress.epoch + progress.step / steps_per_epoch, args.repeat_aug)
    # after the last step its results are still to come
    purge_step = min(done, last_x(progress.epoch, args.repeat_aug)) if done else None
    log = RunLog(
        log_dir(args),
        args.print_freq,
        device,
        purge_step,
        args.skip_nonfinite,
        args.kill_loss_factor,
        time_first_step=args.compile,
    )
    flags = {name: value for name, value in vars(args).items() if name not in NOT_COMPARED}
    log.hparams(flags | {"ranks": dist.world_size()})
    return log


def bad_step_report(error: BadStepError, checkpoints: Checkpoints, index: VideoIndex) -> UserError:
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


def log_dir(args: Namespace) -> str:
    """Return TensorBoard's folder."""
    return args.log_dir or os.path.join(args.output_dir, "tensorboard")
