"""A run's metrics by column, so that any of them can be drawn at once, however long the run.

The record holds rows of JSON (trainer/record_rows.py), of which 10,000 steps of 100 metrics are 25 MB. Here they are
Arrow files of up to `CHUNK` rows, in a folder of this machine that may be deleted at any time. What is new in the
record is read from where the last file ends, which that file itself says; the rows after it are kept in memory.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from data_pipelines.storage import Store
from trainer.record_rows import Cursor, decode_value, read_rows

Floats = npt.NDArray[np.float64]
Whole = npt.NDArray[np.int64]

CHUNK = 8192  # rows
_BLOCK_BYTES = 1 << 20  # of JSON at a time, so that a long run takes no memory while it is read
_VERSION = 1
_PLACE = ("attempt", "step", "time")
_METRIC = "metric:"  # a metric may be called "step", too


class Columns:
    """The metrics of one run. Not safe for threads.

    Rows are in the order of the record: by attempt, and as they were written within one. What the cache cannot hold or
    give back (a full disk, a damaged file) is read from the record again.
    """

    def __init__(self, run: Store, cache: Path) -> None:
        """run: the run's folder. cache: a folder for all runs; each has one of its own in it."""
        self._run = run
        self._identity = _identity(run)
        self._folder = cache / hashlib.sha256(run.uri.encode()).hexdigest()[:32]
        self._chunks: list[pa.Table] = []
        self._names: dict[str, None] = {}  # in the order of their first appearance
        self._cursor: Cursor | None = None
        self._rows: list[dict[str, Any]] = []  # after the last chunk
        self._open()

    @property
    def names(self) -> list[str]:
        """Of all metrics."""
        return list(self._names)

    @property
    def num_rows(self) -> int:
        """That have been read."""
        return sum(chunk.num_rows for chunk in self._chunks) + len(self._rows)

    def update(self) -> int:
        """Read what is new in the record; the number of new rows. Raises ShardyardError if it cannot be read."""
        if _identity(self._run) != self._identity:  # another run of the same name
            self.__init__(self._run, self._folder.parent)  # type: ignore[misc]
        before = self.num_rows
        while True:
            rows, cursor = read_rows(self._run, "metrics", self._cursor, limit=_BLOCK_BYTES)
            if cursor == self._cursor:
                return self.num_rows - before
            self._cursor = cursor
            for row in rows:
                if _is_row(row):
                    self._rows.append(row)
                    self._names.update(dict.fromkeys(row["values"]))
            if len(self._rows) >= CHUNK:
                self._keep()

    def place(self) -> tuple[Whole, Whole, Floats]:
        """(attempt, step, time in epoch seconds) of each row."""
        attempt, step, time = (self._column(name) for name in _PLACE)
        return attempt.astype(np.int64), step.astype(np.int64), time

    def metric(self, name: str) -> tuple[Whole, Floats]:
        """(numbers of the rows that have it, its values), which may not be finite."""
        if name not in self._names:
            return np.empty(0, np.int64), np.empty(0)
        rows, values, start = [], [], 0
        for table in self._tables([_METRIC + name]):
            column = table.column(0).combine_chunks() if table.num_columns else None
            if column is not None and column.null_count < len(column):
                there = np.flatnonzero(column.is_valid().to_numpy(zero_copy_only=False))
                rows.append(there + start)
                values.append(column.drop_null().to_numpy())
            start += table.num_rows
        return (np.concatenate(rows), np.concatenate(values)) if rows else (np.empty(0, np.int64), np.empty(0))

    def row(self, number: int) -> dict[str, Any]:
        """{attempt, step, time, values} of one row; negative numbers count from the end."""
        number += self.num_rows * (number < 0)
        for chunk in self._chunks:
            if number < chunk.num_rows:
                row = chunk.slice(number, 1).to_pylist()[0]
                values = {
                    key.removeprefix(_METRIC): value
                    for key, value in row.items()
                    if key.startswith(_METRIC) and value is not None
                }
                return {name: row[name] for name in _PLACE} | {"values": values}
            number -= chunk.num_rows
        row = self._rows[number]
        return row | {"values": {key: decode_value(value) for key, value in row["values"].items()}}

    def _column(self, name: str) -> Floats:
        columns = [table.column(0).to_numpy() for table in self._tables([name])]
        return np.concatenate(columns) if columns else np.empty(0)

    def _tables(self, names: list[str]) -> list[pa.Table]:
        """These columns of all rows; a chunk that lacks one is without it."""
        found = []
        for chunk in self._chunks:
            there = [name for name in names if name in chunk.column_names]
            found.append(chunk.select(there) if there else chunk.select([]))
        return [*found, _table(self._rows, names)] if self._rows else found

    # --- the cache

    def _open(self) -> None:
        """What a former process has kept of this very run."""
        for path in sorted(self._folder.glob("*.arrow")):
            try:
                table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
                told = json.loads(table.schema.metadata[b"shardyard"])
                if (told["version"], told["identity"], told["start"]) != (_VERSION, self._identity, self.num_rows):
                    raise ValueError
            except (OSError, pa.ArrowException, KeyError, TypeError, ValueError):
                self._forget()
                return
            self._chunks.append(table)
            self._cursor = told["cursor"]
            self._names.update(dict.fromkeys(told["names"]))

    def _forget(self) -> None:
        self._chunks, self._cursor = [], None
        self._names.clear()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _keep(self) -> None:
        """Write the rows in memory as a chunk of their own."""
        names = {name: None for row in self._rows for name in row["values"]}
        table = _table(self._rows, [*_PLACE, *(_METRIC + name for name in names)])
        told = {
            "version": _VERSION,
            "identity": self._identity,
            "start": self.num_rows - len(self._rows),  # a chunk before it may be gone
            "cursor": self._cursor,
            "names": list(self._names),
        }
        table = table.replace_schema_metadata({"shardyard": json.dumps(told)})
        path = self._folder / f"{len(self._chunks):06d}.arrow"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(f".{os.getpid()}")
            with pa.OSFile(str(temporary), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
                writer.write_table(table.combine_chunks())
            os.replace(temporary, path)
            table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        except (OSError, pa.ArrowException):
            pass  # then it stays in memory
        self._chunks.append(table)
        self._rows = []


def _is_row(row: dict[str, Any]) -> bool:
    """Whether it is one of ours: what a record holds may have been damaged, or be of a later version."""
    try:
        _ = (
            int(row["attempt"]),
            int(row["step"]),
            float(row["time"]),
            [decode_value(each) for each in row["values"].values()],
        )
    except (KeyError, TypeError, ValueError, AttributeError):
        return False
    return True


def _table(rows: list[dict[str, Any]], names: list[str]) -> pa.Table:
    columns: list[pa.Array] = []
    for name in names:
        if name in _PLACE:
            columns.append(pa.array([row[name] for row in rows], pa.float64() if name == "time" else pa.int64()))
            continue
        key = name.removeprefix(_METRIC)
        values = [decode_value(row["values"][key]) if key in row["values"] else None for row in rows]
        columns.append(pa.array(values, pa.float64(), from_pandas=False))
    return pa.table(columns, names=names)


def _identity(run: Store) -> str:
    """Of the run that has this folder now: run.yaml is written once."""
    facts = run.info("run.yaml")
    return f"{run.uri} {facts.size if facts else None} {facts.changed if facts else None}"
