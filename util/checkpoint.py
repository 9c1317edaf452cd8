"""Save a run and resume it exactly, as if it had never stopped.

A training checkpoint is a plain dict: model, optimizer, scaler (state dicts), epoch (the last one
finished), step (optimiser steps done), args (a dict of flags), arguments (of the model's
constructor), classes (names), progress and identity (see Progress and Checkpoints); with a moving
average of the weights also model_ema (a state dict) and ema_updates.

Masks, clips and all other random choices are functions of (seed, epoch, step or sample). So
weights, optimiser, scaler and the place in the epoch are the whole state of a run.
"""

import argparse
import contextlib
import os
import re
import threading
import time
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only

from util.args import compared
from util.classes import same_classes, some_names
from util.dist import SAVING, broadcast_object, gather_objects, is_main, print0, world_size
from util.errors import UserError
from util.file_io import is_remote, list_names, make_dirs, path_manager, write_atomically
from util.formats import checkpoint_args, find_average, model_state
from util.meters import write_log
from util.signals import Interruption
from util.weights import read_checkpoint

if TYPE_CHECKING:
    from util.kinetics import VideoIndex
    from util.meters import RunLog
    from util.optim import NonFiniteError, WeightAverage

# --- the files of a run -------------------------------------------------------------------------

# checkpoint-00012.pth: epoch 12 is done; checkpoint-00013-00000450.pth: 450 steps of epoch 13
CHECKPOINT_NAME = re.compile(r"checkpoint-(\d+)(?:-(\d+))?\.pth")
END = float("inf")  # sorts the end of an epoch after its steps
KEEP = {"keep_last": 3, "keep_every": 50}  # unless the flags, or the run that is resumed, say so


def checkpoint_order(path: str) -> tuple[int, float] | None:
    """Return (epoch, step), which sorts checkpoints by age, or None for other files."""
    match = CHECKPOINT_NAME.fullmatch(os.path.basename(path))
    return (int(match[1]), float(match[2] or END)) if match else None


def list_checkpoints(output_dir: str) -> list[str]:
    """Return the paths of a folder's checkpoints, oldest first."""
    names = [name for name in list_names(output_dir) if checkpoint_order(name)]
    names.sort(key=lambda name: checkpoint_order(name) or (0, 0.0))
    return [os.path.join(output_dir, name) for name in names]


def newest_checkpoint(output_dir: str) -> str | None:
    """Return the path of a folder's newest checkpoint, or None."""
    found = list_checkpoints(output_dir)
    return found[-1] if found else None


def superfluous(
    paths: list[str],
    newest: str,
    keep_last: int,
    keep_every: int,
    best_epoch: int | None,
    is_last: bool = False,
) -> list[str]:
    """Choose the checkpoints to delete once `newest` is on the disk.

    Of finished epochs, the last keep_last stay (0: all), every keep_every-th and the best. Of those
    within an epoch, the newest stays, and the one before `newest`, in case that proves damaged. It
    goes, too, if `newest` and another are of finished epochs, or if the run ends (is_last).

    Args:
        paths: checkpoints of one folder, oldest first; those after `newest` belong to another run
            and stay. An object store may not list `newest` yet.
    """

    def order(path: str) -> tuple[int, float]:
        return checkpoint_order(path) or (0, 0.0)

    older = [path for path in paths if order(path) < order(newest)]
    ends = {path: order(path)[0] for path in [*older, newest] if order(path)[1] == END}
    kept = set(list(ends)[-keep_last:])  # all if keep_last is 0
    for path, epoch in ends.items():
        if epoch == best_epoch or (keep_every and (epoch + 1) % keep_every == 0):
            kept.add(path)
    if not (newest in ends and (is_last or len(kept) > 1)):
        kept.update(set(older[-1:]) - ends.keys())
    return [path for path in older if path not in kept]


def read_intact(path: str) -> dict[str, Any]:
    """Read a training checkpoint after checking the checksum of every tensor in it.

    This reads a local file once and then maps its tensors. Raise UserError if it is damaged.
    """
    if not is_remote(path):
        with contextlib.suppress(zipfile.BadZipFile, OSError), zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
            if damaged:
                raise UserError(f"{path} is damaged: wrong checksum of {damaged}")
    return read_checkpoint(path, mmap=True)


def load_latest(args: argparse.Namespace) -> tuple[str, dict[str, Any]] | None:
    """Read the checkpoint to resume from: (path, content) on every rank, None if there is none.

    This takes the newest in the output folder; if it is damaged, it warns and tries the one before.
    With --resume, only checkpoints that the same command has saved count (the folder may also hold
    others), and the last one tried is --resume itself; if it is damaged, all ranks raise UserError.
    """
    path, content, problem = args.resume, None, ""
    if is_main():
        # The main rank checks every candidate as a whole, from the newest on.
        for candidate in reversed(list_checkpoints(args.output_dir)):
            try:
                if args.resume:  # check the flags before reading gigabytes
                    flags = checkpoint_args(read_checkpoint(candidate, mmap=True))
                    if flags.get("resume") != args.resume:
                        continue
                path, content = candidate, read_intact(candidate)
                break
            except UserError as error:
                print0(f"WARNING: {error}; trying the one before it")
        if path and content is None:
            try:
                content = read_intact(path)
            except UserError as error:
                problem = str(error)

    # The other ranks rely on that check, and read only what they use.
    path, problem = broadcast_object((path, problem))
    if problem:
        raise UserError(problem)
    if path and content is None:
        content = read_checkpoint(path, mmap=True)
    return None if content is None else (path, content)


# --- a run --------------------------------------------------------------------------------------


@dataclass
class Progress:
    """How far a run is: `step` micro-steps of `epoch` done, after `updates` in earlier epochs."""

    epoch: int = 0
    step: int = 0
    updates: int = 0
    sums: dict[str, float] = field(default_factory=dict)  # of this epoch's metrics
    counts: dict[str, int] = field(default_factory=dict)
    log: list[dict[str, Any]] = field(default_factory=list)  # the lines of log.txt so far
    best_epoch: int | None = None

    def best(self, metric: str) -> float:
        """Return the highest value of a metric in the lines of log.txt so far; -1 without lines."""
        return max((line[metric] for line in self.log), default=-1.0)


class Checkpoints:
    """Save the objects of a run and restore them.

    Only the main process writes. A thread writes the file atomically from a copy in host memory;
    training waits for the copy in the next optimiser step, and for an earlier save that still runs.
    If a write fails (full disk, lost folder), this warns, keeps the older files and goes on.
    Without an output_dir nothing is saved.

    Args:
        args: with output_dir, resume, checkpoint_period (epochs), checkpoint_minutes, keep_last,
            keep_every (None: as KEEP says) and model.
        fingerprint: checksum of the training videos; a checkpoint of other videos is refused.
        classes: names of a classifier's classes, if known; a checkpoint of others is refused.
        ema: a moving average of the model's weights, to save and resume with them.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        model: nn.Module,
        optimizer: Optimizer,
        scaler: torch.amp.GradScaler,
        fingerprint: int,
        classes: Sequence[str] = (),
        ema: "WeightAverage | None" = None,
    ):
        self.args = args
        self.not_given = [name for name in KEEP if vars(args).get(name) is None]
        vars(args).update((name, KEEP[name]) for name in self.not_given)
        self.ema = ema
        self.model = model
        self.optimizer = optimizer
        self.scaler = scaler
        self.classes = list(classes)
        self.identity = {  # must be equal for an epoch to go on with the same steps
            "data": fingerprint,
            "joint_batch": args.batch_size * world_size(),
            "accum": args.accum_iter,
            "seed": args.seed,
        }
        self.progress = Progress()
        self.last_saved = time.monotonic()
        self.thread: threading.Thread | None = None
        self.failure = ""  # of the last save
        self.host_copy = HostCopy()
        optimizer.register_step_pre_hook(lambda *_: self.host_copy.wait())
        self.interruption = Interruption(args.dist_timeout, bool(getattr(args, "output_dir", "")))

    # --- in the training loop -----------------------------------------------------------------

    def after_step(self, step: int, log: "RunLog") -> bool:
        """Save if checkpoint_minutes are over; return whether all ranks end the loop here.

        The clock is checked only where `log` prints a line, because the metrics are read there
        anyway. Between two updates this neither saves nor stops, because a checkpoint does not hold
        accumulated gradients.
        """
        update = (step + 1) % self.args.accum_iter == 0
        stop = update and self.interruption.after_step()
        if stop or log.is_due(step):
            log.read(step)
            log.flush()  # before a checkpoint counts these steps as done
            if update or step + 1 == log.num_steps:
                progress, meters = self.progress, log.meters
                progress.step = step + 1
                progress.sums, progress.counts = dict(meters.sums), dict(meters.counts)
                minutes = self.args.checkpoint_minutes
                if minutes and time.monotonic() - self.last_saved >= 60 * minutes:
                    self.save()
        return stop

    def exit_if_stopped(self) -> None:
        """If a signal has asked for it, save and end the process; call this after every loop."""
        if self.interruption.agreed:
            self.save()
            self.wait()
            self.interruption.leave()

    def before_validation(self) -> None:
        """Save the finished steps, so that a kill in a long validation does not lose them."""
        if self.args.checkpoint_minutes:
            self.save()

    def finish_epoch(self, record: dict[str, Any], steps: int, metric: str = "") -> None:
        """Add an epoch's line to log.txt; save if a checkpoint is due or the epoch is last or best.

        Args:
            steps: micro-steps of the epoch.
            metric: the best epoch has the highest record[metric]; empty: no epoch is best.
        """
        progress, args = self.progress, self.args
        is_best = bool(metric) and record[metric] > progress.best(metric)
        if is_best:
            progress.best_epoch = progress.epoch
        progress.log.append(record)
        progress.updates += steps // args.accum_iter
        progress.epoch, progress.step = progress.epoch + 1, 0
        progress.sums, progress.counts = {}, {}
        if is_best or progress.epoch % args.checkpoint_period == 0 or progress.epoch == args.epochs:
            self.save()
        write_log(args.output_dir, progress.log)

    def bad_step_report(self, error: "NonFiniteError", index: "VideoIndex") -> UserError:
        """Return an error naming the bad step, its videos and the last good file, on all ranks."""
        own = [] if error.samples is None else [index.path(int(i)) for i in error.samples]
        self.wait()
        files = [path for paths in gather_objects(own) for path in paths]
        last = newest_checkpoint(self.args.output_dir)
        return UserError(
            f"epoch {self.progress.epoch}: {error.problem}; videos of the batch: "
            f"{', '.join(files) or 'unknown (the gradient alone is at fault)'}; last good "
            f"checkpoint: {last or 'none'}; nothing was saved since. Try a smaller --blr, "
            "--clip_grad, or --precision fp32",
            status=1,
        )

    # --- saving -----------------------------------------------------------------------------

    def save(self) -> None:
        """Save the present state from a thread; training goes on at once."""
        self.last_saved = time.monotonic()
        if not (is_main() and self.args.output_dir):
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
            "classes": self.classes,
        }
        if self.ema is not None:
            state["model_ema"] = self.ema.module.state_dict()
            state["ema_updates"] = self.ema.updates
        on_gpu = next(self.model.parameters()).is_cuda
        path = os.path.join(self.args.output_dir, name)
        finish_copy = self.host_copy.begin(state, on_gpu)
        is_last = progress.epoch >= self.args.epochs
        self.thread = threading.Thread(
            target=self._write, args=(path, finish_copy, progress.best_epoch, is_last), name=SAVING
        )
        self.thread.start()

    def wait(self) -> None:
        """Wait until the last save is on the disk, or has failed."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None

    def close(self) -> None:
        """Wait for the last save, restore signal handlers, raise UserError if the save failed."""
        self.wait()
        self.interruption.close()
        if self.failure:
            raise UserError(f"the run's last checkpoint is lost: {self.failure}", status=1)

    def _write(
        self,
        path: str,
        finish_copy: Callable[[], dict[str, Any]],
        best_epoch: int | None,
        is_last: bool,
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

        # Delete older checkpoints only now that this one is on the disk.
        args = self.args
        keep = args.keep_last, args.keep_every, best_epoch, is_last
        first = checkpoint_order(args.resume) or (-1, END)  # files up to this are of another run
        try:
            files = list_checkpoints(args.output_dir)
            own = [file for file in files if (checkpoint_order(file) or first) > first]
            for old in superfluous(own, path, *keep):
                path_manager.rm(old)
        except OSError as error:
            print0(f"WARNING: could not delete an old checkpoint: {error}")

    # --- resuming ---------------------------------------------------------------------------

    def resume(self, path: str, checkpoint: dict[str, Any]) -> None:
        """Restore a run's objects, progress and log.txt from the content of the file `path`.

        Raises:
            UserError: it is not a training checkpoint, or belongs to another model or data set.
        """
        self.wait()
        self._refuse_others(checkpoint, path)
        changed = self._changed_flags(checkpoint)
        try:
            self.model.load_state_dict(model_state(checkpoint, path))
            has_average = bool(find_average(checkpoint))
            if self.ema is not None:
                self.ema.module.load_state_dict(model_state(checkpoint, path, has_average))
                self.ema.updates = checkpoint.get("ema_updates", 0)
            optimizer = checkpoint["optimizer"]
            for group in optimizer["param_groups"]:
                group["fused"] = self.optimizer.defaults["fused"]  # the best for this device
            # copy it, because on a CPU the optimiser would otherwise work in the mapped file
            self.optimizer.load_state_dict(tree_map_only(Tensor, torch.clone, optimizer))
        except (RuntimeError, ValueError, KeyError) as error:
            detail = " ".join(str(error).split())
            flags = f" ({changed})" if changed else ""
            raise UserError(
                f"{path} does not fit the model{flags}; use another --output_dir: {detail[:400]}"
            ) from error
        if checkpoint.get("scaler"):
            self.scaler.load_state_dict(checkpoint["scaler"])
        # files of the reference implementation know only finished epochs
        before = {"epoch": checkpoint["epoch"] + 1, "updates": checkpoint.get("step", 0)}
        self.progress = Progress(**checkpoint.get("progress", before))
        if "progress" in checkpoint:
            write_log(self.args.output_dir, self.progress.log)
        if changed:
            print0(f"WARNING: some flags differ from those of {path}: {changed}")
        if has_average != (self.ema is not None):
            becomes = "is dropped" if has_average else "begins with these weights"
            print0(f"the moving average of the weights {becomes}")
        self._keep_as_before(checkpoint_args(checkpoint))
        step = f", step {self.progress.step}" if self.progress.step else ""
        place = f"going on at epoch {self.progress.epoch}{step}"
        if self.progress.epoch >= self.args.epochs:
            place = f"all {self.args.epochs} epochs are done; to train longer raise --epochs, for "
            place += "another run use another --output_dir"
        print0(f"resumed from {path}: {place}")

    def _keep_as_before(self, then: dict[str, Any]) -> None:
        """Take flags of KEEP that are not given from the run so far; older runs kept all files."""
        before = {name: then.get(name, 0) for name in self.not_given}
        vars(self.args).update(before)
        if before.items() - KEEP.items():
            shown = " ".join(f"--{name} {value}" for name, value in before.items())
            print0(f"checkpoints are kept as until now: {shown}")

    def _changed_flags(self, checkpoint: dict[str, Any]) -> str:
        """List the flags that differ from the checkpoint's."""
        then, now = checkpoint_args(checkpoint), compared(self.args)
        target = "patch" if then.get("norm_pix_loss", True) else "pixels"
        older = {"target": target, "pool": "mean", "crop": "random", "color_jitter": 0.0}
        older |= {"mask_type": "random", "mask_ratio_end": None, "finetune": "", "use_ema": False}
        older |= {"freeze": 0, "model_ema": 0.0}
        then = older | then  # older runs lack these flags
        names = (then.keys() & now.keys()) - {"path_to_data_dir", "path_prefix"}

        def plain(value: Any) -> Any:  # as it comes out of a file
            return list(value) if isinstance(value, tuple) else value

        return ", ".join(
            f"--{name} {then[name]} -> {now[name]}"
            for name in sorted(names)
            if plain(then[name]) != plain(now[name])
        )

    def _refuse_others(self, checkpoint: dict[str, Any], path: str) -> None:
        """Raise UserError for a file from which this run cannot continue."""
        for key in ("model", "optimizer", "epoch"):
            if key not in checkpoint:
                raise UserError(
                    f"{path} is not a training checkpoint (no {key!r}); "
                    "start from its weights with --finetune instead of --resume"
                )
        flags = checkpoint_args(checkpoint)
        trained = flags.get("model")
        started_from = flags.get("finetune", "" if flags else None)  # older pre-training had none
        if trained not in (None, self.args.model):
            way_out = "--finetune to start from its weights"
            way_out = way_out if self.args.resume else "another --output_dir"
            raise UserError(f"{path} is of --model {trained}, not {self.args.model}; use {way_out}")
        # the user has chosen the file of --resume; one found in the folder may be another run's
        wanted = getattr(self.args, "finetune", None)
        if not self.args.resume and None not in (started_from, wanted) and started_from != wanted:
            raise UserError(
                f"{path} was started from --finetune {started_from or '(nothing)'}, not from "
                f"{wanted or '(nothing)'}; use another --output_dir"
            )
        known = checkpoint.get("classes", [])
        if not same_classes(self.classes, known):
            raise UserError(
                f"{path} was trained on other classes, or in another order, than classes.txt "
                f"names now ({some_names(self.classes)}): it has {some_names(known)}; restore "
                "classes.txt, or use another --output_dir"
            )
        self.classes = self.classes or known
        then, now = checkpoint.get("identity", self.identity), self.identity
        if then["data"] != now["data"]:
            raise UserError(
                f"{path} was trained on other videos than train.csv lists now; "
                "use another --output_dir, or start from its weights with --finetune"
            )
        if checkpoint.get("progress", {}).get("step") and then != now:
            raise UserError(
                f"{path} was saved within an epoch of {then['joint_batch']} videos per step over "
                f"all ranks, --accum_iter {then['accum']} and --seed {then['seed']}; now they are "
                f"{now['joint_batch']}, {now['accum']} and {now['seed']}. Use the same values, or "
                "--resume the last checkpoint from the end of an epoch"
            )


class HostCopy:
    """A copy of a run's state in host memory, reused from save to save.

    On a CPU the writing thread copies while the next forward and backward passes run; an optimiser
    step, which changes the tensors, must `wait` for it. On a GPU, copies to page-locked memory are
    queued at once, and the stream runs them before any later change.
    """

    def __init__(self) -> None:
        self.buffers: list[Tensor] = []
        self.complete = threading.Event()
        self.complete.set()

    def begin(self, state: dict[str, Any], on_gpu: bool) -> Callable[[], dict[str, Any]]:
        """Begin a copy over the last one; return a function that gives it to the writing thread."""
        if on_gpu:
            copy = self._copy(state)
            copied, device = torch.cuda.Event(), torch.cuda.current_device()
            copied.record()

            def finish_on_gpu() -> dict[str, Any]:
                torch.cuda.set_device(device)  # every new thread starts with device 0
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
        """Copy all tensors into buffers, which are reused where shape and type allow it."""
        used = 0

        def copy(x: Tensor) -> Tensor:
            nonlocal used
            if used == len(self.buffers):
                self.buffers.append(torch.empty(0))
            buffer = self.buffers[used]
            if buffer.shape != x.shape or buffer.dtype != x.dtype:
                try:
                    buffer = torch.empty(x.shape, dtype=x.dtype, pin_memory=x.is_cuda)
                except RuntimeError:  # no more memory can be page-locked: the copy will be slow
                    buffer = torch.empty(x.shape, dtype=x.dtype)
                self.buffers[used] = buffer
            used += 1
            return buffer.copy_(x.detach(), non_blocking=x.is_cuda)

        return tree_map_only(Tensor, copy, state)
