"""Calls that are given up when they take too long, a read that never returns included."""

import threading
from collections.abc import Callable
from typing import Any


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
    thread.start()
    thread.join(min(seconds, threading.TIMEOUT_MAX))
    if errors:
        raise errors[0]
    if not result:
        raise TimeoutError
    return result[0]
