"""Signals that stop all ranks after the same step, without interference from libraries."""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from util.dist import is_main, print0, world_size

# if several arrive, the last one in this list wins: SIGUSR may ask for a requeue of the job
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
REQUEUE_STATUS = 75  # EX_TEMPFAIL: stopped by a signal, run the same command again
PATIENCE = 2.0  # seconds after which another Ctrl-C stops at once; torchrun itself sends two


@contextlib.contextmanager
def signals_restored(*numbers: int) -> Iterator[None]:
    """Restore the handlers of signals (by default, of those that stop) at the end of the body."""
    before = {number: signal.getsignal(number) for number in numbers or STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None and threading.current_thread() is threading.main_thread():
                signal.signal(number, handler)


def child_signal_kept() -> contextlib.AbstractContextManager[None]:
    """Undo the SIGCHLD handler that DataLoader installs with its first workers.

    That handler raises wherever the trainer is when a worker dies, even in the middle of a save.
    Without it the loader still notices the missing worker, within 5 seconds, when it waits for
    that worker's batch.
    """
    return signals_restored(signal.SIGCHLD)


@contextlib.contextmanager
def signals_blocked() -> Iterator[None]:
    """Block the stop signals, here and in processes started meanwhile."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Interruption:
    """Turn Ctrl-C, SIGTERM, SIGUSR1 and SIGUSR2 into a stop after the same step on every rank.

    The ranks exchange flags while they compute: an exchange begun after one step is read after
    the next. So no rank waits for another one or for its device. If one does not answer
    within `timeout` minutes, the others raise an error. `saves`: the run writes checkpoints.
    """

    def __init__(self, timeout: float, saves: bool = True) -> None:
        self.saves = saves
        self.signal = 0  # place in STOP_SIGNALS, counted from 1; 0: none has come
        self.since = float("inf")  # when the first one came
        self.agreed = False
        self.exchange: tuple[Any, Tensor] | None = None
        self.group: Any = None
        if world_size() > 1:
            self.group = dist.new_group(timeout=timedelta(minutes=timeout), backend="gloo")
        self.handlers: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            self.handlers = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}

    def _note(self, number: int, _: Any) -> None:
        now = time.monotonic()
        if number == signal.SIGINT and now - self.since > PATIENCE:
            raise KeyboardInterrupt
        self.since, which = min(self.since, now), signal.Signals(number)
        self.signal = max(self.signal, STOP_SIGNALS.index(which) + 1)
        again = "; Ctrl-C again stops at once" if which == signal.SIGINT else ""
        checkpoint = " with a checkpoint" if self.saves else ""
        text = f"{which.name}: stopping after this step{checkpoint}{again}\n"
        with contextlib.suppress(OSError):
            os.write(2, text.encode())  # print would raise if the signal interrupted another print

    def after_step(self) -> bool:
        """Return whether all ranks stop now; every rank must call this equally often."""
        if self.group is None:
            self.agreed = self.signal > 0
            return self.agreed
        if self.exchange is not None:
            work, flag = self.exchange
            work.wait()
            if flag > 0:  # otherwise keep a signal that has come to this rank since
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
            # leave together: once one rank leaves, a launcher kills the others, even a saving one
            with contextlib.suppress(RuntimeError):
                dist.barrier(self.group)
        number = STOP_SIGNALS[self.signal - 1]
        previous = self.handlers.get(number)
        status = 128 + number if number == signal.SIGINT else REQUEUE_STATUS
        if callable(previous) and number != signal.SIGINT:
            previous(number, None)
            if not is_main():
                time.sleep(60)
        saved = "the same command continues from here" if self.saves else "nothing was saved"
        print0(f"stopped; {saved} (exit status {status})")
        sys.exit(status)

    def close(self) -> None:
        """Restore the handlers that were installed before."""
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
