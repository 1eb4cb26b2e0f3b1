"""A few threads that fetch blocks: first what somebody waits for, then what is wanted soon, in the order of its use."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future


class FetchQueue:
    """Runs fetch(block, urgent) for each block that is asked for, never twice at the same time for one.

    At most num_threads of what is wanted soon at a time, and as many more that somebody waits for, so that these need
    not wait for those. Threads start when they are needed and are daemons: a store that hangs keeps no process alive.
    """

    def __init__(self, fetch: Callable[[int, bool], None], num_threads: int) -> None:
        self._fetch = fetch
        self._num_threads = num_threads
        self._num_started = 0
        self._num_idle = 0
        self._num_soon = 0  # being fetched
        self._change = threading.Condition()
        self._urgent: dict[int, Future[None]] = {}
        self._soon: deque[int] = deque()
        self._running: dict[int, Future[None]] = {}
        self._closed = False

    def now(self, block: int) -> Future[None]:
        """Fetch a block before all that is not waited for. The future has the fetch's error; while the block was being
        fetched as one wanted soon, it is that fetch's.
        """
        with self._change:
            future = self._running.get(block) or self._urgent.get(block)
            if future is None:
                future = self._urgent[block] = Future()
                self._wake(1)
            return future

    def soon(self, blocks: Iterable[int]) -> None:
        """Fetch these, in their order, and no longer what earlier calls asked for."""
        with self._change:
            self._soon = deque(blocks)
            self._wake(len(self._soon))

    def close(self) -> None:
        """Fetch nothing more; what is being fetched may still end, and is not waited for."""
        with self._change:
            self._closed = True
            self._soon.clear()
            for future in self._urgent.values():
                future.cancel()
            self._urgent.clear()
            self._change.notify_all()

    def _wake(self, count: int) -> None:
        for _ in range(min(count - self._num_idle, 2 * self._num_threads - self._num_started)):
            self._num_started += 1
            threading.Thread(target=self._work, daemon=True, name="fetch").start()
        self._change.notify(count)

    def _work(self) -> None:
        while (taken := self._take()) is not None:
            block, urgent, future = taken
            error: BaseException | None = None
            try:
                self._fetch(block, urgent)
            except BaseException as raised:
                error = raised
            with self._change:
                del self._running[block]
                self._num_soon -= not urgent
            if error is None:
                future.set_result(None)
            else:
                future.set_exception(error)

    def _take(self) -> tuple[int, bool, Future[None]] | None:
        """The next block to fetch; None when closed."""
        with self._change:
            while not self._closed:
                if self._urgent:
                    block = next(iter(self._urgent))
                    self._running[block] = future = self._urgent.pop(block)
                    return block, True, future
                while self._soon and self._num_soon < self._num_threads:
                    block = self._soon.popleft()
                    if block not in self._running:
                        self._num_soon += 1
                        self._running[block] = future = Future()
                        return block, False, future
                self._num_idle += 1
                self._change.wait()
                self._num_idle -= 1
            return None
