"""Leaving out damaged blocks (data.damage=skip): on all ranks alike, and in evaluation too."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from configs.errors import Damaged
from data_pipelines.buffers import Buffers
from data_pipelines.damage import BlockDamaged
from data_pipelines.data_state import Exceptions
from data_pipelines.examples import Examples
from data_pipelines.loader import evaluation_batches
from trainer.distributed import World, all_gather_json, all_sum

NumberedBlock = tuple[str, int]  # split, number of the block in it


def agreed(found: Sequence[NumberedBlock]) -> list[NumberedBlock]:
    """The blocks that any rank has found, sorted. Every rank calls it; costs one small sum where nobody found any."""
    if not all_sum([float(len(found))])[0]:
        return []
    return sorted({(str(split), int(block)) for each in all_gather_json(list(found)) for split, block in each})


class WithoutBlocks:
    """Examples less those of some blocks, numbered anew; see data_pipelines.examples.Examples."""

    def __init__(self, examples: Examples, blocks: Iterable[int]) -> None:
        sizes = examples.block_examples
        self.name = examples.name
        left_out = np.array(sorted(blocks), np.int64)
        self.blocks = np.setdiff1d(np.arange(len(sizes)), left_out)  # (kept,): numbers of those that stay
        self.block_examples: np.ndarray = sizes[self.blocks]
        self._examples = examples
        self._ends = np.cumsum(self.block_examples)
        self._shifts = np.cumsum(sizes)[self.blocks] - self._ends

    def __len__(self) -> int:
        return int(self.block_examples.sum())

    def gather(self, ids: np.ndarray, out: Buffers | None = None, blocks: np.ndarray | None = None) -> dict[str, Any]:
        """See Examples."""
        return self._examples.gather(self.original_ids(ids), out, None if blocks is None else self.blocks[blocks])

    def prefetch(self, blocks: np.ndarray) -> None:
        """See Examples."""
        self._examples.prefetch(self.blocks[blocks])

    def original_ids(self, ids: np.ndarray) -> np.ndarray:
        """What the examples (n,) int64 were numbered before."""
        return ids + self._shifts[self._ends.searchsorted(ids, side="right")] if len(ids) else ids


def without_skipped(examples: Examples, exceptions: Exceptions) -> WithoutBlocks:
    """The examples less the blocks of their split that are skipped, from whatever position on."""
    return WithoutBlocks(examples, {one.block for one in exceptions.skipped if one.split == examples.name})


def unreadable(
    examples: WithoutBlocks, world: World, micro_batch_size: int, num_examples: int | None
) -> list[NumberedBlock]:
    """The damaged blocks that this rank would meet in an evaluation: reads what it reads.

    Raises:
        Damaged: nothing would be left.
    """
    found: set[int] = set()
    while True:
        remaining = WithoutBlocks(examples, {int(np.flatnonzero(examples.blocks == block)[0]) for block in found})
        if len(examples) and not len(remaining):
            raise Damaged(
                f"Every block of split '{examples.name}' that is left is damaged. `shardyard data verify` names the "
                "files; copy them again, or delete the data set's folder so that it is built anew."
            )
        try:
            for _ in evaluation_batches(
                remaining,
                micro_batch_size=micro_batch_size,
                rank=world.rank,
                world_size=world.size,
                num_examples=num_examples,
            ):
                pass
            return [(examples.name, block) for block in sorted(found)]
        except BlockDamaged as error:
            found.update(error.blocks)
