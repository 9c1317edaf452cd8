"""Calls that are given up when they take too long, even a read that never returns.

While the whole process is stopped (SIGSTOP, a suspended job or machine), no time is counted.
"""

import os
import threading
import time
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Any

LONGEST = 1.0  # seconds; a longer time between two looks at the clock counts only this much


class TimeLimit:
    """Seconds of running time that are left, if `is_over` is called at least every LONGEST."""

    def __init__(self, seconds: float):
        self.left = seconds
        self._last = time.monotonic()

    def is_over(self) -> bool:
        """Count the time since the last call, and return whether none is left."""
        now = time.monotonic()
        self.left -= min(now - self._last, LONGEST)
        self._last = now
        return self.left <= 0


def call_within(seconds: float, function: Callable[[], Any]) -> Any:
    """Return function(), or raise TimeoutError if it has not returned after so many seconds.

    It runs in another thread, because no signal ends a system call inside a library. A call that is
    given up goes on in that thread, so nobody else may use what it writes to.
    """
    thread = _idle.pop() if _idle else _Thread()
    try:
        result, error = thread.call(seconds, function)
    except BaseException:
        thread.calls.put(None)  # ends the thread once the call returns, if it ever does
        raise
    _idle.append(thread)
    if error is not None:
        raise error
    return result


class _Thread:
    """A thread that serves many calls; a new one for each would allocate and free memory anew."""

    def __init__(self) -> None:
        self.calls: SimpleQueue = SimpleQueue()
        # A daemon, so that a hung call does not keep the process from ending.
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while (call := self.calls.get()) is not None:
            function, outcome = call
            try:
                outcome.put((function(), None))
            except BaseException as error:
                outcome.put((None, error))
            del call, function, outcome  # frees what they refer to

    def call(self, seconds: float, function: Callable[[], Any]) -> tuple[Any, BaseException | None]:
        """Return the function's result, or the error it raised; raise TimeoutError."""
        outcome: SimpleQueue = SimpleQueue()
        self.calls.put((function, outcome))
        limit = TimeLimit(seconds)
        while True:
            try:
                return outcome.get(timeout=min(limit.left, LONGEST / 2))
            except Empty:
                if limit.is_over():
                    raise TimeoutError from None


_idle: list[_Thread] = []
os.register_at_fork(after_in_child=_idle.clear)  # a forked process has none of these threads
