"""lengths.bin: how long each row is, known without a look at its block.

What is planned by length (buckets.py) must come out the same on every rank and at every resume, also where a block is
damaged or far away. So a build stores the lengths of all rows of every column that has any (Column.has_length): int32,
for each block, in the order of the index, those of one column after those of the other. docs/data.md describes it.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import xxhash

from data_pipelines.blocks import Blocks
from data_pipelines.columns import Column
from data_pipelines.damage import first_rows
from data_pipelines.ownership import owners
from data_pipelines.storage import Store

LENGTHS_FILE = "lengths.bin"
ITEM_BYTES = 4
_COPY_BYTES = 8 << 20


def length_columns(columns: Sequence[Column]) -> list[str]:
    """The columns whose lengths are stored, in the order of the file."""
    return [column.name for column in columns if column.has_length]


def file_bytes(rows: int, columns: Sequence[Column]) -> int:
    """Length of the file of so many rows."""
    return ITEM_BYTES * rows * len(length_columns(columns))


def block_lengths(values: Sequence[Sequence[Any]], columns: Sequence[Column]) -> dict[str, np.ndarray]:
    """(rows,) int32 of each column that has lengths; values: those of a block as they are stored, for each column."""
    return {
        column.name: np.array([len(value) if column.is_ragged else value.item() for value in rows], "<i4")
        for rows, column in zip(values, columns, strict=True)
        if column.has_length
    }


def join(store: Store, parts: Iterable[str]) -> str:
    """Write the file out of those of its parts, one after the other; its XXH3 (128 bits) in hex."""
    with store.open_output(LENGTHS_FILE) as file:
        out = _Digesting(file)
        for part in parts:
            with store.open_input(part) as opened, store.explained("read", part):
                shutil.copyfileobj(opened, out, _COPY_BYTES)
    return out.digest.hexdigest()


class _Digesting:
    """Passes on what is written, and takes its digest."""

    def __init__(self, file: Any) -> None:
        self.digest = xxhash.xxh3_128()
        self._file = file

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        return int(self._file.write(data))


class Lengths:
    """Lengths of a column's values by row of a split. Safe to use from several threads."""

    def __init__(self, raw: memoryview, blocks: Blocks, cut: slice, columns: Sequence[Column], column: str) -> None:
        """raw: the file; blocks: all of the data set, of which `cut` are the split's."""
        names = length_columns(columns)
        rows = blocks.rows
        self._values = np.frombuffer(raw, "<i4")
        self._ends = np.cumsum(rows[cut])
        self._first_rows = first_rows(rows[cut])
        places = len(names) * first_rows(rows) + names.index(column) * rows  # where each block's lengths begin
        self._places = places[cut]

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __call__(self, ids: np.ndarray) -> np.ndarray:
        """(n,) int64 rows -> (n,) int32 lengths."""
        blocks = owners(self._ends, ids)
        lengths: np.ndarray = self._values[self._places[blocks] + ids - self._first_rows[blocks]]
        return lengths


class MixtureLengths:
    """Those of several splits, numbered one after the other as MixtureExamples are."""

    def __init__(self, parts: Sequence[Lengths]) -> None:
        self._parts = tuple(parts)
        self._ends = np.cumsum([len(part) for part in parts])  # (parts,)

    def __call__(self, ids: np.ndarray) -> np.ndarray:
        """(n,) int64 rows -> (n,) int32 lengths."""
        sources = self._ends.searchsorted(ids, side="right")
        lengths = np.empty(len(ids), np.int32)
        for source in np.unique(sources).tolist():
            here = sources == source
            part = self._parts[source]
            lengths[here] = part(ids[here] - (self._ends[source] - len(part)))
        return lengths
