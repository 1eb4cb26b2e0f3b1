"""`python -m trainer` in a process forked from the tests' warm one: all but its 6 s of imports."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.pool import _context, _die_with_parent


class MainProcess:
    """One started `python -m trainer`. Its stdout and stderr go to files."""

    def __init__(self, folder: Path, *arguments: str, environment: dict[str, str] | None = None) -> None:
        """folder: where it runs, and where its output goes."""
        self._out, self._err = folder / "stdout", folder / "stderr"
        self._process = _context.Process(
            target=_main, args=(folder, arguments, environment or {}, self._out, self._err), daemon=True
        )
        self._process.start()

    @property
    def pid(self) -> int | None:
        return self._process.pid

    @property
    def out(self) -> str:
        return self._out.read_text()

    @property
    def err(self) -> str:
        return self._err.read_text()

    def send(self, number: signal.Signals) -> None:
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    def wait(self, timeout_s: float = 120.0) -> int:
        """The exit code; the process is killed if it does not end in time."""
        self._process.join(timeout_s)
        if self._process.exitcode is None:
            self._process.kill()
            raise AssertionError(f"python -m trainer did not end. It said: {self.out} {self.err}")
        return self._process.exitcode

    def wait_for(self, condition: Callable[[], Any], timeout_s: float = 120.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert self._process.is_alive(), f"it ended early: {self.out} {self.err}"
            assert time.monotonic() < deadline, "what was waited for did not happen"
            time.sleep(0.01)


def run_main(folder: Path, *arguments: str, environment: dict[str, str] | None = None) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of `python -m trainer` with these arguments."""
    process = MainProcess(folder, *arguments, environment=environment)
    return process.wait(), process.out, process.err


def _main(folder: Path, arguments: tuple[str, ...], environment: dict[str, str], out: Path, err: Path) -> None:
    _die_with_parent()
    os.chdir(folder)
    os.environ.update(environment)
    for stream, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the process that is forked from ignores it
    from trainer.__main__ import main

    code = main(list(arguments))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
