"""A run's folder: the truth about the run, readable long after the cluster is gone.

    run.yaml        resolved config, where each value came from       lineage.json  code, packages, machine, command
    events/         what happened                                     metrics/      numbers by step
    ranks/          each rank's place, times and memory by step       columns/      metrics by column (columns.py)
    attempts/0001/  logs and a note for each lifetime of the workers  lease/        who runs it now
    stop.json       somebody asked the run to stop                    checkpoints/  see trainer/checkpoint.py
    datasets.json   names of its data sets in <store>/datasets/  pictures/  what the model makes, to look at

Events, metrics and ranks only grow: each writer (the launcher, or one rank) appends to files of its own, for each
attempt. What they hold is in docs/metrics.md.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.errors import Damaged, NotFound, ShardyardError
from configs.load import Resolved, dump
from configs.schema import RunConfig
from data_pipelines.storage import Store
from trainer import history, lineage
from trainer.lease import Claim, Holder, Lease, current_claim
from trainer.record_rows import RowWriter, decode_value, read_rows
from trainer.redact import Redactor
from trainer.run_folder import (
    CONFIG,
    DATASETS,
    LINEAGE,
    STOP,
    read_config,
    refuse_foreign_folder,
    refuse_other_config,
    refuse_secrets,
)

if TYPE_CHECKING:
    from trainer.columns import Columns

_LOCAL_FLUSH_EVERY_S = 0.5
_REMOTE_FLUSH_EVERY_S = 10.0  # every flush is an object of its own there
# Of rows of ranks, which all write at once: so long for each rank there is, and at least so long.
_LOCAL_RANK_FLUSH_S = (0.01, 1.0)  # 100 appends a second to a file system that they share
_REMOTE_RANK_FLUSH_S = (1.0, 60.0)  # an object a second
_COLUMNS_EVERY_S = 60.0  # rows of metrics are made columns, which takes some milliseconds


class RunRecord:
    """One run's folder. Open it with `create` (a launcher) or `open` (a worker, a reader).

    attempt: what this process writes belongs to it; 0 before the first. Set by `next_attempt`, or by hand in a worker.
    Writing never stops training: what the store refuses is kept in memory, tried again, and complained of once.
    """

    def __init__(self, store: Store, resolved: Resolved, *, attempt: int = 0, rank: int | None = None) -> None:
        self.store = store
        self.resolved = resolved
        self.attempt = attempt
        self._writer = "launcher" if rank is None else f"rank-{rank:05d}"
        self._redactor = Redactor(os.environ)
        self._rows: dict[tuple[str, int], RowWriter] = {}
        self._rank_rows: RowWriter | None = None
        self._rank = 0
        self._rank_flush_every_s = 0.0
        self._columns: Columns | None = None
        self._with_columns = store.is_local
        self._flush_lock = threading.Lock()
        self._flusher: threading.Thread | None = None
        self._closing = threading.Event()
        self._complained = False
        self._later_lineage: dict[str, Any] | None = None  # of a launch that goes on with a run, until it is written

    # --- opening

    @classmethod
    def create(cls, store: Store, resolved: Resolved) -> RunRecord:
        """Begin a run in `store`, or go on with the one of this name if its config is the same.

        Raises:
            UsageError: the name is taken by a run with another config, or by a folder that is no run's; or the config
            holds a secret.
        """
        refuse_secrets(resolved.config)
        folder = store.child(resolved.config.name)
        started = lineage.collect(sys.argv, os.environ, Path.cwd())
        if folder.exists(CONFIG):
            refuse_other_config(folder, resolved.config)
            record = cls(folder, resolved, attempt=latest_attempt(folder))
            record._later_lineage = started
            return record
        refuse_foreign_folder(folder)
        folder.write_atomic(LINEAGE, json.dumps(started, indent=1))
        folder.write_atomic(CONFIG, dump(resolved))  # last: from now on it is a run
        record = cls(folder, resolved)
        record.event("created")
        return record

    @classmethod
    def open(cls, store_uri: str, name: str, *, rank: int | None = None) -> RunRecord:
        """An existing run; `rank` for a worker that will write, None for a launcher or a reader.

        Its config's store and name are where it was found, since its folder may have been moved.

        Raises:
            NotFound: no run of this name, with the nearest one. Damaged: its run.yaml cannot be read.
        """
        store = Store(store_uri)
        folder = store.child(name)
        if not name or not folder.exists(CONFIG):
            near = difflib.get_close_matches(name, list_runs(store), n=1)
            hint = f" Did you mean '{near[0]}'?" if near else " `shardyard runs ls` lists the runs of a store."
            raise NotFound(f"There is no run '{name}' in {store.uri}.{hint}")
        resolved = read_config(folder)
        found = resolved.config.model_copy(update={"store": store.uri, "name": name})
        return cls(folder, replace(resolved, config=found), attempt=latest_attempt(folder), rank=rank)

    @property
    def config(self) -> RunConfig:
        """The run's config."""
        return self.resolved.config

    @property
    def name(self) -> str:
        """The run's name."""
        return self.config.name

    # --- control

    def acquire_lease(self, holder: Holder | None = None) -> Lease:
        """Become the run's one launcher; forgets what an earlier launcher was asked.

        Raises:
            UsageError: another process runs it; or it was begun with another config in the same moment.
        """
        lease = Lease.acquire(self.store, holder)
        try:
            refuse_other_config(self.store, self.config)
            self.store.delete(STOP)
        except BaseException:
            lease.release()
            raise
        return lease

    def next_attempt(self) -> int:
        """Number a new attempt (from 1) and make its folder. Only for the lease's holder.

        The first one of a later launch is where that launch's lineage is written: one that is refused leaves none.
        """
        self.attempt = latest_attempt(self.store) + 1
        if self._later_lineage is not None:
            self.store.write_atomic(f"lineage-{self.attempt:04d}.json", json.dumps(self._later_lineage, indent=1))
            self._later_lineage = None
        note = {"time": time.time(), "host": socket.gethostname(), "pid": os.getpid()}
        self.store.write_atomic(f"{attempt_folder(self.attempt)}/attempt.json", json.dumps(note))
        return self.attempt

    def request_stop(self, reason: str) -> None:
        """Ask whoever runs it, anywhere, to save a checkpoint and stop."""
        note = {"time": time.time(), "host": socket.gethostname(), "pid": os.getpid(), "reason": reason}
        self.store.write_atomic(STOP, json.dumps(note))

    def stop_requested(self) -> str | None:
        """Why the present launcher has been asked to stop; None if it has not been."""
        if not self.store.exists(STOP):
            return None
        with contextlib.suppress(FileNotFoundError, NotFound):  # a new launcher has taken it away
            try:
                return str(json.loads(self.store.read_text(STOP))["reason"])
            except (ValueError, KeyError, TypeError):
                return "asked to stop"
        return None

    # --- writing

    def event(self, kind: str, **fields: Any) -> None:
        """Record that something happened; it is on disk when this returns (secrets in `fields` are redacted)."""
        shown = fields if kind == "sample" else self._redactor.value(fields)
        self._append("events", {"kind": kind, **shown})
        self.flush()

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers after `step` completed steps. Costs the caller microseconds: a thread writes them, twice a second."""
        self._append("metrics", {"step": step, "values": dict(values)})
        self._flush_behind()

    def begin_rank(self, rank: int, world_size: int, step: int, **facts: Any) -> None:
        """Begin the rows of a rank in this attempt, after `step` completed steps, with where it runs."""
        for_each_s, least_s = _LOCAL_RANK_FLUSH_S if self.store.is_local else _REMOTE_RANK_FLUSH_S
        self._rank, self._rank_flush_every_s = rank, max(least_s, for_each_s * world_size)
        self._rank_rows = RowWriter(self.store, "ranks", self.attempt, f"rank-{rank:05d}", few_objects=True)
        place = {"host": socket.gethostname(), "world_size": world_size, **facts}
        self._append_rank({"step": step, "place": place, "values": {}})

    def rank_row(self, step: int, values: Mapping[str, float]) -> None:
        """How the rank has fared since its last row, up to `step` completed steps. Costs what `metrics` does.

        Written rarely where many ranks would write at once; what a killed one has not written is lost.
        """
        self._append_rank({"step": step, "values": dict(values)})

    def _append_rank(self, row: dict[str, Any]) -> None:
        assert self._rank_rows is not None, "begin_rank() comes first"
        self._rank_rows.append({"time": time.time(), "attempt": self.attempt, "rank": self._rank, **row})
        self._flush_behind()

    def _flush_behind(self) -> None:
        """Have a thread write from now on."""
        if self._flusher is None:
            self._flusher = threading.Thread(target=self._keep_flushing, name="record", daemon=True)
            self._flusher.start()

    def sample(self, step: int, text: str) -> None:
        """What the model generated after `step` completed steps."""
        self.event("sample", step=step, text=text)

    def picture(self, step: int, name: str, png: bytes) -> None:
        """What the model makes after `step` completed steps, to look at; `name` of letters, digits, - and _.

        A picture that the store refuses is named on stderr: training goes on without it.
        """
        assert re.fullmatch(r"[A-Za-z0-9_-]+", name), name
        path = f"pictures/step-{step:08d}/{name}.png"
        try:
            self.store.write_atomic(path, png)
        except ShardyardError as error:
            self._complain(error)
            return
        self.event("picture", step=step, name=name, path=path)

    def update_lineage(self, **fields: Any) -> None:
        """Add what becomes known later, such as data_fingerprint, to lineage.json."""
        self.store.write_atomic(LINEAGE, json.dumps(self.lineage() | self._redactor.value(fields), indent=1))

    def write_datasets(self, names: Sequence[str]) -> None:
        """Say which data sets of the store the run reads: one, or that of each source of a mixture."""
        self.store.write_atomic(DATASETS, json.dumps({"datasets": list(names)}))

    def flush(self) -> bool:
        """Write what is kept; False if the store refused (it stays kept)."""
        with self._flush_lock:
            try:
                for writer in list(self._rows.values()):
                    writer.flush()
            except ShardyardError as error:
                self._complain(error)
                return False
        return True

    def close(self) -> None:
        """Write what is kept and let go of the files; the record can still be read."""
        self._closing.set()
        if self._flusher is not None:
            self._flusher.join()
            self._flusher = None
        with self._flush_lock:
            for writer in [*self._rows.values(), *([self._rank_rows] if self._rank_rows else [])]:
                try:
                    writer.close()
                except ShardyardError as error:
                    self._complain(error)
            self._keep_columns(last=True)
            self._rows.clear()
            self._rank_rows = None
        self._closing.clear()

    def _append(self, folder: str, row: dict[str, Any]) -> None:
        key = (folder, self.attempt)
        writer = self._rows.get(key)
        if writer is None:  # two threads may come here at once: setdefault keeps one writer for both
            writer = self._rows.setdefault(key, RowWriter(self.store, folder, self.attempt, self._writer))
        writer.append({"time": time.time(), "attempt": self.attempt, **row})

    def _keep_flushing(self) -> None:
        every_s = _LOCAL_FLUSH_EVERY_S if self.store.is_local else _REMOTE_FLUSH_EVERY_S
        ranks_at = time.monotonic() + self._rank_flush_every_s
        columns_at = time.monotonic() + _COLUMNS_EVERY_S
        while not self._closing.wait(every_s):
            self.flush()
            if time.monotonic() >= columns_at:
                columns_at = time.monotonic() + _COLUMNS_EVERY_S
                self._keep_columns()
            if self._rank_rows is not None and time.monotonic() >= ranks_at:
                ranks_at = time.monotonic() + self._rank_flush_every_s
                try:
                    self._rank_rows.flush()
                except ShardyardError as error:
                    self._complain(error)

    def _keep_columns(self, *, last: bool = False) -> None:
        """Keep the rows of metrics as columns, too, if this process writes them (see trainer/columns.py)."""
        if not self._with_columns or all(folder != "metrics" for folder, _ in self._rows):
            return
        try:
            if self._columns is None:
                from trainer.columns import Columns

                self._columns = Columns(self.store, None)
            self._columns.update()
            if last:
                self._columns.close()
                self._columns = None
        except Exception as error:  # they only follow from the rows, whose writing nothing of theirs may end
            self._columns, self._with_columns = None, False
            print(f"The metrics of run '{self.name}' are kept as rows alone from here on: {error}", file=sys.stderr)

    def _complain(self, error: ShardyardError) -> None:
        if not self._complained:
            print(f"The record of run '{self.name}' is behind, training goes on: {error}", file=sys.stderr, flush=True)
        self._complained = True

    # --- reading

    def events(self) -> list[dict[str, Any]]:
        """Everything that happened: {time (epoch seconds), attempt, kind, ...}, in order."""
        rows, _ = read_rows(self.store, "events")
        return sorted(rows, key=lambda row: (row["attempt"], row["time"]))

    def metrics_table(self) -> list[dict[str, Any]]:
        """All rows ever recorded, those that were rolled back too: {attempt, step, time, <metric>: value}."""
        rows, _ = read_rows(self.store, "metrics")
        return [
            {"attempt": row["attempt"], "step": row["step"], "time": row["time"]}
            | {key: decode_value(value) for key, value in row["values"].items()}
            for row in rows
        ]

    def stitched(self) -> list[dict[str, Any]]:
        """The curve of the weights that survive, one row a step (see history.stitched)."""
        return history.stitched(self.metrics_table())

    def status(self) -> history.Status:
        """queued, running, finished, stopped, failed, or lost: its launcher died without a word."""
        claim = current_claim(self.store)
        return history.status(self.events(), lease=None if claim is None else "live" if claim.is_live() else "stale")

    def holder(self) -> Claim | None:
        """The live launcher's claim, None if nobody runs it."""
        claim = current_claim(self.store)
        return claim if claim is not None and claim.is_live() else None

    def attempts(self) -> list[dict[str, Any]]:
        """One row an attempt (see history.attempts)."""
        return history.attempts(self.events())

    def checkpoints(self) -> list[dict[str, Any]]:
        """Complete checkpoints still there: {step, path (of its folder or its URI)}, oldest first."""
        folders = [name for name in self.store.list_dirs("checkpoints") if name.removeprefix("step-").isdigit()]
        return [
            {"step": int(name.removeprefix("step-")), "path": self.store.path(f"checkpoints/{name}")}
            for name in folders
            if self.store.exists(f"checkpoints/{name}/manifest.json")
        ]

    def lineage(self) -> dict[str, Any]:
        """lineage.json: git, packages, machine and command of the first launch."""
        fields: dict[str, Any] = json.loads(self.store.read_text(LINEAGE))
        return fields


def list_runs(store: Store) -> list[str]:
    """Names of the runs in a store."""
    return [name for name in store.list_dirs() if store.exists(f"{name}/{CONFIG}")]


def recorded_datasets(folder: Store) -> list[str]:
    """Names of the data sets that a run, in its folder, was launched with last; [] before that. Raises Damaged."""
    if not folder.exists(DATASETS):
        return []
    try:
        return [str(name) for name in json.loads(folder.read_text(DATASETS))["datasets"]]
    except (ValueError, KeyError, TypeError) as error:
        raise Damaged(
            f"{folder.path(DATASETS)} cannot be read ({type(error).__name__}: {error}). Delete it and launch the run "
            "again, which writes it anew."
        ) from error


def attempt_folder(attempt: int) -> str:
    """Where an attempt's logs lie, in the run's folder."""
    return f"attempts/{attempt:04d}"


def latest_attempt(folder: Store) -> int:
    """The number of the newest attempt in a run's folder; 0 before the first."""
    return max((int(name) for name in folder.list_dirs("attempts") if name.isdigit()), default=0)
