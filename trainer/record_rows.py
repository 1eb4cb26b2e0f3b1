"""Rows that only grow, on disk: JSON lines in numbered segments, a writer's own for each attempt.

`<folder>/0002-rank-00000-000001.jsonl` is attempt 2, writer "rank-00000", segment 1.
"""

from __future__ import annotations

import json
import math
import re
from collections import deque
from collections.abc import Mapping
from typing import Any

from data_pipelines.storage import Store

Cursor = dict[str, list[int]]  # writer's prefix -> [number of the segment read last, bytes read of it]

_SEGMENT_NAME = re.compile(r"(?P<prefix>\d{4,}-.+)-(?P<number>\d{6,})\.jsonl")
_OBJECT_BYTES = 1 << 20
_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class RowWriter:
    """Appends rows to one writer's segments. `append` only keeps the row; `flush` encodes and writes.

    Rows that could not be written stay kept for the next flush, so one failed flush loses nothing.

    few_objects: on an object store, write the newest segment again with more in it: few objects for many writers.
    """

    def __init__(self, store: Store, folder: str, attempt: int, writer: str, *, few_objects: bool = False) -> None:
        self._rows: deque[dict[str, Any]] = deque()
        prefix = f"{folder}/{attempt:04d}-{writer}"
        grows = few_objects and not store.is_local
        self._segments = GrowingObjects(store, prefix) if grows else store.appender(prefix)

    def append(self, row: dict[str, Any]) -> None:
        """Keep a row for the next flush; the caller gives it away."""
        self._rows.append(row)

    def flush(self) -> None:
        """Write what was appended until now. Raises ShardyardError; what was not written stays kept."""
        lines = [encode_row(self._rows.popleft()) for _ in range(len(self._rows))]
        if lines:
            self._segments.write("".join(lines).encode())
        self._segments.flush()

    def close(self) -> None:
        """Flush and close the file. Raises ShardyardError."""
        self.flush()
        self._segments.close()


class GrowingObjects:
    """SegmentWriter's segments, of which the last is an object that every flush replaces with a longer one.

    Of one thread.
    """

    def __init__(self, store: Store, prefix: str) -> None:
        self._store = store
        self._prefix = prefix
        self._number: int | None = None
        self._written = b""
        self._pending = b""

    def write(self, data: bytes) -> None:
        """Keep whole lines for the next flush."""
        self._pending += data

    def flush(self) -> None:
        """Write what is kept. Raises ShardyardError; then it stays kept."""
        if not self._pending:
            return
        if self._number is None:
            self._number = len(self._store.segments(self._prefix)) + 1
        data = self._written + self._pending
        self._store.write_atomic(f"{self._prefix}-{self._number:06d}.jsonl", data)
        self._written, self._pending = data, b""
        if len(data) >= _OBJECT_BYTES:
            self._number, self._written = self._number + 1, b""

    def close(self) -> None:
        """Flush. Raises ShardyardError."""
        self.flush()


def read_rows(
    store: Store, folder: str, cursor: Cursor | None = None, *, limit: int | None = None
) -> tuple[list[dict[str, Any]], Cursor]:
    """Whole rows written to a folder since `cursor` (None: since the beginning), and the cursor to go on from.

    In the order of writing within a writer's attempt. A torn last line is left for later, and for ever if its writer
    was killed; a line that is no JSON is skipped.

    limit: bytes to read at most, more only to come to the end of a row; what is left is for the next call.
    """
    lines, reached = read_lines(store, folder, cursor, limit=limit)
    return decode_rows(lines), reached


def read_lines(
    store: Store, folder: str, cursor: Cursor | None = None, *, limit: int | None = None
) -> tuple[bytes, Cursor]:
    """The lines of `read_rows`, as they were written."""
    reached: Cursor = {prefix: list(position) for prefix, position in (cursor or {}).items()}
    found: list[bytes] = []
    left = limit
    for name in store.list(folder):
        match = _SEGMENT_NAME.fullmatch(name)
        if match is None:
            continue
        prefix, number = match["prefix"], int(match["number"])
        last_number, offset = reached.get(prefix, [0, 0])
        if number < last_number:
            continue
        if number > last_number:
            offset = 0
        with store.open_input(f"{folder}/{name}") as file:
            file.seek(offset)
            data = file.read() if left is None else file.read(left)  # Arrow files know no -1
            cut = len(data) == left
            while left is not None and b"\n" not in data and (more := file.read(left)):
                data += more
        whole = data[: data.rfind(b"\n") + 1]
        found.append(whole)
        reached[prefix] = [number, offset + len(whole)]
        if cut:
            break
        left = None if left is None else left - len(data)
    return b"".join(found), reached


def decode_rows(lines: bytes) -> list[dict[str, Any]]:
    """The rows of whole lines; a line that is no JSON object is skipped."""
    return [row for line in lines.splitlines() if (row := _decode_row(line)) is not None]


def encode_row(row: Mapping[str, Any]) -> str:
    """One JSON line. Numbers that JSON lacks become the strings "NaN", "Infinity", "-Infinity"."""
    try:
        return json.dumps(row, allow_nan=False, separators=(",", ":"), default=_plain) + "\n"
    except ValueError:
        return json.dumps(_finite(row), separators=(",", ":"), default=_plain) + "\n"


def decode_value(value: float | str) -> float:
    """A metric's value as it was before `encode_row`."""
    return _NOT_FINITE[value] if isinstance(value, str) else float(value)


def _decode_row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def _plain(value: Any) -> Any:
    # NumPy's scalars know how to become Python's; anything else is worth recording as its text.
    return value.item() if hasattr(value, "item") else str(value)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value
