"""Waiting for what other processes do, and whether they are there."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import psutil


def wait_for(condition: Callable[[], Any], what: str, timeout_s: float = 60.0) -> Any:
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline, f"{what} did not happen within {timeout_s} s"
        time.sleep(0.02)
    return found


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def mentioning(word: str) -> list[int]:
    """Pids of the living processes whose command holds it."""
    return [pid for pid, command in commands() if word in " ".join(command)]


def commands() -> list[tuple[int, list[str]]]:
    """Living processes of this machine, of any namespace, but for this one."""
    found = [(process.pid, process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])]
    return [(pid, command) for pid, command in found if pid != os.getpid() and alive(pid)]
