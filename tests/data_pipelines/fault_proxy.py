"""An HTTP proxy in front of an object store that misbehaves on demand, the way real ones do. For reading only."""

from __future__ import annotations

from collections import Counter, deque
from urllib.parse import urlsplit

from tests.http_proxy import Handler, Proxy

FAULTS = ("throttle", "error", "reset", "truncate", "stall", "corrupt")


class FaultProxy(Proxy):
    """Use it in `with`. The next GETs of objects get the faults that were put in `plan`, one each, then `always`."""

    def __init__(self, host: str, port: int) -> None:
        super().__init__(host, port, _FaultHandler)
        self.plan: deque[str | None] = deque()
        self.always: str | None = None
        self.met: Counter[str] = Counter()  # faults that were served
        self.gets: Counter[str] = Counter()  # "path range" of each GET of an object

    def next_fault(self, request: str) -> str | None:
        """For a GET of an object."""
        with self.lock:
            self.gets[request] += 1
            fault = self.plan.popleft() if self.plan else self.always
            if fault is not None:
                self.met[fault] += 1
            return fault


class _FaultHandler(Handler):
    def do_GET(self) -> None:
        path = urlsplit(self.path)
        is_object = path.path.count("/") > 1 and not path.query
        fault = self.proxy.next_fault(f"{path.path} {self.headers['Range']}") if is_object else None
        if fault == "stall":
            self.proxy.released.wait()
        if fault in ("stall", "reset"):
            self.reset()
        elif fault in ("throttle", "error"):
            self.refuse(503 if fault == "throttle" else 500)
        else:
            status, headers, body = self.forward()
            if fault == "corrupt" and body:
                body = body[:-1] + bytes([body[-1] ^ 1])
            self.answer(status, headers, body, cut=fault == "truncate")

    def do_HEAD(self) -> None:
        self.answer(*self.forward())
