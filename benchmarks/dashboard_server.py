"""A process that serves pages, and what it takes."""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil

START_S = 120.0
Figures = dict[str, Any]


class Server:
    """A process that serves pages, with what it takes."""

    def __init__(self, command: Sequence[str], port: int, **variables: str) -> None:
        self.port = port
        began = time.monotonic()
        self.process = subprocess.Popen(
            command, env=os.environ | variables, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while True:
            with contextlib.suppress(OSError, http.client.HTTPException):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=30).read()
                break
            if self.process.poll() is not None or time.monotonic() - began > START_S:
                raise SystemExit(f"{command} does not answer")
            time.sleep(0.02)
        self.start_s = time.monotonic() - began

    def get(self, path: str) -> tuple[bytes, float, float]:
        """(what it answers, seconds, its CPU seconds)."""
        used, began = self.cpu_s(), time.monotonic()
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=300) as answer:
            content = answer.read()
        return content, time.monotonic() - began, self.cpu_s() - used

    def processes(self) -> list[psutil.Process]:
        own = psutil.Process(self.process.pid)
        return [own, *own.children(recursive=True)]

    def cpu_s(self) -> float:
        return sum(sum(each.cpu_times()[:2]) for each in self.processes())

    def memory_mb(self) -> Figures:
        """Of all its processes: resident, and resident with what is shared divided among those that share it."""
        maps = [each.memory_full_info() for each in self.processes()]
        return {"rss_mb": sum(each.rss for each in maps) / 1e6, "pss_mb": sum(each.pss for each in maps) / 1e6}

    def close(self) -> None:
        for each in reversed(self.processes()):
            with contextlib.suppress(psutil.NoSuchProcess):
                each.send_signal(signal.SIGTERM)
        self.process.wait(30)


@contextlib.contextmanager
def dashboard(store: Path, cache: Path) -> Iterator[Server]:
    port = free_port()
    command = [sys.executable, "-m", "cluster.cli", "ui", "--store", str(store), "--port", str(port)]
    server = Server(command, port, XDG_CACHE_HOME=str(cache))
    try:
        yield server
    finally:
        server.close()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
