"""What a run's events and metrics say: its status, its attempts, its curve without what was rolled back. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any, Literal

Status = Literal["queued", "running", "finished", "stopped", "failed", "lost"]
Row = dict[str, Any]

_WAITING = {"created", "submitted", "queued"}
_WORKING = {"placed", "started", "restarted"}
_ENDED: dict[str, Status] = {"finished": "finished", "stopped": "stopped"}


def status(events: Sequence[Row], *, lease: Literal["live", "stale"] | None) -> Status:
    """Where the run stands, by its events in order and by its launcher's lease (None: nobody holds it).

    "lost": it was at work, nothing says how it ended, and its launcher is gone. A `failed` event ends the run only when
    the launcher has let go of it, or says so (`final: true`): until then it may be about to restart.
    """
    telling = _WAITING | _WORKING | {"failed", *_ENDED}
    last = next((event for event in reversed(events) if event["kind"] in telling), None)
    if last is None or last["kind"] in _WAITING:
        return "lost" if lease == "stale" else "queued"
    if last["kind"] in _ENDED:
        return _ENDED[last["kind"]]
    if last["kind"] == "failed" and (last.get("final") or lease is None):
        return "failed"
    return "running" if lease == "live" else "lost"


def stitched(rows: Iterable[Row]) -> list[Row]:
    """One row a step, in order: what was rolled back is gone, as the weights that it describes are.

    rows: {attempt, step, time, <metric>: value, ...}; several of a step (training and evaluation) are merged.
    An attempt, or within one what follows a rollback, supersedes everything recorded before from its own first step on.
    """
    by_attempt: dict[int, list[Row]] = {}
    for row in rows:
        by_attempt.setdefault(row["attempt"], []).append(row)
    kept: dict[int, Row] = {}
    superseded_from: float = float("inf")
    for take in reversed([take for attempt in sorted(by_attempt) for take in _takes(by_attempt[attempt])]):
        for row in take:
            if row["step"] < superseded_from:
                kept[row["step"]] = kept.get(row["step"], {}) | row
        superseded_from = min(superseded_from, take[0]["step"])
    return [kept[step] for step in sorted(kept)]


def _takes(rows: Sequence[Row]) -> list[list[Row]]:
    """An attempt's rows, cut where its steps fall: there it was rolled back."""
    cuts = [place for place in range(1, len(rows)) if rows[place]["step"] < rows[place - 1]["step"]]
    return [list(rows[start:stop]) for start, stop in pairwise([0, *cuts, len(rows)])]


def attempts(events: Iterable[Row]) -> list[Row]:
    """One row an attempt: {attempt, started_at, start_step, ended_at, outcome, events}.

    outcome: "finished", "stopped", "failed", or None while it runs or when nothing says. Times are epoch seconds.
    """
    found: dict[int, Row] = {}
    for event in events:
        if event["attempt"] == 0:
            continue
        new: Row = {"started_at": None, "start_step": None, "ended_at": None, "outcome": None, "events": []}
        row = found.setdefault(event["attempt"], {"attempt": event["attempt"], **new})
        row["events"].append(event)
        if event["kind"] == "started" and row["started_at"] is None:
            row["started_at"], row["start_step"] = event["time"], event.get("step")
        if event["kind"] in {"finished", "stopped", "failed"}:
            row["ended_at"], row["outcome"] = event["time"], event["kind"]
    return [found[attempt] for attempt in sorted(found)]
