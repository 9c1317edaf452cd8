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
        self.seconds = self.left = seconds
        self._last = time.monotonic()

    def restart(self) -> None:
        """Give all the seconds again, because there is progress; other threads may call this."""
        self.left = self.seconds

    def is_over(self) -> bool:
        """Count the time since the last call, and return whether none is left."""
        now = time.monotonic()
        self.left -= min(now - self._last, LONGEST)
        self._last = now
        return self.left <= 0


def call_within(limit: float | TimeLimit, function: Callable[[], Any]) -> Any:
    """Return function(), or raise TimeoutError if it has not returned after `limit` (seconds).

    It runs in another thread, because no signal ends a system call inside a library. A call that is
    given up goes on in that thread, so nobody else may use what it writes to.
    """
    calls, outcome = _idle.pop() if _idle else _start_thread(), SimpleQueue()
    calls.put((function, outcome))
    limit = limit if isinstance(limit, TimeLimit) else TimeLimit(limit)
    try:
        while True:
            try:
                result, error = outcome.get(timeout=min(limit.left, LONGEST / 2))
                break
            except Empty:
                if limit.is_over():
                    raise TimeoutError from None
    except BaseException:
        calls.put(None)  # ends the thread once the call returns, if it ever does
        raise
    _idle.append(calls)
    if error is not None:
        raise error
    return result


def _start_thread() -> SimpleQueue:
    """Return the queue of a thread for many calls; one for each would allocate memory anew."""
    calls: SimpleQueue = SimpleQueue()
    # A daemon, so that a hung call does not keep the process from ending.
    threading.Thread(target=_serve, args=[calls], daemon=True).start()
    return calls


def _serve(calls: SimpleQueue) -> None:
    while (call := calls.get()) is not None:
        function, outcome = call
        try:
            outcome.put((function(), None))
        except BaseException as error:
            outcome.put((None, error))
        del call, function, outcome  # frees what they refer to


_idle: list[SimpleQueue] = []  # the queues of threads that serve no call now
os.register_at_fork(after_in_child=_idle.clear)  # a forked process has none of these threads
