"""An HTTP proxy in front of an object store that misbehaves on demand, the way real ones do. For reading only."""

from __future__ import annotations

import http.client
import socket
import struct
import threading
from collections import Counter, deque
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

_SLOW_DOWN = (
    b'<?xml version="1.0" encoding="UTF-8"?><Error><Code>SlowDown</Code>'
    b"<Message>Please reduce your request rate.</Message></Error>"
)
_INTERNAL = (
    b'<?xml version="1.0" encoding="UTF-8"?><Error><Code>InternalError</Code>'
    b"<Message>We encountered an internal error.</Message></Error>"
)
FAULTS = ("throttle", "error", "reset", "truncate", "stall", "corrupt")


class FaultProxy:
    """Use it in `with`. The next GETs of objects get the faults that were put in `plan`, one each, then `always`."""

    def __init__(self, host: str, port: int) -> None:
        self.target = (host, port)
        self.plan: deque[str | None] = deque()
        self.always: str | None = None
        self.met: Counter[str] = Counter()  # faults that were served
        self.gets: Counter[str] = Counter()  # "path range" of each GET of an object
        self.released = threading.Event()  # ends stalls
        self._lock = threading.Lock()
        proxy = self

        class Handler(_Handler):
            faults = proxy

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.block_on_close = False
        self.port: int = self.server.server_address[1]
        self._thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)

    def __enter__(self) -> FaultProxy:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.released.set()
        self.server.shutdown()
        self.server.server_close()
        self._thread.join()

    def next_fault(self, request: str) -> str | None:
        with self._lock:
            self.gets[request] += 1
            fault = self.plan.popleft() if self.plan else self.always
            if fault is not None:
                self.met[fault] += 1
            return fault


class _Handler(BaseHTTPRequestHandler):
    faults: FaultProxy
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        path = urlsplit(self.path)
        is_object = path.path.count("/") > 1 and not path.query
        fault = self.faults.next_fault(f"{path.path} {self.headers['Range']}") if is_object else None
        if fault == "stall":
            self.faults.released.wait()
        if fault in ("stall", "reset"):
            self._reset()
        elif fault == "throttle":
            self._answer(503, {"Content-Type": "application/xml"}, _SLOW_DOWN)
        elif fault == "error":
            self._answer(500, {"Content-Type": "application/xml"}, _INTERNAL)
        else:
            status, headers, body = self._forward()
            if fault == "corrupt" and body:
                body = body[:-1] + bytes([body[-1] ^ 1])
            self._answer(status, headers, body, cut=fault == "truncate")

    def do_HEAD(self) -> None:
        self._answer(*self._forward())

    def _forward(self) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection(*self.faults.target, timeout=20)
        headers = {name: value for name, value in self.headers.items() if name.lower() != "connection"}
        connection.request(self.command, self.path, headers=headers)
        response = connection.getresponse()
        body = response.read()
        kept = {name: value for name, value in response.getheaders() if name.lower() not in _HOP_BY_HOP}
        if self.command == "HEAD":
            kept["Content-Length"] = response.getheader("Content-Length") or "0"
        connection.close()
        return response.status, kept, body

    def _answer(self, status: int, headers: dict[str, str], body: bytes, cut: bool = False) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if self.command != "HEAD":
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if cut else body)
        if cut:
            self.wfile.flush()
            self.close_connection = True

    def _reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()

    def finish(self) -> None:
        try:
            super().finish()
        except (OSError, ValueError):
            pass


_HOP_BY_HOP = ("content-length", "connection", "transfer-encoding", "keep-alive", "date", "server")
