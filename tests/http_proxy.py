"""An HTTP proxy on loopback in front of an object store, to be made to misbehave by what is built upon it."""

from __future__ import annotations

import contextlib
import http.client
import socket
import struct
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

_SLOW_DOWN, _INTERNAL = (
    f'<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code}</Code><Message>{text}</Message></Error>'.encode()
    for code, text in (("SlowDown", "Please reduce your request rate."), ("InternalError", "We met an internal error."))
)
_HOP_BY_HOP = ("content-length", "connection", "transfer-encoding", "keep-alive", "date", "server", "expect")


class Proxy:
    """Use it in `with`. target: (host, port) of the store. port: where the proxy listens, on 127.0.0.1.

    handler: its attribute `proxy` will be this object.
    """

    def __init__(self, host: str, port: int, handler: type[Handler]) -> None:
        self.target = (host, port)
        self.released = threading.Event()  # ends stalls
        self.lock = threading.Lock()
        own = type("Handler", (handler,), {"proxy": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), own)
        self._server.daemon_threads = True
        self._server.block_on_close = False
        self.port: int = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.released.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class Handler(BaseHTTPRequestHandler):
    """What a request can meet; subclasses have do_GET and its like."""

    proxy: Any
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Nothing."""

    def handle_one_request(self) -> None:
        """As the base class, but a client may give up."""
        with contextlib.suppress(ConnectionError):
            super().handle_one_request()

    def finish(self) -> None:
        """As the base class, also after a reset."""
        with contextlib.suppress(OSError, ValueError):
            super().finish()

    def forward(self, body: bytes = b"") -> tuple[int, dict[str, str], bytes]:
        """Have the store carry the request out; its status, headers and body."""
        connection = http.client.HTTPConnection(*self.proxy.target, timeout=20)
        headers = {name: value for name, value in self.headers.items() if name.lower() not in _HOP_BY_HOP}
        connection.request(self.command, self.path, body or None, headers | {"Content-Length": str(len(body))})
        response = connection.getresponse()
        answer = response.read()
        kept = {name: value for name, value in response.getheaders() if name.lower() not in _HOP_BY_HOP}
        if self.command == "HEAD":
            kept["Content-Length"] = response.getheader("Content-Length") or "0"
        connection.close()
        return response.status, kept, answer

    def body(self) -> bytes:
        """The request's own."""
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline().partition(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return b"".join(chunks)

    def answer(self, status: int, headers: dict[str, str], body: bytes, *, cut: bool = False) -> None:
        """Answer; cut: half of the body, and the connection ends."""
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

    def refuse(self, status: int) -> None:
        """503: too many requests; 500: an error of the store's."""
        self.answer(status, {"Content-Type": "application/xml"}, {503: _SLOW_DOWN, 500: _INTERNAL}[status])

    def reset(self) -> None:
        """End the connection at once, without an answer."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()
