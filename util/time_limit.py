"""Calls that are given up when they take too long, a read that never returns included.

A process can be stopped as a whole: by SIGSTOP, by a scheduler that suspends its job, with its
machine. That time is not the file's fault, and does not count.
"""

import threading
import time
from collections.abc import Callable
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
        self.left -= min(now - self._last, LONGEST)
        self._last = now
        return self.left <= 0


def call_within(seconds: float, function: Callable[[], Any]) -> Any:
    """Return function(), or raise TimeoutError when it has not come back after so many seconds.

    It runs in a thread of its own, for no signal ends a system call inside of a library. A call
    given up goes on in that thread for as long as it takes, so it must own what it writes to.
    """
    result: list[Any] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            result.append(function())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)  # a hung one must not keep the process
    limit = TimeLimit(seconds)
    thread.start()
    while thread.is_alive() and not limit.is_over():
        thread.join(min(limit.left, LONGEST / 2))
    if errors:
        raise errors[0]
    if not result:
        raise TimeoutError
    return result[0]
