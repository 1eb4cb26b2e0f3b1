"""A run's metrics by column, so that any of them can be drawn at once, however long the run.

The record holds rows of JSON (trainer/record_rows.py), of which 10,000 steps of 100 metrics are 25 MB. Here they are
Arrow files of about `CHUNK` values. Training keeps them beside the rows, in the run's folder `columns/`; who reads a
run whose rows go further keeps the rest in a folder of its own machine. Both follow from the rows and may be deleted
at any time. What is new in the record is read from where the last file ends, which that file itself says; the rows
after it are kept in memory.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.json

from data_pipelines.storage import Store
from trainer.record_rows import Cursor, decode_rows, decode_value, read_lines

Floats = npt.NDArray[np.float64]
Whole = npt.NDArray[np.int64]

CHUNK = 1 << 19  # values: 4 MB
# What comes while a run trains is a few rows at a time: Python's reader is as fast there, and takes less memory.
_FEW_BYTES, _FEW_ROWS = 64 << 10, 256
_WORTH_KEEPING = 1024  # rows, of which a file of their own is read sooner than their JSON
_BLOCK_BYTES = 4 << 20  # of JSON at a time, so that a long run takes little memory while it is read
_PIECE_BYTES, _READERS = 512 << 10, min(4, os.cpu_count() or 1)  # of it, and threads that make columns of a piece each
FOLDER = "columns"  # of a run
_VERSION = 2
_PLACE = {"attempt": np.int64, "step": np.int64, "time": np.float64}
_ARROW = {np.int64: pa.int64(), np.float64: pa.float64()}
_METRIC = "metric:"  # a metric may be called "step", too


@dataclass(frozen=True)
class _Kept:
    """A file of the cache, opened anew each time: what stays mapped counts as memory of this process."""

    path: Path
    num_rows: int

    def table(self) -> pa.Table:
        """Raises OSError, ArrowException or ValueError for one that is not there or is another."""
        table = pa.ipc.open_file(pa.memory_map(str(self.path))).read_all()
        if table.num_rows != self.num_rows:
            raise ValueError(f"{self.path} is another file now")
        return table


class Columns:
    """The metrics of one run. Not safe for threads.

    Rows are in the order of the record: by attempt, and as they were written within one. What the cache cannot hold or
    give back (a full disk, a damaged file) is read from the record again.
    """

    def __init__(self, run: Store, cache: Path | None) -> None:
        """run: the run's folder.

        cache: a reader's folder for all runs, each of which has one of its own in it; None: whoever writes the rows,
        whose files are the run's own. Of a run on this machine.
        """
        self._run = run
        self._cache = cache
        self._identity = _identity(run)
        own = run.local_path(FOLDER)
        if cache is None:
            assert own is not None, "files of a remote run are a reader's"
            self._folder, self._others = own, None
        else:
            self._folder, self._others = cache / hashlib.sha256(run.uri.encode()).hexdigest()[:32], own
        self._chunks: list[_Kept | pa.Table] = []  # a table where it cannot be written
        self._names: dict[str, None] = {}  # in the order of their first appearance
        self._cursor: Cursor | None = None
        self._pieces: list[pa.Table] = []  # after the last chunk
        self._rows: list[dict[str, Any]] = []  # after the last piece
        self._open()

    @property
    def names(self) -> list[str]:
        """Of all metrics."""
        return list(self._names)

    @property
    def num_rows(self) -> int:
        """That have been read."""
        return sum(chunk.num_rows for chunk in self._chunks) + self._num_new()

    def update(self) -> int:
        """Read what is new in the record; the number of new rows. Raises ShardyardError if it cannot be read."""
        if _identity(self._run) != self._identity:  # another run of the same name
            self.__init__(self._run, self._cache)  # type: ignore[misc]
        before = self.num_rows
        while True:
            lines, cursor = read_lines(self._run, "metrics", self._cursor, limit=_BLOCK_BYTES)
            if cursor == self._cursor:
                new = self.num_rows - before
                if new >= _WORTH_KEEPING:  # of a run that nobody looked at for long; one that is followed has a few
                    self.close()
                    pa.default_memory_pool().release_unused()
                return new
            self._cursor = cursor
            self._add(lines)

    def _add(self, lines: bytes) -> None:
        pieces = _pieces(lines, _PIECE_BYTES)
        if len(pieces) == 1:
            self._add_piece(lines, _decoded(lines) if len(lines) >= _FEW_BYTES else None)
        else:
            # Threads of our own: those of Arrow's reader have been seen to crash the process on a damaged line.
            with ThreadPoolExecutor(_READERS) as readers:
                for piece, table in zip(pieces, readers.map(_decoded, pieces), strict=True):
                    self._add_piece(piece, table)
        if self._num_new() * len(self._names) >= CHUNK:
            self._keep()

    def _add_piece(self, lines: bytes, table: pa.Table | None) -> None:
        """table: of the lines; None: Python reads them."""
        if table is None:
            rows = [row for row in decode_rows(lines) if _is_row(row)]
            self._rows += rows
            for row in rows:
                self._names.update(dict.fromkeys(row["values"]))
        else:
            self._settle()
            self._pieces.append(table)
            self._names.update(dict.fromkeys(_metrics_of(table)))
        if len(self._rows) >= _FEW_ROWS:
            self._settle()

    def _settle(self) -> None:
        """Make columns of the rows: they take a tenth of the memory."""
        if self._rows:
            names = {_METRIC + name: None for row in self._rows for name in row["values"]}
            self._pieces.append(_table(self._rows, [*_PLACE, *names]))
            self._rows = []

    def close(self) -> None:
        """Keep what would take long to read again. It may be used again afterwards."""
        if self._num_new() >= _WORTH_KEEPING:
            self._keep()

    def _num_new(self) -> int:
        """Rows after the last chunk."""
        return sum(piece.num_rows for piece in self._pieces) + len(self._rows)

    def place(self) -> tuple[Whole, Whole, Floats]:
        """(attempt, step, time in epoch seconds) of each row."""
        attempt, step, time = (self._place(name) for name in _PLACE)
        return attempt, step, time

    def metric(self, name: str) -> tuple[Whole, Floats]:
        """(numbers of the rows that have it, its values), which may not be finite."""
        rows, values, start = [], [], 0
        for table in self._tables([_METRIC + name]):
            if table.num_columns and (column := _array(table)).null_count < len(column):
                there = np.flatnonzero(_is_there(column))
                rows.append(there + start)
                values.append(_as_numpy(column)[there])
            start += table.num_rows
        return (np.concatenate(rows), np.concatenate(values)) if rows else (np.empty(0, np.int64), np.empty(0))

    def rows(self, start: int, stop: int) -> list[dict[str, Any]]:
        """{attempt, step, time, values} of the rows from one number to another, as far as there are."""
        settled = self.num_rows - len(self._rows)
        newest = [_decoded_row(row) for row in self._rows[max(start - settled, 0) : max(stop - settled, 0)]]
        return newest if start >= settled else [*self._settled_rows(start, min(stop, settled)), *newest]

    def _settled_rows(self, start: int, stop: int) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        for table in self._tables([*_PLACE, *(_METRIC + name for name in self._names)]):
            if start < table.num_rows and stop > 0:
                first = max(start, 0)
                found += [_row(values) for values in table.slice(first, stop - first).to_pylist()]
            start, stop = start - table.num_rows, stop - table.num_rows
        return found

    def _place(self, name: str) -> Any:
        columns = [_as_numpy(_array(table)) for table in self._tables([name])]
        return np.concatenate(columns) if columns else np.empty(0, _PLACE[name])

    def _tables(self, names: list[str]) -> list[pa.Table]:
        """These columns of all rows; a table that lacks one is without it."""
        try:
            return self._selected(names)
        except (OSError, pa.ArrowException, ValueError):  # somebody has cleared the cache
            self._forget()
            self.update()
            return self._selected(names)

    def _selected(self, names: list[str]) -> list[pa.Table]:
        chunks = [chunk.table() if isinstance(chunk, _Kept) else chunk for chunk in self._chunks]
        tables = [*chunks, *self._pieces]
        found = [table.select([name for name in names if name in table.column_names]) for table in tables]
        return [*found, _table(self._rows, names)] if self._rows else found

    # --- the cache

    def _open(self) -> None:
        """What training has kept, then what a former process has."""
        if self._others is not None:
            self._open_files(self._others, None)
        for left in self._open_files(self._folder, None if self._cache is None else self._identity):
            left.unlink(missing_ok=True)

    def _open_files(self, folder: Path, identity: str | None) -> list[Path]:
        """Take those that go on where this is; returns the first that does not, and those after it."""
        paths = sorted(folder.glob("*.arrow"))
        for number, path in enumerate(paths):
            try:
                table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
                told = json.loads(table.schema.metadata[b"shardyard"])
                if (told["version"], told["identity"], told["start"]) != (_VERSION, identity, self.num_rows):
                    return paths[number:]
                cursor, names = dict(told["cursor"]), dict.fromkeys(told["names"])
            except (OSError, pa.ArrowException, KeyError, TypeError, ValueError):
                return paths[number:]
            self._chunks.append(_Kept(path, table.num_rows))
            self._cursor = cursor
            self._names.update(names)
        return []

    def _forget(self) -> None:
        self._chunks, self._pieces, self._rows, self._cursor = [], [], [], None
        self._names.clear()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _keep(self) -> None:
        """Write what is in memory as a chunk of its own."""
        self._settle()
        table = pa.concat_tables(self._pieces, promote_options="default").combine_chunks()
        told = {
            "version": _VERSION,
            "identity": None if self._cache is None else self._identity,  # a run's folder may be moved with its files
            "start": self.num_rows - table.num_rows,  # a chunk before it may be gone
            "cursor": self._cursor,
            "names": list(self._names),
        }
        table = table.replace_schema_metadata({"shardyard": json.dumps(told)})
        path = self._folder / f"{len(self._chunks):06d}.arrow"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(f".{os.getpid()}")
            with pa.OSFile(str(temporary), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
                writer.write_table(table)
            os.replace(temporary, path)
            self._chunks.append(_Kept(path, table.num_rows))
        except (OSError, pa.ArrowException):
            self._chunks.append(table)
        self._pieces = []


def _pieces(lines: bytes, size: int) -> list[bytes]:
    """Whole lines, about so many bytes at a time."""
    found, start = [], 0
    while len(lines) - start > size and (stop := lines.find(b"\n", start + size) + 1) < len(lines):
        found.append(lines[start:stop])
        start = stop
    return [*found, lines[start:]]


def _is_row(row: dict[str, Any]) -> bool:
    """Whether it is one of ours: what a record holds may have been damaged, or be of a later version."""
    try:
        whole = all(isinstance(row[name], int) and abs(row[name]) < 2**63 for name in ("attempt", "step"))
        return (
            whole
            and isinstance(row["time"], int | float)
            and all(decode_value(value) is not None for value in row["values"].values())
        )
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        return False


def _decoded(lines: bytes) -> pa.Table | None:
    """A table of whole lines, by Arrow's reader, which takes a tenth of the time of Python's.

    None where it would not tell the same: of anything but plain numbers, in rows that are all ours.
    """
    if b"\\" in lines:
        return None
    options = pyarrow.json.ReadOptions(use_threads=False, block_size=len(lines) + 1)
    try:
        read = pyarrow.json.read_json(pa.BufferReader(lines), read_options=options)
        columns = {name: read.column(name).combine_chunks() for name in _PLACE}
        values = read.column("values").combine_chunks()
        whole = all(columns[name].type == pa.int64() for name in ("attempt", "step"))
        if not whole or any(column.null_count for column in (*columns.values(), values)):
            return None
        text = np.frombuffer(lines, np.uint8)
        ends = np.flatnonzero(text == ord("\n"))
        begun = text[np.append(0, ends[:-1] + 1)] == ord("{")
        if not (read.num_rows == len(ends) and begun.all()):  # it would also take two rows in one line
            return None
        columns |= {_METRIC + field.name: values.field(number) for number, field in enumerate(values.type)}
        numbers = (pa.int64(), pa.float64())
        if any(column.type not in numbers for column in columns.values()):
            return None
        if any(column.null_count for column in columns.values()) and b"null" in lines:
            return None  # it tells no null from what is not there
        wide = [_of_type(column, _PLACE.get(name, np.float64)) for name, column in columns.items()]
        return pa.table(wide, names=list(columns))
    except (pa.ArrowException, KeyError, TypeError, UnicodeError):
        return None


def _table(rows: list[dict[str, Any]], names: list[str]) -> pa.Table:
    columns: list[pa.Array] = []
    for name in names:
        if name in _PLACE:
            columns.append(_as_arrow(np.array([row[name] for row in rows], _PLACE[name])))
            continue
        key = name.removeprefix(_METRIC)
        values = [row["values"].get(key) for row in rows]
        numbers = np.array([0.0 if value is None else decode_value(value) for value in values])
        columns.append(_as_arrow(numbers, np.array([value is not None for value in values])))
    return pa.table(columns, names=names)


# Arrow's own ways between its arrays and NumPy's import pandas: 30 MB, and 0.2 s at the first curve. Its functions on
# arrays are another 7 MB.


def _of_type(column: pa.Array, kind: Any) -> pa.Array:
    """Whole or other numbers as numbers of a type of NumPy's."""
    if column.type == _ARROW[kind]:
        return column
    return _as_arrow(_as_numpy(column).astype(kind), _is_there(column))


def _is_there(array: pa.Array) -> npt.NDArray[np.bool_]:
    """Where it has a value."""
    bits = array.buffers()[0]
    if bits is None:
        return np.ones(len(array), bool)
    every = np.unpackbits(np.frombuffer(bits, np.uint8), bitorder="little")
    return every[array.offset : array.offset + len(array)].astype(bool)


def _as_arrow(numbers: np.ndarray, there: np.ndarray | None = None) -> pa.Array:
    """there: where it has a value; None: everywhere."""
    valid = None if there is None else pa.py_buffer(np.packbits(there, bitorder="little"))
    return pa.Array.from_buffers(_ARROW[numbers.dtype.type], len(numbers), [valid, pa.py_buffer(numbers)])


def _as_numpy(array: pa.Array) -> np.ndarray:
    """With anything where the array has nothing."""
    kind = np.dtype(str(array.type).replace("double", "float64"))
    return np.frombuffer(array.buffers()[1], kind, len(array), array.offset * kind.itemsize)


def _array(table: pa.Table) -> pa.Array:
    """The only column of a table."""
    column = table.column(0)
    return column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks)


def _decoded_row(row: dict[str, Any]) -> dict[str, Any]:
    """One of the record's rows as a table would give it back."""
    values = {name: decode_value(value) for name, value in row["values"].items()}
    return {"attempt": row["attempt"], "step": row["step"], "time": float(row["time"]), "values": values}


def _metrics_of(table: pa.Table) -> list[str]:
    return [name.removeprefix(_METRIC) for name in table.column_names if name.startswith(_METRIC)]


def _row(values: dict[str, Any]) -> dict[str, Any]:
    """One row of a table as the record has it."""
    metrics = {
        key.removeprefix(_METRIC): value
        for key, value in values.items()
        if key.startswith(_METRIC) and value is not None
    }
    return {name: values[name] for name in _PLACE} | {"values": metrics}


def _identity(run: Store) -> str:
    """Of the run that has this folder now: run.yaml is written once."""
    facts = run.info("run.yaml")
    return f"{run.uri} {facts.size if facts else None} {facts.changed if facts else None}"
