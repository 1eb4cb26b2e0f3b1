"""What a run's data state holds beside the number of examples seen: exceptions, each effective from a position."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from configs.errors import Damaged

_SKIP_BLOCK, _SKIP_EXAMPLES = "skip_block", "skip_examples"


@dataclass(frozen=True, order=True)
class SkippedBlock:
    """The examples of a block are left out of every batch from a position of the global order on."""

    position: int
    split: str
    block: int


@dataclass(frozen=True, order=True)
class SkippedExamples:
    """Positions [start, stop) of the global order are passed over: the examples after them move up."""

    start: int
    stop: int


@dataclass(frozen=True)
class Exceptions:
    """What a run leaves out, sorted by position: blocks, and examples. Immutable; equal on all ranks."""

    skipped: tuple[SkippedBlock, ...] = ()
    passed: tuple[SkippedExamples, ...] = ()  # they do not overlap

    def skip(self, blocks: Iterable[tuple[str, int]], position: int) -> Exceptions:
        """These, and the blocks (split, number) from `position` on; a block that is skipped already stays as it is."""
        known = {(skipped.split, skipped.block) for skipped in self.skipped if skipped.position <= position}
        new = {SkippedBlock(position, split, int(block)) for split, block in blocks if (split, int(block)) not in known}
        return Exceptions(tuple(sorted({*self.skipped, *new})), self.passed)

    def pass_over(self, positions: np.ndarray) -> Exceptions:
        """These, and the examples at (n,) ascending positions."""
        runs = np.split(positions, np.flatnonzero(np.diff(positions) != 1) + 1)
        new = {SkippedExamples(int(run[0]), int(run[-1]) + 1) for run in runs}
        return Exceptions(self.skipped, tuple(sorted({*self.passed, *new})))

    def positions(self, begin: int, numbers: np.ndarray) -> np.ndarray:
        """Where the examples number (...) int64, counted from 0, stand that a run takes from position `begin` on."""
        found = begin + numbers
        for passed in self.passed:  # sorted: what it moves up to may have to move on
            if passed.start >= begin:
                found = found + (found >= passed.start) * (passed.stop - passed.start)
        return found

    def num_passed(self, begin: int) -> int:
        """How many examples are passed over from position `begin` on."""
        return sum(passed.stop - passed.start for passed in self.passed if passed.start >= begin)

    def kept(self, split: str, blocks: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Which examples stay: (n,) bool, for examples of (n,) `blocks` at (n,) `positions`."""
        first: dict[int, int] = {}
        for skipped in self.skipped:  # sorted: the earliest position of a block comes first
            if skipped.split == split:
                first.setdefault(skipped.block, skipped.position)
        if not first:
            return np.ones(len(blocks), bool)
        numbers = np.array(sorted(first), np.int64)
        since = np.array([first[number] for number in numbers.tolist()], np.int64)
        places = np.minimum(np.searchsorted(numbers, blocks), len(numbers) - 1)
        return (numbers[places] != blocks) | (positions < since[places])

    def state(self) -> list[dict[str, Any]]:
        """For a checkpoint, as plain JSON values."""
        blocks = [
            {"position": skipped.position, "kind": _SKIP_BLOCK, "split": skipped.split, "block": skipped.block}
            for skipped in self.skipped
        ]
        examples = [
            {"position": passed.start, "kind": _SKIP_EXAMPLES, "start": passed.start, "stop": passed.stop}
            for passed in self.passed
        ]
        return [*blocks, *examples]

    @classmethod
    def from_state(cls, state: Sequence[Any]) -> Exceptions:
        """What state() gave. Raises Damaged for anything else."""
        try:
            unknown = sorted({entry["kind"] for entry in state} - {_SKIP_BLOCK, _SKIP_EXAMPLES})
            if unknown:
                raise Damaged(
                    f"The checkpoint's data state holds exceptions of the kind {', '.join(unknown)}, which this "
                    "version does not know. Resume with the version that wrote it."
                )
            blocks = [one for one in state if one["kind"] == _SKIP_BLOCK]
            examples = [one for one in state if one["kind"] == _SKIP_EXAMPLES]
            skipped = [SkippedBlock(int(one["position"]), str(one["split"]), int(one["block"])) for one in blocks]
            passed = [SkippedExamples(int(one["start"]), int(one["stop"])) for one in examples]
            return cls(tuple(sorted(skipped)), tuple(sorted(passed)))
        except (KeyError, TypeError, ValueError) as error:
            raise Damaged(
                f"The checkpoint's data state cannot be read ({type(error).__name__}: {error}). Resume from an older "
                "checkpoint."
            ) from error
