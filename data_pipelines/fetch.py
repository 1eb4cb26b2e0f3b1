"""Whole blocks from a remote store: fetched (ranges.py), checked, decompressed, checked again.

Nobody sees a block before its digest was found right. One that fails is fetched again, with back-off, before it counts
as damaged.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xxhash

from configs.errors import NotFound
from data_pipelines.block_source import first_and_last_key, offsets_hold
from data_pipelines.blocks import Blocks
from data_pipelines.columns import Column
from data_pipelines.damage import BlockDamaged, DamagedBlock, DamagePolicy, first_rows
from data_pipelines.ranges import Counters, RangeReader, Truncated, pauses
from data_pipelines.storage import Store


class BlockFetcher:
    """The blocks of one split, from a remote store. Safe to use from several threads."""

    def __init__(
        self,
        store: Store,
        files: Sequence[str],
        blocks: Blocks,
        columns: Sequence[Column],
        policy: DamagePolicy,
        counters: Counters,
    ) -> None:
        self._reader = RangeReader(store, policy, counters)
        self._store = store
        self._files = files
        self._blocks = blocks
        self._columns = columns
        self._policy = policy
        self._counters = counters

    def content(self, block: int) -> bytes | memoryview:
        """A block's content (blocks.py), whole and sound.

        Raises BlockDamaged for one that is not there, is cut off or fails its digest each time it is fetched, and
        Unreachable where the store fails for longer than the policy's retry_s.
        """
        every = self._blocks
        name = self._files[int(every.file[block])]
        waits, cause = pauses(f"{block}"), ""
        for attempt in range(self._policy.attempts):
            if attempt:
                self._reader.forget(name)
                self._reader.pause(next(waits))
            self._counters.add("fetches")
            stored, content = b"", None
            try:
                stored = self._reader.read(name, int(every.start[block]), int(every.stop[block]))
                content = self._decoded(block, stored)
                fault = content_damage(content, every, block, self._columns)
                if fault is None:
                    assert content is not None
                    return content
                cause = fault
            except NotFound:
                cause = "is missing"
            except Truncated as error:
                cause = f"is cut off: the file ends at byte {error.size}, not {every.stop[block]}"
            self._counters.add("damaged_fetches")
        raise BlockDamaged([self._describe(block, cause, stored if content is None else content)], self._policy.action)

    def close(self) -> None:
        """Give up what is being tried."""
        self._reader.close()

    def _decoded(self, block: int, stored: bytes) -> bytes | memoryview | None:
        """The content of a stored block; None where the stored bytes fail their digest, or are no message."""
        if xxhash.xxh3_64_intdigest(stored) != int(self._blocks.xxh3[block]):
            return None
        if not self._blocks.compressed:
            return stored
        import pyarrow as pa

        from data_pipelines.writer import decompressed

        try:
            return decompressed(stored, self._columns)
        except (pa.ArrowException, OSError, ValueError):
            return None

    def _describe(self, block: int, cause: str, content: bytes | memoryview) -> DamagedBlock:
        every = self._blocks
        whole = len(content) == int(every.content_bytes[block])
        keys = first_and_last_key(np.frombuffer(content, np.uint8), every, block, self._columns) if whole else None
        return DamagedBlock(
            block=block,
            file=self._store.path(self._files[int(every.file[block])]),
            number=int(every.number[block]),
            first_row=int(first_rows(every.rows)[block]),
            rows=int(every.rows[block]),
            cause=cause,
            keys=keys,
        )


def content_damage(
    content: bytes | memoryview | np.ndarray | None, blocks: Blocks, block: int, columns: Sequence[Column]
) -> str | None:
    """What is wrong with a block's content, from a store or from the cache; None for nothing."""
    digest = (blocks.content_xxh3 if blocks.compressed else blocks.xxh3)[block]
    raw = np.frombuffer(b"" if content is None else content, np.uint8)
    if content is None or xxhash.xxh3_64_intdigest(raw.data) != int(digest):
        return "fails its digest"
    return None if offsets_hold(raw, blocks, block, columns) else "holds lists beyond its end"
