"""Runs as training records them, without training."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from configs.load import load
from data_pipelines.storage import Store
from trainer.record import RunRecord


def new_run(store: Path, name: str = "run", steps: int = 1000, **overrides: Any) -> RunRecord:
    """A run whose launcher has begun its first attempt."""
    given = {"name": name, "store": str(store), "steps": steps} | overrides
    record = RunRecord.create(
        Store(store), load("language_modeling-gpt-tiny", [f"{key}={value}" for key, value in given.items()])
    )
    record.next_attempt()
    record.event("started", step=0)
    return record


def train(record: RunRecord, first: int, last: int, **values: float) -> None:
    """Rows of the steps from one to another, both included; they are on disk when this returns."""
    for step in range(first, last + 1):
        record.metrics(step, {"loss": 1.0 / step, "step_s": 0.1, "tokens_per_s": 1000.0} | values)
    record.flush()


def wait_until(true: Any, timeout_s: float = 20.0) -> None:
    """Until `true()` is."""
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline, "it has not come"
        time.sleep(0.05)
