"""Meters, progress lines and TensorBoard."""

import contextlib
import io
import os
import resource
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import numpy as np
import simplejson
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from util import dist
from util.args import compared
from util.dist import all_reduce_mean, is_main, print0
from util.errors import UserError
from util.file_io import make_dirs, open_file, write_atomically
from util.optim import NonFiniteError, UpdateGuard, _is_finite

if TYPE_CHECKING:
    from util.checkpoint import Checkpoints, Progress


def epoch_1000x(epoch: float, repeat_aug: int) -> int:
    """Map fractional epochs to TensorBoard's x axis, where runs of all batch sizes line up."""
    return int(epoch * 1000 * repeat_aug)


def last_x(epoch: int, repeat_aug: int) -> int:
    """Return the last place of an epoch (0, 1, ...) on the x axis, for what is known at its end.

    The next place is that of the next epoch's first step: TensorBoard drops what was written from
    there on when a run goes on from the end of this epoch, and must keep what belongs to it.
    """
    return epoch_1000x(epoch + 1, repeat_aug) - 1


class Meters:
    """Collect the metrics of every step without waiting for the device.

    Values may be device scalars: they are stacked, averaged over ranks and read once per
    `flush`, which is where a non-finite value is noticed.
    """

    def __init__(
        self,
        device: torch.device,
        progress: "Progress | None" = None,
        skip_nonfinite: bool = False,
    ):
        self.device = device
        self.skip_nonfinite = skip_nonfinite
        self.pending: list[tuple[int, Tensor, dict[str, Tensor | float]]] = []
        self.sums = dict(progress.sums) if progress else {}
        self.counts = dict(progress.counts) if progress else {}
        self.latest: dict[str, float] = {}

    def update(self, step: int, samples: Tensor, **metrics: Tensor | float) -> None:
        """Note the metrics of a step and the sample numbers of its batch.

        Every rank must note the same steps and names.
        """
        self.pending.append((step, samples, metrics))

    def flush(self) -> list[tuple[int, dict[str, float]]]:
        """Read the steps noted since the last flush, averaged over ranks.

        Raises:
            NonFiniteError: on every rank, for the first step with a value that is not finite,
                unless UpdateGuard has dealt with such steps already.
        """
        if not self.pending:
            return []
        flat = [value for _, _, metrics in self.pending for value in metrics.values()]
        local = torch.stack(
            [torch.as_tensor(v, dtype=torch.float32, device=self.device) for v in flat]
        )
        values = iter(zip(all_reduce_mean(local.clone()).tolist(), local.tolist(), strict=True))
        steps = []
        for step, samples, metrics in self.pending:
            row = {}
            for name in metrics:
                value, own = next(values)
                if not _is_finite(value):
                    if self.skip_nonfinite:
                        continue  # its update was skipped; it is in no mean either
                    raise NonFiniteError(step, samples if not _is_finite(own) else None)
                row[name] = value
                self.sums[name] = self.sums.get(name, 0.0) + value
                self.counts[name] = self.counts.get(name, 0) + 1
            steps.append((step, row))
        for _, row in steps:  # the gradient norm is there in updates alone
            self.latest = self.latest | row
        self.pending.clear()
        return steps

    def means(self) -> dict[str, float]:
        """Return each metric's mean over the steps flushed so far."""
        return {name: self.sums[name] / self.counts[name] for name in self.sums}


class RunLog:
    """The log of a run: progress on the screen, and a file for TensorBoard.

    Args:
        log_dir: TensorBoard's folder; empty for none.
        print_freq: steps between printed lines.
        purge_step: drop what an earlier, killed process wrote from this place of the x axis on.
        skip_nonfinite: see UpdateGuard.
        time_first_step: print how long the first step took, as it compiles the model.
    """

    def __init__(
        self,
        log_dir: str,
        print_freq: int,
        device: torch.device,
        purge_step: int | None = None,
        skip_nonfinite: int = 0,
        time_first_step: bool = False,
    ):
        self.print_freq = print_freq
        self.time_first_step = time_first_step
        self.device = device
        self.guard = UpdateGuard(skip_nonfinite)
        self.meters = Meters(device)
        self.session_end: Any = None  # see hparams
        self.writer = None
        if is_main() and log_dir:
            from torch.utils.tensorboard import SummaryWriter  # slow to import; one rank needs it

            make_dirs(log_dir)
            self.writer = SummaryWriter(log_dir, purge_step=purge_step)

    def every(
        self,
        loader: Any,
        header: str,
        num_steps: int,
        clips_per_step: int,
        x_axis: Callable[[float], int] | None = None,
        checkpoints: "Checkpoints | None" = None,
    ) -> Iterator[tuple[int, Any]]:
        """Yield (step, batch), printing a line every print_freq steps, or a live bar on a terminal.

        Args:
            num_steps: length of the loop.
            clips_per_step: clips that all ranks together take in per step, for clips/s.
            x_axis: maps a step to TensorBoard's x axis; None logs no scalars.
            checkpoints: says where in the epoch to start, may save after a printed line, and ends
                the loop early when the run is to stop.

        Raises:
            NonFiniteError: see Meters.flush.
        """
        first = checkpoints.progress.step if checkpoints else 0
        self.meters = Meters(
            self.device,
            checkpoints.progress if checkpoints else None,
            self.guard.limit > 0,
        )

        def scalar(name: str, value: float, step: int) -> None:
            if x_axis is not None:
                self.scalar(name, value, x_axis(step))

        live = is_main() and sys.stderr.isatty()
        bar = tqdm(
            total=num_steps, initial=first, desc=header, disable=not live, dynamic_ncols=True
        )
        start = last = time.perf_counter()
        data_time, data_start, last_step, stopping = 0.0, start, first - 1, False
        for step, batch in enumerate(loader, first):
            step_start = time.perf_counter()
            data_time += step_start - data_start
            yield step, batch
            if self.time_first_step:
                seconds = time.perf_counter() - step_start
                print0(f"{header}  first step, with compilation: {seconds:.1f} s")
                self.time_first_step = False
            bar.update()
            if checkpoints is not None:
                stopping = checkpoints.is_stopping(step)
            if stopping or (step + 1) % self.print_freq == 0 or step + 1 == num_steps:
                for number, row in self.meters.flush():
                    for name, value in row.items():
                        scalar(f"train/{name}", value, number)
                now = time.perf_counter()
                seconds = (now - last) / (step - last_step)
                line = {
                    **{name: f"{value:.4g}" for name, value in self.meters.latest.items()},
                    "clips/s": f"{clips_per_step / seconds:.1f}",
                    "data": f"{data_time / (now - last):.0%}",
                    "mem": f"{memory_mib(self.device):.0f}M",
                }
                scalar("speed/clips_per_s", clips_per_step / seconds, step)
                scalar("speed/data_share", data_time / (now - last), step)
                scalar("speed/memory_mib", memory_mib(self.device), step)
                eta = timedelta(seconds=int(seconds * (num_steps - step - 1)))
                if live:
                    bar.set_postfix(line)
                else:
                    text = "  ".join(f"{name} {value}" for name, value in line.items())
                    print0(f"{header}  [{step + 1}/{num_steps}]  eta {eta}  {text}")
                last, last_step, data_time = now, step, 0.0
                if checkpoints is not None:
                    self.flush()  # what a checkpoint counts as done must be on the disk
                    checkpoints.after_line(step, num_steps, self.meters.sums, self.meters.counts)
            if stopping:
                break
            data_start = time.perf_counter()
        bar.close()
        elapsed = timedelta(seconds=int(time.perf_counter() - start))
        means = "".join(f"  {k} {v:.4g}" for k, v in self.meters.means().items() if k == "loss")
        print0(f"{header}  {'stopped' if stopping else 'done'} in {elapsed}{means}")

    def scalar(self, name: str, value: float, x: int) -> None:
        """Write one TensorBoard scalar."""
        with self._writing() as writer:
            if writer is not None:
                writer.add_scalar(name, value, x)

    def histogram(self, name: str, values: np.ndarray, x: int) -> None:
        """Write a TensorBoard histogram of numbers of any shape."""
        with self._writing() as writer:
            if writer is not None:
                writer.add_histogram(name, values, x)

    def image(self, name: str, pixels: np.ndarray, x: int) -> None:
        """Write a TensorBoard image, uint8 [H, W, 3]."""
        with self._writing() as writer:
            if writer is not None:
                writer.add_image(name, pixels, x, dataformats="HWC")

    def gif(self, name: str, data: bytes, x: int) -> None:
        """Write a GIF file's contents, which TensorBoard plays among its images.

        writer.add_video would need MoviePy to make the same.
        """
        if self.writer is None:
            return
        from torch.utils.tensorboard import summary

        width, height = Image.open(io.BytesIO(data)).size
        Summary: Any = summary.Summary  # a generated class, which type checkers do not see
        picture = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=data)
        with self._writing() as writer:
            writer.file_writer.add_summary(
                Summary(value=[Summary.Value(tag=name, image=picture)]), x
            )

    def text(self, name: str, markdown: str, x: int) -> None:
        """Write a TensorBoard text."""
        with self._writing() as writer:
            if writer is not None:
                writer.add_text(name, markdown, x)

    def hparams(self, flags: dict[str, Any]) -> None:
        """Let TensorBoard compare this run with others by its flags.

        It finds the flags that differ, and the last values of all scalars, by itself.
        writer.add_hparams would make a run of its own for them.
        """
        if self.writer is None:
            return
        from torch.utils.tensorboard.summary import hparams

        values = {
            name: value if isinstance(value, (bool, int, float)) else str(value)
            for name, value in flags.items()
        }
        _, start, self.session_end = hparams(values, {})
        with self._writing() as writer:
            writer.file_writer.add_summary(start)

    def flush(self) -> None:
        """Write what TensorBoard shall show to the disk."""
        with self._writing() as writer:
            if writer is not None:
                writer.flush()

    def close(self) -> None:
        """Note the end of the run for TensorBoard and close its file."""
        with self._writing() as writer:
            if writer is not None:
                if self.session_end is not None:
                    writer.file_writer.add_summary(self.session_end)
                writer.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[Any]:
        """Go on without TensorBoard when its file cannot be written: training matters more."""
        try:
            yield self.writer
        except OSError as error:
            print0(f"WARNING: TensorBoard's file cannot be written, going on without: {error}")
            self.writer = None


def memory_mib(device: torch.device) -> float:
    """Return the peak memory of the device, or of this process on a CPU, MiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def open_log(
    args: Namespace,
    device: torch.device,
    progress: "Progress",
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
        time_first_step=args.compile,
    )
    log.hparams(compared(args) | {"ranks": dist.world_size()})
    return log


def log_dir(args: Namespace) -> str:
    """Return TensorBoard's folder."""
    return args.log_dir or os.path.join(args.output_dir, "tensorboard")


def log_line(record: dict[str, Any]) -> str:
    """Make a line of log.txt; a validation loss that is no number, which JSON lacks, is null."""
    return simplejson.dumps(record, ignore_nan=True) + "\n"


def append_log(output_dir: str, record: dict[str, Any]) -> None:
    """Append one JSON line to log.txt, from the main process."""
    if is_main() and output_dir:
        with open_file(os.path.join(output_dir, "log.txt"), "a") as file:
            file.write(log_line(record))


def write_log(output_dir: str, records: list[dict[str, Any]]) -> None:
    """Write log.txt, one JSON line per epoch, from the main process; a failure is but a warning.

    It is written whole, which drops what a killed process had added after its last checkpoint.
    """
    if not (is_main() and output_dir):
        return
    text = "".join(map(log_line, records))
    path = os.path.join(output_dir, "log.txt")
    try:
        make_dirs(output_dir)
        write_atomically(path, lambda file: file.write(text.encode()))
    except (OSError, UserError) as error:
        print0(f"WARNING: could not write {path}: {error}; the next epoch tries again")
