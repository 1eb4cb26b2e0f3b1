"""Rows that are the same, or nearly, over a whole source: signatures on disk, compared one band at a time.

Each partition's task writes its signatures to a file: 16 bytes of content hash a row, and where near-duplicates are
looked for 512 bytes of MinHash (near_duplicates.py). `find_groups` then reads them in order and gives, for each
partition, the group of each row and whether it is the first of it. Near-duplicates are candidates when the values of a
band agree, and are then compared in full.

A group's number is the lowest of its rows' content hashes. So when data is added it can only fall, also where groups
become one, and what is held out (split.py) stays so.

Memory is bounded (repeats.py), whatever the number of rows: what is known of each lies in files of a scratch folder,
28 bytes a row, or 276 where near-duplicates are looked for. 12 of these are mapped: pages that the kernel takes back
when memory is short.

Shape legend: n rows of a piece, N of all, H = NUM_HASHES, P pairs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import xxhash

from data_pipelines.mixing import mix
from data_pipelines.near_duplicates import MIN_SIMILARITY, NUM_HASHES, ROWS_PER_BAND, signature
from data_pipelines.repeats import repeats, rows_at_once
from data_pipelines.storage import OutputFile, Store

NUM_BANDS = NUM_HASHES // ROWS_PER_BAND
GROUP = np.dtype([("group", "<u8"), ("first", "?")])  # of a row: its group, and whether it is the first of it
_READ_ROWS = 1 << 16
_MINHASH_BYTES = 4096  # of memory a row, where MinHashes are read: they, others, the hashes of their bands


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


def read_groups(store: Store, path: str) -> Iterator[tuple[int, bool]]:
    """(group, whether it is the first of it) of each row of a partition, from a file of GROUP records."""
    with store.explained("read", path), store.open_input(path) as file:
        while raw := file.read(_READ_ROWS * GROUP.itemsize):
            yield from np.frombuffer(raw, GROUP).tolist()


def find_groups(folder: Path, names: Sequence[str], near: bool, scratch: Path) -> Iterator[tuple[str, np.ndarray]]:
    """(partition, (n,) GROUP of its next rows), in order; at least one piece of each partition.

    folder: where the signature files lie, under these names. scratch: an empty folder, left to the caller with files.
    """
    signatures = Signatures(folder, names)
    leaders = _file_array(scratch / "leaders", _own_numbers(signatures.num_rows))  # of each row one of its group
    if near:
        _join_near(signatures, leaders, scratch)
    else:
        for first, _, rows in repeats(signatures.contents(), signatures.num_rows, scratch):
            leaders[rows] = first
    lowest = _file_array(scratch / "lowest", (part[:, 0] for part in signatures.contents()))
    for start, stop in _ranges(0, signatures.num_rows, rows_at_once()):
        rows = np.arange(start, stop)
        leaders[start:stop] = roots = _roots(leaders, rows)
        np.minimum.at(lowest, roots, np.array(lowest[start:stop]))
    for name, partition in zip(names, pairwise(signatures.starts.tolist()), strict=True):
        for start, stop in _ranges(*partition, rows_at_once()) or [partition]:
            groups = np.empty(stop - start, GROUP)
            groups["group"] = lowest[leaders[start:stop]]
            groups["first"] = leaders[start:stop] == np.arange(start, stop)
            yield name, groups


def _own_numbers(count: int) -> Iterator[np.ndarray]:
    """The numbers of all rows, in pieces: each row leads itself."""
    for start, stop in _ranges(0, count, rows_at_once()):
        yield np.arange(start, stop, dtype=np.uint32 if count < 1 << 32 else np.int64)


def _file_array(path: Path, pieces: Iterable[np.ndarray]) -> np.ndarray:
    """An array in a file. It is written before it is mapped, so that a full disk is an error and no signal."""
    dtype = np.dtype(np.uint8)
    with path.open("wb") as file:
        for piece in pieces:
            dtype = piece.dtype
            file.write(piece.tobytes())
    return np.memmap(path, dtype, "r+") if path.stat().st_size else np.empty(0, dtype)


def _ranges(start: int, stop: int, size: int) -> list[tuple[int, int]]:
    """A range in pieces of that size; none of an empty one."""
    return [(begin, min(begin + size, stop)) for begin in range(start, stop, size)]


# --- what lies on disk


class Signatures:
    """The signatures of all rows. starts: number of each partition's first row, and of all rows."""

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self._contents = [folder / f"{name}.content" for name in names]
        self._minhashes = [folder / f"{name}.minhash" for name in names]
        self.starts = np.zeros(len(names) + 1, np.int64)
        np.cumsum([path.stat().st_size // 16 for path in self._contents], out=self.starts[1:])
        self.num_rows = int(self.starts[-1])

    def contents(self) -> Iterator[np.ndarray]:
        """The content hashes of all rows, (n, 2) uint64: low and high halves."""
        for path in self._contents:
            for part in _read(path, "<u8", 2 * rows_at_once()):
                yield part.reshape(-1, 2)

    def minhashes(self) -> Iterator[np.ndarray]:
        """The MinHashes of all rows, (n, H) uint32."""
        for path in self._minhashes:
            for part in _read(path, "<u4", NUM_HASHES * rows_at_once(_MINHASH_BYTES)):
                yield part.reshape(-1, NUM_HASHES)

    def similar(self, one: np.ndarray, other: np.ndarray) -> np.ndarray:
        """Whether the rows of each pair are near-duplicates, (P,) and (P,) -> (P,) bool."""
        found = np.zeros(len(one), bool)
        for start, stop in _ranges(0, len(one), rows_at_once(_MINHASH_BYTES)):
            agreeing = (self._minhashes_of(one[start:stop]) == self._minhashes_of(other[start:stop])).mean(axis=1)
            found[start:stop] = agreeing >= MIN_SIMILARITY
        return found

    def _minhashes_of(self, rows: np.ndarray) -> np.ndarray:
        """(P,) -> (P, H) uint32."""
        values = np.empty((len(rows), NUM_HASHES), np.uint32)
        partitions = np.searchsorted(self.starts, rows, "right") - 1
        for partition in np.unique(partitions):
            wanted = np.flatnonzero(partitions == partition)
            file = np.memmap(self._minhashes[partition], "<u4", "r").reshape(-1, NUM_HASHES)
            values[wanted] = file[rows[wanted] - self.starts[partition]]
        return values


def _read(path: Path, dtype: str, count: int) -> Iterator[np.ndarray]:
    """The items of a file, so many at a time."""
    with path.open("rb") as file:
        while len(part := np.fromfile(file, dtype, count)):
            yield part


# --- nearly equal rows


def _join_near(signatures: Signatures, leaders: np.ndarray, scratch: Path) -> None:
    """Make near-duplicates one group, in place. Groups are closed under chains."""
    _write_bands(signatures, scratch)
    for band in range(NUM_BANDS):
        path = scratch / f"band-{band}"
        hashes = (part.reshape(-1, 1) for part in _read(path, "<u8", rows_at_once()))
        for first, before, rows in repeats(hashes, signatures.num_rows, scratch):
            for earlier in (first, before):
                apart = _roots(leaders, earlier) != _roots(leaders, rows)
                one, other = earlier[apart], rows[apart]
                alike = signatures.similar(one, other)
                _join(leaders, one[alike], other[alike])
        path.unlink()


def _write_bands(signatures: Signatures, scratch: Path) -> None:
    """A file for each band, of a hash of each row's values in it: (N,) uint64."""
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context((scratch / f"band-{band}").open("wb")) for band in range(NUM_BANDS)]
        for values in signatures.minhashes():
            halves = values.view("<u8").reshape(len(values), NUM_BANDS, ROWS_PER_BAND // 2)
            hashes = np.zeros((len(values), NUM_BANDS), np.uint64)
            for half in range(halves.shape[2]):
                hashes = mix(hashes * np.uint64(3) + halves[:, :, half])
            for file, band in zip(files, hashes.T, strict=True):
                file.write(band.tobytes())


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
