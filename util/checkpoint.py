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
import threading
import time
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only

from util.args import compared
from util.dist import SAVING, broadcast_object, is_main, print0, world_size
from util.errors import UserError
from util.file_io import is_remote, make_dirs, path_manager, write_atomically
from util.formats import checkpoint_args, model_state
from util.meters import write_log
from util.signals import Interruption
from util.weights import read_checkpoint

# checkpoint-00012.pth: epoch 12 is done; checkpoint-00013-00000450.pth: 450 steps of epoch 13 are
CHECKPOINT_NAME = re.compile(r"checkpoint-(\d+)(?:-(\d+))?\.pth")


@dataclass
class Progress:
    """The place of a run: `step` micro-steps of `epoch` are done, `updates` before that epoch."""

    epoch: int = 0
    step: int = 0
    updates: int = 0
    sums: dict[str, float] = field(default_factory=dict)  # of this epoch's metrics
    counts: dict[str, int] = field(default_factory=dict)
    log: list[dict[str, Any]] = field(default_factory=list)  # the lines of log.txt so far
    best_epoch: int | None = None

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


def is_epoch_end(path: str) -> bool:
    """Tell the checkpoints of finished epochs by name."""
    order = checkpoint_order(os.path.basename(path))
    return order is not None and order[1] == float("inf")


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


def superfluous(
    paths: list[str], newest: str, keep_last: int, keep_every: int, best_epoch: int | None
) -> list[str]:
    """Choose the checkpoints to delete now that the newest is on the disk.

    In mid-epoch the newest and the one before it stay. Of finished epochs the last keep_last do
    (0: all), with every keep_every-th and the best.

    Args:
        newest: one of them, or not listed there yet (an object store).
        paths: of one folder, oldest first; those beyond the newest are another run's and stay.
    """
    age = checkpoint_order(os.path.basename(newest)) or (0, 0)
    paths = [path for path in paths if (checkpoint_order(os.path.basename(path)) or age) < age]
    mid_epoch = [path for path in paths if not is_epoch_end(path)]
    before = paths[-1:]  # should the newest prove damaged
    finished = [path for path in paths if is_epoch_end(path)]
    if keep_last:
        kept = keep_last - 1 if is_epoch_end(newest) else keep_last
        finished = finished[: max(len(finished) - kept, 0)]
    else:
        finished = []

    def is_kept(path: str) -> bool:
        epoch, _ = checkpoint_order(os.path.basename(path)) or (0, 0)
        return epoch == best_epoch or bool(keep_every and (epoch + 1) % keep_every == 0)

    return [path for path in mid_epoch if path not in before] + [
        path for path in finished if not is_kept(path)
    ]


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
    """Return the checkpoint to resume from, the same on every rank: the newest, or --resume.

    A damaged one in the output folder is reported and the one before it taken. With --resume,
    those count that the same command saved before it was stopped, not those of other commands.
    """
    path = args.resume or None
    if is_main():
        for candidate in reversed(list_checkpoints(args.output_dir)):
            try:
                if args.resume:  # a look before gigabytes are read
                    flags = checkpoint_args(read_checkpoint(candidate, mmap=True))
                    if flags.get("resume") != args.resume:
                        continue
                read_intact(candidate)
            except UserError as error:
                print0(f"WARNING: {error}; trying the one before it")
                continue
            path = candidate
            break
    return broadcast_object(path)


def _plain(value: Any) -> Any:
    """Return a flag's value as it is when it comes out of a file."""
    return list(value) if isinstance(value, tuple) else value


class Checkpoints:
    """Save the objects of a run, and bring them back.

    Files are written by a thread from a copy in host memory, atomically; a write that fails (full
    disk, lost folder) is reported loudly, leaves the older files, and lets training go on. Only
    the main process writes. The optimiser's step waits for the copy where it is still under way.

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
        self.identity = {
            "data": fingerprint,
            "joint_batch": joint_batch,
            "accum": args.accum_iter,
            "seed": args.seed,
        }
        self.progress = Progress()
        self.last_saved = time.monotonic()
        self.thread: threading.Thread | None = None
        self.failure = ""  # of the last save
        self.host_copy = HostCopy()
        optimizer.register_step_pre_hook(lambda *_: self.host_copy.wait())
        self.interruption = Interruption(args.dist_timeout)

    # --- in the training loop -----------------------------------------------------------------

    def is_stopping(self, step: int) -> bool:
        """Tell, alike on every rank, whether step was the last one; ask after every step."""
        return (step + 1) % self.args.accum_iter == 0 and self.interruption.after_step()

    def after_line(
        self, step: int, num_steps: int, sums: dict[str, float], counts: dict[str, int]
    ) -> None:
        """Note the place in the epoch, and save when checkpoint_minutes have gone by.

        Called where metrics have just been read. Between updates there is nothing to save: the
        gradients gathered so far are no part of a checkpoint (and are dropped after an epoch).
        """
        if (step + 1) % self.args.accum_iter and step + 1 < num_steps:
            return
        self.progress.step = step + 1
        self.progress.sums, self.progress.counts = dict(sums), dict(counts)
        minutes = self.args.checkpoint_minutes
        if minutes and time.monotonic() - self.last_saved >= 60 * minutes:
            self.save()

    def finish_epoch(self, record: dict[str, Any], steps: int, best: bool = False) -> None:
        """Note an epoch's line for log.txt; save every checkpoint_period epochs, and the best."""
        progress, args = self.progress, self.args
        if best:
            progress.best_epoch = progress.epoch
        progress.finish_epoch(record, steps // args.accum_iter)
        if best or progress.epoch % args.checkpoint_period == 0 or progress.epoch == args.epochs:
            self.save()
        write_log(args.output_dir, progress.log)

    def before_validation(self) -> None:
        """Save the epoch's steps, lest a kill during a long validation lose them."""
        if self.args.checkpoint_minutes:
            self.save()

    def stop_if_told(self) -> None:
        """Save and end the process, when a signal has asked for it; call it after every loop."""
        if self.interruption.agreed:
            self.save()
            self.wait()
            self.interruption.leave()

    # --- saving -----------------------------------------------------------------------------

    def save(self) -> None:
        """Write the checkpoint of this moment, beside training, which goes on at once."""
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
        on_gpu = next(self.model.parameters()).is_cuda
        path = os.path.join(self.args.output_dir, name)
        finish_copy = self.host_copy.begin(state, on_gpu)
        self.thread = threading.Thread(
            target=self._write, args=(path, finish_copy, progress.best_epoch), name=SAVING
        )
        self.thread.start()

    def wait(self) -> None:
        """Wait until the last save is on the disk, or has failed."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None

    def close(self) -> None:
        """Wait for the last save and give the signals back, at the end of a run.

        Raises:
            UserError: the last save failed, so that the run's result is lost.
        """
        self.wait()
        self.interruption.close()
        if self.failure:
            raise UserError(f"the run's last checkpoint is lost: {self.failure}", status=1)

    def _write(
        self, path: str, finish_copy: Callable[[], dict[str, Any]], best_epoch: int | None
    ) -> None:
        try:
            state = finish_copy()
            make_dirs(self.args.output_dir)
            write_atomically(path, lambda file: torch.save(state, file))
        except (OSError, RuntimeError, UserError) as error:  # RuntimeError: torch's zip writer
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            self.failure = f"could not save {path}: {reason}"
            print0(f"WARNING: {self.failure}; training goes on without it")
            return
        self.failure = ""
        print0(f"saved {path}")
        self._prune(path, best_epoch)

    def _prune(self, newest: str, best_epoch: int | None) -> None:
        try:
            for path in superfluous(
                list_checkpoints(self.args.output_dir),
                newest,
                self.args.keep_last,
                self.args.keep_every,
                best_epoch,
            ):
                path_manager.rm(path)
        except OSError as error:
            print0(f"WARNING: could not delete an old checkpoint: {error}")

    # --- resuming ---------------------------------------------------------------------------

    def resume(self, path: str) -> None:
        """Bring back the objects and the progress of a run, and log.txt as it was then.

        Raises:
            UserError: the file is damaged, no training checkpoint, or of another model or data set.
        """
        self.wait()
        checkpoint = read_intact(path)
        self._refuse_others(checkpoint, path)
        changed = self._changed_flags(checkpoint)
        try:
            self.model.load_state_dict(model_state(checkpoint, path))
            for group in checkpoint["optimizer"]["param_groups"]:
                # as suits this device, not the last one
                group["fused"] = self.optimizer.defaults["fused"]
            self.optimizer.load_state_dict(checkpoint["optimizer"])
        except (RuntimeError, ValueError, KeyError) as error:
            detail = " ".join(str(error).split())
            flags = f" ({changed})" if changed else ""
            raise UserError(
                f"{path} does not fit the model{flags}; use another --output_dir: {detail[:400]}"
            ) from error
        if checkpoint.get("scaler"):
            self.scaler.load_state_dict(checkpoint["scaler"])
        # files of the reference implementation know finished epochs only
        before = {"epoch": checkpoint["epoch"] + 1, "updates": checkpoint.get("step", 0)}
        self.progress = Progress(**checkpoint.get("progress", before))
        if "progress" in checkpoint:
            write_log(self.args.output_dir, self.progress.log)
        if changed:
            print0(f"WARNING: flags are not those of {path}: {changed}")
        step = f", step {self.progress.step}" if self.progress.step else ""
        if self.progress.epoch < self.args.epochs:
            print0(f"resumed from {path}: going on at epoch {self.progress.epoch}{step}")
        else:
            print0(
                f"resumed from {path}: all {self.args.epochs} epochs are done; for more raise "
                "--epochs, for another run use another --output_dir"
            )

    def _changed_flags(self, checkpoint: dict[str, Any]) -> str:
        """List the flags that differ from the checkpoint's."""
        then, now = checkpoint_args(checkpoint), compared(self.args)
        names = then.keys() & now.keys() - {"path_to_data_dir", "path_prefix"}
        return ", ".join(
            f"--{name} {then[name]} -> {now[name]}"
            for name in sorted(names)
            if _plain(then[name]) != _plain(now[name])
        )

    def _refuse_others(self, checkpoint: dict[str, Any], path: str) -> None:
        for key in ("model", "optimizer", "epoch"):
            if key not in checkpoint:
                raise UserError(
                    f"{path} is not a training checkpoint (no {key!r}); "
                    "start from its weights with --finetune instead of --resume"
                )
        trained = checkpoint_args(checkpoint).get("model")
        if trained not in (None, self.args.model):
            way_out = "use another --output_dir"
            if self.args.resume:
                way_out = "to start from weights use --finetune (main_finetune.py)"
            raise UserError(f"{path} is of --model {trained}, not {self.args.model}; {way_out}")
        started_from = checkpoint_args(checkpoint).get("finetune")
        wanted = getattr(self.args, "finetune", None)
        # whoever names the checkpoint means it; found in the folder, it may be another run's
        if not self.args.resume and None not in (started_from, wanted) and started_from != wanted:
            raise UserError(
                f"{path} was started from --finetune {started_from or '(nothing)'}, not from "
                f"{wanted or '(nothing)'}; use another --output_dir"
            )
        then = checkpoint.get("identity", self.identity)
        if then["data"] != self.identity["data"]:
            raise UserError(
                f"{path} was trained on other videos than train.csv lists now; "
                "use another --output_dir, or fine-tune from its weights with --finetune"
            )
        if checkpoint.get("progress", {}).get("step") and then != self.identity:
            raise UserError(
                f"{path} is in the middle of an epoch of {then['joint_batch']} videos per step of "
                f"all ranks, --accum_iter {then['accum']} and --seed {then['seed']}; now they are "
                f"{self.identity['joint_batch']}, {self.identity['accum']} and "
                f"{self.identity['seed']}. Use the same, or --resume the last checkpoint at the "
                "end of an epoch"
            )


class HostCopy:
    """A copy of a run's state in host memory, which is kept from save to save.

    On a CPU the writing thread makes it, beside the next forward and backward pass: what changes
    the tensors, an optimiser's step, must `wait`. On a GPU copies into page-locked memory are
    enqueued at once, so that the stream itself puts later changes after them.
    """

    def __init__(self) -> None:
        self.buffers: list[Tensor] = []
        self.complete = threading.Event()
        self.complete.set()

    def begin(self, state: dict[str, Any], on_gpu: bool) -> Callable[[], dict[str, Any]]:
        """Return a function for the writing thread: it gives the copy, and the last one is gone."""
        if on_gpu:
            copy = self._copy(state)
            copied, device = torch.cuda.Event(), torch.cuda.current_device()
            copied.record()

            def finish_on_gpu() -> dict[str, Any]:
                torch.cuda.set_device(device)  # every thread starts with the first one
                copied.synchronize()
                return copy

            return finish_on_gpu
        self.complete.clear()

        def finish() -> dict[str, Any]:
            try:
                return self._copy(state)
            finally:
                self.complete.set()

        return finish

    def wait(self) -> None:
        """Wait until the tensors may change."""
        self.complete.wait()

    def _copy(self, state: dict[str, Any]) -> dict[str, Any]:
        used = 0

        def copy(x: Tensor) -> Tensor:
            nonlocal used
            if used == len(self.buffers):
                self.buffers.append(torch.empty(0))
            buffer = self.buffers[used]
            if buffer.shape != x.shape or buffer.dtype != x.dtype:
                try:
                    buffer = torch.empty(x.shape, dtype=x.dtype, pin_memory=x.is_cuda)
                except RuntimeError:  # no more memory may be locked: the copy is a slow one
                    buffer = torch.empty(x.shape, dtype=x.dtype)
                self.buffers[used] = buffer
            used += 1
            return buffer.copy_(x.detach(), non_blocking=x.is_cuda)

        return tree_map_only(Tensor, copy, state)
