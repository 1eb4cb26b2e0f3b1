"""One run, followed: what is new in its folder is read, nothing else is asked of anybody.

So the dashboard tells as much of a run whose cluster is gone as of one that trains, and costs training nothing but
reads of its files.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from cluster.dashboard import metric_rows, performance, rank_rows
from cluster.dashboard.attention import attention, unverified
from cluster.dashboard.curves import Curve, Floats, Reduced, Whole, curve_of, reduced, surviving
from configs.errors import NotFound
from data_pipelines.storage import FileFacts
from trainer import history
from trainer.extremes import bounds_of, is_bound
from trainer.lease import current_claim
from trainer.record import RunRecord
from trainer.record_rows import Cursor, read_rows

if TYPE_CHECKING:
    from trainer.columns import Columns

Axis = Literal["step", "time", "tokens"]
Row = dict[str, Any]

SPARKLINE_BUCKETS = 60
SUMMARY_S = 2.0  # in which a run that trains tells the same, if none of its files changes
STRAGGLERS_EVERY_S = 15.0  # each rank's file is opened for it


@dataclass(frozen=True)
class Series:
    """A metric to draw. last: its newest value, wherever one looks; None before there is one.

    superseded: what was rolled back or repeated later. restarts: {x, attempt, cause}.
    """

    curve: Reduced
    last: float | None
    smooth: Curve | None
    superseded: list[tuple[float, float]]
    restarts: list[Row]


class RunView:
    """One run. Methods may be called by several threads at once."""

    def __init__(self, record: RunRecord, cache: Path, identity: FileFacts | None) -> None:
        """identity: of its run.yaml, which is written once."""
        self.record = record
        self.identity = identity
        self.name = record.name
        self._lock = threading.RLock()
        self._events: list[Row] = []
        self._arrived: list[Row] = []
        self._event_cursor: Cursor | None = None
        self._columns: Columns | None = None  # from the first time that somebody looks at a curve
        self._columns_used_at = 0.0  # time.monotonic()
        self._cache = cache
        self._ranks: rank_rows.RankRows | None = None  # the same
        self._slow: list[Row] = []
        self._slow_at = -math.inf
        self._summary: Row | None = None
        self._summarized: tuple[set[FileFacts], bool] = (set(), False)  # the files, and whether somebody ran it
        self._summarized_at = -math.inf  # time.monotonic()
        self.changes = 0  # how often a summary has found other files

    # --- what it says of itself

    def events(self) -> list[Row]:
        """Everything that happened, in order (see RunRecord.events)."""
        with self._lock:
            self._read_events()
            return self._events

    def arrived(self) -> list[Row]:
        """The events in the order in which they were found here: new ones come last."""
        with self._lock:
            self._read_events()
            return self._arrived

    def _read_events(self) -> None:
        rows, self._event_cursor = read_rows(self.record.store, "events", self._event_cursor)
        new = [row for row in rows if isinstance(row.get("kind"), str) and _is_placed(row)]
        if new:
            self._arrived = [*self._arrived, *sorted(new, key=_when)]
            self._events = sorted(self._arrived, key=_when)

    def status(self) -> history.Status:
        """Where it stands (see RunRecord.status)."""
        claim = current_claim(self.record.store)
        return history.status(self.events(), lease=None if claim is None else "live" if claim.is_live() else "stale")

    def latest(self) -> Row:
        """The newest row of a training step: {attempt, step, time, values, before}; {} before the first.

        before: the rows of steps before it, at most 64.
        """
        rows = metric_rows.newest(self.record.store)
        return rows[-1] | {"before": rows[:-1]} if rows else {}

    def summary(self) -> Row:
        """One line of the overview. Times are epoch seconds or seconds, None where nothing is known.

        Computed anew only when a file has changed, or after a while if somebody holds the lease, which time alone may
        end.
        Raises NotFound when the run has been deleted.
        """
        self.check()
        with self._lock:
            facts, (before, live) = self._facts(), self._summarized
            same, old = facts == before, time.monotonic() - self._summarized_at > SUMMARY_S
            if self._summary is not None and same and not (live and old):
                return self._summary
            live = any(each.path.startswith("lease/") for each in facts) and self.record.holder() is not None
            self._summary, self._summarized, self._summarized_at = self._read_summary(), (facts, live), time.monotonic()
            self.changes += not same
            return self._summary

    def check(self) -> None:
        """Raises NotFound when the run has been deleted, or another has its name now."""
        if self.record.store.info("run.yaml") != self.identity:
            raise NotFound(f"The run '{self.name}' has been deleted from {self.record.store.uri}.")

    def _facts(self) -> set[FileFacts]:
        found: set[FileFacts] = set()
        for folder in ("events", "metrics", "lease"):
            with contextlib.suppress(NotFound):  # a file goes while it is looked at
                found |= {replace(facts, path=f"{folder}/{facts.path}") for facts in self.record.store.walk(folder)}
        return found

    def _read_summary(self) -> Row:
        events, status, latest = self.events(), self.status(), self.latest()
        values, config = latest.get("values", {}), self.record.config
        holder = self.record.holder()
        submitted = [event["target"] for event in events if event["kind"] == "submitted"]
        step_s = values.get("step_s")
        watched = status == "running" and bool(latest) and config.resources.workers > 1
        step = latest.get("step", 0)
        return {
            "run": self.name,
            "status": status,
            "where": holder.holder.host if holder else submitted[-1] if submitted else None,
            "workers": config.resources.workers,
            "step": step,
            "steps": config.steps,
            "loss": values.get("loss"),
            "tokens_per_s": values.get("tokens_per_s"),
            "mfu": values.get("mfu"),
            "step_s": step_s,
            "eta_s": (config.steps - step) * step_s if status == "running" and step_s is not None else None,
            "restarts": sum(event["kind"] == "restarted" for event in events),
            "started_at": events[0]["time"] if events else None,
            "updated_at": latest.get("time"),
            "goodput": goodput(events, latest, time.time() if status == "running" else None),
            "unverified": unverified(self.record.store, events, status),
            "attention": attention(config, events, status, latest, self.stragglers() if watched else []),
        }

    def stragglers(self) -> list[Row]:
        """Ranks that hold the others up now, the slowest first: {rank, node, factor, text}."""
        with self._lock:
            if time.monotonic() - self._slow_at < STRAGGLERS_EVERY_S:
                return self._slow
            store = self.record.store
            slow = performance.stragglers(rank_rows.recent_own_s(store))
            others = len(slow) - 1
            more = f", and {others} more {'does' if others == 1 else 'do'}" if others > 0 else ""
            self._slow = []
            for rank, factor in slow:
                node = rank_rows.place_of(store, rank).get("host")
                text = f"rank {rank} on {node} takes {factor:.1f} times the median rank's time a step{more}"
                self._slow.append({"rank": rank, "node": node, "factor": factor, "text": text})
            self._slow_at = time.monotonic()
            return self._slow

    # --- its ranks

    def ranks(self) -> tuple[rank_rows.RankTable, dict[int, Row]]:
        """What its ranks wrote up to now, and where each ran last."""
        with self._lock:
            if self._ranks is None:
                self._ranks = rank_rows.RankRows(self.record.store)
            self._ranks.update()
            return self._ranks.table(), self._ranks.places()

    def split(self, start: float | None, stop: float | None, buckets: int) -> performance.Split:
        """Where the time of its steps went (see performance.split)."""
        with self._lock:
            return performance.split(self.columns(), self.events(), start=start, stop=stop, buckets=buckets)

    # --- its curves

    def columns(self) -> Columns:
        """Its metrics, up to now."""
        with self._lock:
            if self._columns is None:
                import pyarrow as pa  # here, since it takes 26 MB and 0.2 s

                from trainer.columns import Columns

                pa.set_memory_pool(pa.system_memory_pool())  # Arrow's own keeps what it was given
                self._columns = Columns(self.record.store, self._cache)
            self._columns.update()
            self._columns_used_at = time.monotonic()
            return self._columns

    @property
    def unused_s(self) -> float | None:
        """Since somebody has looked at a curve; None where nothing of them is in memory."""
        return None if self._columns is None else time.monotonic() - self._columns_used_at

    def rest(self) -> None:
        """Give back the memory of its curves, until somebody looks at one again."""
        with self._lock:
            if self._columns is not None:
                self._columns.close()
                self._columns = self._ranks = None

    def metric_names(self) -> list[str]:
        """Of all metrics that have a curve of their own, in the order of their first appearance."""
        return [name for name in self.columns().names if not is_bound(name)]

    def num_rows(self) -> int:
        """Rows of metrics up to now."""
        return self.columns().num_rows

    def rows(self, start: int, stop: int) -> list[Row]:
        """Rows of metrics that have been read, by number: {number, attempt, step, time, values}."""
        with self._lock:
            columns = self._columns or self.columns()
            return [{"number": number} | row for number, row in enumerate(columns.rows(start, stop), start)]

    def series(
        self,
        metric: str,
        *,
        axis: Axis = "step",
        start: float | None = None,
        stop: float | None = None,
        buckets: int = 600,
        smooth: int = 1,
    ) -> Series:
        """A metric between two places of an axis. smooth: steps to take means over, for a line of its own."""
        with self._lock:  # one chart after the other: the first is there sooner than if all shared the processor
            curve, old, restarts = self._curves(metric, axis)
            lost = reduced(old.within(start, stop), buckets)
            return Series(
                curve=reduced(curve.within(start, stop), buckets),
                last=float(curve.values[-1]) if len(curve.values) else None,
                smooth=_thinned(curve.smoothed(smooth).within(start, stop), buckets) if smooth > 1 else None,
                superseded=[
                    point
                    for x, low, high in zip(lost.x, lost.smallest, lost.largest, strict=True)
                    for point in ([(x, low)] if low == high else [(x, low), (x, high)])
                ],
                restarts=restarts,
            )

    def curve(self, metric: str, axis: Axis = "step") -> Curve:
        """All that survives of a metric."""
        return self._curves(metric, axis)[0]

    def _curves(self, metric: str, axis: Axis) -> tuple[Curve, Curve, list[Row]]:
        """What survives of a metric, what was superseded, and where attempts begin."""
        with self._lock:
            columns = self.columns()
            numbers, values = columns.metric(metric)
            attempt, step, when = columns.place()  # after it, since rows are only added
            bounds = [_at_rows(columns, each, numbers) for each in bounds_of(metric) or ()]
        everywhere = self._places(axis, step, when)
        places, kept = everywhere[numbers], surviving(attempt, step)[numbers]
        survives, superseded = (
            curve_of(places[mask], values[mask], *(bound[mask] for bound in bounds)) for mask in (kept, ~kept)
        )
        return survives, superseded, self._restarts(attempt, everywhere)

    def sparkline(self) -> list[float]:
        """The loss in a few numbers: of rows at even distances in the record, so that no more than those are read."""
        store = self.record.store
        if not store.is_local:  # each row would be a request
            curve = self.series("loss", buckets=SPARKLINE_BUCKETS).curve
            return [float(each) for each in curve.mean if math.isfinite(each)]
        rows = metric_rows.spread(store, SPARKLINE_BUCKETS)
        places = [np.array([row[name] for row in rows], np.int64) for name in ("attempt", "step")]
        values = np.array([row["values"]["loss"] for row in rows])[surviving(*places)]
        return [float(each) for each in values if math.isfinite(each)]

    def _places(self, axis: Axis, step: np.ndarray, when: np.ndarray) -> np.ndarray:
        if axis == "time":
            return when
        if axis == "tokens":
            return step * float(self.tokens_per_step() or 1)
        return step.astype(np.float64)

    def tokens_per_step(self) -> int | None:
        """Where every example has as many tokens; None where the task knows none."""
        length = getattr(self.record.config.task, "seq_len", None)
        return None if length is None else length * self.record.config.batch.global_batch_size

    def _restarts(self, attempt: np.ndarray, places: np.ndarray) -> list[Row]:
        """Where each attempt but the first begins, and what ended the one before."""
        firsts = np.flatnonzero(np.diff(attempt)) + 1
        causes = {event["attempt"]: event for event in self.events() if event["kind"] in {"failed", "stopped"}}
        found = []
        for first in firsts:
            before = causes.get(int(attempt[first - 1]), {})
            cause = before.get("summary") or before.get("error") or before.get("reason") or before.get("kind", "")
            found.append({"x": float(places[first]), "attempt": int(attempt[first]), "cause": str(cause)})
        return found


def goodput(events: Iterable[Row], latest: Row, until: float | None) -> float | None:
    """Share of the time since the first start in which steps were made that survive; None before there are any.

    until: epoch seconds, while it runs; None: its last event.
    """
    events = list(events)
    started = [event["time"] for event in events if event["kind"] == "started"]
    values = latest.get("values", {})
    if not started or "step_s" not in values:
        return None
    end = until if until is not None else max(event["time"] for event in events)
    return min(1.0, latest["step"] * values["step_s"] / max(end - started[0], 1e-9))


def _at_rows(columns: Columns, metric: str, rows: Whole) -> Floats:
    """A metric's values in these rows, NaN where one has none."""
    numbers, values = columns.metric(metric)
    found = np.full(columns.num_rows, np.nan)
    found[numbers] = values
    return found[rows]


def _thinned(curve: Curve, buckets: int) -> Curve:
    """A smooth curve at the ends of buckets."""
    small = reduced(curve, buckets)
    return Curve(small.x, small.mean)


def _when(event: Row) -> tuple[int, float]:
    return event["attempt"], event["time"]


def _is_placed(row: Row) -> bool:
    return isinstance(row.get("attempt"), int) and isinstance(row.get("time"), int | float)
