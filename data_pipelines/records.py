"""Records of a file (lines, or what stands between separators), also of a byte range of it, read in bounded memory.

Ranges that follow one another give each record exactly once: a range begins behind the first delimiter at or after its
start (the first one at the beginning of the file) and ends where the next one begins. Every reader finds these places
by itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import BinaryIO, NamedTuple

from data_pipelines.input_files import open_decompressed, open_input, without_query
from data_pipelines.sources import Bad, Partition, excerpt

MAX_RECORD_BYTES = 64 << 20
_CHUNK_BYTES = 4 << 20
_SHOWN_BYTES = 256


class Record(NamedTuple):
    """One record, without its delimiter. raw is its beginning only, where it is longer than MAX_RECORD_BYTES."""

    offset: int  # of its first byte in the file (as decompressed)
    number: int  # among those of this range, from 0
    raw: bytes
    is_whole: bool


class Records:
    """The records of bytes start..stop of a file; of all of it where these are None, as of every compressed file.

    path: where it is; name: its key. A file that ends with a delimiter has no empty record behind it.
    """

    def __init__(
        self, path: str, name: str, start: int | None = None, stop: int | None = None, delimiter: bytes = b"\n"
    ) -> None:
        self.path = path
        self.name = name
        self._start, self._stop = start, stop
        self._delimiter = delimiter

    def __iter__(self) -> Iterator[Record]:
        if self._start is None:
            with open_decompressed(self.path) as file:
                yield from _split(file, 0, None, self._delimiter)
            return
        with open_input(self.path) as file:
            first, end = _edge(file, self._start, self._delimiter), _edge(file, self._stop, self._delimiter)
            if first is not None and (end is None or first < end):
                file.seek(first)
                yield from _split(file, first, end, self._delimiter)

    @property
    def begins_file(self) -> bool:
        """Whether the first record is that of the file."""
        return not self._start

    def key(self, record: Record) -> str:
        """name:number, from 1, where the file is read as a whole; name@offset where it is read in ranges."""
        return f"{self.name}:{record.number + 1}" if self._start is None else f"{self.name}@{record.offset}"

    def bad(self, record: Record, reason: str) -> Bad:
        """A record that cannot be used, with its number in the file; of a range of a remote file, with its offset."""
        path = without_query(self.path)
        if self._before is None:
            return Bad(path, None, f"at byte {record.offset}: {reason}", excerpt(record.raw))
        return Bad(path, self._before + record.number + 1, reason, excerpt(record.raw))

    def too_long(self, record: Record) -> Bad:
        """The Bad of a record that is not whole."""
        return self.bad(record, f"longer than {MAX_RECORD_BYTES >> 20} MB, which is no row")

    @cached_property
    def _before(self) -> int | None:
        """How many records the file has before this range: counted, so only asked for what is rare."""
        if self.begins_file:
            return 0
        if "://" in self.path:
            return None  # all that is before would have to be transferred
        with open_input(self.path) as file:
            first = _edge(file, self._start, self._delimiter)
            file.seek(0)
            return sum(1 for _ in _split(file, 0, first, self._delimiter))


def records_of(partition: Partition, delimiter: bytes = b"\n") -> Iterator[Records]:
    """The records of each file of a partition that partition_files has made."""
    for path, key in zip(partition.files, partition.keys, strict=True):
        yield Records(path, key, partition.start, partition.stop, delimiter)


def _edge(file: BinaryIO, position: int | None, delimiter: bytes) -> int | None:
    """Where the record behind the first delimiter at or after a position begins; None where there is none."""
    if not position:
        return position
    file.seek(position)
    tail, size = b"", 1 << 16
    while chunk := file.read(size):
        window = tail + chunk
        found = window.find(delimiter)
        if found >= 0:
            return position - len(tail) + found + len(delimiter)
        position, size = position + len(chunk), _CHUNK_BYTES
        tail = window[len(window) - len(delimiter) + 1 :]
    return None


def _split(file: BinaryIO, offset: int, stop: int | None, delimiter: bytes) -> Iterator[Record]:
    """Records from `offset`, where the file stands, to `stop`."""
    number, position = 0, offset
    rest = beginning = b""  # the record that is not complete yet; its first bytes, once some of it was let go
    skipped = 0  # bytes of it that were let go

    def record(raw: bytes) -> Record:
        return Record(offset, number, beginning or raw, len(raw) + skipped <= MAX_RECORD_BYTES)

    while chunk := file.read(_CHUNK_BYTES if stop is None else min(_CHUNK_BYTES, stop - position)):
        position += len(chunk)
        *complete, rest = (rest + chunk).split(delimiter)
        for raw in complete:
            yield record(raw)
            offset, number = offset + len(raw) + skipped + len(delimiter), number + 1
            skipped, beginning = 0, b""
        if len(rest) > MAX_RECORD_BYTES:
            beginning = beginning or rest[:_SHOWN_BYTES]
            kept = rest[len(rest) - len(delimiter) + 1 :]
            skipped, rest = skipped + len(rest) - len(kept), kept
    if rest or skipped:
        yield record(rest)
