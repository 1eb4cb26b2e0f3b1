"""An HTTP proxy in front of an object store: it counts the requests that change something, and fails them on demand.

A request that fails has one of FAULTS. "Done" is what the store knows and its client does not: the request has arrived
and was carried out, and the answer never came.
"""

from __future__ import annotations

import contextlib
import http.client
import math
import socket
import struct
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

_SLOW_DOWN, _INTERNAL = (
    f'<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code}</Code><Message>{text}</Message></Error>'.encode()
    for code, text in (("SlowDown", "Please reduce your request rate."), ("InternalError", "We met an internal error."))
)
REFUSED, FAILED = "503", "500"
RESET, RESET_DONE = "connection reset", "connection reset, done"
STALLED, STALLED_DONE = "no answer", "no answer, done"
TRUNCATED = "answer cut off, done"
FAULTS = (REFUSED, FAILED, RESET, RESET_DONE, STALLED, STALLED_DONE, TRUNCATED)

_READS = ("GET", "HEAD")
_HOP_BY_HOP = ("content-length", "connection", "transfer-encoding", "keep-alive", "date", "server", "expect")


class StoreProxy:
    """Use it in `with`. port: where it listens, on 127.0.0.1. requests: what came, as "METHOD path?query".

    after_write: called in the server's thread when the store has carried out a write, before the client hears of it.
    """

    def __init__(self, host: str, port: int) -> None:
        self.target = (host, port)
        self.requests: list[str] = []
        self.after_write: Callable[[], None] = lambda: None
        self._fault = ""
        self._reads = False
        self._first = self._count = self._met = 0
        self._most: float = 0
        self._released = threading.Event()  # ends stalls
        self._faulted = threading.Event()
        self._lock = threading.Lock()
        proxy = self

        class Handler(_Handler):
            store = proxy

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.block_on_close = False
        self.port: int = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)

    def __enter__(self) -> StoreProxy:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.mend()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def fail(self, fault: str, *, at: int = 1, count: float = math.inf, reads: bool = False) -> None:
        """From the `at`-th write from now on, so many requests of any kind meet this fault. reads: the `at`-th read."""
        with self._lock:
            self._fault, self._reads, self._first, self._most = fault, reads, at, count
            self._count = self._met = 0
            self._released.clear()
            self._faulted.clear()

    def mend(self) -> int:
        """Answer everything from now on; how many requests have met the fault."""
        with self._lock:
            self._most = 0
            self._released.set()
            return self._met

    def wait_for_fault(self, timeout_s: float = 60.0) -> None:
        """Return when a request has met the fault."""
        assert self._faulted.wait(timeout_s), "no request has met the fault"

    def _next_fault(self, method: str, path: str) -> str:
        with self._lock:
            self.requests.append(f"{method} {path}")
            self._count += (method in _READS) == self._reads
            met = self._count >= self._first and self._met < self._most
            self._met += met
            if met:
                self._faulted.set()
            return self._fault if met else ""


class _Handler(BaseHTTPRequestHandler):
    store: StoreProxy
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def _pass_on(self) -> None:
        body = self._body()
        fault = self.store._next_fault(self.command, self.path)
        if fault in (REFUSED, FAILED):
            self._answer(int(fault), {"Content-Type": "application/xml"}, {REFUSED: _SLOW_DOWN}.get(fault, _INTERNAL))
            return
        if fault not in (RESET, STALLED):
            status, headers, answer = self._forward(body)
            if self.command not in _READS:
                self.store.after_write()
        if fault in (STALLED, STALLED_DONE):
            self.store._released.wait()
        if fault in (RESET, RESET_DONE, STALLED, STALLED_DONE):
            self._reset()
        else:
            self._answer(status, headers, answer, cut=fault == TRUNCATED)

    def handle_one_request(self) -> None:
        with contextlib.suppress(ConnectionError):  # the client has given up
            super().handle_one_request()

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _pass_on

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline().partition(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return b"".join(chunks)

    def _forward(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection(*self.store.target, timeout=20)
        headers = {name: value for name, value in self.headers.items() if name.lower() not in _HOP_BY_HOP}
        connection.request(self.command, self.path, body or None, headers | {"Content-Length": str(len(body))})
        response = connection.getresponse()
        answer = response.read()
        kept = {name: value for name, value in response.getheaders() if name.lower() not in _HOP_BY_HOP}
        if self.command == "HEAD":
            kept["Content-Length"] = response.getheader("Content-Length") or "0"
        connection.close()
        return response.status, kept, answer

    def _answer(self, status: int, headers: dict[str, str], body: bytes, cut: bool = False) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if self.command != "HEAD":
            self.send_header("Content-Length", str(len(body)))
        self.close_connection = cut
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if cut else body)

    def _reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()

    def finish(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            super().finish()
