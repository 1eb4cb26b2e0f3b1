"""blocks.arrow: the arrays of Blocks as an Arrow file, which numpy alone reads back, and whether they make sense."""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import xxhash

from configs.errors import Damaged, NotFound
from data_pipelines.blocks import ARRAYS, Blocks, array_dtype, array_shape, names_of
from data_pipelines.columns import Column, num_buffers
from data_pipelines.ranges import RangeReader
from data_pipelines.storage import Store

BLOCKS_FILE = "blocks.arrow"
REBUILD = "Delete that folder and run the same command again: the data set is built anew from its source."
_MAX_ITEMS = 1 << 31
_MAX_BYTES = 1 << 48
_CHUNK = 1 << 13  # blocks checked at once: what that takes stays in the nearest cache


def to_arrow(blocks: Blocks) -> tuple[bytes, dict[str, int]]:
    """An Arrow IPC file of one record batch, and where in it each array begins."""
    import pyarrow as pa

    width = blocks.content_buffers.shape[1]
    arrays = {}
    for name, values in blocks.arrays().items():
        flat = pa.array(np.ascontiguousarray(values).reshape(-1))
        arrays[name] = pa.FixedSizeListArray.from_arrays(flat, width) if name == "content_buffers" else flat
    batch = pa.RecordBatch.from_arrays(list(arrays.values()), list(arrays))
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    raw = sink.getvalue()
    with pa.ipc.open_file(raw) as reader:
        written = reader.get_batch(0)
    places = {}
    for name, column in zip(arrays, written.columns, strict=True):
        values = column.buffers()[-1]
        places[name] = values.address - raw.address if len(blocks) else 0
    return raw.to_pybytes(), places


def read_bytes(store: Store, reader: RangeReader, name: str, size: int, xxh3: str) -> memoryview:
    """The bytes of a file that the index names, mapped where it is local. Raises Damaged where they are others."""
    path = store.path(name)
    try:
        raw = _mapped(store, name) if store.is_local else memoryview(reader.read_file(name))
    except NotFound:
        raise Damaged(f"{path} is missing, though the index names it. {REBUILD}") from None
    if len(raw) != size:
        raise Damaged(f"{path} is {len(raw)} bytes long instead of {size}. {REBUILD}")
    if xxhash.xxh3_128_hexdigest(raw) != xxh3:
        raise Damaged(f"{path} fails its digest. {REBUILD}")
    return raw


def _mapped(store: Store, name: str) -> memoryview:
    local = store.local_path(name)
    assert local is not None
    with store.explained("read", name), local.open("rb") as file:
        empty = os.fstat(file.fileno()).st_size == 0
        return memoryview(b"" if empty else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def from_arrow(raw: memoryview, content: Mapping[str, Any], columns: tuple[Column, ...]) -> Blocks:
    """The blocks in those bytes; content: of index.json. Raises ValueError and its like for what does not fit."""
    facts = content["blocks"]
    rows, places = count_of(facts["rows"]), typed(facts["arrays"], dict)
    names = [*ARRAYS, *names_of([count_of(seq_len) for seq_len in content["packing"] or ()])]
    if rows and places.keys() != set(names):
        raise ValueError("other arrays than these: " + ", ".join(sorted(names)))
    arrays = {}
    for name in names:
        dtype, shape = array_dtype(name), array_shape(name, rows, num_buffers(columns))
        if rows:
            arrays[name] = np.frombuffer(raw, dtype, math.prod(shape), count_of(places[name])).reshape(shape)
        else:
            arrays[name] = np.empty(shape, dtype)
    return Blocks.from_arrays(arrays, content["compression"] is not None)


def check(blocks: Blocks, content: Mapping[str, Any], columns: tuple[Column, ...]) -> None:
    """That every place lies where it can: what is read through the index alone never reads beside a block.

    Raises ValueError and its like.
    """
    if content["compression"] not in (None, "zstd"):
        raise ValueError(f"compression {content['compression']!r}")
    if len({column.name for column in columns}) != len(columns) or not columns:
        raise ValueError("the columns have no names of their own")
    end = 0
    for start, stop in typed(content["splits"], dict).values():
        if count_of(start) != end or count_of(stop) < start:
            raise ValueError("the splits do not lie one after the other")
        end = stop
    if end != len(blocks):
        raise ValueError("the splits do not hold all blocks")
    files = counts_of(content["files"])
    if any("/" in name for name in files):
        raise ValueError("a file lies in another folder")
    sizes = np.array(list(files.values()), np.int64)
    for first in range(0, len(blocks), _CHUNK):
        chunk = blocks[first : first + _CHUNK]
        _check_places(chunk, sizes)
        _check_columns(chunk, columns)


def _check_places(blocks: Blocks, file_sizes: np.ndarray) -> None:
    if blocks.file.min() < 0 or blocks.file.max() >= len(file_sizes):
        raise ValueError("a block lies in no file")
    if blocks.start.min() < 0 or (blocks.stop <= blocks.start).any() or (blocks.stop > file_sizes[blocks.file]).any():
        raise ValueError("a block lies outside its file")
    if int(np.bitwise_or.reduce(blocks.start)) & 7:
        raise ValueError("a block does not begin at a multiple of 8")
    if blocks.content_bytes.min() < 0 or blocks.content_bytes.max() >= _MAX_BYTES:
        raise ValueError("a block has no length, or too much of it")
    if not blocks.compressed and (blocks.content_bytes != blocks.stop - blocks.start).any():
        raise ValueError("a block is not as long as its content")
    for numbers in (blocks.tokens, blocks.text_bytes, blocks.number, *blocks.packed.values()):
        if numbers.min() < 0:
            raise ValueError("a block holds less than nothing")
    if blocks.rows.min() < 1 or blocks.rows.max() >= _MAX_ITEMS or blocks.tokens.max() >= _MAX_ITEMS:
        raise ValueError("a block holds no rows, or too many")


def _check_columns(blocks: Blocks, columns: tuple[Column, ...]) -> None:
    """That each buffer lies in its block's content, as far as its length follows from the index."""
    bits = int(np.bitwise_or.reduce(blocks.content_buffers, axis=None))  # one pass tells of all
    if bits < 0 or bits & 7:
        raise ValueError("a column does not begin at a multiple of 8")
    number = 0
    for column in columns:
        needed = [blocks.rows * column.item_bytes]
        if column.is_ragged:
            needed = [4 * (blocks.rows + 1), blocks.tokens * (column.item_bytes if column.name == "tokens" else 0)]
        for least in needed:
            if (blocks.content_buffers[:, number] > blocks.content_bytes - least).any():
                raise ValueError(f"column '{column.name}' lies outside its block")
            number += 1


# --- values of index.json


def typed(value: Any, kind: type) -> Any:
    """The value, which must be of just that type. Raises TypeError."""
    if type(value) is not kind:
        raise TypeError(f"{value!r:.40} is not of type {kind.__name__}")
    return value


def counts_of(values: Any) -> dict[str, int]:
    """A mapping of names to counts. Raises TypeError or ValueError."""
    return {typed(name, str): count_of(number) for name, number in typed(values, dict).items()}


def count_of(value: Any) -> int:
    """A number of things or bytes. Raises TypeError or ValueError."""
    number: int = typed(value, int)
    if not 0 <= number < 1 << 62:
        raise ValueError(f"{number} is no count")
    return number
