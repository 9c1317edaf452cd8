"""Signals: they stop all ranks after the same step; libraries must not get in the way."""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from util.dist import is_main, print0, world_size

# when several arrive the later in this list wins: SIGUSR may ask for a requeue of the job
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
REQUEUE_STATUS = 75  # EX_TEMPFAIL: stopped by a signal, run the same command again
PATIENCE = 2.0  # seconds after which another Ctrl-C stops at once; torchrun itself sends two


@contextlib.contextmanager
def signals_restored() -> Iterator[None]:
    """Restore the handlers of the stop signals at the end, also after an error."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, handler)


class Interruption:
    """Turn Ctrl-C, SIGTERM, SIGUSR1 and SIGUSR2 into a stop after the same step on every rank.

    The ranks exchange flags while they compute: an exchange begun after one step is read after
    the next. So no rank waits for another one or for its device.

    Args:
        timeout: minutes that a rank waits for the others.
    """

    def __init__(self, timeout: float) -> None:
        self.signal = 0  # place in STOP_SIGNALS, counted from 1; 0: none has come
        self.since = float("inf")  # when the first one came
        self.agreed = False
        self.exchange: tuple[Any, Tensor] | None = None
        self.group: Any = None
        if world_size() > 1:
            self.group = dist.new_group(timeout=timedelta(minutes=timeout), backend="gloo")
        self.handlers: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            self.handlers = {s: signal.signal(s, self._note) for s in STOP_SIGNALS}

    def _note(self, number: int, _: Any) -> None:
        now = time.monotonic()
        if number == signal.SIGINT and now - self.since > PATIENCE:
            raise KeyboardInterrupt
        self.since = min(self.since, now)
        self.signal = max(self.signal, STOP_SIGNALS.index(signal.Signals(number)) + 1)
        again = "; once more: at once" if number == signal.SIGINT else ""
        name = signal.Signals(number).name
        text = f"{name}: stopping after this step with a checkpoint{again}\n"
        with contextlib.suppress(OSError):
            os.write(2, text.encode())  # print would raise if the signal interrupted another print

    def after_step(self) -> bool:
        """Return, alike on every rank, whether to stop now; all ranks must ask equally often."""
        if self.group is None:
            self.agreed = self.signal > 0
            return self.agreed
        if self.exchange is not None:
            work, flag = self.exchange
            work.wait()
            if flag > 0:  # otherwise keep what may have come to this rank since
                self.agreed, self.signal = True, int(flag)
        if not self.agreed:
            flag = torch.tensor(self.signal)
            work = dist.all_reduce(flag, dist.ReduceOp.MAX, self.group, async_op=True)
            self.exchange = work, flag
        return self.agreed

    def leave(self) -> None:
        """End the process: call the handler that was installed before, or exit with status 75.

        After Ctrl-C the status is 130, as usual. submitit's handler requeues the job from rank 0
        and needs the other ranks to stay alive meanwhile.
        """
        if self.group is not None:
            # Leave together: a launcher kills the other ranks, maybe a saving one, when one leaves.
            with contextlib.suppress(RuntimeError):
                dist.barrier(self.group)
        number = STOP_SIGNALS[self.signal - 1]
        previous: Callable[..., Any] | int | None = self.handlers.get(number)
        status = 128 + number if number == signal.SIGINT else REQUEUE_STATUS
        if callable(previous) and number != signal.SIGINT:
            previous(number, None)
            if not is_main():
                time.sleep(60)
        print0(f"stopped; the same command goes on from here (exit status {status})")
        sys.exit(status)

    def close(self) -> None:
        """Restore the handlers that were installed before."""
        for number, handler in self.handlers.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def signals_blocked() -> Iterator[None]:
    """Block the stop signals, here and in processes that are started meanwhile."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def child_signal_kept() -> Iterator[None]:
    """Undo the SIGCHLD handler that DataLoader installs with its first workers.

    That handler raises wherever the trainer is when a worker dies, even in the middle of a save.
    Without it the loader still notices the missing worker, within 5 seconds, when it waits for
    that worker's batch.
    """
    before = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        if before is not None and signal.getsignal(signal.SIGCHLD) is not before:
            signal.signal(signal.SIGCHLD, before)
