"""Writes one split of a data set: documents in, Arrow files of blocks out."""

from __future__ import annotations

from types import TracebackType

import numpy as np
import pyarrow as pa
import xxhash

from data_pipelines.index import Block
from data_pipelines.shards import arrow_schema
from data_pipelines.storage import OutputFile, Store

BLOCK_BYTES = 2 << 20
SHARD_BYTES = 256 << 20


class SplitWriter:
    """Use it in `with`; afterwards `blocks` and `file_sizes` say what was written. Keeps one block in memory."""

    def __init__(self, store: Store, split: str, token_dtype: type[np.unsignedinteger]) -> None:
        self.blocks: list[Block] = []
        self.file_sizes: dict[str, int] = {}
        self._store = store
        self._split = split
        self._token_dtype = token_dtype
        self._schema = arrow_schema(token_dtype.__name__)
        self._rows: list[tuple[str, np.ndarray, int]] = []
        self._pending_bytes = 0
        self._num_rows = 0
        self._file: OutputFile | None = None
        self._writer: pa.RecordBatchFileWriter | None = None

    def __enter__(self) -> SplitWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if kind is None:
            self._write_block()
            self._close_file()
        elif self._file is not None:
            self._file.__exit__(kind, error, None)

    def add(self, key: str, tokens: np.ndarray, num_bytes: int) -> None:
        """Append a document: its token ids, (n,) of the split's dtype, and its length in UTF-8 bytes."""
        self._rows.append((key, tokens, num_bytes))
        self._pending_bytes += tokens.nbytes + len(key) + 12
        if self._pending_bytes >= BLOCK_BYTES:
            self._write_block()

    def _write_block(self) -> None:
        if not self._rows:
            return
        keys, tokens, sizes = zip(*self._rows, strict=True)
        offsets = np.zeros(len(tokens) + 1, np.int32)
        np.cumsum([len(document) for document in tokens], out=offsets[1:])
        values = np.concatenate(tokens, dtype=self._token_dtype)
        columns = [
            pa.array(keys, pa.string()),
            pa.ListArray.from_arrays(pa.array(offsets), pa.array(values)),
            pa.array(sizes, pa.int64()),
        ]
        self._append(pa.record_batch(columns, schema=self._schema), len(values), sum(sizes))
        self._num_rows += len(keys)
        self._rows = []
        self._pending_bytes = 0

    def _append(self, batch: pa.RecordBatch, num_tokens: int, text_bytes: int) -> None:
        if self._writer is None or self._file is None:
            name = f"{self._split}-{len(self.file_sizes):05d}.arrow"
            self.file_sizes[name] = 0
            self._file = self._store.open_output(name)
            self._writer = pa.ipc.new_file(self._file, self._schema)
        name = next(reversed(self.file_sizes))
        message = batch.serialize()  # the very bytes that go into the file
        self._writer.write_batch(batch)
        stop = self._file.tell()
        self.blocks.append(
            Block(
                file=name,
                number=sum(block.file == name for block in self.blocks[-SHARD_BYTES // BLOCK_BYTES :]),
                first_row=self._num_rows,
                rows=batch.num_rows,
                start=stop - message.size,
                stop=stop,
                tokens=num_tokens,
                text_bytes=text_bytes,
                xxh3=xxhash.xxh3_64_intdigest(message),
            )
        )
        if stop >= SHARD_BYTES:
            self._close_file()

    def _close_file(self) -> None:
        if self._writer is None or self._file is None:
            return
        self._writer.close()
        self.file_sizes[next(reversed(self.file_sizes))] = self._file.tell()
        self._file.close()
        self._writer = self._file = None
