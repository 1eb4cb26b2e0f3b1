"""A data set on disk: Arrow IPC files and an index, written once, memory-mapped ever after.

    <store>/datasets/<name>-<digest>/
        index.json          written last: without it there is no data set
        tokenizer.json      a Hugging Face tokenizer
        train-00000.arrow, validation-00000.arrow, ...

A file holds blocks, each one Arrow record batch of 1-4 MB (more only where a single document is larger). Columns:
`key` utf8, `tokens` list<uint16> (uint32 past 65,536 token ids), `num_bytes` int64 (the document's length in UTF-8).
The index gives for each block its byte range (an encapsulated IPC message, which can be read without the rest of the
file), rows, tokens, text bytes and xxh3 digest. Opening a data set reads the index and no Arrow file; a block is
checked against its digest when it is first used.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import xxhash

from configs.errors import Damaged, NotFound, ShardyardError
from data_pipelines.index import INDEX_FILE, TOKENIZER_FILE, Block, Index
from data_pipelines.pack import PackedSplit
from data_pipelines.storage import Store
from data_pipelines.tokenizer import Tokenizer

REBUILD = "Delete that folder and run the same command again: the data set is built anew from its source."
_MAX_REMOTE_BLOCKS = 64


class BlockData(NamedTuple):
    """The content of one block of D documents: views of the mapped file (but for the marks)."""

    keys: pa.StringArray  # (D,)
    tokens: np.ndarray  # all documents in a row, uint16 or uint32
    offsets: np.ndarray  # (D + 1,) int32: document d is tokens[offsets[d]:offsets[d + 1]]
    marks: np.ndarray  # (D + 1,) int64: where the end marks stand in the block's stream (pack.py)
    num_bytes: np.ndarray  # (D,) int64


class Damage(NamedTuple):
    """A part of a data set that fails its digest; str() is one line."""

    file: str
    block: int | None
    documents: str
    cause: str

    def __str__(self) -> str:
        place = self.file if self.block is None else f"{self.file}, block {self.block} ({self.documents})"
        return f"{place}: {self.cause}"


class Dataset:
    """An opened data set. Safe to use from several threads."""

    def __init__(self, store: Store, index: Index) -> None:
        self.store = store
        self.index = index
        self.fingerprint: str = index.fingerprint
        self.splits: tuple[str, ...] = tuple(index.splits)
        self._files: dict[str, pa.Buffer] = {}
        self._blocks: dict[Block, BlockData] = {}

    @classmethod
    def open(cls, store: Store | str | Path) -> Dataset:
        """Read the index of the data set in a folder.

        Raises NotFound where there is no index, and Damaged for one that is not whole.
        """
        folder = store if isinstance(store, Store) else Store(store)
        if not folder.exists(INDEX_FILE):
            raise NotFound(
                f"There is no data set in {folder.path()}: it has no {INDEX_FILE}, which a build writes last. Build "
                "the data set again (shardyard data build), or check the path."
            )
        return cls(folder, Index.from_json(folder.read_bytes(INDEX_FILE), folder.path(INDEX_FILE), REBUILD))

    def __reduce__(self) -> tuple[Any, tuple[Store]]:
        return Dataset.open, (self.store,)

    @property
    def path(self) -> str:
        """The folder, or its URI."""
        return self.store.path()

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer whose ids the data set holds. Raises Damaged."""
        raw = self.store.read_bytes(TOKENIZER_FILE)
        if xxhash.xxh3_128_hexdigest(raw) != self.index.tokenizer_xxh3:
            raise Damaged(f"{self.store.path(TOKENIZER_FILE)} fails its digest. {REBUILD}")
        return Tokenizer.from_json(raw.decode("utf-8"))

    def blocks(self, split: str) -> tuple[Block, ...]:
        """The blocks of a split, in order. Raises NotFound for a split it has not."""
        if split not in self.index.splits:
            raise NotFound(f"The data set {self.path} has no split '{split}'; it has {', '.join(self.splits)}.")
        return self.index.splits[split]

    def documents(self, split: str) -> Iterator[tuple[str, np.ndarray, int]]:
        """(key, token ids, length in bytes) of each document of a split, in order; the ids are a view, not a copy."""
        for block in self.blocks(split):
            data = self.read(block)
            for row, key in enumerate(data.keys):
                yield key.as_py(), data.tokens[data.offsets[row] : data.offsets[row + 1]], int(data.num_bytes[row])

    def packed(self, split: str, seq_len: int) -> PackedSplit:
        """The split as sequences of seq_len tokens."""
        return PackedSplit(self.blocks(split), self.read, seq_len, self.index.eos_id)

    def read(self, block: Block) -> BlockData:
        """The block's content; on first use its digest is checked. Raises Damaged, naming file, block and documents."""
        data = self._blocks.get(block)
        if data is None:
            raw = self._raw(block)
            if xxhash.xxh3_64_intdigest(raw) != block.xxh3:
                raise Damaged(
                    f"{self.store.path(block.file)} is damaged: block {block.number} ({_documents(block, raw)}) fails "
                    f"its digest. {REBUILD}"
                )
            data = self._view(raw)
            if not self.store.is_local and len(self._blocks) >= _MAX_REMOTE_BLOCKS:
                self._blocks.pop(next(iter(self._blocks)), None)
            self._blocks[block] = data
        return data

    def verify(self) -> list[Damage]:
        """Check every digest; what fails, in the order of the files. The list is empty when all is well."""
        found = []
        try:
            _ = self.tokenizer
        except ShardyardError as error:
            found.append(Damage(TOKENIZER_FILE, None, "", str(error)))
        for name, size in self.index.file_sizes.items():
            actual = self.store.size(name) if self.store.exists(name) else None
            if actual != size:
                cause = "missing" if actual is None else f"{actual} bytes long instead of {size}"
                found.append(Damage(name, None, "", cause))
        for split in self.splits:
            for block in self.blocks(split):
                try:
                    raw = self._raw(block)
                except ShardyardError:
                    found.append(Damage(block.file, block.number, _documents(block, None), "not there"))
                    continue
                if xxhash.xxh3_64_intdigest(raw) != block.xxh3:
                    found.append(Damage(block.file, block.number, _documents(block, raw), "fails its digest"))
        return found

    def _raw(self, block: Block) -> pa.Buffer:
        """The block's bytes: a view of the mapped file, or a range read from a remote store."""
        path = self.store.path(block.file)
        if not self.store.is_local:
            with self.store.open_input(block.file) as file:
                file.seek(block.start)
                raw = pa.py_buffer(file.read(block.stop - block.start))
        else:
            mapped = self._files.get(block.file)
            if mapped is None:
                self._files[block.file] = mapped = self._map(block.file)
            start, stop = (min(place, mapped.size) for place in (block.start, block.stop))
            raw = mapped.slice(start, stop - start)
        if raw.size != block.stop - block.start:
            raise Damaged(
                f"{path} is truncated: block {block.number} ({_documents(block, None)}) should end at byte "
                f"{block.stop}. {REBUILD}"
            )
        return raw

    def _map(self, name: str) -> pa.Buffer:
        if not self.store.exists(name):
            raise Damaged(f"{self.store.path(name)} is missing, though the index names it. {REBUILD}")
        if self.store.size(name) == 0:
            return pa.py_buffer(b"")
        with self.store.explained("read", name):
            return pa.memory_map(self.store.path(name)).read_buffer()

    def _view(self, raw: pa.Buffer) -> BlockData:
        batch = pa.ipc.read_record_batch(raw, arrow_schema(self.index.token_dtype))
        tokens = batch.column("tokens")
        offsets = tokens.offsets.to_numpy(zero_copy_only=True)
        return BlockData(
            keys=batch.column("key"),
            tokens=tokens.values.to_numpy(zero_copy_only=True),
            offsets=offsets,
            marks=offsets + np.arange(len(offsets)),
            num_bytes=batch.column("num_bytes").to_numpy(zero_copy_only=True),
        )


def arrow_schema(token_dtype: str) -> pa.Schema:
    """The columns of a data set whose token ids are "uint16" or "uint32"."""
    token_type = {"uint16": pa.uint16(), "uint32": pa.uint32()}[token_dtype]
    return pa.schema([("key", pa.string()), ("tokens", pa.list_(token_type)), ("num_bytes", pa.int64())])


def _documents(block: Block, raw: pa.Buffer | None) -> str:
    """The documents of a damaged block for people: by key where they can still be read, else by number."""
    names = f"documents {block.first_row} to {block.first_row + block.rows - 1} of its split"
    if raw is None:
        return names
    try:
        for dtype in ("uint16", "uint32"):
            batch = pa.ipc.read_record_batch(raw, arrow_schema(dtype))
            keys = batch.column("key")
            keys.validate(full=True)
            return f"{names}, '{keys[0].as_py()}' to '{keys[-1].as_py()}'"
    except (pa.ArrowException, OSError, ValueError, IndexError):
        pass
    return names
