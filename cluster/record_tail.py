"""What a run's record says while the run goes on, for whoever watches it."""

from __future__ import annotations

import time
from typing import Any

from trainer.record import RunRecord
from trainer.record_rows import Cursor, read_rows

POLL_S = 2.0


class RecordTail:
    """Follows a record for what is told while the run goes on: evaluations, and checkpoints that are not good."""

    def __init__(self, record: RunRecord) -> None:
        self._record = record
        self._metrics: Cursor | None = None
        self._events: Cursor | None = None
        self._read_at = 0.0

    def read(self, *, now: bool = False) -> tuple[list[tuple[int, dict[str, float]]], list[str]]:
        """New evaluations as (step, {name: value}), and warnings; looks every few seconds only, unless `now`."""
        if not now and time.monotonic() - self._read_at < POLL_S:
            return [], []
        self._read_at = time.monotonic()
        first = self._metrics is None
        rows, self._metrics = read_rows(self._record.store, "metrics", self._metrics)
        events, self._events = read_rows(self._record.store, "events", self._events)
        if first:
            return [], []  # of earlier launches
        prefix = "validation/"
        found = [
            (row["step"], {key.removeprefix(prefix): value for key, value in row["values"].items() if prefix in key})
            for row in rows
        ]
        return [(step, values) for step, values in found if values], [
            event["error"] if event["kind"] == "checkpoint_damaged" else _not_saved(event)
            for event in events
            if event["kind"] in ("checkpoint_damaged", "checkpoint_failed")
        ]


def _not_saved(event: dict[str, Any]) -> str:
    return (
        f"The checkpoint of step {event['step']} was not saved: {event['error']} Training goes on; earlier "
        "checkpoints are as they were."
    )
