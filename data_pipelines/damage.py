"""Damaged blocks: what the policy says, how an error names them, and the list the loader asks for.

A block that fails its digest is read again, with back-off, before it counts as damaged (fetch.py for remote stores,
block_source.py for local disks). What is damaged then stops the run, or, under "skip", is kept in a DamageLog: the
ranks agree between two steps on what to leave out, so that every one of them, and every resume, leaves out the same.
A store that is out of reach is no damage: it stops the run under either policy, for nothing of the data is lost.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from configs.errors import Damaged

SKIP_REMEDY = "To train without what is damaged set data.damage to skip: every rank then leaves out the same examples."
REMEDY = (
    "`shardyard data verify` names all that is damaged. Copy the file again from where it is whole, or delete the "
    "data set's folder and run the same command again: it is built anew from its source."
)
_NAMED = 10  # runs of blocks in a message


@dataclass(frozen=True)
class DamagePolicy:
    """What is done about blocks that fail their digests; and, of remote stores, how they are read.

    action: "stop" raises BlockDamaged; "skip" raises it too, after the blocks have been put on the DamageLog from
    which the loader takes them between steps.
    """

    action: Literal["stop", "skip"] = "stop"
    retry_s: float = 120.0  # budget: a fetch is tried again until this long after its first failure
    stall_s: float = 30.0  # a request that gives nothing for so long is abandoned and made again
    attempts: int = 3  # fetches of a block that fails its digest each time, before it counts as damaged
    cache_path: str | None = None  # the node's folder of fetched blocks (block_cache.py); None: in the user's cache
    cache_bytes: int = 16 << 30  # what that folder may take on the disk, at most


@dataclass(frozen=True)
class DamagedBlock:
    """One damaged block; str() is one clause of a sentence."""

    block: int  # number in its split
    file: str  # path or URI
    number: int  # of the record batch within the file
    first_row: int  # of the split
    rows: int
    cause: str  # "fails its digest", "is missing", ...
    keys: tuple[str, str] | None = None  # of the first and last row, where they could be read

    def __str__(self) -> str:
        keys = f", '{self.keys[0]}' to '{self.keys[1]}'" if self.keys else ""
        rows = f"rows {self.first_row} to {self.first_row + self.rows - 1} of its split{keys}"
        return f"{self.file}: block {self.number} ({rows}) {self.cause}"


class BlockDamaged(Damaged):
    """Blocks stay damaged however often they are read. `found` has them; the message names the first few."""

    def __init__(self, found: Sequence[DamagedBlock], action: str = "stop") -> None:
        self.found = tuple(sorted(found, key=lambda damaged: damaged.block))
        self.action = action
        named = "; ".join(map(str, self.found[:3]))
        more = f"; and {len(self.found) - 3} more blocks" if len(self.found) > 3 else ""
        remedy = f"{REMEDY} {SKIP_REMEDY}" if action == "stop" else REMEDY
        super().__init__(f"The data set is damaged. {named}{more}. {remedy}")

    def __reduce__(self) -> tuple[Any, ...]:
        return BlockDamaged, (self.found, self.action)

    @property
    def blocks(self) -> tuple[int, ...]:
        """Their numbers in the split, ascending."""
        return tuple(damaged.block for damaged in self.found)


@dataclass(frozen=True)
class Damage:
    """A file of a data set, or blocks of it one after the other, that fail their digests; str() is one clause.

    blocks: numbers of the first and the last record batch in the file; None: the file itself is meant. rows: numbers in
    the split of the first and the last row; keys: theirs, where they could be read.
    """

    file: str
    cause: str
    blocks: tuple[int, int] | None = None
    split: str | None = None
    rows: tuple[int, int] | None = None
    keys: tuple[str, str] | None = None

    def __str__(self) -> str:
        if self.blocks is None or self.rows is None:
            return f"{self.file}: {self.cause}"
        first, last = self.blocks
        blocks = f"block {first}" if first == last else f"blocks {first} to {last}"
        keys = f", '{self.keys[0]}' to '{self.keys[1]}'" if self.keys else ""
        return f"{self.file}, {blocks} (examples {self.rows[0]} to {self.rows[1]} of {self.split}{keys}): {self.cause}"

    def joined(self, after: Damage) -> Damage | None:
        """Both as one, where `after` is the next block of the same file and is damaged alike."""
        same = (self.file, self.cause, self.split) == (after.file, after.cause, after.split)
        if not same or not (self.blocks and after.blocks and self.rows and after.rows):
            return None
        if after.blocks[0] != self.blocks[1] + 1:
            return None
        keys = (self.keys[0], after.keys[1]) if self.keys and after.keys else None
        return replace(self, blocks=(self.blocks[0], after.blocks[1]), rows=(self.rows[0], after.rows[1]), keys=keys)


class DatasetDamaged(Damaged):
    """A data set that fails its digests. `damage` has all of it; the message names the first."""

    def __init__(self, path: str, damage: Sequence[Damage], build: str) -> None:
        self.damage = tuple(damage)
        named = "; ".join(map(str, self.damage[:_NAMED]))
        more = f"; and {len(self.damage) - _NAMED} more, which --json lists" if len(self.damage) > _NAMED else ""
        super().__init__(
            f"The data set {path} is damaged: {named}{more}. Copy what is damaged again from where it is whole, or "
            f"delete that folder and build it anew: {build}"
        )


class DamageLog:
    """The damaged blocks that one process found in one split. Safe to use from several threads; asking is cheap."""

    def __init__(self) -> None:
        self._found: dict[int, DamagedBlock] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._found)

    def add(self, found: Iterable[DamagedBlock]) -> None:
        """Note damaged blocks; one that is known already keeps its first cause."""
        with self._lock:
            for damaged in found:
                self._found.setdefault(damaged.block, damaged)

    def blocks(self) -> list[int]:
        """Numbers of all blocks found so far, ascending."""
        with self._lock:
            return sorted(self._found)

    def __getitem__(self, block: int) -> DamagedBlock:
        return self._found[block]

    def __contains__(self, block: int) -> bool:
        return block in self._found


def first_rows(rows: np.ndarray) -> np.ndarray:
    """(blocks,) int64: the number in the split of each block's first row, from the rows of each block."""
    starts = np.zeros(len(rows), np.int64)
    np.cumsum(rows[:-1], out=starts[1:])
    return starts
