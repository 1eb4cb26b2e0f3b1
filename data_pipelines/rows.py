"""The rows of a split, read many at once from wherever its blocks are."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from configs.errors import NotFound
from data_pipelines.block_source import BlockSource
from data_pipelines.blocks import Blocks
from data_pipelines.buffers import Buffers
from data_pipelines.columns import TEXT, Column, first_buffers
from data_pipelines.damage import DamageLog, first_rows
from data_pipelines.native import ListCopies, address_of, copy_rows
from data_pipelines.ownership import owners


@dataclass(frozen=True)
class Ragged:
    """n arrays that differ in length: [i] is a view of values[starts[i] : starts[i] + lengths[i]].

    What lies between them is arbitrary: gather() leaves gaps, so that one native call can copy all.
    """

    values: np.ndarray  # (total, ...)
    starts: np.ndarray  # (n,) int64
    lengths: np.ndarray  # (n,) int64

    @classmethod
    def joined(cls, values: np.ndarray, offsets: np.ndarray) -> Ragged:
        """Of arrays one after the other: [i] is values[offsets[i] : offsets[i + 1]]; offsets (n + 1,) int64."""
        return cls(values, offsets[:-1], np.diff(offsets))

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, number: int) -> np.ndarray:
        start = self.starts[number]
        return self.values[start : start + self.lengths[number]]

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[number] for number in range(len(self)))


class Split:
    """One split of a data set: rows 0 .. num_rows - 1, in the order of its blocks. Safe to use from several threads.

    Every read checks the digests of blocks that were not used before; it raises BlockDamaged, which names file, block
    and rows, where one fails, and other ShardyardErrors where a store cannot be read.
    """

    def __init__(
        self, name: str, columns: Sequence[Column], blocks: Blocks, source: BlockSource, damage: DamageLog
    ) -> None:
        self.name = name
        self.columns = tuple(columns)
        self.blocks = blocks
        self.source = source
        self.damage = damage  # what was found damaged so far
        self.block_examples: np.ndarray = np.ascontiguousarray(blocks.rows)  # (blocks,) int64: rows
        self.first_rows = first_rows(self.block_examples)  # (blocks,) int64
        self._ends = np.cumsum(self.block_examples)
        self.num_rows = int(self.block_examples.sum())
        self.num_tokens = int(blocks.tokens.sum())  # end marks among them
        self.num_bytes = int(blocks.text_bytes.sum())  # of the rows' text as UTF-8
        self._named = {column.name: column for column in columns}
        self._first = first_buffers(columns)
        self._memory = np.asarray(source.flat())
        self._base = address_of(self._memory)
        # The same memory as list offsets: every buffer begins at a multiple of 8.
        self._cuts = self._memory[: len(self._memory) // 4 * 4].view("<i4")

    def __len__(self) -> int:
        return self.num_rows

    def block_of(self, ids: np.ndarray) -> np.ndarray:
        """The block that holds each of the rows (n,): (n,) int64. Raises IndexError for a number that is no row."""
        if len(ids) and not (np.minimum.reduce(ids) >= 0 and np.maximum.reduce(ids) < self.num_rows):
            raise IndexError(f"rows {ids.min()} to {ids.max()} of {self.num_rows}")
        return owners(self._ends, ids)

    @contextlib.contextmanager
    def located(self, blocks: np.ndarray) -> Iterator[np.ndarray]:
        """The address in this process of the content of each of the blocks (n,): (n,) int64, good inside `with`."""
        places = self.source.locate(blocks)
        try:
            yield places + self._base
        finally:
            self.source.release(blocks)

    def values_at(self, blocks: np.ndarray, column: str) -> np.ndarray:
        """Where a column's values begin in the content of each block: (n,) int64 bytes, to add to located()."""
        return self.blocks.content_buffers[blocks, self._first[column] + self._column(column).num_buffers - 1]

    def prefetch(self, blocks: np.ndarray) -> None:
        """Say which blocks are wanted soon."""
        self.source.prefetch(blocks)

    # --- many rows

    def gather(
        self,
        ids: np.ndarray,
        columns: Sequence[str],
        out: Buffers | None = None,
        blocks: np.ndarray | None = None,
    ) -> dict[str, np.ndarray | Ragged]:
        """Columns of the rows (n,) int64 `ids`, copied: (n, *shape) for each, or Ragged for what differs in length.

        utf8 and binary are Ragged bytes. With `out` they lie in its memory, and the next call with it overwrites them.
        blocks: (n,) int64, the block of each, where the caller knows it.
        """
        memory = out if out is not None else Buffers()
        if blocks is None:
            blocks = self.block_of(ids)
        rows = ids - self.first_rows[blocks]
        with self.located(blocks) as contents:
            return {name: self._gather(self._column(name), rows, blocks, contents, memory) for name in columns}

    def _gather(
        self, column: Column, rows: np.ndarray, blocks: np.ndarray, contents: np.ndarray, memory: Buffers
    ) -> np.ndarray | Ragged:
        """rows (n,): places in their blocks (n,); contents (n,): the addresses of those blocks' contents.

        A batch is a few hundred rows, so that what counts here is the number of operations.
        """
        places, number = self.blocks.content_buffers, self._first[column.name]
        first = contents + places[:, number][blocks]
        if not column.is_ragged:
            values = memory.take(column.name, (len(rows), *column.item_shape), column.numpy_dtype)
            copy_rows(first + rows * column.item_bytes, values)
            return values
        cuts = ((first - self._base) >> 2) + rows
        starts = self._cuts[cuts].astype(np.int64)
        lengths = self._cuts[cuts + 1] - starts
        begins = contents + places[:, number + 1][blocks] + starts * column.item_bytes
        longest = int(np.maximum.reduce(lengths, initial=0))
        if longest * len(rows) == np.add.reduce(lengths):  # all of one length
            values = memory.take(column.name, (len(rows), longest, *column.item_shape), column.numpy_dtype)
            copy_rows(begins, values)
            joined = values.reshape(len(rows) * longest, *column.item_shape)
            return Ragged(joined, np.arange(len(rows)) * longest, lengths)
        ends = contents + self.blocks.content_bytes[blocks]
        plan = ListCopies(begins, lengths * column.item_bytes, ends, column.item_bytes)
        values = memory.take(column.name, (plan.num_bytes // column.item_bytes, *column.item_shape), column.numpy_dtype)
        plan.copy(values)
        return Ragged(values, plan.starts // column.item_bytes, lengths)

    def lengths(self, block: int, column: str) -> np.ndarray:
        """Of a ragged column's lists in a block: (rows,) int32."""
        first = self._first[column]
        assert self._column(column).is_ragged, column
        with self.located(np.array([block])) as contents:
            offsets = self._buffer(int(contents[0]), block, first, int(self.block_examples[block]) + 1, np.dtype("<i4"))
            lengths: np.ndarray = np.diff(offsets)
            return lengths

    # --- whole blocks, row by row

    @contextlib.contextmanager
    def block(self, block: int, columns: Sequence[str] | None = None) -> Iterator[dict[str, np.ndarray | Ragged]]:
        """A block's columns (all where None), as views of where it lies; good inside `with`."""
        rows = int(self.block_examples[block])
        with self.located(np.array([block])) as contents:
            content = int(contents[0])
            found: dict[str, np.ndarray | Ragged] = {}
            for name in columns if columns is not None else self._named:
                column, first = self._column(name), self._first[name]
                kind, shape = column.numpy_dtype, column.item_shape
                width = column.item_bytes // column.itemsize
                if not column.is_ragged:
                    values = self._buffer(content, block, first, rows * width, kind)
                    found[name] = values.reshape(rows, *shape)
                    continue
                offsets = self._buffer(content, block, first, rows + 1, np.dtype("<i4")).astype(np.int64)
                values = self._buffer(content, block, first + 1, int(offsets[-1]) * width, kind)
                found[name] = Ragged.joined(values.reshape(int(offsets[-1]), *shape), offsets)
            yield found

    def rows(self, columns: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
        """Each row in order, as column -> number, array (a copy), str or bytes."""
        for block in range(len(self.blocks)):
            with self.block(block, columns) as content:
                for row in range(int(self.block_examples[block])):
                    yield {name: _value(values[row], self._named[name]) for name, values in content.items()}

    def _buffer(self, content: int, block: int, number: int, count: int, dtype: np.dtype[Any]) -> np.ndarray:
        place = content - self._base + int(self.blocks.content_buffers[block, number])
        return self._memory[place : place + count * dtype.itemsize].view(dtype)

    def _column(self, name: str) -> Column:
        try:
            return self._named[name]
        except KeyError:
            raise NotFound(
                f"The data set has no column '{name}'; it has {', '.join(self._named)}. Choose one of them, or another "
                "source."
            ) from None


def _value(value: Any, column: Column) -> Any:
    if column.dtype == TEXT:
        return value.tobytes().decode("utf-8")
    if column.dtype == "binary":
        return value.tobytes()
    return value.copy() if column.shape else value.item()
