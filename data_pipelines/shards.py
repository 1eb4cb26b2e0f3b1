"""A data set on disk: Arrow IPC files and an index, written once, memory-mapped ever after.

    <store>/datasets/<name>-<settings>-<digest>/
        index.json          written last: without it there is no data set
        blocks.arrow        what is known of each block
        lengths.bin         how long each row is, where rows differ
        tokenizer.json      a Hugging Face tokenizer, where the data is text
        train-00000-000.arrow, ..., validation-00000-000.arrow, ...

An Arrow file holds blocks, each one record batch of 1-4 MB (more only where a single row is larger). Opening a data set
reads the index and no Arrow file; a block is checked against its digest when it is first used. Local blocks are mapped
and read in place with numpy; remote ones come through a cache on this node's disk. docs/data.md has every byte.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from configs.errors import Damaged, NotFound, ShardyardError, UsageError
from data_pipelines.block_source import BlockSource, LocalBlocks, first_and_last_key
from data_pipelines.blocks_file import read_bytes
from data_pipelines.damage import Damage, DamageLog, DamagePolicy
from data_pipelines.index import REBUILD, TOKENIZER_FILE, Index
from data_pipelines.lengths import LENGTHS_FILE, Lengths, file_bytes
from data_pipelines.mapped import MappedFiles
from data_pipelines.ranges import Counters, RangeReader
from data_pipelines.rows import Ragged, Split
from data_pipelines.storage import Store

if TYPE_CHECKING:
    from data_pipelines.pack import PackedSplit
    from data_pipelines.tokenizer import Tokenizer

__all__ = ["REBUILD", "Damage", "Dataset", "Ragged", "Split"]


class Dataset:
    """An opened data set. Safe to use from several threads. Close it, or let it go, when nobody reads any more."""

    def __init__(self, store: Store, index: Index, damage: DamagePolicy | None = None) -> None:
        self.store = store
        self.index = index
        self.damage_policy = damage or DamagePolicy()
        self.fingerprint: str = index.fingerprint
        self.splits: tuple[str, ...] = tuple(index.splits)
        self._opened: dict[str, Split] = {}
        self._lock = threading.Lock()

    @classmethod
    def open(cls, store: Store | str | Path, *, damage: DamagePolicy | None = None) -> Dataset:
        """Read the index of the data set in a folder.

        Raises NotFound where there is no index, and Damaged for one that is not whole.
        """
        folder = store if isinstance(store, Store) else Store(store)
        return cls(folder, Index.read(folder, damage), damage)

    def __reduce__(self) -> tuple[Any, ...]:
        return _open, (self.store, self.damage_policy)

    @property
    def path(self) -> str:
        """The folder, or its URI."""
        return self.store.path()

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer whose ids the data set holds; None where it holds none. Raises Damaged."""
        from data_pipelines.tokenizer import Tokenizer

        if self.index.tokenizer is None:
            return None
        raw = RangeReader(self.store, self.damage_policy, Counters()).read_file(TOKENIZER_FILE)
        if xxhash.xxh3_128_hexdigest(raw) != self.index.tokenizer.xxh3:
            raise Damaged(f"{self.store.path(TOKENIZER_FILE)} fails its digest. {REBUILD}")
        return Tokenizer.from_json(raw.decode("utf-8"))

    def split(self, name: str) -> Split:
        """A split by name. Raises NotFound for one that the data set has not."""
        if name not in self.index.splits:
            raise NotFound(f"The data set {self.path} has no split '{name}'; it has {', '.join(self.splits)}.")
        with self._lock:
            if name not in self._opened:
                blocks, log = self.index.splits[name], DamageLog()
                source = self._source(name, log)
                self._opened[name] = Split(name, self.index.columns, blocks, source, log)
            return self._opened[name]

    def packed(self, split: str, seq_len: int, kind: str = "concat", *, boundaries: bool = False) -> PackedSplit:
        """The split as sequences of seq_len tokens; with boundaries each micro-batch has "cu_seqlens" too.

        Raises NotFound for an unknown split, and UsageError for data without tokens.
        """
        from data_pipelines.pack import PackedSplit

        if self.index.tokenizer is None or "tokens" not in self.index.ids:
            raise UsageError(
                f"The data set {self.path} holds no tokens; its columns are "
                f"{', '.join(column.name for column in self.index.columns)}. Use it with a task that reads these, or a "
                "source of text."
            )
        return PackedSplit(self.split(split), seq_len, self.index.tokenizer.eos_id, kind, boundaries=boundaries)

    def lengths(self, split: str, column: str) -> Lengths:
        """How long each row of a split is in a column that has lengths (Column.has_length); no block is read.

        Raises Damaged where the file of lengths is not whole.
        """
        return Lengths(self._lengths, self.index.blocks, slice(*self.index.ranges[split]), self.index.columns, column)

    @cached_property
    def _lengths(self) -> memoryview:
        index = self.index
        if index.lengths is None:
            raise Damaged(f"The data set {self.path} says of no row how long it is. {REBUILD}")
        size = file_bytes(int(index.blocks.rows.sum()), index.columns)
        reader = RangeReader(self.store, self.damage_policy, Counters())
        return read_bytes(self.store, reader, LENGTHS_FILE, size, index.lengths)

    def rows(self, split: str) -> Iterator[dict[str, Any]]:
        """Each row of a split in order: column -> number, array, str or bytes."""
        return self.split(split).rows()

    def documents(self, split: str) -> Iterator[tuple[str, np.ndarray, int]]:
        """(key, token ids without the mark, length in bytes) of each document of a split of tokens, in order."""
        for row in self.split(split).rows(("key", "tokens", "num_bytes")):
            yield row["key"], row["tokens"][1:], row["num_bytes"]

    def verify(self, progress: Callable[[str, int], None] | None = None) -> list[Damage]:
        """Check every digest; what fails, in the order of the blocks, those that follow each other as one; else [].

        progress: called with what is being done and the blocks checked so far.
        """
        found: list[Damage] = []
        try:
            _ = self.tokenizer
        except ShardyardError as error:
            found.append(Damage(TOKENIZER_FILE, str(error)))
        try:
            _ = self._lengths if self.index.lengths is not None else None
        except ShardyardError as error:
            found.append(Damage(LENGTHS_FILE, str(error)))
        for name, size in self.index.files.items():
            actual = self.store.size(name) if self.store.exists(name) else None
            if actual != size:
                cause = "missing" if actual is None else f"{actual} bytes long instead of {size}"
                found.append(Damage(name, cause))
        done = 0
        for split in self.splits:
            for block, raw in enumerate(self._stored_blocks(split)):
                fault = self._fault(split, block, raw)
                if fault is not None:
                    damage = self._damage(split, block, raw, fault)
                    joined = found[-1].joined(damage) if found else None
                    found[-1:] = [joined] if joined else [*found[-1:], damage]
                done += 1
                if progress is not None:
                    progress("checking blocks", done)
        return found

    def close(self) -> None:
        """Let go of files and caches. What was read stays valid."""
        with self._lock:
            for split in self._opened.values():
                split.source.close()
            self._opened.clear()

    # --- where blocks come from

    @cached_property
    def _mapped(self) -> MappedFiles:
        folder = self.store.local_path()
        assert folder is not None
        return MappedFiles(folder, self.index.files)

    def _source(self, split: str, log: DamageLog) -> BlockSource:
        if self.store.is_local and self.index.compression is None:
            return LocalBlocks(self._mapped, self.index.splits[split], self.index.columns, self.damage_policy, log)
        from data_pipelines.cache import CachedBlocks

        return CachedBlocks(self.store, self.index, split, self.damage_policy, log)

    # --- verify

    def _stored_blocks(self, split: str) -> Iterator[np.ndarray]:
        """The bytes of each block as they are stored, as far as they are there."""
        blocks, opened, file = self.index.splits[split], -1, None
        try:
            for number, start, stop in zip(
                blocks.file.tolist(), blocks.start.tolist(), blocks.stop.tolist(), strict=True
            ):
                if number != opened:
                    if file is not None:
                        file.close()
                    name, opened = self.index.file_names[number], number
                    file = self.store.open_input(name) if self.store.exists(name) else None
                if file is None:
                    yield np.empty(0, np.uint8)
                    continue
                with self.store.explained("read", self.index.file_names[number]):
                    file.seek(start)
                    yield np.frombuffer(file.read(stop - start), np.uint8)
        finally:
            if file is not None:
                file.close()

    def _fault(self, split: str, block: int, raw: np.ndarray) -> str | None:
        blocks = self.index.splits[split]
        if len(raw) != int(blocks.stop[block] - blocks.start[block]):
            return "not there"
        return None if xxhash.xxh3_64_intdigest(raw.data) == int(blocks.xxh3[block]) else "fails its digest"

    def _damage(self, split: str, block: int, raw: np.ndarray, cause: str) -> Damage:
        blocks = self.index.splits[split]
        file, number = self.index.file_names[int(blocks.file[block])], int(blocks.number[block])
        first = int(blocks.rows[:block].sum())
        keys = None
        if not blocks.compressed and len(raw) == int(blocks.content_bytes[block]):
            keys = first_and_last_key(raw, blocks, block, self.index.columns)
        rows = (first, first + int(blocks.rows[block]) - 1)
        return Damage(file, cause, (number, number), split, rows, keys)


def _open(store: Store, damage: DamagePolicy) -> Dataset:
    return Dataset.open(store, damage=damage)
