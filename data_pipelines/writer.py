"""Writes one partition of a split: rows in, Arrow files of blocks out. The same rows give the same bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import xxhash

from configs.errors import UsageError
from data_pipelines.blocks import Blocks
from data_pipelines.columns import BINARY, TEXT, Column, arrow_schema, num_buffers
from data_pipelines.lengths import block_lengths
from data_pipelines.storage import OutputFile, Store

BLOCK_BYTES = 2 << 20
SHARD_BYTES = 256 << 20
_MAX_OFFSET = (1 << 31) - 1


class ShardWriter:
    """Use it in `with`; afterwards `blocks` and `files` (bytes by name) say what was written.

    It keeps one block in memory. Its files are "<prefix>-<number:03d>.arrow"; a partition without rows has none. Left
    by an exception, the file it was at is removed.

    packed: (rows of a block,) int64 lengths of its documents, end marks counted -> {seq_len: number of best-fit
    sequences}; called once a block, for data with a column "tokens". lengths: a file for the rows' part of lengths.bin.
    """

    def __init__(
        self,
        store: Store,
        prefix: str,
        columns: Sequence[Column],
        compression: Literal["zstd"] | None = None,
        packed: Callable[[np.ndarray], Mapping[int, int]] | None = None,
        lengths: OutputFile | None = None,
    ) -> None:
        self.files: dict[str, int] = {}
        self._store = store
        self._prefix = prefix
        self._columns = tuple(columns)
        self._compression = compression
        self._packed = packed
        self._lengths = lengths
        self._has_documents = any(column.name == "tokens" and column.is_ragged for column in columns)
        self._schema = arrow_schema(columns)
        self._rows: list[tuple[Any, ...]] = []
        self._pending_bytes = 0
        self._text_bytes = 0
        self._facts: list[dict[str, Any]] = []
        self._number = 0  # of the next block in its file
        self._file: OutputFile | None = None
        self._tee: _Tee | None = None
        self._writer: pa.RecordBatchFileWriter | None = None

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            if kind is None:
                self._write_block()
                self._close_file()
        except BaseException as late:
            self._give_up(late)
            raise
        if error is not None:
            self._give_up(error)

    @property
    def blocks(self) -> Blocks:
        """What was written so far; Blocks.file counts in the order of `files`."""
        return Blocks.of(self._facts, num_buffers(self._columns), self._compression is not None)

    def add(self, values: Mapping[str, Any], text_bytes: int = 0) -> None:
        """Append a row: an array, a number, str or bytes for each column; text_bytes: its text's length as UTF-8.

        Raises UsageError for a value that does not fit its column.
        """
        row = tuple(_stored(values[column.name], column) for column in self._columns)
        size = sum(len(value) if isinstance(value, bytes) else value.nbytes for value in row) + 4 * len(row)
        if self._pending_bytes >= BLOCK_BYTES // 2 and self._pending_bytes + size > 2 * BLOCK_BYTES:
            self._write_block()
        self._rows.append(row)
        self._pending_bytes += size
        self._text_bytes += text_bytes
        if self._pending_bytes >= BLOCK_BYTES:
            self._write_block()

    def _write_block(self) -> None:
        if not self._rows:
            return
        transposed = list(zip(*self._rows, strict=True))
        arrays = [_arrow_array(values, column) for values, column in zip(transposed, self._columns, strict=True)]
        lengths = block_lengths(transposed, self._columns)
        documents = lengths["tokens"].astype(np.int64) if self._has_documents else None
        self._append(pa.RecordBatch.from_arrays(arrays, schema=self._schema), documents)
        if self._lengths is not None:
            self._lengths.write(b"".join(array.tobytes() for array in lengths.values()))
        self._rows = []
        self._pending_bytes = self._text_bytes = 0

    def _append(self, batch: pa.RecordBatch, documents: np.ndarray | None) -> None:
        """documents: lengths of its "tokens", end marks counted."""
        if self._writer is None:
            self._open_file()
        assert self._writer is not None and self._tee is not None
        self._tee.taken.clear()
        self._writer.write_batch(batch)
        message = _message(b"".join(self._tee.taken))
        stop = self._tee.tell()
        content = message if self._compression is None else uncompressed_message(batch)
        body = body_of(content)
        held = content if self._compression is None else body
        self.files[next(reversed(self.files))] = stop
        self._facts.append(
            {
                "file": len(self.files) - 1,
                "number": self._number,
                "start": stop - len(message),
                "stop": stop,
                "rows": batch.num_rows,
                "tokens": 0 if documents is None else int(documents.sum()),
                "text_bytes": self._text_bytes,
                "xxh3": xxhash.xxh3_64_intdigest(message),
                "content_xxh3": xxhash.xxh3_64_intdigest(body),
                "content_bytes": len(held),
                "content_buffers": _buffer_places(content, len(content) - len(held), self._schema, self._columns),
                "packed": dict(self._packed(documents)) if self._packed and documents is not None else {},
            }
        )
        self._number += 1
        if stop >= SHARD_BYTES:
            self._close_file()

    def _open_file(self) -> None:
        name = f"{self._prefix}-{len(self.files):03d}.arrow"
        self.files[name] = self._number = 0
        self._file = self._store.open_output(name)
        self._tee = _Tee(self._file)
        options = pa.ipc.IpcWriteOptions(compression=self._compression, use_threads=False)
        self._writer = pa.ipc.new_file(self._tee, self._schema, options=options)

    def _close_file(self) -> None:
        if self._writer is None or self._file is None:
            return
        self._writer.close()
        self.files[next(reversed(self.files))] = self._file.tell()
        self._file.close()
        self._writer = self._tee = self._file = None

    def _give_up(self, error: BaseException) -> None:
        file, self._writer, self._tee, self._file = self._file, None, None, None
        if file is not None:
            file.__exit__(type(error), error, None)


class _Tee:
    """Passes on what is written, and keeps it until `taken` is cleared."""

    closed = False

    def __init__(self, file: OutputFile) -> None:
        self.taken: list[bytes] = []
        self._file = file

    def write(self, data: Any) -> int:
        piece = bytes(data)
        self.taken.append(piece)
        return self._file.write(piece)

    def tell(self) -> int:
        return self._file.tell()

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass


def _message(written: bytes) -> bytes:
    """The record batch's message in what was written; a file's first comes after "ARROW1", padding and the schema."""
    if not written.startswith(b"ARROW1"):
        return written
    return written[16 + int.from_bytes(written[12:16], "little") :]


def body_of(message: bytes | memoryview) -> memoryview:
    """The body of an encapsulated message: what follows FF FF FF FF, the metadata's length and the metadata."""
    view = memoryview(message)
    return view[8 + int.from_bytes(view[4:8], "little") :]


def uncompressed_message(batch: pa.RecordBatch) -> bytes:
    """The message of a record batch, not compressed."""
    return bytes(batch.serialize())


def decompressed(stored: bytes | memoryview, columns: Sequence[Column]) -> memoryview:
    """The content of a compressed block: the body of its message, written without compression.

    Its XXH3 is the block's content_xxh3, its length content_bytes, and content_buffers counts from its beginning.
    Raises pyarrow errors for bytes that are no such message: check their digest before.
    """
    return body_of(uncompressed_message(pa.ipc.read_record_batch(pa.py_buffer(stored), arrow_schema(columns))))


def _buffer_places(message: bytes, content_start: int, schema: pa.Schema, columns: Sequence[Column]) -> list[int]:
    """Where each data buffer begins, from `content_start` of an uncompressed message; an empty one at its end."""
    raw = pa.py_buffer(message)
    batch = pa.ipc.read_record_batch(raw, schema)
    places = []
    for array, column in zip(batch.columns, columns, strict=True):
        data = [buffer for buffer in array.buffers() if buffer is not None]
        assert len(data) == column.num_buffers, (column, len(data))
        for buffer in data:
            places.append((buffer.address - raw.address if buffer.size else len(message)) - content_start)
    return places


# --- values


def _stored(value: Any, column: Column) -> bytes | np.ndarray:
    """A row's value as its bytes, or as an array of the column's dtype and the shape of its lists' elements."""
    try:
        if column.dtype == TEXT:
            return value.encode("utf-8")  # type: ignore[no-any-return]
        if column.dtype == BINARY:
            return bytes(memoryview(value))
        array = np.asarray(value)
        if array.dtype != column.numpy_dtype:
            array = _cast(array, column)
    except (AttributeError, TypeError, ValueError, OverflowError) as error:
        raise UsageError(f"{_misfit(value, column)} ({error}). Change the source, or its schema.") from error
    expected = column.shape if column.shape else ()
    shape_fits = array.ndim == len(expected) and all(
        want in (None, have) for want, have in zip(expected, array.shape, strict=True)
    )
    if not shape_fits or (column.is_ragged and len(array) > _MAX_OFFSET):
        raise UsageError(f"{_misfit(value, column)}: its shape is {array.shape}. Change the source, or its schema.")
    return np.ascontiguousarray(array)


def _cast(array: np.ndarray, column: Column) -> np.ndarray:
    """The same numbers in the column's dtype; floats may be rounded, nothing else may change."""
    to = column.numpy_dtype
    if array.dtype.kind not in "iufb" or (array.dtype.kind == "f" and to.kind != "f"):
        raise ValueError(f"{array.dtype} is not {to}")
    if to.kind in "iu" and array.size:
        limits = np.iinfo(to)
        if int(array.min()) < limits.min or int(array.max()) > limits.max:
            raise ValueError(f"values from {array.min()} to {array.max()} do not fit {to}")
    return array.astype(to)


def _misfit(value: Any, column: Column) -> str:
    return (
        f"{value!r:.60} does not fit column '{column.name}' of {column.dtype}"
        f"{list(column.shape) if column.shape else ''}"
    )


def _arrow_array(values: Sequence[Any], column: Column) -> pa.Array:
    if column.dtype in (TEXT, BINARY):
        return _bytes_array(values, column)
    if not column.is_ragged:
        numbers = np.concatenate([value.reshape(-1) for value in values])
        return _of_items(numbers, column)
    offsets = np.zeros(len(values) + 1, np.int64)
    np.cumsum([len(value) for value in values], out=offsets[1:])
    _check_offsets(offsets, column)
    items = _of_items(np.concatenate(values).reshape(-1), column)
    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), items, type=column.arrow_type)


def _of_items(numbers: np.ndarray, column: Column) -> pa.Array:
    if not column.item_shape:
        return pa.array(numbers)
    width = int(np.prod(column.item_shape))
    return pa.FixedSizeListArray.from_arrays(pa.array(numbers), width)


def _bytes_array(values: Sequence[bytes], column: Column) -> pa.Array:
    offsets = np.zeros(len(values) + 1, np.int64)
    np.cumsum([len(value) for value in values], out=offsets[1:])
    _check_offsets(offsets, column)
    buffers = [None, pa.py_buffer(offsets.astype(np.int32)), pa.py_buffer(b"".join(values))]
    return pa.Array.from_buffers(column.arrow_type, len(values), buffers)


def _check_offsets(offsets: np.ndarray, column: Column) -> None:
    if int(offsets[-1]) > _MAX_OFFSET:
        raise UsageError(
            f"A row has more than 2^31 - 1 elements in column '{column.name}'. Cut it into several rows in the source."
        )
