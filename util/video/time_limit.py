"""Calls that are given up when they take too long, a read that never returns included.

A process can be stopped as a whole: by SIGSTOP, by a scheduler that suspends its job, with its
machine. That time is not the file's fault, and does not count.
"""

import os
import threading
import time
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Any

LONGEST = 1.0  # seconds; what lies between two looks at the clock counts for no more


class TimeLimit:
    """Seconds of running that are left, as long as somebody looks at least once in LONGEST."""

    def __init__(self, seconds: float):
        self.left = seconds
        self._last = time.monotonic()

    def is_over(self) -> bool:
        """Count the time since the last look, and tell if none is left."""
        now = time.monotonic()
        elapsed, self._last = now - self._last, now
        self.left -= elapsed if elapsed < LONGEST else LONGEST
        return self.left <= 0


def call_within(seconds: float, function: Callable[[], Any]) -> Any:
    """Return function(), or raise TimeoutError when it has not come back after so many seconds.

    It runs in another thread, for no signal ends a system call inside of a library. A call given up
    goes on in that thread for as long as it takes, so it must own what it writes to.
    """
    thread = _idle.pop() if _idle else _Thread()
    try:
        result, error = thread.call(seconds, function)
    except BaseException:
        thread.calls.put(None)  # it ends, if the call ever does
        raise
    _idle.append(thread)
    if error is not None:
        raise error
    return result


class _Thread:
    """A thread kept for calls: a new one for every call would grow and give back memory anew."""

    def __init__(self) -> None:
        self.calls: SimpleQueue = SimpleQueue()
        # a daemon, for a hung one must not keep the process
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while (call := self.calls.get()) is not None:
            function, outcome = call
            try:
                outcome.put((function(), None))
            except BaseException as error:
                outcome.put((None, error))
            del call, function, outcome  # and what they refer to

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
os.register_at_fork(after_in_child=_idle.clear)  # a fork has the list and none of the threads
