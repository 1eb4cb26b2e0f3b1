"""Rows with equal keys, found in bounded memory whatever their number: keys are spread over files, and sorted there.

A key is a hash of one or more words of 64 bits. By its upper bits it goes into one of so many files that each can be
sorted at once. Only where very many rows have one key a file is longer: it is sorted in pieces, and of each key no more
than its first and its last row are carried from piece to piece.

Shape legend: n rows of a piece, W words of a key, P rows found.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

MEMORY_BYTES = 64 << 20  # that the search for duplicates takes, about


def rows_at_once(bytes_a_row: int = 256) -> int:
    """Rows in memory at once; the default is for keys that are sorted: their records, a copy of them, the order."""
    return max(1, MEMORY_BYTES // bytes_a_row)


def repeats(
    keys: Iterable[np.ndarray], num_rows: int, scratch: Path
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(first row with that key, last one before it, row) of each row whose key came before; (P,) int64 each, in pieces.

    keys: (n, W) uint64, those of all rows in order, in pieces of at most rows_at_once(). scratch: a folder for files of
    8 * (W + 1) bytes a row in all, which are gone at the end.
    """
    paths, width = _spread(keys, num_rows, scratch)
    for path in paths:
        yield from _repeats_in(path, width)
        path.unlink()


def _spread(keys: Iterable[np.ndarray], num_rows: int, scratch: Path) -> tuple[list[Path], int]:
    """(files of records (key, row), in which the rows of a key are in one file and in order; W + 1 words of each)."""
    count = 1 + 2 * num_rows // rows_at_once()  # twice as many as needed: hardly a file is longer than expected
    paths = [scratch / f"keys-{number:06d}" for number in range(count)]
    start = width = 0
    for part in keys:
        rows = np.arange(start, start + len(part), dtype=np.uint64)
        records = np.column_stack([part, rows])
        file = (part[:, 0] >> np.uint64(32)) * np.uint64(count) >> np.uint64(32)  # 0 to count - 1, (n,)
        order = np.argsort(file, kind="stable")
        places = np.searchsorted(file[order], np.arange(count + 1, dtype=np.uint64)).tolist()
        for number in np.unique(file).tolist():
            with paths[number].open("ab") as output:
                output.write(records[order[places[number] : places[number + 1]]].tobytes())
        start, width = start + len(part), records.shape[1]
    return [path for path in paths if path.exists()], width


def _repeats_in(path: Path, width: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """What `repeats` gives, of one file of records of so many words."""
    kept = np.empty((0, width), np.uint64)
    with path.open("rb") as file:
        while len(more := np.fromfile(file, np.uint64, rows_at_once() * width)):
            records = np.concatenate([kept, more.reshape(-1, width)])
            order = np.lexsort(records[:, :-1].T)  # stable: the rows of a key stay in order, what was kept comes first
            records = records[order]
            new = np.ones(len(records), bool)
            new[1:] = (records[1:, :-1] != records[:-1, :-1]).any(axis=1)
            begins = np.maximum.accumulate(np.where(new, np.arange(len(records)), 0))
            found = np.flatnonzero(~new & (order >= len(kept)))
            rows = records[:, -1].astype(np.int64)
            yield rows[begins[found]], rows[found - 1], rows[found]
            kept = records[new | np.append(new[1:], True)]
