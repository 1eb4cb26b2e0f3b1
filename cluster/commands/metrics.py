"""`shardyard metrics`: a store's runs as Prometheus reads them."""

from __future__ import annotations

import hmac
import socket
from argparse import Namespace
from contextlib import suppress
from http.server import BaseHTTPRequestHandler
from socketserver import ThreadingTCPServer
from typing import Any

from cluster.commands.output import say
from cluster.listening import in_url, is_loopback, read_token
from cluster.prometheus import CONTENT_TYPE, StorePage
from configs.errors import Unreachable, UsageError
from data_pipelines.storage import Store

PATH = "/metrics"


def metrics(arguments: Namespace) -> dict[str, Any] | None:
    """Print the page once, or serve it until the process is ended.

    Raises:
        UsageError: it would listen to other machines, and nobody would have to show a token.
        Unreachable: the port is taken, or the address is not this machine's.
    """
    page = StorePage(Store(arguments.store))
    if arguments.once:
        text = page.text()
        if not arguments.json:
            print(text, end="")
        return {"page": text}
    token = read_token(arguments.token_file) if arguments.token_file else None
    if token is None and not is_loopback(arguments.host):
        raise UsageError(
            f"--host {arguments.host} lets other machines read how the runs go, and nobody would have to show a token. "
            "Give --token-file FILE, whose content Prometheus sends as its bearer token, or leave --host out."
        )
    try:
        server = MetricsServer((arguments.host, arguments.port), page, token)
    except OSError as error:
        raise Unreachable(
            f"Nothing can listen at {arguments.host}:{arguments.port}: {error.strerror or error}. Choose another "
            "address of this machine (--host), or another port (--port; 0 takes a free one)."
        ) from error
    with server:
        host, port = server.server_address[:2]
        say(arguments, f"Metrics of {Store(arguments.store).uri} at http://{in_url(str(host))}:{port}{PATH}")
        server.serve_forever()
    return None


class MetricsServer(ThreadingTCPServer):
    """Answers GET /metrics with the page, to those who show the token where there is one."""

    # Not http.server's own class, which asks the DNS for its name before it listens.
    allow_reuse_address = True
    daemon_threads = True

    def __init__(self, address: tuple[str, int], page: StorePage, token: bytes | None) -> None:
        self.page = page
        self.authorization = None if token is None else b"Bearer " + token
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        super().__init__(address, _Handler)


class _Handler(BaseHTTPRequestHandler):
    server: MetricsServer
    timeout = 10.0  # of a client that connects and says nothing
    server_version, sys_version = "shardyard", ""

    def do_GET(self) -> None:
        wanted = self.server.authorization
        given = self.headers.get("Authorization", "").encode("latin-1", "replace")
        if wanted is not None and not hmac.compare_digest(given, wanted):
            self._answer(401, "A bearer token is needed.\n", {"WWW-Authenticate": "Bearer"})
        elif self.path.partition("?")[0] != PATH:
            self._answer(404, f"The metrics are at {PATH}.\n")
        else:
            self._answer(200, self.server.page.text(), {"Content-Type": CONTENT_TYPE})

    def _answer(self, status: int, text: str, headers: dict[str, str] | None = None) -> None:
        body = text.encode()
        self.send_response(status)
        for name, value in ({"Content-Type": "text/plain; charset=utf-8"} | (headers or {})).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        with suppress(ConnectionError):  # the client has gone
            self.end_headers()
            self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Scrapes come every few seconds: nobody wants a line of each."""
