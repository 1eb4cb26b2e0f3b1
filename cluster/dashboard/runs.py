"""The runs of a store, followed: what is new in their folders is read, nothing else is asked of anybody.

So the dashboard tells as much of a run whose cluster is gone as of one that trains, and costs training nothing but
reads of its files.
"""

from __future__ import annotations

import json
import math
import statistics
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cluster.commands.output import age
from cluster.dashboard.columns import Columns
from cluster.dashboard.curves import Curve, Reduced, curve_of, reduced, surviving
from cluster.dashboard.stragglers import straggler
from configs.errors import NotFound, ShardyardError
from data_pipelines.storage import FileFacts, Store
from trainer import history
from trainer.lease import current_claim
from trainer.record import RunRecord, list_runs
from trainer.record_rows import Cursor, decode_value, read_rows

Axis = Literal["step", "time", "tokens"]
Row = dict[str, Any]

_TAIL_BYTES, _TAIL_ROWS = 64 << 10, 65
SPARKLINE_BUCKETS = 60
# A run counts as stalled when its newest row is older than this many of its own intervals, but not before a minute.
STALLED_INTERVALS, STALLED_S = 10.0, 60.0
# A loss counts as a spike above this many medians of those before it, as far as they stand in the record's last bytes.
SPIKE, SPIKE_FEWEST, SPIKE_SHOWN = 3.0, 16, 16
RECENT_S = 3600.0  # what a running run has recovered from is shown for so long
LOW_DISK = 0.05  # of the store's disk


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
        self._event_cursor: Cursor | None = None
        self._columns: Columns | None = None  # from the first time that somebody looks at a curve
        self._cache = cache

    # --- what it says of itself

    def events(self) -> list[Row]:
        """Everything that happened, in order (see RunRecord.events)."""
        with self._lock:
            new, self._event_cursor = read_rows(self.record.store, "events", self._event_cursor)
            good = [row for row in new if isinstance(row.get("kind"), str) and _is_placed(row)]
            if good:
                self._events = sorted([*self._events, *good], key=lambda row: (row["attempt"], row["time"]))
            return self._events

    def status(self) -> history.Status:
        """Where it stands (see RunRecord.status)."""
        claim = current_claim(self.record.store)
        return history.status(self.events(), lease=None if claim is None else "live" if claim.is_live() else "stale")

    def latest(self) -> Row:
        """The newest row of a training step: {attempt, step, time, values, before}; {} before the first.

        From the end of the newest file, so that it costs the same for a run of any length. before: the rows of steps
        before it in that end, at most 64.
        """
        store = self.record.store
        for name in reversed(store.list("metrics")):
            path = f"metrics/{name}"
            with store.open_input(path) as file:
                size = file.seek(0, 2)
                file.seek(max(0, size - _TAIL_BYTES))
                data = file.read()
            lines = data[: data.rfind(b"\n") + 1].splitlines()[-_TAIL_ROWS:]
            rows = [row for line in lines if (row := _training_row(line)) is not None]
            if rows:
                return rows[-1] | {"before": rows[:-1]}
        return {}

    def summary(self) -> Row:
        """One line of the overview. Times are epoch seconds or seconds, None where nothing is known."""
        events, status, latest = self.events(), self.status(), self.latest()
        values, config = latest.get("values", {}), self.record.config
        holder = self.record.holder()
        submitted = [event["target"] for event in events if event["kind"] == "submitted"]
        step_s = values.get("step_s")
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
            "attention": self._attention(events, status, latest),
        }

    def _attention(self, events: list[Row], status: str, latest: Row) -> list[Row]:
        """What a person should look at: {kind, text, time}."""
        found: list[Row] = []
        attempt = max((event["attempt"] for event in events), default=0)
        recently = time.time() - RECENT_S
        if status == "running" and latest:
            found += self._of_steps(events, latest)
        if status == "lost" and events:
            found.append({"kind": "lost", "text": "its launcher is gone without a word", "time": events[-1]["time"]})
        failed = [event for event in events if event["kind"] == "failed"]
        if failed and (status == "failed" or (status == "running" and failed[-1]["time"] > recently)):
            text = str(failed[-1].get("summary") or failed[-1].get("error") or "failed")
            kind = "failed" if status == "failed" else "restarted"
            found.append({"kind": kind, "text": text, "time": failed[-1]["time"]})
        if status in {"finished", "stopped"}:
            return found
        if status == "running":
            found += self._of_nodes(events)
        for event in events:
            if event["attempt"] != attempt:
                continue
            if event["kind"] == "diverged" and status == "running" and event["time"] > recently:
                found.append({"kind": "diverged", "text": _divergence(event), "time": event["time"]})
            elif event["kind"] in {"checkpoint_damaged", "checkpoint_failed"}:
                found.append({"kind": "checkpoint", "text": str(event.get("error", "")), "time": event["time"]})
            elif event["kind"] == "checkpoint_verified" and event.get("damage"):
                text = f"The checkpoint of step {event.get('step')} is damaged."
                found.append({"kind": "checkpoint", "text": text, "time": event["time"]})
            elif event["kind"] == "data_skipped":
                text = f"damaged data is left out: {len(event.get('blocks', []))} blocks"
                found.append({"kind": "data", "text": text, "time": event["time"]})
        return _last_of_each(found)

    def _of_steps(self, events: list[Row], latest: Row) -> list[Row]:
        """What the newest steps of a running run show."""
        found: list[Row] = []
        values, now = latest["values"], time.time()
        every = (self.record.config.tracking.every or 1) * values.get("step_s", 0.0)
        silent = now - max(latest["time"], events[-1]["time"])
        if silent > max(STALLED_S, STALLED_INTERVALS * every):
            found.append({"kind": "stalled", "text": f"nothing new for {age(silent)}", "time": latest["time"]})
        if not math.isfinite(values["loss"]):
            text = f"the loss is {values['loss']} after step {latest['step']:,}"
            found.append({"kind": "nan", "text": text, "time": latest["time"]})
        before = [row["values"]["loss"] for row in latest["before"] if math.isfinite(row["values"]["loss"])]
        usual = statistics.median(before) if len(before) >= SPIKE_FEWEST else 0.0
        spikes = [row for row in [*latest["before"][-SPIKE_SHOWN:], latest] if row["values"]["loss"] > SPIKE * usual]
        if usual > 0 and spikes:
            worst = max(spikes, key=lambda row: row["values"]["loss"])
            text = f"loss {worst['values']['loss']:.4g} after step {worst['step']:,}, where {usual:.4g} is usual"
            found.append({"kind": "spike", "text": text, "time": worst["time"]})
        slow = straggler(self.record.store, latest["attempt"])
        if slow is not None:
            times = (
                f"{1000 * slow['own_s']:.3g} ms a step without waits, where others take {1000 * slow['others_s']:.3g}"
            )
            found.append({"kind": "straggler", "text": f"rank {slow['rank']} takes {times}", "time": slow["time"]})
        return found

    def _of_nodes(self, events: list[Row]) -> list[Row]:
        """Whether it goes on with fewer workers than it was placed with first."""
        resized = [event for event in events if event["kind"] == "resized"]
        wanted = self.record.config.resources.workers
        if not resized or not isinstance(resized[-1].get("workers"), int) or resized[-1]["workers"] >= wanted:
            return []
        text = f"it goes on with {resized[-1]['workers']} of {wanted} workers: a node is gone"
        return [{"kind": "node", "text": text, "time": resized[-1]["time"]}]

    # --- its curves

    def columns(self) -> Columns:
        """Its metrics, up to now."""
        with self._lock:
            if self._columns is None:
                self._columns = Columns(self.record.store, self._cache)
            self._columns.update()
            return self._columns

    def metric_names(self) -> list[str]:
        """Of all metrics, in the order of their first appearance."""
        return self.columns().names

    def num_rows(self) -> int:
        """Rows of metrics up to now."""
        return self.columns().num_rows

    def rows(self, start: int, stop: int) -> list[Row]:
        """Rows of metrics that have been read, by number: {number, attempt, step, time, values}."""
        with self._lock:
            columns = self._columns or self.columns()
            return [{"number": each} | columns.row(each) for each in range(start, min(stop, columns.num_rows))]

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
        with self._lock:
            columns = self.columns()
            attempt, step, when = columns.place()
            numbers, values = columns.metric(metric)
        kept = surviving(attempt, step)
        places = self._places(axis, step, when)
        mask = kept[numbers]
        curve = curve_of(places[numbers[mask]], values[mask])
        shown = curve.within(start, stop)
        old = curve_of(places[numbers[~mask]], values[~mask]).within(start, stop)
        lost = reduced(old, buckets)
        return Series(
            curve=reduced(shown, buckets),
            last=float(curve.values[-1]) if len(curve.values) else None,
            smooth=_thinned(curve.smoothed(smooth).within(start, stop), buckets) if smooth > 1 else None,
            superseded=[
                point
                for x, low, high in zip(lost.x, lost.smallest, lost.largest, strict=True)
                for point in ([(x, low)] if low == high else [(x, low), (x, high)])
            ],
            restarts=self._restarts(attempt, places),
        )

    def curve(self, metric: str, axis: Axis = "step") -> Curve:
        """All that survives of a metric."""
        with self._lock:
            columns = self.columns()
            attempt, step, when = columns.place()
            numbers, values = columns.metric(metric)
        mask = surviving(attempt, step)[numbers]
        return curve_of(self._places(axis, step, when)[numbers[mask]], values[mask])

    def sparkline(self, metric: str = "loss") -> list[float]:
        """The curve in a few numbers: means, with what is not finite left out."""
        curve = self.series(metric, buckets=SPARKLINE_BUCKETS).curve
        return [float(each) for each in curve.mean if math.isfinite(each)]

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


class StoreView:
    """All runs of a store. `cache` is a folder for what is computed of them, and may be deleted at any time."""

    def __init__(self, uri: str, cache: Path) -> None:
        self.store = Store(uri)
        self.cache = cache
        self._runs: dict[str, RunView] = {}
        self._lock = threading.Lock()

    def names(self) -> list[str]:
        """Of the runs; [] where the store is not there yet."""
        return list_runs(self.store) if self.store.exists() else []

    def run(self, name: str) -> RunView:
        """One of them. Raises NotFound."""
        if name not in self.names():  # a name comes from outside: it must not lead out of the store
            raise NotFound(f"There is no run '{name}' in {self.store.uri}.")
        changed = self.store.info(f"{name}/run.yaml")
        with self._lock:
            view = self._runs.get(name)
            if view is None or view.identity != changed:
                view = self._runs[name] = RunView(RunRecord.open(self.store.uri, name), self.cache, changed)
            return view

    def summaries(self) -> list[Row]:
        """One row a run, the newest first; a run that cannot be read says so and hides no other."""
        rows = []
        for name in self.names():
            try:
                rows.append(self.run(name).summary())
            except ShardyardError as error:
                rows.append({"run": name, "status": "damaged", "error": str(error), "attention": []})
        return sorted(rows, key=lambda row: row.get("started_at") or 0.0, reverse=True)


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


def _divergence(event: Row) -> str:
    """What trainer/session.py records of a step that diverged."""
    limit = event.get("limit")
    above = "" if limit is None else f", above its limit of {_told(limit)}"
    where = f"{event.get('what', 'loss')} {_told(event.get('value'))} at step {_told(event.get('step'))}"
    return f"{where}{above}; recovery.divergence is {event.get('policy')}"


def _told(value: Any) -> str:
    return f"{value:,.6g}" if isinstance(value, int | float) else str(value)


def _last_of_each(found: list[Row]) -> list[Row]:
    """Of each kind the newest."""
    return list({each["kind"]: each for each in found}.values())


def _thinned(curve: Curve, buckets: int) -> Curve:
    """A smooth curve at the ends of buckets."""
    small = reduced(curve, buckets)
    return Curve(small.x, small.mean)


def _is_placed(row: Row) -> bool:
    return isinstance(row.get("attempt"), int) and isinstance(row.get("time"), int | float)


def _training_row(line: bytes) -> Row | None:
    try:
        row = json.loads(line)
        values = {key: decode_value(value) for key, value in row["values"].items()}
        if "loss" in values:
            return {
                "attempt": int(row["attempt"]),
                "step": int(row["step"]),
                "time": float(row["time"]),
                "values": values,
            }
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    return None
