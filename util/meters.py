"""What a run writes: meters of a loop, progress lines, log.txt and TensorBoard's file."""

from __future__ import annotations

import io
import math
import os
import resource
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import numpy as np
import simplejson
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from util.dist import all_reduce_mean, is_main, print0, world_size
from util.errors import UserError
from util.file_io import make_dirs, open_file, write_atomically
from util.optim import NonFiniteError, UpdateGuard

if TYPE_CHECKING:
    from util.checkpoint import Progress

# --- meters -------------------------------------------------------------------------------------


class Meters:
    """Collect the metrics of every step without waiting for the device.

    Values may be scalars on the device: they are stacked, averaged over ranks and read once per
    `flush`. That is where a value that is not finite is noticed.

    Args:
        progress: of an epoch that is continued; its sums and counts are carried on.
        skip_nonfinite: leave values that are not finite out; UpdateGuard has dealt with them.
    """

    def __init__(
        self, device: torch.device, progress: Progress | None = None, skip_nonfinite: bool = False
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
            NonFiniteError: on every rank, for the first step with a value that is not finite.
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
                if math.isfinite(value):
                    row[name] = value
                    self.sums[name] = self.sums.get(name, 0.0) + value
                    self.counts[name] = self.counts.get(name, 0) + 1
                elif not self.skip_nonfinite:
                    raise NonFiniteError(step, samples if not math.isfinite(own) else None)
            steps.append((step, row))
            self.latest |= row  # only steps with an update have a gradient norm: keep the last one
        self.pending.clear()
        return steps

    def means(self) -> dict[str, float]:
        """Return each metric's mean over the steps flushed so far."""
        return {name: self.sums[name] / self.counts[name] for name in self.sums}


def memory_mib(device: torch.device) -> float:
    """Return the peak memory of the GPU, or of this process on a CPU, in MiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


# --- progress lines and TensorBoard -------------------------------------------------------------


def epoch_1000x(epoch: float, repeat_aug: int) -> int:
    """Map fractional epochs to TensorBoard's x axis; runs of all batch sizes line up there."""
    return int(epoch * 1000 * repeat_aug)


def last_x(epoch: int, repeat_aug: int) -> int:
    """Return the last place of an epoch (0, 1, ...) on the x axis, for results of its end.

    The next place belongs to the first step of the next epoch: a run that resumes from the end of
    this epoch has TensorBoard drop everything from there on.
    """
    return epoch_1000x(epoch + 1, repeat_aug) - 1


@dataclass
class _Loop:
    """The loop that RunLog.every is in, and its clock since the last printed line (seconds)."""

    header: str
    num_steps: int
    clips_per_step: int
    x_axis: Callable[[int], int] | None
    bar: tqdm
    last_step: int
    last_time: float
    data_time: float = 0.0  # spent waiting for the loader


class RunLog:
    """Progress lines, and TensorBoard from the main process.

    Args:
        log_dir: TensorBoard's folder; empty for none.
        print_freq: steps between printed lines.
        purge_step: x from which on TensorBoard drops what an earlier process wrote.
        skip_nonfinite: see UpdateGuard.
        time_first_step: print how long the first step takes, for it compiles the model.
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
        self.device = device
        self.time_first_step = time_first_step
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
        x_axis: Callable[[int], int] | None = None,
        progress: Progress | None = None,
    ) -> Iterator[tuple[int, Any]]:
        """Yield (step, batch); print a line every print_freq steps, or a live bar on a terminal.

        Args:
            num_steps: length of the loop.
            clips_per_step: clips that all ranks together process per step, for clips/s.
            x_axis: maps a step to TensorBoard's x axis; None logs no scalars.
            progress: the place in the epoch where the loop starts.

        Raises:
            NonFiniteError: see Meters.flush.
        """
        first = progress.step if progress else 0
        self.meters = Meters(self.device, progress, self.guard.limit > 0)
        hidden = not (is_main() and sys.stderr.isatty())
        bar = tqdm(total=num_steps, initial=first, desc=header, disable=hidden, dynamic_ncols=True)
        start = waiting = time.perf_counter()
        loop = _Loop(header, num_steps, clips_per_step, x_axis, bar, first - 1, start)
        self.loop = loop
        try:
            for step, batch in enumerate(loader, first):
                step_start = time.perf_counter()
                loop.data_time += step_start - waiting
                yield step, batch
                if self.time_first_step:
                    seconds = time.perf_counter() - step_start
                    print0(f"{header}  first step, with compilation: {seconds:.1f} s")
                    self.time_first_step = False
                bar.update()
                if self.is_due(step):
                    self.read(step)
                waiting = time.perf_counter()
        finally:
            bar.close()
        elapsed = timedelta(seconds=int(time.perf_counter() - start))
        means = "".join(f"  {k} {v:.4g}" for k, v in self.meters.means().items() if k == "loss")
        print0(f"{header}  done in {elapsed}{means}")

    def is_due(self, step: int) -> bool:
        """Return whether a line is due after a step: every print_freq steps and after the last."""
        return (step + 1) % self.print_freq == 0 or step + 1 == self.loop.num_steps

    def read(self, step: int) -> None:
        """Read the metrics up to this step; print them, and log them to TensorBoard.

        This waits for the device. A step that has been read is not read again.
        """
        loop = self.loop
        if step == loop.last_step:
            return
        rows = self.meters.flush()
        now = time.perf_counter()
        seconds = (now - loop.last_time) / (step - loop.last_step)
        speed = {
            "clips_per_s": loop.clips_per_step / seconds,
            "data_share": loop.data_time / (now - loop.last_time),
            "memory_mib": memory_mib(self.device),
        }
        if loop.x_axis is not None:
            for number, row in rows:
                for name, value in row.items():
                    self.scalar(f"train/{name}", value, loop.x_axis(number))
            for name, value in speed.items():
                self.scalar(f"speed/{name}", value, loop.x_axis(step))
        line = {
            **{name: f"{value:.4g}" for name, value in self.meters.latest.items()},
            "clips/s": f"{speed['clips_per_s']:.1f}",
            "data": f"{speed['data_share']:.0%}",
            "mem": f"{speed['memory_mib']:.0f}M",
        }
        eta = timedelta(seconds=int(seconds * (loop.num_steps - step - 1)))
        if loop.bar.disable:
            text = "  ".join(f"{name} {value}" for name, value in line.items())
            print0(f"{loop.header}  [{step + 1}/{loop.num_steps}]  eta {eta}  {text}")
        else:
            loop.bar.set_postfix(line)
        loop.last_step, loop.last_time, loop.data_time = step, now, 0.0

    def scalar(self, name: str, value: float, x: int) -> None:
        """Write a scalar to TensorBoard."""
        self._write("add_scalar", name, value, x)

    def histogram(self, name: str, values: np.ndarray, x: int) -> None:
        """Write a histogram of numbers of any shape to TensorBoard."""
        self._write("add_histogram", name, values, x)

    def image(self, name: str, pixels: np.ndarray, x: int) -> None:
        """Write an image to TensorBoard, uint8 [H, W, 3]."""
        self._write("add_image", name, pixels, x, dataformats="HWC")

    def text(self, name: str, markdown: str, x: int) -> None:
        """Write a text to TensorBoard."""
        self._write("add_text", name, markdown, x)

    def gif(self, name: str, data: bytes, x: int) -> None:
        """Write the contents of a GIF file; TensorBoard plays it among its images.

        writer.add_video would make the same, but needs MoviePy.
        """
        if self.writer is not None:
            from torch.utils.tensorboard import summary

            width, height = Image.open(io.BytesIO(data)).size
            Summary: Any = summary.Summary  # a generated class, which type checkers do not see
            picture = Summary.Image(
                height=height, width=width, colorspace=3, encoded_image_string=data
            )
            self._write("add_summary", Summary(value=[Summary.Value(tag=name, image=picture)]), x)

    def hparams(self, flags: dict[str, Any]) -> None:
        """Let TensorBoard compare this run with others by its flags.

        It finds the flags that differ, and the last values of all scalars, by itself.
        writer.add_hparams would make a run of its own for them.
        """
        if self.writer is not None:
            from torch.utils.tensorboard.summary import hparams

            values = {
                name: value if isinstance(value, (bool, int, float)) else str(value)
                for name, value in flags.items()
            }
            _, start, self.session_end = hparams(values, {})
            self._write("add_summary", start)

    def flush(self) -> None:
        """Bring everything that was written for TensorBoard to the disk."""
        self._write("flush")

    def close(self) -> None:
        """Tell TensorBoard that the run has ended, and close its file."""
        if self.session_end is not None:
            self._write("add_summary", self.session_end)
        self._write("close")

    def _write(self, method: str, *values: Any, **options: Any) -> None:
        """Call a method of TensorBoard's writer; if that fails, train on without TensorBoard."""
        if self.writer is None:
            return
        try:
            target = self.writer.file_writer if method == "add_summary" else self.writer
            getattr(target, method)(*values, **options)
        except OSError as error:
            print0(f"WARNING: TensorBoard's file cannot be written, going on without: {error}")
            self.writer = None


def open_log(
    args: Namespace,
    device: torch.device,
    progress: Progress,
    steps_per_epoch: int,
    hparams: dict[str, Any],
) -> RunLog:
    """Open the log of a training run; what a killed process wrote beyond `progress` is dropped."""
    done = epoch_1000x(progress.epoch + progress.step / steps_per_epoch, args.repeat_aug)
    # a run that stopped after the last step of an epoch has still to write that epoch's results
    purge_step = min(done, last_x(progress.epoch, args.repeat_aug)) if done else None
    log_dir = args.log_dir or os.path.join(args.output_dir, "tensorboard")
    log = RunLog(log_dir, args.print_freq, device, purge_step, args.skip_nonfinite, args.compile)
    log.hparams(hparams | {"ranks": world_size()})
    return log


# --- log.txt ------------------------------------------------------------------------------------


def log_line(record: dict[str, Any]) -> str:
    """Return a line of log.txt. JSON has no NaN: a validation loss that is one becomes null."""
    return simplejson.dumps(record, ignore_nan=True) + "\n"


def append_log(output_dir: str, record: dict[str, Any]) -> None:
    """Append one JSON line to log.txt, from the main process."""
    if is_main() and output_dir:
        with open_file(os.path.join(output_dir, "log.txt"), "a") as file:
            file.write(log_line(record))


def write_log(output_dir: str, records: list[dict[str, Any]]) -> None:
    """Write log.txt anew, one JSON line per epoch, from the main process; failing only warns.

    This drops the lines that a killed process had added after its last checkpoint.
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
