"""`shardyard ui`: the dashboard of a store, in a browser."""

from __future__ import annotations

import os
import socket
from argparse import Namespace
from pathlib import Path
from typing import Any

from cluster.commands.output import say
from cluster.listening import in_url, is_loopback, read_token
from configs.errors import Unreachable, UsageError
from data_pipelines.storage import Store

_LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")


def ui(arguments: Namespace) -> dict[str, Any] | None:
    """Serve the dashboard until the process is ended.

    Raises:
        UsageError: it would listen to other machines, and nobody would have to show a token.
        Unreachable: the port is taken, or the address is not this machine's.
    """
    token = _token(arguments.token_file) if arguments.token_file else None
    if token is None and not is_loopback(arguments.host):
        raise UsageError(
            f"--host {arguments.host} lets other machines see and stop the runs, and nobody would have to show a "
            "token. Give --token-file FILE with a long random token, which people type once, or leave --host out."
        )
    with _listen(arguments.host, arguments.port) as listener:
        from cluster.dashboard.app import create_app
        from cluster.dashboard.server import serve
        from cluster.dashboard.store_view import StoreView

        store = StoreView(arguments.store, cache_folder())
        names = [*_LOOPBACK_NAMES, *arguments.name] if is_loopback(arguments.host) else arguments.name
        app = create_app(store, token=token, hosts=names)
        host, port = listener.getsockname()[:2]
        address = f"http://{in_url(str(host))}:{port}/"
        say(arguments, f"The runs of {Store(arguments.store).uri} at {address}  (Ctrl-C ends it)")
        serve(app, listener)
    return None


def _token(file: str) -> str:
    try:
        return read_token(file).decode()
    except UnicodeDecodeError as error:
        raise UsageError(f"{file} holds no text. Write a long random token of letters and digits into it.") from error


def cache_folder() -> Path:
    """Where what is computed of runs is kept; it may be deleted at any time."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "shardyard" / "dashboard"


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen()  # who reads where it is may come before the server is ready for them
    except (OSError, UnicodeError) as error:
        listener.close()
        reason = getattr(error, "strerror", None) or error
        raise Unreachable(
            f"Nothing can listen at {host}:{port}: {reason}. Choose another address of this machine (--host), or "
            "another port (--port; 0 takes a free one)."
        ) from error
    return listener
