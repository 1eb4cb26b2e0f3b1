"""A data set as Parquet files, for other programs to read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from configs.errors import UsageError
from data_pipelines.columns import BINARY, TEXT, Column
from data_pipelines.rows import Ragged
from data_pipelines.shards import Dataset
from data_pipelines.storage import Store

if TYPE_CHECKING:
    import pyarrow as pa

_FILE_BYTES = 512 << 20


def export(
    dataset: Dataset, folder: Store | str | Path, progress: Callable[[str, int], None] | None = None
) -> list[str]:
    """Write each split as <split>-<number:05d>.parquet (zstd, a row group a block); the names of the files.

    The columns are those of the data set; with tokens there is also their text: "text", or
    "source_text" and "target_text". Arrays of a fixed shape
    lie flat, in row-major order, in a fixed-size list. What an exception leaves behind is removed.
    Raises UsageError for a folder that holds Parquet files already, and ShardyardErrors for what cannot be read or
    written.
    """
    store = folder if isinstance(folder, Store) else Store(folder)
    there = [name for name in store.list() if name.endswith(".parquet")]
    if there:
        raise UsageError(f"{store.path()} already holds {there[0]}. Choose an empty folder, or move the files away.")
    written: list[str] = []
    try:
        for split in dataset.splits:
            _export_split(dataset, split, store, written, progress)
    except BaseException:
        for name in written:
            store.delete(name)
        raise
    return written


def _export_split(
    dataset: Dataset, split: str, store: Store, written: list[str], progress: Callable[[str, int], None] | None
) -> None:
    import pyarrow.parquet as pq

    blocks = len(dataset.index.splits[split])
    schema = _schema(dataset)
    block = number = 0
    while block < blocks or not number:
        name = f"{split}-{number:05d}.parquet"
        written.append(name)
        with store.open_output(name) as file, pq.ParquetWriter(file, schema, compression="zstd") as writer:
            while block < blocks and file.tell() < _FILE_BYTES:
                writer.write_batch(_record_batch(dataset, split, block, schema))
                block += 1
                if progress is not None:
                    progress(f"exporting {split}", block)
        number += 1


def _schema(dataset: Dataset) -> pa.Schema:
    import pyarrow as pa

    fields = [pa.field(column.name, column.arrow_type, nullable=False) for column in dataset.index.columns]
    fields += [pa.field(_text_of(name), pa.string(), nullable=False) for name in dataset.index.ids]
    return pa.schema(fields)


def _record_batch(dataset: Dataset, split: str, block: int, schema: pa.Schema) -> pa.RecordBatch:
    import pyarrow as pa

    rows = dataset.split(split)
    with rows.block(block) as values:
        arrays = [_arrow_array(values[column.name], column) for column in rows.columns]
        for name in dataset.index.ids:
            assert dataset.tokenizer is not None
            tokens = values[name]
            texts = [dataset.tokenizer.decode(tokens[row][1:]) for row in range(len(tokens))]
            arrays.append(pa.array(texts, pa.string()))
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def _text_of(ids: str) -> str:
    return "text" if ids == "tokens" else f"{ids}_text"


def _arrow_array(values: np.ndarray | Ragged, column: Column) -> pa.Array:
    """A copy, since the block may go away."""
    import pyarrow as pa

    if isinstance(values, np.ndarray):
        return _items(values, column)
    offsets = pa.array(np.append(values.starts, len(values.values)).astype(np.int32))  # one after the other in a block
    if column.dtype in (TEXT, BINARY):
        buffers = [None, offsets.buffers()[1], pa.py_buffer(values.values.tobytes())]
        return pa.Array.from_buffers(column.arrow_type, len(values), buffers)
    return pa.ListArray.from_arrays(offsets, _items(values.values, column), type=column.arrow_type)


def _items(values: np.ndarray, column: Column) -> Any:
    import pyarrow as pa

    numbers = pa.array(values.reshape(-1).copy())
    if not column.item_shape:
        return numbers
    return pa.FixedSizeListArray.from_arrays(numbers, column.item_bytes // column.itemsize)
