"""Arrow IPC files and streams to read rows from: mapped where they are local, so that only what is used is read."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from data_pipelines.arrow_rows import damage_named, partition_pieces
from data_pipelines.input_files import local, open_input
from data_pipelines.sources import InputFile, Partition, partition_bytes, partition_files

if TYPE_CHECKING:
    import pyarrow as pa

_MAGIC = b"ARROW1"


class ArrowFile:
    """An open file or stream of record batches."""

    def __init__(self, reader: pa.ipc.RecordBatchFileReader | pa.ipc.RecordBatchStreamReader, is_file: bool) -> None:
        self._reader = reader
        self._is_file = is_file

    @property
    def schema(self) -> pa.Schema:
        """Of the batches."""
        return self._reader.schema

    def batches(self, start: int | None = None, stop: int | None = None) -> Iterator[tuple[int, pa.RecordBatch]]:
        """(number of its first row in the file, batch) of batches start..stop."""
        first = 0
        for number, batch in enumerate(self._all(stop)):
            if number >= (start or 0):
                yield first, batch
            first += batch.num_rows

    def _all(self, stop: int | None) -> Iterator[pa.RecordBatch]:
        if self._is_file:
            count = self._reader.num_record_batches
            yield from map(self._reader.get_batch, range(count if stop is None else stop))
            return
        number = 0
        while stop is None or number < stop:
            try:
                yield self._reader.read_next_batch()
            except StopIteration:
                return
            number += 1


@contextlib.contextmanager
def open_arrow(path: str) -> Iterator[ArrowFile]:
    """An Arrow file, or stream, at a path or URI. Raises NotFound, Damaged, and what else reading a file raises."""
    import pyarrow as pa

    with open_input(path) as raw, damage_named(path, "an Arrow file"):
        is_file = raw.read(len(_MAGIC)) == _MAGIC
        raw.seek(0)
        is_local = "://" not in path or path.startswith("file://")
        source = pa.memory_map(str(local(path))) if is_local else pa.PythonFile(raw, mode="r")
        with source, pa.ipc.open_file(source) if is_file else pa.ipc.open_stream(source) as reader:
            yield ArrowFile(reader, is_file)


def partition_arrow_files(files: list[InputFile]) -> list[Partition]:
    """Small files together; large local ones by record batches, about partition_bytes of them."""
    target_bytes = partition_bytes(files)
    partitions: list[Partition] = []
    together: list[InputFile] = []
    for file in files:
        cut = _by_batches(file, target_bytes)
        if cut:
            partitions += [*partition_files(together, cut=False, target_bytes=target_bytes), *cut]
            together = []
        else:
            together.append(file)
    return partitions + partition_files(together, cut=False, target_bytes=target_bytes)


def _by_batches(file: InputFile, target_bytes: int) -> list[Partition]:
    """Partitions of a large file; none of one that is small, or remote, since to count its batches is to read it."""
    if 2 * file.size <= 3 * target_bytes or "://" in file.path:
        return []
    with open_arrow(file.path) as opened:
        sizes = [batch.num_rows for _, batch in opened.batches()]
    count = min(len(sizes), -(-file.size // target_bytes))
    return partition_pieces(file, sizes, count, "batches") if count > 1 else []
