"""What a loader leaves out of its order: blocks that the ranks agreed to skip, and damaged ones that it just met."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from configs.errors import Damaged
from data_pipelines.data_state import Exceptions
from data_pipelines.examples import Examples
from data_pipelines.order import Order
from data_pipelines.ownership import owners

_AT_ONCE = 2048  # positions that are looked at for one that is whole


class Omissions:
    """The exceptions of a run, and the damaged blocks found that are none yet."""

    def __init__(self, examples: Examples, order: Order, exceptions: Exceptions) -> None:
        self.exceptions = exceptions
        self._examples = examples
        self._order = order
        self._block_ends = np.cumsum(examples.block_examples)
        self._damaged: set[int] = set()

    def __bool__(self) -> bool:
        return bool(self.exceptions.skipped or self._damaged)

    def found(self) -> list[tuple[str, int]]:
        """Damaged blocks (split, number) that are not skipped yet."""
        if not self._damaged:
            return []
        known = {(skipped.split, skipped.block) for skipped in self.exceptions.skipped}
        return sorted({(self._examples.name, block) for block in tuple(self._damaged)} - known)

    def skip(self, blocks: Sequence[tuple[str, int]], position: int) -> None:
        """Leave out blocks (split, number) from a position on. Raises Damaged where nothing would be left."""
        exceptions = self.exceptions.skip(blocks, position)
        if not self._is_anything_left(exceptions, set()):
            raise Damaged(
                f"Every block of the split '{self._examples.name}' is damaged. `shardyard data verify` names the "
                "files; copy them again, or delete the data set's folder so that it is built anew."
            )
        self.exceptions = exceptions

    def blocks_of(self, ids: np.ndarray) -> np.ndarray:
        """The block of each of the examples (n,): (n,) int64."""
        return owners(self._block_ends, ids)

    def _kept(self, positions: np.ndarray, ids: np.ndarray) -> np.ndarray:
        blocks = self.blocks_of(ids)
        kept = self.exceptions.kept(self._examples.name, blocks, positions)
        if self._damaged:
            kept &= ~np.isin(blocks, list(self._damaged))
        return kept

    def leave_out(
        self, positions: np.ndarray, ids: np.ndarray, sizes: np.ndarray, slots: list[tuple[int, bool]]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[tuple[int, bool]]]:
        """Without the examples of skipped and damaged blocks; a micro-batch without any left takes the next example."""
        kept = self._kept(positions, ids)
        if kept.all():
            return positions, ids, sizes, slots
        ends = np.cumsum(sizes)
        new_positions, new_ids, new_slots = [], [], []
        for start, stop, (index, idle) in zip((ends - sizes).tolist(), ends.tolist(), slots, strict=True):
            here = kept[start:stop]
            if here.any():
                new_positions.append(positions[start:stop][here])
                new_ids.append(ids[start:stop][here])
            else:
                position = self._next_kept(int(positions[start]))
                new_positions.append(np.array([position]))
                new_ids.append(self._order.sample_ids(np.array([position])))
            new_slots.append((index, idle or not here.any()))
        new_sizes = np.array([len(part) for part in new_ids])
        return np.concatenate(new_positions), np.concatenate(new_ids), new_sizes, new_slots

    def without(self, positions: np.ndarray, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Positions and ids (n,) less those of skipped and damaged blocks."""
        kept = self._kept(positions, ids)
        return positions[kept], ids[kept]

    def _next_kept(self, position: int) -> int:
        """The first position from here on whose example is not left out."""
        for start in range(position, position + 4 * len(self._examples) + _AT_ONCE, _AT_ONCE):
            positions = np.arange(start, start + _AT_ONCE, dtype=np.int64)
            kept = np.flatnonzero(self._kept(positions, self._order.sample_ids(positions)))
            if len(kept):
                return start + int(kept[0])
        raise Damaged(
            f"No example from position {position} on can be read: what is left out leaves nothing. `shardyard data "
            "verify` names the files; copy them again."
        )

    def _is_anything_left(self, exceptions: Exceptions, found: set[int]) -> bool:
        whole = np.ones(len(self._block_ends), bool)
        for skipped in exceptions.skipped:
            if skipped.split == self._examples.name:
                whole[skipped.block] = False
        whole[sorted(found)] = False
        return bool(self._examples.block_examples[whole].any())

    def find_damage(self, ids: np.ndarray) -> None:
        """Which blocks of these examples cannot be read. Raises Damaged where it is none of them, or all there are."""
        blocks, places = np.unique(self.blocks_of(ids), return_index=True)
        found, error = set(), None
        for block, place in zip(blocks.tolist(), places.tolist(), strict=True):
            try:
                self._examples.gather(ids[place : place + 1])
            except Damaged as damaged:
                found.add(block)
                error = damaged
        if not found or not self._is_anything_left(self.exceptions, self._damaged | found):
            raise error or Damaged("The examples of a step cannot be read together, though each can alone.")
        self._damaged |= found
