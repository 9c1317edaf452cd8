"""Exact resume: checkpoints from which a run goes on as if it had never stopped.

A training checkpoint is a plain dict: model, optimizer, scaler (state dicts), epoch (the last one
finished), step (optimiser steps done), args (a dict of flags), arguments (of the model's
constructor), progress and identity (see Progress and Checkpoints).

Masks, clips and all other random choices are functions of (seed, epoch, step or sample), so that
weights, optimiser, scaler and the place in the epoch are the whole state of a run.
"""

import argparse
import contextlib
import os
import re
import signal
import sys
import threading
import time
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import simplejson
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only

from util.checkpoint import read_checkpoint
from util.convert import checkpoint_args, model_state
from util.dist import broadcast_object, is_main, print0, world_size
from util.errors import UserError
from util.file_io import is_remote, make_dirs, open_file, path_manager, write_atomically

# checkpoint-00012.pth: epoch 12 is done; checkpoint-00013-00000450.pth: 450 steps of epoch 13 are
CHECKPOINT_NAME = re.compile(r"checkpoint-(\d+)(?:-(\d+))?\.pth")
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
REQUEUE_STATUS = 75  # EX_TEMPFAIL: stopped by a signal, run the same command again


@dataclass
class Progress:
    """The place of a run: `step` micro-steps of `epoch` are done, `updates` before that epoch."""

    epoch: int = 0
    step: int = 0
    updates: int = 0
    sums: dict[str, float] = field(default_factory=dict)  # of this epoch's metrics
    counts: dict[str, int] = field(default_factory=dict)
    log: list[dict[str, Any]] = field(default_factory=list)  # the lines of log.txt so far

    def finish_epoch(self, record: dict[str, Any], updates: int) -> None:
        """Note the line that log.txt gets for the epoch, and move on to the next."""
        self.log.append(record)
        self.updates += updates
        self.epoch, self.step, self.sums, self.counts = self.epoch + 1, 0, {}, {}


def checkpoint_order(name: str) -> tuple[int, float] | None:
    """Return what sorts checkpoints by age, or None for other files."""
    match = CHECKPOINT_NAME.fullmatch(name)
    if match is None:
        return None
    return int(match[1]), float(match[2]) if match[2] else float("inf")


def list_checkpoints(output_dir: str) -> list[str]:
    """Return the paths of a folder's checkpoints, oldest first."""
    if not output_dir or not path_manager.isdir(output_dir):
        return []
    names = [name for name in path_manager.ls(output_dir) if checkpoint_order(name)]
    names.sort(key=lambda name: checkpoint_order(name) or (0, 0.0))
    return [os.path.join(output_dir, name) for name in names]


def newest_checkpoint(output_dir: str) -> str | None:
    """Return the path of a folder's newest checkpoint, or None."""
    found = list_checkpoints(output_dir)
    return found[-1] if found else None


def read_intact(path: str) -> dict[str, Any]:
    """Read a training checkpoint after checking the checksum of every tensor in it.

    Raises:
        UserError: it is damaged.
    """
    if not is_remote(path):
        with contextlib.suppress(zipfile.BadZipFile, OSError), zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
            if damaged:
                raise UserError(f"{path} is damaged: wrong checksum of {damaged}")
    return read_checkpoint(path)


def find_checkpoint(args: argparse.Namespace) -> str | None:
    """Return the checkpoint to resume from, the same on every rank: --resume, or the newest.

    A damaged one in the output folder is reported and the one before it taken.
    """
    path = args.resume or None
    if path is None and is_main():
        for candidate in reversed(list_checkpoints(args.output_dir)):
            try:
                read_intact(candidate)
            except UserError as error:
                print0(f"WARNING: {error}; trying the one before it")
                continue
            path = candidate
            break
    return broadcast_object(path)


def append_log(output_dir: str, record: dict[str, Any]) -> None:
    """Append one JSON line to log.txt, from the main process."""
    if is_main() and output_dir:
        with open_file(os.path.join(output_dir, "log.txt"), "a") as file:
            file.write(simplejson.dumps(record) + "\n")


def rewrite_log(output_dir: str, records: list[dict[str, Any]]) -> None:
    """Make log.txt what it was when a checkpoint was saved: a kill may have come in between."""
    if is_main() and output_dir:
        text = "".join(simplejson.dumps(record) + "\n" for record in records)
        path = os.path.join(output_dir, "log.txt")
        write_atomically(path, lambda file: file.write(text.encode()))


class Checkpoints:
    """Save the objects of a run, and bring them back.

    Files are written by a thread from a copy in host memory, atomically; a write that fails (full
    disk, lost folder) is reported loudly, leaves the older files, and lets training go on. Only
    the main process writes.

    Args:
        args: with output_dir, resume, checkpoint_period (epochs), checkpoint_minutes, keep_last,
            keep_every and model.
        fingerprint: of the training videos; a checkpoint of other ones is refused.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        model: nn.Module,
        optimizer: Optimizer,
        scaler: torch.amp.GradScaler,
        fingerprint: int,
    ):
        self.args = args
        self.model = model
        self.optimizer = optimizer
        self.scaler = scaler
        # an epoch can be continued with the same joint batch only: its steps would be others
        joint_batch = args.batch_size * world_size()
        self.identity = {"data": fingerprint, "joint_batch": joint_batch, "accum": args.accum_iter}
        self.progress = Progress()
        self.best_epoch: int | None = None
        self.last_saved = time.monotonic()
        self.thread: threading.Thread | None = None
        self.interruption = Interruption()

    # --- in the training loop -----------------------------------------------------------------

    def is_stopping(self, step: int) -> bool:
        """Tell, alike on every rank, whether step was the last one; ask after every step."""
        return (step + 1) % self.args.accum_iter == 0 and self.interruption.after_update()

    def after_line(self, step: int, sums: dict[str, float], counts: dict[str, int]) -> None:
        """Note the place in the epoch, and save when checkpoint_minutes have gone by.

        Called where metrics have just been read. Between updates there is nothing to save: the
        gradients gathered so far are no part of a checkpoint.
        """
        if (step + 1) % self.args.accum_iter:
            return
        self.progress.step = step + 1
        self.progress.sums, self.progress.counts = dict(sums), dict(counts)
        minutes = self.args.checkpoint_minutes
        if minutes and time.monotonic() - self.last_saved >= 60 * minutes:
            self.save()

    def finish_epoch(self, record: dict[str, Any], steps: int, best: bool = False) -> None:
        """Note an epoch's line for log.txt and save every checkpoint_period epochs."""
        progress, args = self.progress, self.args
        if best:
            self.best_epoch = progress.epoch
        progress.finish_epoch(record, steps // args.accum_iter)
        if progress.epoch % args.checkpoint_period == 0 or progress.epoch == args.epochs:
            self.save()
        append_log(args.output_dir, record)

    def stop_if_told(self) -> None:
        """Save and end the process, when a signal has asked for it; call it after the loop."""
        if self.interruption.agreed:
            self.save()
            self.wait()
            self.interruption.leave()

    # --- saving -----------------------------------------------------------------------------

    def save(self) -> None:
        """Write the checkpoint of this moment; the copy is done when this returns, not the file."""
        self.last_saved = time.monotonic()
        if not is_main():
            return
        self.wait()
        progress = self.progress
        name = f"checkpoint-{progress.epoch:05d}-{progress.step:08d}.pth"
        if progress.step == 0:
            name = f"checkpoint-{progress.epoch - 1:05d}.pth"
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "epoch": progress.epoch - 1,  # the last one finished
            "step": progress.updates + progress.step // self.args.accum_iter,
            "progress": asdict(progress),
            "identity": self.identity,
            "args": vars(self.args),
            "arguments": getattr(self.model, "arguments", {}),  # of its constructor
        }
        state = tree_map_only(Tensor, lambda x: x.detach().to("cpu", copy=True), state)
        path = os.path.join(self.args.output_dir, name)
        self.thread = threading.Thread(target=self._write, args=(path, state))
        self.thread.start()

    def wait(self) -> None:
        """Wait until the last save is on the disk, or has failed."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None

    def _write(self, path: str, state: dict[str, Any]) -> None:
        try:
            make_dirs(self.args.output_dir)
            write_atomically(path, lambda file: torch.save(state, file))
        except (OSError, RuntimeError, UserError) as error:  # RuntimeError: torch's zip writer
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            print0(f"WARNING: could not save {path}: {reason}; training goes on without it")
            return
        print0(f"saved {path}")
        self._prune(path)

    def _prune(self, newest: str) -> None:
        """Delete older checkpoints in mid-epoch, and what --keep_last does not keep."""
        epochs = []
        for path in list_checkpoints(self.args.output_dir):
            epoch, step = checkpoint_order(os.path.basename(path)) or (0, 0.0)
            if path == newest or (epoch, step) > (checkpoint_order(os.path.basename(newest)) or ()):
                continue
            if step != float("inf"):
                path_manager.rm(path)
            elif not self._is_kept(epoch):
                epochs.append(path)
        keep = self.args.keep_last
        if keep:
            finished = "-" not in os.path.basename(newest).removeprefix("checkpoint-")
            for path in epochs[: max(len(epochs) - keep + int(finished), 0)]:
                path_manager.rm(path)

    def _is_kept(self, epoch: int) -> bool:
        every = self.args.keep_every
        return epoch == self.best_epoch or bool(every and (epoch + 1) % every == 0)

    # --- resuming ---------------------------------------------------------------------------

    def resume(self, path: str) -> None:
        """Bring back the objects and the progress of a run, and log.txt as it was then.

        Raises:
            UserError: the file is damaged, no training checkpoint, or of another model or data set.
        """
        checkpoint = read_intact(path)
        self._refuse_others(checkpoint, path)
        try:
            self.model.load_state_dict(model_state(checkpoint, path))
            for group in checkpoint["optimizer"]["param_groups"]:
                # as suits this device, not the last one
                group["fused"] = self.optimizer.defaults["fused"]
            self.optimizer.load_state_dict(checkpoint["optimizer"])
        except (RuntimeError, ValueError, KeyError) as error:
            detail = " ".join(str(error).split())
            raise UserError(f"{path} does not fit the model: {detail[:400]}") from error
        if checkpoint.get("scaler"):
            self.scaler.load_state_dict(checkpoint["scaler"])
        # files of the reference implementation know finished epochs only
        before = {"epoch": checkpoint["epoch"] + 1, "updates": checkpoint.get("step", 0)}
        self.progress = Progress(**checkpoint.get("progress", before))
        if "progress" in checkpoint:
            rewrite_log(self.args.output_dir, self.progress.log)
        step = f", step {self.progress.step}" if self.progress.step else ""
        print0(f"resumed from {path}: going on at epoch {self.progress.epoch}{step}")

    def _refuse_others(self, checkpoint: dict[str, Any], path: str) -> None:
        for key in ("model", "optimizer", "epoch"):
            if key not in checkpoint:
                raise UserError(
                    f"{path} is not a training checkpoint (no {key!r}); "
                    "start from its weights with --finetune instead of --resume"
                )
        trained = checkpoint_args(checkpoint).get("model")
        if trained not in (None, self.args.model):
            raise UserError(
                f"{path} is of --model {trained}, not {self.args.model}; use another --output_dir"
            )
        then = checkpoint.get("identity", self.identity)
        if then["data"] != self.identity["data"]:
            raise UserError(
                f"{path} was trained on other videos than train.csv lists now; "
                "use another --output_dir, or start from its weights with --finetune"
            )
        if checkpoint.get("progress", {}).get("step") and then != self.identity:
            raise UserError(
                f"{path} is in the middle of an epoch of {then['joint_batch']} videos per step of "
                f"all ranks and --accum_iter {then['accum']}; now they are "
                f"{self.identity['joint_batch']} and {self.identity['accum']}. Use the same, or "
                "--resume the last checkpoint at the end of an epoch"
            )


class Interruption:
    """Turn SIGTERM, SIGUSR1 and SIGUSR2 into a stop after the same update on every rank.

    The flags of the ranks travel beside the computation: the exchange begun after one update is
    read after the next, so that no rank waits for another and none for its device.
    """

    def __init__(self) -> None:
        self.signal = 0
        self.agreed = False
        self.exchange: tuple[Any, Tensor] | None = None
        self.group = dist.new_group(backend="gloo") if world_size() > 1 else None
        self.handlers: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            self.handlers = {s: signal.signal(s, self._note) for s in STOP_SIGNALS}

    def _note(self, number: int, _: Any) -> None:
        self.signal = max(self.signal, number)
        name = signal.Signals(number).name
        print(f"{name}: stopping after this step with a checkpoint", file=sys.stderr, flush=True)

    def after_update(self) -> bool:
        """Tell, alike on every rank, whether this update is the last one."""
        if self.group is None:
            self.agreed = self.signal > 0
            return self.agreed
        if self.exchange is not None:
            work, flag = self.exchange
            work.wait()
            self.signal = int(flag)
            self.agreed = self.signal > 0
        if not self.agreed:
            flag = torch.tensor(self.signal)
            group: Any = self.group
            work = dist.all_reduce(flag, dist.ReduceOp.MAX, group, async_op=True)
            self.exchange = work, flag
        return self.agreed

    def leave(self) -> None:
        """End the process: hand the signal to whom it was for before us, or exit with status 75.

        submitit's handler requeues the job from rank 0 and wants the other ranks to stay.
        """
        previous: Callable[..., Any] | int | None = self.handlers.get(self.signal)
        if callable(previous):
            previous(self.signal, None)
            if not is_main():
                time.sleep(60)
        print0(f"stopped; the same command goes on from here (exit status {REQUEUE_STATUS})")
        sys.exit(REQUEUE_STATUS)
