"""The steps of a worker of benchmarks/recovery.py, and its kill; both systems use it, so it imports next to nothing."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

KILL_AFTER = 25


class StepLog:
    """A worker's steps with their times, and the kill, in one file a process."""

    def __init__(self, folder: Path, rank: int) -> None:
        self._folder, self._rank = folder, rank
        self._file = (folder / f"steps-{rank}-{os.getpid()}.jsonl").open("w")

    def step(self, step: int) -> None:
        """After a step: write it down, or end this process if it is its turn."""
        self._write({"step": step, "time": time.time()})

    def kill_due(self, step: int) -> bool:
        """Whether this worker is to be killed now, for the first time."""
        return self._rank == 1 and step >= KILL_AFTER and not (self._folder / "killed").exists()

    def kill(self, pid: int) -> None:
        """SIGKILL, with its time."""
        (self._folder / "killed").write_text(str(time.time()))
        os.kill(pid, signal.SIGKILL)

    def _write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
