"""The four kinds of data, as raw files from which each loader's own format is written.

    a  rows of 2,048 uint16 tokens                    batch: 8 rows
    b  documents of a few to some thousand tokens     batch: 8 rows of 2,048 tokens, packed, with their boundaries
    c  images, uint8 (3, 32, 32)                      batch: 256
    d  blobs of 20,000 bytes                          batch: 64

A token row or document begins with the end mark 0; then come two tokens that hold its number, so that what a loader
gives can be counted. Images and blobs begin with their number as uint32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

SEQ_LEN = 2048
BLOB_BYTES = 20_000
NUM_CHUNKS = 12  # files, shards or chunks of every format that lets one choose
_BASE = 30_000  # ids are written in digits 1.._BASE


@dataclass(frozen=True)
class Case:
    """`raw` holds rows.bin (all rows) and, for documents, offsets.npy."""

    key: str
    num_examples: int
    raw: Path

    @property
    def batch(self) -> int:
        return {"a": 8, "b": 8, "c": 256, "d": 64}[self.key]

    @property
    def dtype(self) -> type:
        return np.uint16 if self.key in "ab" else np.uint8

    @property
    def shape(self) -> tuple[int, ...]:
        """Of an example; of documents, of a packed one."""
        return {"a": (SEQ_LEN,), "b": (SEQ_LEN,), "c": (3, 32, 32), "d": (BLOB_BYTES,)}[self.key]

    @property
    def batch_bytes(self) -> int:
        """Of the content of a batch: what a training step consumes."""
        return self.batch * int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize

    @property
    def raw_bytes(self) -> int:
        return (self.raw / "rows.bin").stat().st_size

    @property
    def num_batches(self) -> int:
        """Of an epoch, about."""
        return self.raw_bytes // self.batch_bytes

    def flat(self) -> np.ndarray:
        """All rows, mapped: 1-D."""
        return np.memmap(self.raw / "rows.bin", self.dtype, "r")

    def matrix(self) -> np.ndarray:
        """All rows of one shape, mapped: (n, *shape)."""
        return self.flat().reshape(-1, *self.shape)

    def rows(self) -> Iterator[np.ndarray]:
        if self.key != "b":
            yield from self.matrix()
            return
        flat, offsets = self.flat(), np.load(self.raw / "offsets.npy")
        for start, stop in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
            yield flat[start:stop]


def make_case(key: str, folder: Path, num_bytes: int | None = None, num_examples: int | None = None) -> Case:
    """Write random rows of about num_bytes, or so many."""
    generator = np.random.default_rng(7)
    folder.mkdir(parents=True, exist_ok=True)
    if key == "b":
        assert num_bytes is not None
        lengths = np.clip(generator.lognormal(6.0, 1.0, 10 + num_bytes // 400), 8, 8192).astype(np.int64)
        lengths = lengths[: int(np.searchsorted(np.cumsum(lengths), num_bytes // 2)) + 1]
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
        flat = generator.integers(1, 50_000, offsets[-1], np.uint16)
        ids = np.arange(len(lengths))
        flat[offsets[:-1]] = 0
        flat[offsets[:-1] + 1], flat[offsets[:-1] + 2] = 1 + ids % _BASE, 1 + ids // _BASE
        flat.tofile(folder / "rows.bin")
        np.save(folder / "offsets.npy", offsets)
        return Case(key, len(ids), folder)
    case = Case(key, 0, folder)
    size = case.batch_bytes // case.batch
    count = num_examples if num_examples is not None else max(4 * case.batch, (num_bytes or 0) // size)
    rows = generator.integers(1, 50_000 if key == "a" else 255, (count, *case.shape), case.dtype)
    ids = np.arange(count)
    if key == "a":
        rows[:, 0], rows[:, 1], rows[:, 2] = 0, 1 + ids % _BASE, 1 + ids // _BASE
    else:
        rows.reshape(count, -1)[:, :4] = ids.astype("<u4")[:, None].view(np.uint8)
    rows.tofile(folder / "rows.bin")
    return Case(key, count, folder)


def batch_ids(case: Case, batch: Any) -> np.ndarray:
    """The numbers of a batch's examples (not of packed documents), (n,) int64."""
    if case.key == "a":
        rows = np.stack([np.asarray(row) for row in batch]) if isinstance(batch, list) else np.asarray(batch)
        rows = rows.reshape(len(rows), -1).view(np.uint16) if rows.itemsize == 2 else rows
        return rows[:, 1].astype(np.int64) - 1 + (rows[:, 2].astype(np.int64) - 1) * _BASE
    assert case.key != "b"
    heads = [
        bytes(row[:4]) if isinstance(row, bytes) else np.asarray(row).reshape(-1)[:4].astype(np.uint8).tobytes()
        for row in batch
    ]
    return np.frombuffer(b"".join(heads), "<u4").astype(np.int64)


def num_bytes(case: Case, batch: Any) -> int:
    """Check that a batch has the shape it should have, and give the size of its content."""
    if case.key == "b":
        tokens, boundaries = batch
        assert len(tokens) == case.batch and len(boundaries) >= 1, (len(tokens), len(boundaries))
    elif case.key == "d":
        assert len(batch) == case.batch and all(len(blob) == BLOB_BYTES for blob in batch), len(batch)
    else:
        assert tuple(batch.shape) in ((case.batch, *case.shape), (case.batch, SEQ_LEN + 1)), batch.shape
    return case.batch_bytes
