"""Which rows are held out: decided row by row from a hash, so that the split stays as it is when data is added.

A row's group is a number of 64 bits: the hash of its content, or of the group that it shares with others (its
near-duplicates, the same speaker). A row is held out when that number falls below validation_fraction of its range.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from configs.errors import UsageError

TRAIN, VALIDATION = "train", "validation"
SPLITS = (TRAIN, VALIDATION)  # always there, though they may be empty; a source's rows may name others
GROUP_RANGE = 1 << 64
# How much of a source is looked at for both sides of the split (then the extremes seen so far stand in).
LOOK_BYTES = 64 << 20


class Member(NamedTuple):
    """What the split needs to know of a row. own: the split that the row itself names, if it does."""

    own: str | None
    group: int
    num_bytes: int


@dataclass(frozen=True)
class Split:
    """The rule. lowest and highest are set where a small source would have nothing on one side: see `of`."""

    fraction: float
    lowest: int | None = None
    highest: int | None = None

    def name(self, own: str | None, group: int) -> str:
        """The split of a row."""
        if own is not None:
            return own
        if self.fraction == 0 or group == self.highest:
            return TRAIN
        return VALIDATION if group == self.lowest or group < self.fraction * GROUP_RANGE else TRAIN

    @classmethod
    def of(cls, members: Iterable[Member], fraction: float, name: str) -> Split:
        """The split of a source whose rows begin with `members`; reads them until both sides have something.

        Where none of the rows (at least of the first LOOK_BYTES) is held out, the group of the lowest hash is; where
        all are, the one of the highest is not.

        Raises:
            UsageError: there are no rows, none to train on, or too few to hold one out.
        """
        rule = cls(fraction)
        seen: set[str] = set()
        lowest, highest, count, size = GROUP_RANGE, -1, 0, 0
        for member in members:
            seen.add(rule.name(member.own, member.group))
            count += 1
            size += member.num_bytes
            if member.own is None:
                lowest, highest = min(lowest, member.group), max(highest, member.group)
            if TRAIN in seen and (VALIDATION in seen or fraction == 0):
                return rule
            if size > LOOK_BYTES and lowest < highest:
                break
        if not count:
            raise UsageError(
                f"The source {name} has no rows: it has none, or all are empty, filtered out or bad. Check what it is "
                "given in data."
            )
        if highest < 0:  # every row names its split
            if TRAIN not in seen:
                raise UsageError(
                    f"The rows of the source {name} all name their split, and none is '{TRAIN}' "
                    f"({', '.join(sorted(seen))}). Rename one, or leave the splits out."
                )
            return rule
        if lowest == highest and seen != {TRAIN, VALIDATION} and fraction > 0:
            raise UsageError(
                f"The source {name} has {count} row(s), all nearly the same, so none can be held out for validation. "
                "Give it more (for the source text, data.separator cuts a file into several), or set "
                "data.validation_fraction=0."
            )
        return cls(fraction, lowest if VALIDATION not in seen else None, highest if TRAIN not in seen else None)
