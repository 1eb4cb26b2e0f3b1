"""What a run's record says while the run goes on, for whoever watches it."""

from __future__ import annotations

import time
from typing import Any

from trainer.record import RunRecord
from trainer.record_rows import Cursor, read_rows

POLL_S = 2.0


class RecordTail:
    """Follows a record for what is told while the run goes on: evaluations, and checkpoints that are not good.

    latest: the newest row of a step, {step, values}; None before the first.
    """

    def __init__(self, record: RunRecord) -> None:
        self.latest: dict[str, Any] | None = None
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
        steps = [row for row in rows if "loss" in row["values"]]
        self.latest = steps[-1] if steps else self.latest
        if first:
            return [], []  # of earlier launches
        prefix = "validation/"
        found = [
            (row["step"], {key.removeprefix(prefix): value for key, value in row["values"].items() if prefix in key})
            for row in rows
        ]
        return [(step, values) for step, values in found if values], [
            _WARNINGS[event["kind"]](event) for event in events if event["kind"] in _WARNINGS
        ]


def _not_saved(event: dict[str, Any]) -> str:
    return (
        f"The checkpoint of step {event['step']} was not saved: {event['error']} Training goes on; earlier "
        "checkpoints are as they were."
    )


def _diverged(event: dict[str, Any]) -> str:
    then = {"stop": "the run ends", "skip": "it makes no update", "rollback": "its examples are left out"}
    return f"Step {event['step']} diverged: its {event['what']} is {event['value']}; {then[event['policy']]}."


_WARNINGS = {
    "checkpoint_damaged": lambda event: str(event["error"]),
    "checkpoint_failed": _not_saved,
    "diverged": _diverged,
    "rolled_back": lambda event: f"Rolled back from step {event['step']} to the checkpoint of step {event['to']}.",
}
