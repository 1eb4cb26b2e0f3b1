"""An HTTP proxy in front of an object store: it counts the requests that change something, and fails them on demand.

A request that fails has one of FAULTS. "Done" is what the store knows and its client does not: the request has arrived
and was carried out, and the answer never came.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable

from tests.http_proxy import Handler, Proxy

REFUSED, FAILED = "503", "500"
RESET, RESET_DONE = "connection reset", "connection reset, done"
STALLED, STALLED_DONE = "no answer", "no answer, done"
TRUNCATED = "answer cut off, done"
FAULTS = (REFUSED, FAILED, RESET, RESET_DONE, STALLED, STALLED_DONE, TRUNCATED)

_READS = ("GET", "HEAD")


class StoreProxy(Proxy):
    """Use it in `with`. requests: what came, as "METHOD path?query".

    after_write: called in the server's thread when the store has carried out a write, before the client hears of it.
    """

    def __init__(self, host: str, port: int) -> None:
        super().__init__(host, port, _StoreHandler)
        self.requests: list[str] = []
        self.after_write: Callable[[], None] = lambda: None
        self._fault = ""
        self._reads = False
        self._first = self._count = self._met = 0
        self._most: float = 0
        self._faulted = threading.Event()

    def fail(self, fault: str, *, at: int = 1, count: float = math.inf, reads: bool = False) -> None:
        """From the `at`-th write from now on, so many requests of any kind meet this fault. reads: the `at`-th read."""
        with self.lock:
            self._fault, self._reads, self._first, self._most = fault, reads, at, count
            self._count = self._met = 0
            self.released.clear()
            self._faulted.clear()

    def mend(self) -> int:
        """Answer everything from now on; how many requests have met the fault."""
        with self.lock:
            self._most = 0
            self.released.set()
            return self._met

    def wait_for_fault(self, timeout_s: float = 60.0) -> None:
        """Return when a request has met the fault."""
        assert self._faulted.wait(timeout_s), "no request has met the fault"

    def next_fault(self, method: str, path: str) -> str:
        """For a request; "" for none."""
        with self.lock:
            self.requests.append(f"{method} {path}")
            self._count += (method in _READS) == self._reads
            met = self._count >= self._first and self._met < self._most
            self._met += met
            if met:
                self._faulted.set()
            return self._fault if met else ""


class _StoreHandler(Handler):
    def _pass_on(self) -> None:
        body = self.body()
        fault = self.proxy.next_fault(self.command, self.path)
        if fault in (REFUSED, FAILED):
            self.refuse(int(fault))
            return
        if fault not in (RESET, STALLED):
            status, headers, answer = self.forward(body)
            if self.command not in _READS:
                self.proxy.after_write()
        if fault in (STALLED, STALLED_DONE):
            self.proxy.released.wait()
        if fault in (RESET, RESET_DONE, STALLED, STALLED_DONE):
            self.reset()
        else:
            self.answer(status, headers, answer, cut=fault == TRUNCATED)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _pass_on
