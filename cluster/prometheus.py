"""What Prometheus is told of a store's runs: from their folders alone, and of these only what is new at each scrape.

The text format is https://prometheus.io/docs/instrumenting/exposition_formats/ (version 0.0.4).
"""

from __future__ import annotations

import math
import os
import shutil
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal

from configs.errors import Damaged
from data_pipelines.storage import Store
from trainer import history
from trainer.lease import current_claim
from trainer.record import RunRecord, list_runs
from trainer.record_rows import Cursor, decode_value, read_rows
from trainer.redact import Redactor

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
KEPT_S = 5.0  # scrapes that come closer get the same page: many of them load a store no more than one does

# Every metric, in the order of the page: its type and its meaning.
FAMILIES: dict[str, tuple[Literal["gauge", "counter"], str]] = {
    "shardyard_run_step": ("gauge", "Completed steps, as recorded last."),
    "shardyard_run_steps": ("gauge", "Steps that the run is to complete."),
    "shardyard_run_loss": ("gauge", "Training loss, as recorded last."),
    "shardyard_run_tokens_per_second": ("gauge", "Tokens of all workers a second, as recorded last."),
    "shardyard_run_examples_per_second": ("gauge", "Examples of all workers a second, as recorded last."),
    "shardyard_run_data_wait_ratio": ("gauge", "Share of a step in which rank 0 waits for data, as recorded last."),
    "shardyard_run_restarts_total": ("counter", "Restarts of the run's workers."),
    "shardyard_run_failures_total": ("counter", "Failures of the run, those that it went on from included."),
    "shardyard_run_diverged_total": ("counter", "Steps whose loss or gradient was no number, or a spike."),
    "shardyard_run_checkpoint_failures_total": ("counter", "Checkpoints that could not be saved."),
    "shardyard_run_last_step_timestamp_seconds": ("gauge", "When a step was recorded last."),
    "shardyard_run_last_checkpoint_timestamp_seconds": ("gauge", "When a checkpoint was complete last."),
    "shardyard_run_status": ("gauge", "1 for the status that the run is in, named by the label."),
    "shardyard_store_free_bytes": ("gauge", "Free space of the disk that the store lies on; of local stores alone."),
    "shardyard_scrape_errors": ("gauge", "Runs that could not be read, or not in full; 1 for a store out of reach."),
}
_COUNTED = {
    "restarted": "shardyard_run_restarts_total",
    "failed": "shardyard_run_failures_total",
    "diverged": "shardyard_run_diverged_total",
    "checkpoint_failed": "shardyard_run_checkpoint_failures_total",
}
_OF_A_STEP = {
    "loss": "shardyard_run_loss",
    "tokens_per_s": "shardyard_run_tokens_per_second",
    "examples_per_s": "shardyard_run_examples_per_second",
}


@dataclass(frozen=True)
class Sample:
    """One line of the page; `name` is a key of FAMILIES."""

    name: str
    value: float
    labels: Mapping[str, str] = field(default_factory=dict)


def exposition(samples: Iterable[Sample]) -> str:
    """The page: a metric's samples together, below what it means."""
    by_name: dict[str, list[Sample]] = {name: [] for name in FAMILIES}
    for sample in samples:
        by_name[sample.name].append(sample)
    lines = []
    for name, (kind, meaning) in FAMILIES.items():
        if by_name[name]:
            lines += [f"# HELP {name} {meaning}", f"# TYPE {name} {kind}"]
            lines += [f"{name}{_labels(sample.labels)} {_number(sample.value)}" for sample in by_name[name]]
    return "".join(f"{line}\n" for line in lines)


def _labels(labels: Mapping[str, str]) -> str:
    return f"{{{','.join(f'{key}={_quoted(value)}' for key, value in labels.items())}}}" if labels else ""


def _quoted(text: str) -> str:
    # A folder's name may be bytes that are no UTF-8, which Python holds as surrogates.
    text = text.encode("utf-8", "backslashreplace").decode()
    return '"' + text.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"") + '"'


def _number(value: float) -> str:
    if math.isfinite(value):
        return repr(value)
    return "NaN" if math.isnan(value) else "+Inf" if value > 0 else "-Inf"


class StorePage:
    """The page of one store. Threads may ask for it at once; one of them reads."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._runs: dict[tuple[str, int | None], RunTail] = {}
        self._lock = threading.Lock()
        self._text, self._made_at = "", -math.inf
        self._redactor = Redactor(os.environ)
        self._said: set[str] = set()

    def text(self) -> str:
        """The page, at most KEPT_S old. It never raises: what cannot be read is counted, and named on stderr once."""
        with self._lock:
            if time.monotonic() - self._made_at > KEPT_S:
                self._text, self._made_at = exposition(self._samples()), time.monotonic()
            return self._text

    def _samples(self) -> list[Sample]:
        samples, errors = [], 0
        try:
            names = self._names()
        except Exception as error:
            self._say(str(error))
            return [Sample("shardyard_scrape_errors", 1)]
        followed: dict[tuple[str, int | None], RunTail] = {}
        for name in names:
            try:
                key, tail = self._tail(name)
                followed[key] = tail
                samples += list(tail.samples(name))
                errors += tail.bad_rows > 0
            except Exception as error:  # whatever is wrong with one run, the others are told
                self._say(f"Run '{name}' cannot be read: {error}")
                if isinstance(error, Damaged):
                    samples.append(Sample("shardyard_run_status", 1, {"run": name, "status": "damaged"}))
                errors += 1
        self._runs = followed
        path = self._store.local_path()
        with suppress(OSError):  # gone since the listing
            samples += [] if path is None else [Sample("shardyard_store_free_bytes", shutil.disk_usage(path).free)]
        return [*samples, Sample("shardyard_scrape_errors", errors)]

    def _names(self) -> list[str]:
        """The runs; a store that is not there is an error here, since its disk may not be mounted."""
        if not self._store.exists():
            raise FileNotFoundError(f"There is nothing at {self._store.uri}.")
        return list_runs(self._store)

    def _tail(self, name: str) -> tuple[tuple[str, int | None], RunTail]:
        """What is known of a run. Its run.yaml is written once: another one is another run of the same name."""
        config = self._store.info(f"{name}/run.yaml")
        key = (name, config.changed if config else None)
        return key, self._runs.get(key) or RunTail(RunRecord.open(self._store.uri, name))

    def _say(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            print(f"shardyard metrics: {self._redactor.text(text)}", file=sys.stderr, flush=True)


class RunTail:
    """A run that is followed: new rows of its record are read, of the others only what the page needs is kept."""

    def __init__(self, record: RunRecord) -> None:
        self._record = record
        self._events: Cursor | None = None
        self._metrics: Cursor | None = None
        self._counts: Counter[str] = Counter()
        self._latest: dict[str, dict[str, Any]] = {}  # the newest event of each kind
        self._trained: dict[str, Any] | None = None  # the newest row of a training step
        self.bad_rows = 0

    def samples(self, name: str) -> Iterator[Sample]:
        """What is to be told of it now."""
        self._read()
        label = {"run": name}
        claim = current_claim(self._record.store)
        lease: Literal["live", "stale"] | None = None if claim is None else "live" if claim.is_live() else "stale"
        events = sorted(self._latest.values(), key=_when)
        yield Sample("shardyard_run_status", 1, label | {"status": history.status(events, lease=lease)})
        yield Sample("shardyard_run_steps", self._record.config.steps, label)
        for kind, metric in _COUNTED.items():
            yield Sample(metric, self._counts[kind], label)
        if "checkpoint" in self._latest:
            saved_at = self._latest["checkpoint"]["time"]
            yield Sample("shardyard_run_last_checkpoint_timestamp_seconds", saved_at, label)
        if self._trained is not None:
            yield from self._of_step(self._trained, label)

    def _of_step(self, row: dict[str, Any], label: dict[str, str]) -> Iterator[Sample]:
        values = row["values"]
        yield Sample("shardyard_run_step", row["step"], label)
        yield Sample("shardyard_run_last_step_timestamp_seconds", row["time"], label)
        for key, metric in _OF_A_STEP.items():
            if key in values:
                yield Sample(metric, values[key], label)
        if "data_wait_s" in values and values.get("step_s", 0) > 0:
            yield Sample("shardyard_run_data_wait_ratio", values["data_wait_s"] / values["step_s"], label)

    def _read(self) -> None:
        events, self._events = read_rows(self._record.store, "events", self._events)
        self._fold(self._count, events)
        rows, self._metrics = read_rows(self._record.store, "metrics", self._metrics)
        self._fold(self._train, rows)

    def _fold(self, add: Callable[[dict[str, Any]], None], rows: list[dict[str, Any]]) -> None:
        for row in rows:
            try:
                add(row)
            except (KeyError, TypeError, ValueError, AttributeError):  # JSON, but no row of ours
                self.bad_rows += 1

    def _count(self, event: dict[str, Any]) -> None:
        kind, when = str(event["kind"]), _when(event)
        if kind not in self._latest or when >= _when(self._latest[kind]):
            self._latest[kind] = {"kind": kind, "attempt": when[0], "time": when[1], "final": event.get("final")}
        self._counts[kind] += 1

    def _train(self, row: dict[str, Any]) -> None:
        """The row written last, in the latest attempt, is of the weights that survive (see history.stitched)."""
        attempt, at = _when(row)
        values = {key: decode_value(value) for key, value in row["values"].items()}
        if "loss" in values and (self._trained is None or attempt >= self._trained["attempt"]):
            self._trained = {"attempt": attempt, "time": at, "step": int(row["step"]), "values": values}


def _when(row: Mapping[str, Any]) -> tuple[int, float]:
    return int(row["attempt"]), float(row["time"])
