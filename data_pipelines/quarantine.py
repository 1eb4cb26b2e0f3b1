"""Bad rows: they go to a file with place, reason and excerpt, and too many of them stop a build.

A partition writes its own part while it is built; at the end the parts are joined, in order, as quarantine.jsonl
beside the index: {"file": ..., "line": ..., "reason": ..., "excerpt": ...} a line. Nothing of it is kept in memory
but the first few.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from configs.errors import UsageError
from data_pipelines.sources import Bad
from data_pipelines.storage import OutputFile, Store

QUARANTINE_FILE = "quarantine.jsonl"
SHOWN_ROWS = 3
EXCERPT_CHARACTERS = 200


class TooManyBadRows(UsageError):
    """More of a source's rows are bad than data.max_bad_share allows."""


class BadRows:
    """How many rows are bad, and the first few of them, described for messages."""

    def __init__(self) -> None:
        self.count = 0
        self.first: list[str] = []

    def add(self, bad: Bad) -> None:
        """Count one."""
        if self.count < SHOWN_ROWS:
            self.first.append(describe(asdict(bad)))
        self.count += 1


class Quarantine(BadRows):
    """The bad rows of one partition. The file is made with the first of them; `close()` makes it durable."""

    def __init__(self, store: Store, path: str) -> None:
        super().__init__()
        self._store, self._path = store, path
        self._file: OutputFile | None = None

    def add(self, bad: Bad) -> None:
        """Write one row down."""
        if self._file is None:
            self._file = self._store.open_output(self._path)
        row = asdict(bad) | {"excerpt": bad.excerpt[:EXCERPT_CHARACTERS]}
        self._file.write((json.dumps(row) + "\n").encode())
        super().add(bad)

    def close(self) -> None:
        """Finish the file, if there is one."""
        if self._file is not None:
            self._file.close()
            self._file = None


def describe(row: dict[str, Any]) -> str:
    """A bad row in a line: "rows.jsonl:7: not a JSON value"."""
    place = row["file"] if row["line"] is None else f"{row['file']}:{row['line']}"
    return f"{place}: {row['reason']}"


def check_share(name: str, bad: int, rows: int, max_share: float, first: Iterable[str], progress: float = 1.0) -> None:
    """Stop where the bad rows are more than their share of all rows, good and bad.

    progress: the share of the source that was read so far; the rows to come are estimated from it, so that a build
    stops early only where the whole could not pass.

    Raises:
        TooManyBadRows: names the first few.
    """
    if bad > max_share * rows / max(progress, 1e-9):
        shown = "; ".join(list(first)[:SHOWN_ROWS])
        so_far = "" if progress == 1.0 else " so far"
        raise TooManyBadRows(
            f"{bad:,} of the {rows:,} rows of the source {name} read{so_far} cannot be used, which is more than "
            f"data.max_bad_share={max_share:g} allows. The first: {shown}. Repair or remove them, or raise "
            "data.max_bad_share: they are then left out, and listed in quarantine.jsonl beside the data set."
        )


def join(store: Store, parts: Iterable[str]) -> None:
    """Write quarantine.jsonl from the partitions' files; none where there are no bad rows."""
    paths = [path for path in parts if store.exists(path)]
    if not paths:
        return
    with store.open_output(QUARANTINE_FILE) as output:
        for path in paths:
            with store.open_input(path) as part:
                while piece := part.read(1 << 20):
                    output.write(piece)
