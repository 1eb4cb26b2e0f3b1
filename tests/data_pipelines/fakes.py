"""Splits in memory, without files: what orders, packing and the loader are tested on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from configs.errors import Damaged
from data_pipelines.blocks import Blocks
from data_pipelines.buffers import Buffers
from data_pipelines.columns import Column
from data_pipelines.damage import DamageLog
from data_pipelines.pack import PackedSplit
from data_pipelines.rows import Ragged, Split

EOS = 0


class MemoryBlocks:
    """A BlockSource of blocks in one array; those in `broken` cannot be read."""

    def __init__(self, memory: np.ndarray, starts: np.ndarray) -> None:
        self.memory = memory
        self.starts = starts
        self.broken: set[int] = set()
        self.held: list[int] = []  # located and not released
        self.asked: set[int] = set()  # by prefetch

    def locate(self, blocks: np.ndarray) -> np.ndarray:
        for block in blocks.tolist():
            if block in self.broken:
                raise Damaged(f"block {block} is damaged")
        self.held += blocks.tolist()
        return self.starts[blocks]

    def release(self, blocks: np.ndarray) -> None:
        for block in blocks.tolist():
            self.held.remove(block)

    def flat(self) -> np.ndarray:
        return self.memory

    def prefetch(self, blocks: np.ndarray) -> None:
        self.asked.update(blocks.tolist())

    def close(self) -> None:
        pass


def token_split(blocks: Sequence[Sequence[Sequence[int]]], dtype: str = "uint16", name: str = "train") -> Split:
    """A split of documents of token ids: each is stored as its end mark and its ids. Blocks lie back to back."""
    kind = np.dtype(dtype)
    parts: list[bytes] = []
    starts, buffers, size = [], [], 0
    for documents in blocks:
        stored = [np.array([EOS, *document], kind) for document in documents]
        offsets = np.cumsum([0, *map(len, stored)]).astype("<i4").tobytes()
        offsets += bytes(-len(offsets) % 8)
        values = b"".join(array.tobytes() for array in stored)
        starts.append(size)
        buffers.append([0, len(offsets)])
        block = offsets + values + bytes(-len(values) % 8)
        parts.append(block)
        size += len(block)
    memory = np.frombuffer(bytearray(b"".join(parts)) or bytearray(8), np.uint8)
    count = len(blocks)
    zeros = np.zeros(count, np.int64)
    described = Blocks(
        file=zeros.astype(np.int32),
        number=np.arange(count, dtype=np.int32),
        start=np.array(starts, np.int64),
        stop=np.array([*starts[1:], size][:count], np.int64),
        rows=np.array([len(documents) for documents in blocks], np.int64),
        tokens=np.array([sum(len(document) + 1 for document in documents) for documents in blocks], np.int64),
        text_bytes=np.array([10 * len(documents) for documents in blocks], np.int64),
        xxh3=zeros.astype(np.uint64),
        content_xxh3=zeros.astype(np.uint64),
        content_bytes=np.array([len(part) for part in parts], np.int64),
        content_buffers=np.array(buffers, np.int64).reshape(count, 2),
    )
    source = MemoryBlocks(memory, np.array(starts, np.int64))
    return Split(name, [Column("tokens", dtype, (None,))], described, source, DamageLog())


def packed(
    blocks: Sequence[Sequence[Sequence[int]]], seq_len: int, kind: str = "concat", dtype: str = "uint16"
) -> PackedSplit:
    return PackedSplit(token_split(blocks, dtype), seq_len, EOS, kind)


def random_documents(seed: int, num_blocks: int, documents: int = 8, longest: int = 30) -> list[list[list[int]]]:
    """Documents of 0 to `longest` ids in blocks; no id comes twice."""
    generator = np.random.default_rng(seed)
    following = 1
    blocks = []
    for _ in range(num_blocks):
        block = []
        for length in generator.integers(0, longest + 1, documents).tolist():
            block.append(list(range(following, following + length)))
            following += length
        blocks.append(block)
    return blocks


class Numbers:
    """Examples that are their own sample id, in blocks of the given sizes; `broken` blocks cannot be read."""

    name = "train"

    def __init__(self, block_examples: Sequence[int], broken: Sequence[int] = ()) -> None:
        self.block_examples = np.array(block_examples, np.int64)
        self.broken = set(broken)
        self.asked: set[int] = set()

    def __len__(self) -> int:
        return int(self.block_examples.sum())

    def gather(self, ids: np.ndarray, out: Buffers | None = None, blocks: Any = None) -> dict[str, Any]:
        blocks = np.cumsum(self.block_examples).searchsorted(ids, side="right")
        if damaged := sorted(self.broken & set(blocks.tolist())):
            raise Damaged(f"block {damaged[0]} is damaged")
        memory = out if out is not None else Buffers()
        numbers = memory.take("id", (len(ids), 2), np.int64)
        numbers[:] = ids[:, None]
        return {"id": numbers}

    def prefetch(self, blocks: np.ndarray) -> None:
        self.asked.update(blocks.tolist())


class Lists(Numbers):
    """Examples whose value is a list of their own sample id, of 0 to 9 elements."""

    def lengths(self, ids: np.ndarray) -> np.ndarray:
        return ids * 7 % 10

    def gather(self, ids: np.ndarray, out: Buffers | None = None, blocks: Any = None) -> dict[str, Any]:
        lengths = self.lengths(ids)
        return {"list": Ragged.joined(np.repeat(ids, lengths), np.cumsum([0, *lengths.tolist()]))}
