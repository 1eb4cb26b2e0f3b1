"""What a worker of benchmarks/recovery.py does besides training: its steps are written down, and it is killed once.

With it comes what training imports, as with a run's own body, for the process that attempts are forked from.
"""

from __future__ import annotations

import importlib
import os
import threading
import time
from pathlib import Path
from typing import Any

from benchmarks.step_log import StepLog
from cluster.ray_group import IMPORTS
from trainer.worker import run_worker

for _module in (*IMPORTS, "trainer.models.gpt", "trainer.tasks.language_modeling", "data_pipelines.sources.text"):
    importlib.import_module(_module)


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
