"""Rows that are the same, or nearly, over a whole source: signatures on disk, compared one band at a time.

Each partition's task writes its signatures to a file: 16 bytes of content hash a row, and where near-duplicates are
looked for 512 bytes of MinHash (near_duplicates.py). `find_groups` then reads them in order and writes, for each
partition, the group of each row and whether it is the first of it. It keeps about 30 bytes a row in memory (a billion
rows are 30 GB), whatever their length: the MinHashes stay on disk, where the values of one band after the other are
sorted to find candidates, which are then compared in full.

Shape legend: n rows of a partition, N of all, H = NUM_HASHES, P pairs.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import xxhash

from data_pipelines.mixing import mix
from data_pipelines.near_duplicates import MIN_SIMILARITY, NUM_HASHES, ROWS_PER_BAND, signature
from data_pipelines.storage import OutputFile, Store

NUM_BANDS = NUM_HASHES // ROWS_PER_BAND
_CHUNK_ROWS = 1 << 14  # rows whose MinHashes are in memory at once
_CHUNK_PLACES = 1 << 20  # places of a sorted band looked at at once


def content_hash(values: Mapping[str, Any]) -> int:
    """128 bits over a row's values, by column: equal for equal rows."""
    state = xxhash.xxh3_128()
    for name in sorted(values):
        value = values[name]
        if isinstance(value, str):
            raw, kind = value.encode("utf-8"), "utf8"
        elif isinstance(value, bytes | bytearray | memoryview):
            raw, kind = bytes(value), "binary"
        else:
            array = np.ascontiguousarray(value)
            raw, kind = array.tobytes(), f"{array.dtype.str}{array.shape}"
        state.update(f"{name}:{kind}:{len(raw)}:".encode())
        state.update(raw)
    return state.intdigest()


def group_number(content: int) -> int:
    """The 64 bits of a content hash that stand for its group (split.py)."""
    return content & (1 << 64) - 1


class SignatureWriter:
    """Writes one partition's signatures as its rows come; use it in `with`. near: the MinHashes too."""

    def __init__(self, store: Store, path: str, near: bool) -> None:
        self.rows = 0
        self._content: OutputFile = store.open_output(f"{path}.content")
        self._minhash: OutputFile | None = store.open_output(f"{path}.minhash") if near else None

    def __enter__(self) -> SignatureWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        for file in (self._content, self._minhash):
            if file is not None:
                file.__exit__(kind, error, None)

    def add(self, content: int, text: str) -> None:
        """One row: its content hash; its text where near-duplicates are looked for."""
        self._content.write(content.to_bytes(16, "little"))
        if self._minhash is not None:
            self._minhash.write(signature(text.encode("utf-8")).tobytes())
        self.rows += 1


@dataclass(frozen=True)
class Groups:
    """What a partition's task has to know of its rows. group (n,) uint64; first (n,) bool: the first of its group."""

    group: np.ndarray
    first: np.ndarray

    def to_bytes(self) -> bytes:
        """For a file: all groups, then a byte a row."""
        return self.group.astype("<u8").tobytes() + self.first.astype(np.uint8).tobytes()

    @classmethod
    def from_bytes(cls, raw: bytes) -> Groups:
        """What to_bytes() gave."""
        count = len(raw) // 9
        return cls(np.frombuffer(raw, "<u8", count), np.frombuffer(raw, np.uint8, offset=8 * count).astype(bool))


def find_groups(folder: Path, names: Sequence[str], near: bool, scratch: Path) -> Iterator[Groups]:
    """The groups of each partition's rows, in order. The first row of a group in that order names it by its content.

    folder: where the signature files lie, under these names. scratch: a folder for a file of 256 bytes a row.
    """
    starts = np.zeros(len(names) + 1, np.int64)
    np.cumsum([(folder / f"{name}.content").stat().st_size // 16 for name in names], out=starts[1:])
    if near:
        first = _near_leaders(folder, names, starts, scratch)
    else:
        first = _equal_leaders(_contents(folder, names, starts))
    low = np.empty(int(starts[-1]), np.uint64)
    for start, part in _each_content(folder, names, starts):
        low[start : start + len(part)] = part[:, 0]
    for start, stop in pairwise(starts.tolist()):
        leaders = first[start:stop]
        yield Groups(low[leaders], leaders == np.arange(start, stop))


# --- equal rows


def _each_content(folder: Path, names: Sequence[str], starts: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    for name, start in zip(names, starts[:-1], strict=True):
        yield int(start), np.fromfile(folder / f"{name}.content", "<u8").reshape(-1, 2)


def _contents(folder: Path, names: Sequence[str], starts: np.ndarray) -> np.ndarray:
    """(2, N) uint64: low and high halves of the content hashes."""
    halves = np.empty((2, int(starts[-1])), np.uint64)
    for start, part in _each_content(folder, names, starts):
        halves[:, start : start + len(part)] = part.T
    return halves


def _equal_leaders(halves: np.ndarray) -> np.ndarray:
    """For each row the number of the first row with the same content, (2, N) uint64 -> (N,)."""
    order = np.lexsort(halves)  # stable: equal rows stand in their own order
    leaders = _new_leaders(len(order))
    leader = 0
    for start in range(0, len(order), _CHUNK_PLACES):
        places = np.arange(start, min(start + _CHUNK_PLACES, len(order)))
        rows, before = order[places], order[np.maximum(places - 1, 0)]
        new = (halves[:, rows] != halves[:, before]).any(axis=0)
        new[places == 0] = True
        begin = np.maximum.accumulate(np.where(new, places, leader))
        leaders[rows] = order[begin]
        leader = int(begin[-1])
    return leaders


def _new_leaders(count: int) -> np.ndarray:
    """Every row by itself."""
    return np.arange(count, dtype=np.uint32 if count < 1 << 32 else np.int64)


# --- nearly equal rows


def _near_leaders(folder: Path, names: Sequence[str], starts: np.ndarray, scratch: Path) -> np.ndarray:
    """For each row the number of the first of its group, (N,). Groups are closed under chains."""
    minhashes = MinHashes(folder, names, starts)
    leaders = _new_leaders(int(starts[-1]))
    bands = scratch / "bands"
    try:
        _write_bands(minhashes, bands)
        for band in range(NUM_BANDS):
            hashes = np.fromfile(bands, "<u8", len(leaders), offset=band * len(leaders) * 8)
            for one, other in _candidates(hashes):
                apart = _roots(leaders, one) != _roots(leaders, other)
                one, other = one[apart], other[apart]
                alike = minhashes.similar(one, other)
                _join(leaders, one[alike], other[alike])
    finally:
        bands.unlink(missing_ok=True)
    return _roots(leaders, np.arange(len(leaders)))


class MinHashes:
    """The MinHashes of all rows, on disk."""

    def __init__(self, folder: Path, names: Sequence[str], starts: np.ndarray) -> None:
        self._paths = [folder / f"{name}.minhash" for name in names]
        self._starts = starts
        self.num_rows = int(starts[-1])

    def chunks(self) -> Iterator[tuple[int, np.ndarray]]:
        """(number of the first row, (rows, H) uint32), in order."""
        for path, first, last in zip(self._paths, self._starts[:-1], self._starts[1:], strict=True):
            with path.open("rb") as file:
                for start in range(int(first), int(last), _CHUNK_ROWS):
                    rows = min(_CHUNK_ROWS, int(last) - start)
                    yield start, np.fromfile(file, "<u4", rows * NUM_HASHES).reshape(rows, NUM_HASHES)

    def similar(self, one: np.ndarray, other: np.ndarray) -> np.ndarray:
        """Whether the rows of each pair are near-duplicates, (P,) and (P,) -> (P,) bool."""
        found = np.zeros(len(one), bool)
        for start in range(0, len(one), _CHUNK_ROWS):
            cut = slice(start, start + _CHUNK_ROWS)
            agreeing = (self._read(one[cut]) == self._read(other[cut])).mean(axis=1)
            found[cut] = agreeing >= MIN_SIMILARITY
        return found

    def _read(self, rows: np.ndarray) -> np.ndarray:
        """(P,) -> (P, H) uint32."""
        values = np.empty((len(rows), NUM_HASHES), np.uint32)
        partitions = np.searchsorted(self._starts, rows, "right") - 1
        for partition in np.unique(partitions):
            wanted = np.flatnonzero(partitions == partition)
            file = np.memmap(self._paths[partition], "<u4", "r").reshape(-1, NUM_HASHES)
            values[wanted] = file[rows[wanted] - self._starts[partition]]
        return values


def _write_bands(minhashes: MinHashes, path: Path) -> None:
    """A file with a hash of each row's values in band 0, then of band 1, and so on: (NUM_BANDS, N) uint64."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        for start, values in minhashes.chunks():
            halves = np.ascontiguousarray(values).view("<u8").reshape(len(values), NUM_BANDS, ROWS_PER_BAND // 2)
            hashes = np.zeros((len(values), NUM_BANDS), np.uint64)
            for half in range(halves.shape[2]):
                hashes = mix(hashes * np.uint64(3) + halves[:, :, half])
            for band in range(NUM_BANDS):
                raw = memoryview(hashes[:, band].tobytes())
                place = (band * minhashes.num_rows + start) * 8
                while raw:
                    written = os.pwrite(descriptor, raw, place)
                    raw, place = raw[written:], place + written
    finally:
        os.close(descriptor)


def _candidates(hashes: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs of rows with the same hash: each with the first of them, and with the one before it."""
    order = np.argsort(hashes, kind="stable")
    begin = 0
    for start in range(0, len(order), _CHUNK_PLACES):
        places = np.arange(start, min(start + _CHUNK_PLACES, len(order)))
        rows, before = order[places], order[np.maximum(places - 1, 0)]
        same = hashes[rows] == hashes[before]
        same[places == 0] = False
        begins = np.maximum.accumulate(np.where(same, begin, places))
        begin = int(begins[-1])
        yield order[begins[same]], rows[same]
        third = same & (begins < places - 1)
        yield before[third], rows[third]


def _roots(leaders: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The first row of each row's group, (P,) -> (P,)."""
    found = leaders[rows]
    while (further := leaders[found] != found).any():
        found[further] = leaders[found[further]]
    return found


def _join(leaders: np.ndarray, one: np.ndarray, other: np.ndarray) -> None:
    """Make one group of the groups of each pair, in place: the later leader gets the earlier one for its own."""
    while len(one):
        one, other = _roots(leaders, one), _roots(leaders, other)
        apart = one != other
        one, other = one[apart], other[apart]
        np.minimum.at(leaders, np.maximum(one, other), np.minimum(one, other))
