"""Where the blocks of a split come from: local files that are mapped, or a cache of remote ones (cache.py).

Whatever is read of a block goes through locate(), which checks its digest when it is first used.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import xxhash

from data_pipelines.blocks import Blocks
from data_pipelines.columns import Column, first_buffers
from data_pipelines.damage import BlockDamaged, DamagedBlock, DamageLog, DamagePolicy, first_rows
from data_pipelines.mapped import MappedFiles

PAUSE_S = 0.1  # before a block that fails its digest is read from the disk for the last time


class BlockSource(Protocol):
    """The contents of one split's blocks, in one flat range of memory. Safe to use from several threads."""

    def locate(self, blocks: np.ndarray) -> np.ndarray:
        """Where the content of each of the blocks (n,) begins in flat(): (n,) int64. They stay there until release().

        Their digests are right, and their lists lie in them (offsets_hold): who reads them need not check again.
        Raises BlockDamaged for others, and notes them on the DamageLog.
        """

    def release(self, blocks: np.ndarray) -> None:
        """The caller of locate() is done with these blocks."""

    def flat(self) -> Any:
        """The range: 1-D uint8, a numpy array or a torch tensor; always the same memory."""

    def prefetch(self, blocks: np.ndarray) -> None:
        """Say which blocks (n,) are wanted soon, in the order of their use; one may come several times."""

    def close(self) -> None:
        """Let go of everything."""


class LocalBlocks:
    """A BlockSource of mapped files. Blocks stay where they are, so nothing is ever fetched or evicted."""

    def __init__(
        self, files: MappedFiles, blocks: Blocks, columns: Sequence[Column], policy: DamagePolicy, log: DamageLog
    ) -> None:
        self._files = files
        self._blocks = blocks
        self._columns = columns
        self._policy = policy
        self._log = log
        self._located = np.full(len(blocks), -1, np.int64)

    def locate(self, blocks: np.ndarray) -> np.ndarray:
        """See BlockSource."""
        found = self._located[blocks]
        if found.size and np.minimum.reduce(found) < 0:
            self._check(sorted(set(blocks[found < 0].tolist())))  # np.unique would import numpy.ma: 15 ms
            found = self._located[blocks]
        return found

    def release(self, blocks: np.ndarray) -> None:
        """Nothing to do."""

    def flat(self) -> np.ndarray:
        """See BlockSource."""
        return self._files.array

    def prefetch(self, blocks: np.ndarray) -> None:
        """Read ahead what was not used yet."""
        new = blocks[self._located[blocks] < 0]
        for block in dict.fromkeys(new.tolist()):
            file, start, stop = self._place(block)
            readable = self._files.map(file)
            if readable is not None and stop <= readable:
                self._files.will_need(self._files.offset(file) + start, stop - start)

    def close(self) -> None:
        """Let go of the files."""
        self._located.fill(-1)

    def _place(self, block: int) -> tuple[int, int, int]:
        every = self._blocks
        return int(every.file[block]), int(every.start[block]), int(every.stop[block])

    def _check(self, blocks: Sequence[int]) -> None:
        damaged = []
        for block in blocks:
            file, start, stop = self._place(block)
            content = self._content(file, start, stop)
            cause = self._damage(block, content)
            if cause is None:
                self._located[block] = self._files.offset(file) + start
            else:
                damaged.append(self._describe(block, content, cause))
        if damaged:
            self._log.add(damaged)
            raise BlockDamaged(damaged, self._policy.action)

    def _content(self, file: int, start: int, stop: int) -> np.ndarray | None:
        """The block's bytes, (n,) uint8; None where the file lacks them."""
        readable = self._files.map(file)
        if readable is None or readable < stop:
            return None
        offset = self._files.offset(file)
        return self._files.array[offset + start : offset + stop]

    def _damage(self, block: int, content: np.ndarray | None) -> str | None:
        """What is wrong with a block."""
        file, start, stop = self._place(block)
        if content is None:
            readable = self._files.map(file)
            return "is missing" if readable is None else f"is cut off: the file ends at byte {readable}, not {stop}"
        expected = int(self._blocks.xxh3[block])
        for pause_s in (0.0, PAUSE_S, None):
            if xxhash.xxh3_64_intdigest(content.data) == expected:
                break
            if pause_s is None:
                return "fails its digest"
            time.sleep(pause_s)
            self._files.read_again(file, start, stop)
        return None if offsets_hold(content, self._blocks, block, self._columns) else "holds lists beyond its end"

    def _describe(self, block: int, content: np.ndarray | None, cause: str) -> DamagedBlock:
        every = self._blocks
        return DamagedBlock(
            block=block,
            file=str(self._files.path(int(every.file[block]))),
            number=int(every.number[block]),
            first_row=int(first_rows(every.rows)[block]),
            rows=int(every.rows[block]),
            cause=cause,
            keys=None if content is None else first_and_last_key(content, every, block, self._columns),
        )


def offsets_hold(content: np.ndarray, blocks: Blocks, block: int, columns: Sequence[Column]) -> bool:
    """Whether every list of a block lies in it. A digest tells that bytes are as written, this that they are sound."""
    rows = int(blocks.rows[block])
    places = blocks.content_buffers[block].tolist()
    for column, first in zip(columns, first_buffers(columns).values(), strict=True):
        if not column.is_ragged:
            continue
        offsets = content[places[first] : places[first] + 4 * (rows + 1)].view("<i4")
        end = places[first + 1] + int(offsets[-1]) * column.item_bytes
        if offsets[0] != 0 or (offsets[1:] < offsets[:-1]).any() or end > len(content):
            return False
        if column.name == "tokens" and int(offsets[-1]) != int(blocks.tokens[block]):
            return False
    return True


def first_and_last_key(
    content: np.ndarray, blocks: Blocks, block: int, columns: Sequence[Column]
) -> tuple[str, str] | None:
    """The keys of a damaged block's first and last row, where they can still be read."""
    first = first_buffers(columns).get("key")
    if first is None:
        return None
    rows = int(blocks.rows[block])
    place, values = blocks.content_buffers[block][first : first + 2].tolist()
    offsets = content[place : place + 4 * (rows + 1)].view("<i4").tolist()
    keys = []
    for start, stop in ((offsets[0], offsets[1]), (offsets[-2], offsets[-1])):
        if not 0 <= start <= stop <= min(start + 4096, len(content) - values):
            return None
        try:
            keys.append(content[values + start : values + stop].tobytes().decode("utf-8"))
        except UnicodeDecodeError:
            return None
    return (keys[0], keys[1]) if all(map(str.isprintable, keys)) else None
