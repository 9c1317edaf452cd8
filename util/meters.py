"""What a run writes: meters of a loop, progress lines, log.txt and TensorBoard's file."""

from __future__ import annotations

import io
import math
import os
import resource
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
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
from util.file_io import is_remote, list_names, make_dirs, open_file, read_text, write_atomically
from util.optim import NonFiniteError, UpdateGuard

if TYPE_CHECKING:
    from util.checkpoint import Progress


class Meters:
    """Collect the metrics of every step without waiting for the device.

    Values may be scalars on the device: they are stacked, averaged over ranks and read once per
    `flush`. There a value that is not finite raises an error, or is left out if UpdateGuard has
    handled it (skip_nonfinite). In a resumed epoch, sums and counts start from those in `progress`.
    """

    def __init__(
        self, device: torch.device, progress: Progress | None = None, skip_nonfinite: bool = False
    ):
        self.device, self.skip_nonfinite = device, skip_nonfinite
        self.pending: list[tuple[int, Tensor, dict[str, Tensor | float]]] = []
        self.sums = dict(progress.sums) if progress else {}
        self.counts = dict(progress.counts) if progress else {}
        self.latest: dict[str, float] = {}

    def update(self, step: int, samples: Tensor, **metrics: Tensor | float) -> None:
        """Store a step's metrics, the same names on every rank, and the csv rows of its batch."""
        self.pending.append((step, samples, metrics))

    def flush(self) -> list[tuple[int, dict[str, float]]]:
        """Return the metrics of the steps since the last flush, averaged over ranks.

        Raises:
            NonFiniteError: on every rank, for the first step with a value that is not finite.
        """
        if not self.pending:
            return []
        flat = [value for _, _, metrics in self.pending for value in metrics.values()]
        options = {"dtype": torch.float32, "device": self.device}
        local = torch.stack([torch.as_tensor(value, **options) for value in flat])
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
    """Map fractional epochs to TensorBoard's x axis, where runs of all batch sizes line up."""
    return int(epoch * 1000 * repeat_aug)


def last_x(epoch: int, repeat_aug: int) -> int:
    """Return the last place of an epoch (counted from 0) on the x axis, for the epoch's results.

    When a run resumes from the end of this epoch, TensorBoard keeps them and drops what follows.
    """
    return epoch_1000x(epoch + 1, repeat_aug) - 1


def is_vis_epoch(epoch: int, args: Namespace) -> bool:
    """Return whether to look at the model after this epoch (0, 1, ...): see --vis_period."""
    return args.vis_period > 0 and ((epoch + 1) % args.vis_period == 0 or epoch + 1 == args.epochs)


class RunLog:
    """Progress lines, and TensorBoard from the main process if there is a log_dir.

    TensorBoard drops what an earlier process wrote from x = purge_step on.
    """

    def __init__(
        self, log_dir: str, print_freq: int, device: torch.device, purge_step: int | None = None
    ):
        self.print_freq, self.device = print_freq, device
        self.guard = UpdateGuard(0)
        self.meters = Meters(device)
        self.repeat_aug = 1  # for the x axis
        self.time_first_step = False  # print how long the first step takes: it compiles
        self.session_end: Any = None  # see hparams
        self.writer = None
        if is_main() and log_dir:
            from torch.utils.tensorboard import SummaryWriter  # slow to import; one rank needs it

            make_dirs(log_dir)
            self.writer = SummaryWriter(log_dir, purge_step=purge_step)

    def every(
        self, loader: Any, header: str, clips_per_step: int, progress: Progress | None = None
    ) -> Iterator[tuple[int, Any]]:
        """Yield (step, batch); print a line every print_freq steps, or a live bar on a terminal.

        Args:
            loader: its length is that of a whole epoch.
            clips_per_step: clips that all ranks together process per step, for clips/s.
            progress: the epoch, and where in it the loop starts; None logs no scalars.

        Raises:
            NonFiniteError: see Meters.flush.
        """
        # State for `read`: the loop, and clock and loading time since the last printed line.
        first, steps = progress.step if progress else 0, len(loader)
        start = waiting = time.perf_counter()
        self.header, self.num_steps, self.clips_per_step = header, steps, clips_per_step
        self.progress, self.meters = progress, Meters(self.device, progress, self.guard.limit > 0)
        self.last_step, self.last_time, self.data_time = first - 1, start, 0.0
        hidden = not (is_main() and sys.stderr.isatty())
        self.bar = tqdm(total=steps, initial=first, desc=header, disable=hidden, dynamic_ncols=True)
        with self.bar:
            for step, batch in enumerate(loader, first):
                step_start = time.perf_counter()
                self.data_time += step_start - waiting
                yield step, batch
                if self.time_first_step:
                    seconds = time.perf_counter() - step_start
                    print0(f"{header}  first step, with compilation: {seconds:.1f} s")
                    self.time_first_step = False
                self.bar.update()
                if self.is_due(step):
                    self.read(step)
                waiting = time.perf_counter()
        elapsed = timedelta(seconds=int(time.perf_counter() - start))
        means = self.meters.means()
        loss = f"  loss {means['loss']:.4g}" if "loss" in means else ""
        print0(f"{header}  done in {elapsed}{loss}")

    def is_due(self, step: int) -> bool:
        """Return whether a line is due after a step: every print_freq steps and after the last."""
        return (step + 1) % self.print_freq == 0 or step + 1 == self.num_steps

    def read(self, step: int) -> None:
        """Wait for the metrics up to this step, once; print them, and log them to TensorBoard."""
        if step == self.last_step:
            return
        rows = self.meters.flush()
        now = time.perf_counter()
        seconds = (now - self.last_time) / (step - self.last_step)
        speed = {
            "clips_per_s": self.clips_per_step / seconds,
            "data_share": self.data_time / (now - self.last_time),
            "memory_mib": memory_mib(self.device),
        }
        self.last_step, self.last_time, self.data_time = step, now, 0.0
        if self.progress is not None:
            for kind, number, row in [*(("train", *row) for row in rows), ("speed", step, speed)]:
                x = epoch_1000x(self.progress.epoch + number / self.num_steps, self.repeat_aug)
                for name, value in row.items():
                    self.scalar(f"{kind}/{name}", value, x)
        line = {name: f"{value:.4g}" for name, value in self.meters.latest.items()}
        line["clips/s"] = f"{speed['clips_per_s']:.1f}"
        line["data"], line["mem"] = f"{speed['data_share']:.0%}", f"{speed['memory_mib']:.0f}M"
        if not self.bar.disable:
            self.bar.set_postfix(line)
            return
        eta = timedelta(seconds=int(seconds * (self.num_steps - step - 1)))
        text = "  ".join(f"{name} {value}" for name, value in line.items())
        print0(f"{self.header}  [{step + 1}/{self.num_steps}]  eta {eta}  {text}")

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
        """Write a GIF file, which TensorBoard plays; writer.add_video would need MoviePy for it."""
        if self.writer is None:
            return
        from torch.utils.tensorboard import summary

        width, height = Image.open(io.BytesIO(data)).size
        Summary: Any = summary.Summary  # a generated class, which type checkers do not see
        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=data)
        self._write("add_summary", Summary(value=[Summary.Value(tag=name, image=image)]), x)

    def hparams(self, flags: dict[str, Any]) -> None:
        """Let TensorBoard compare this run with others by its flags and last scalars."""
        if self.writer is not None:  # writer.add_hparams would create another run
            from torch.utils.tensorboard.summary import hparams

            values = {}
            for name, value in flags.items():
                value = " ".join(map(str, value)) if isinstance(value, list | tuple) else value
                values[name] = value if isinstance(value, int | float) else str(value)
            _, start, self.session_end = hparams(values, {})
            self._write("add_summary", start)

    def flush(self) -> None:
        """Write everything that TensorBoard has been given to the disk."""
        self._write("flush")

    def close(self) -> None:
        """Tell TensorBoard that the run has ended, and close its file."""
        if self.session_end is not None:
            self._write("add_summary", self.session_end)
        self._write("close")

    def _write(self, method: str, *values: Any, **options: Any) -> None:
        """Call a method of TensorBoard's writer; if that fails, warn and go on without."""
        if self.writer is None:
            return
        try:
            target = self.writer.file_writer if method == "add_summary" else self.writer
            getattr(target, method)(*values, **options)
        except OSError as error:
            print0(f"WARNING: TensorBoard's file cannot be written; going on without it: {error}")
            self.writer = None


def open_log(
    args: Namespace, device: torch.device, progress: Progress, steps: int, hparams: dict[str, Any]
) -> RunLog:
    """Open the log of a training run; what a killed process wrote beyond `progress` is dropped."""
    done = epoch_1000x(progress.epoch + progress.step / steps, args.repeat_aug)
    # a run that stopped after the last step of an epoch still has to write that epoch's results
    purge_step = min(done, last_x(progress.epoch, args.repeat_aug)) if done else None
    log_dir = args.log_dir or (args.output_dir and os.path.join(args.output_dir, "tensorboard"))
    log = RunLog(log_dir, args.print_freq, device, purge_step)
    log.guard.limit, log.repeat_aug = args.skip_nonfinite, args.repeat_aug
    log.time_first_step = args.compile
    log.hparams(hparams | {"ranks": world_size()})
    return log


# --- log.txt ------------------------------------------------------------------------------------


def log_line(record: dict[str, Any]) -> str:
    """Return a line of log.txt. JSON has no NaN, so a NaN loss becomes null."""
    return simplejson.dumps(record, ignore_nan=True) + "\n"


def append_log(output_dir: str, record: dict[str, Any]) -> None:
    """Append one JSON line to log.txt in the main process."""
    if is_main() and output_dir:
        path, text = os.path.join(output_dir, "log.txt"), log_line(record)
        if is_remote(path):  # object stores cannot append
            text = (read_text(path) if "log.txt" in list_names(output_dir) else "") + text
            return write_atomically(path, lambda file: file.write(text.encode()))
        with open_file(path, "a") as file:
            file.write(text)


def write_log(output_dir: str, records: list[dict[str, Any]]) -> None:
    """Rewrite log.txt in the main process, one JSON line per epoch; a failure only warns.

    This drops the lines that a killed process had added after its last checkpoint.
    """
    if is_main() and output_dir:
        text = "".join(map(log_line, records)).encode()
        path = os.path.join(output_dir, "log.txt")
        try:
            make_dirs(output_dir)
            write_atomically(path, lambda file: file.write(text))
        except (OSError, UserError) as error:
            print0(f"WARNING: could not write {path}: {error}; the next epoch tries again")
