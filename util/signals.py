"""Signals: a stop after the same step on every rank, and what libraries must not do with them."""

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

# the later ones win when several arrive: a scheduler's warning by SIGUSR may ask for a requeue
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
REQUEUE_STATUS = 75  # EX_TEMPFAIL: stopped by a signal, run the same command again
PATIENCE = 2.0  # seconds after Ctrl-C from which on another one means at once; torchrun sends two


@contextlib.contextmanager
def signals_restored() -> Iterator[None]:
    """Give the signals of Interruption back in the end, after an error too."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, handler)


class Interruption:
    """Turn Ctrl-C, SIGTERM, SIGUSR1 and SIGUSR2 into a stop after the same step on every rank.

    The flags of the ranks travel beside the computation: the exchange begun after one step is
    read after the next, so that no rank waits for another and none for its device.

    Args:
        timeout: minutes that a rank waits for the others.
    """

    def __init__(self, timeout: float) -> None:
        self.signal = 0  # its place in STOP_SIGNALS, from 1 on
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
            os.write(2, text.encode())  # print raises where the signal comes within another print

    def after_step(self) -> bool:
        """Tell, alike on every rank, whether to stop now; every rank must ask equally often."""
        if self.group is None:
            self.agreed = self.signal > 0
            return self.agreed
        if self.exchange is not None:
            work, flag = self.exchange
            work.wait()
            if flag > 0:  # else a signal may have come to this rank since
                self.agreed, self.signal = True, int(flag)
        if not self.agreed:
            flag = torch.tensor(self.signal)
            work = dist.all_reduce(flag, dist.ReduceOp.MAX, self.group, async_op=True)
            self.exchange = work, flag
        return self.agreed

    def leave(self) -> None:
        """End the process: hand the signal to whom it was for before us, or exit with status 75.

        After Ctrl-C the status is 130, as ever. submitit's handler requeues the job from rank 0 and
        wants the other ranks to stay.
        """
        if self.group is not None:
            # A launcher ends the others when one has left, and the main process may still write.
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
        """Give the signals back to whom they were for."""
        for number, handler in self.handlers.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def signals_blocked() -> Iterator[None]:
    """Hold back the signals that stop a run, here and in processes started meanwhile."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def child_signal_kept() -> Iterator[None]:
    """Undo the SIGCHLD handler that DataLoader installs with its first workers.

    It raises wherever the trainer happens to be when a worker dies: in a save, or in a callback
    that swallows it with a traceback. Without it the loader finds the worker missing as soon as
    its batch is waited for (it looks every 5 seconds).
    """
    before = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        if before is not None and signal.getsignal(signal.SIGCHLD) is not before:
            signal.signal(signal.SIGCHLD, before)
