"""What a worker of benchmarks/recovery.py does besides training: its steps are written down, and it is killed once.

With it comes what training imports, as with a run's own body, for the process that attempts are forked from.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import deepspeed  # noqa: F401

import trainer.loop
import trainer.models.gpt
import trainer.tasks.language_modeling  # noqa: F401
from trainer.worker import run_worker

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


def watched_worker(store_uri: str, rank: int, progress: Any, **rest: Any) -> dict[str, Any]:
    """trainer.worker.run_worker beside a thread that writes its steps down, and carries out the kill."""
    folder = Path(store_uri).parent
    log = StepLog(folder, rank)

    def watch() -> None:
        seen = 0
        while True:
            step = progress.step
            if step > seen:
                log.step(step)
                seen = step
            if log.kill_due(step):
                whole = (folder / "whole-actor").read_text() == "True"
                log.kill(_actor() if whole else os.getpid())
            time.sleep(0.001)

    threading.Thread(target=watch, daemon=True).start()
    return run_worker(store_uri, rank=rank, progress=progress, **rest)


def _actor() -> int:
    """Ray's process above this one."""
    import psutil

    for process in [psutil.Process(), *psutil.Process().parents()]:
        if process.name().startswith("ray::"):
            return process.pid
    raise AssertionError("no Ray above this process")
