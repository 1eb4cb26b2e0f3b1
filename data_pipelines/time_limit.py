"""A time limit for calls into libraries that have none of their own."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


class Stalled(OSError):
    """A request gave nothing within its time."""


def within(seconds: float, call: Callable[[], T]) -> T:
    """The call's result. Raises Stalled where it takes longer; its thread is left behind, and what it finds dropped.

    No client library can be relied on to time out, so the wait is out here. The thread is a daemon: it keeps no
    process alive.
    """
    outcome: queue.SimpleQueue[tuple[T | None, BaseException | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            outcome.put((call(), None))
        except BaseException as error:
            outcome.put((None, error))

    threading.Thread(target=run, daemon=True, name="read").start()
    try:
        result, error = outcome.get(timeout=seconds)
    except queue.Empty:
        raise Stalled(f"nothing came for {seconds:g} s") from None
    if error is not None:
        raise error
    return result  # type: ignore[return-value]  # None only where T allows it
