"""Several data sets in one order, in given shares: computed from the position, never drawn.

A table of L = 10,000 slots says which source stands at each position, repeated for ever. Source i gets c[i] of the
slots (its share of L, by largest remainder), and its j-th one is at (j + 1/2) / c[i] of the table: so every stretch of
positions holds each source nearly in its share. With shares 3/5 and 2/5, and L = 5:

    position    0 1 2 3 4 | 5 6 7 ...
    source      a b a b a | a b a ...         (a at 1/6 3/6 5/6, b at 1/4 3/4)
    its example 0 0 1 1 2 | 3 2 4 ...

The i-th example of a source is the i-th of its own order (order.py), epoch after epoch. Shares may change at given
positions, and a source may end after `max_epochs`: the others then share what is left. Both begin a new segment with a
table of its own, worked out when the mixture is opened; so a position is found in O(1), whatever came before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from configs.errors import UsageError
from data_pipelines.boundaries import Boundaries
from data_pipelines.buffers import Buffers
from data_pipelines.examples import Examples
from data_pipelines.order import Order
from data_pipelines.rows import Ragged

SLOTS = 10_000


@dataclass(frozen=True)
class Change:
    """From position `at` on, the sources have these weights (sources,)."""

    at: int
    weights: tuple[float, ...]


@dataclass(frozen=True)
class _Segment:
    """A stretch of positions with one table."""

    start: int  # position
    weights: tuple[float, ...]  # (sources,), summing to 1; 0 for those that are not in it
    source: np.ndarray  # (SLOTS,) int64: of each slot
    rank: np.ndarray  # (SLOTS,) int64: how many slots of the same source come before
    slots: tuple[np.ndarray, ...]  # of each source, ascending
    before: np.ndarray  # (sources,) int64: examples of each source before the segment

    def counts(self, position: int) -> np.ndarray:
        """(sources,) int64: examples of each source before a position that is not before the segment."""
        rounds, slot = divmod(position - self.start, SLOTS)
        in_table = np.array([len(slots) for slots in self.slots], np.int64)
        return self.before + rounds * in_table + np.array([slots.searchsorted(slot) for slots in self.slots], np.int64)

    def position_of(self, source: int, number: int) -> int:
        """Where the example `number` of a source would stand, if the segment went on for ever."""
        slots = self.slots[source]
        rounds, rank = divmod(number - int(self.before[source]), len(slots))
        return self.start + rounds * SLOTS + int(slots[rank])


class Schedule:
    """Which source stands at each position, and how many of its examples came before."""

    def __init__(
        self, weights: Sequence[float], caps: Sequence[int | None] | None = None, changes: Sequence[Change] = ()
    ) -> None:
        """weights: (sources,) > 0 or 0; caps: how many examples a source has at most, None for no limit.

        Raises UsageError for weights and changes that cannot be.
        """
        self.num_sources = len(weights)
        self.end: int | None = None  # the position at which every source has ended
        self._segments: list[_Segment] = []
        self._build(_checked(weights, changes), list(caps) if caps is not None else [None] * len(weights))
        self._starts = np.array([segment.start for segment in self._segments], np.int64)

    @property
    def changes(self) -> tuple[int, ...]:
        """The positions at which shares change, ascending."""
        return tuple(segment.start for segment in self._segments[1:])

    def __call__(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(sources, numbers), (n,) int64 each, for (n,) int64 positions: the source's how-manieth example.

        Raises UsageError where all sources have ended.
        """
        if self.end is not None and len(positions) and positions.max() >= self.end:
            raise UsageError(
                f"The mixture has {self.end} examples, and the run goes on to position {int(positions.max())}: every "
                "source has had its max_epochs. Train fewer steps, or raise max_epochs of a source."
            )
        which = self._starts.searchsorted(positions, side="right") - 1
        sources, numbers = np.empty_like(positions), np.empty_like(positions)
        for number in np.unique(which).tolist():
            segment = self._segments[number]
            here = which == number
            rounds, slots = np.divmod(positions[here] - segment.start, np.int64(SLOTS))
            source = segment.source[slots]
            in_table = np.array([len(slots) for slots in segment.slots], np.int64)
            sources[here] = source
            numbers[here] = segment.before[source] + rounds * in_table[source] + segment.rank[slots]
        return sources, numbers

    def counts(self, position: int) -> np.ndarray:
        """(sources,) int64: how many examples of each source stand before a position."""
        number = int(self._starts.searchsorted(position, side="right")) - 1
        return self._segments[max(number, 0)].counts(position)

    def weights(self, position: int) -> tuple[float, ...]:
        """The planned shares at a position, (sources,), summing to 1."""
        return self._segments[int(self._starts.searchsorted(position, side="right")) - 1].weights

    def planned(self, start: int, stop: int) -> np.ndarray:
        """(sources,) float64: the mean of the planned shares over the positions start .. stop - 1, at least one."""
        edges = np.array([*self._starts, np.iinfo(np.int64).max]).clip(start, stop)
        weights = np.array([segment.weights for segment in self._segments])  # (segments, sources)
        return np.diff(edges) @ weights / (stop - start)

    def history(self, position: int) -> list[dict[str, Any]]:
        """The shares up to a position, for a checkpoint: what a resumed run must have in common with it."""
        return [
            {"at": segment.start, "weights": list(segment.weights)}
            for segment in self._segments
            if segment.start < max(position, 1)
        ]

    def check_history(self, history: Sequence[Any], position: int) -> None:
        """Raises UsageError where the shares before `position` are not those of a checkpoint."""
        mine = self.history(position)
        if mine != list(history):
            raise UsageError(
                f"The mixture's shares up to position {position} are {_named(mine)}, but the run that is resumed had "
                f"{_named(history)}: what it has seen would be counted wrongly. Restore them, and put what shall be "
                f"new in data.changes, at a position of {position} or more."
            )

    def _build(self, changes: list[Change], caps: list[int | None]) -> None:
        before = np.zeros(self.num_sources, np.int64)
        for change, following in zip(changes, [*changes[1:], None], strict=True):
            start = change.at
            while True:
                left = [cap is None or int(count) < cap for cap, count in zip(caps, before, strict=True)]
                weights = [weight if here else 0.0 for weight, here in zip(change.weights, left, strict=True)]
                if not any(weights):
                    self.end = start
                    return
                segment = _segment(start, weights, before)
                self._segments.append(segment)
                ends = [
                    segment.position_of(source, cap)
                    for source, cap in enumerate(caps)
                    if cap is not None and weights[source] > 0
                ]
                if following is not None:
                    ends.append(following.at)
                stop = min(ends, default=None)
                if stop is None:
                    return
                before = segment.counts(stop)
                start = stop
                if following is not None and stop == following.at:
                    break


def _segment(start: int, weights: Sequence[float], before: np.ndarray) -> _Segment:
    total = sum(weights)
    shares = tuple(weight / total for weight in weights)
    counts = _slots_of_each(shares)
    place = np.concatenate([(2 * np.arange(count) + 1) / (2 * count) for count in counts if count])
    owner = np.repeat(np.arange(len(counts)), counts)
    source = owner[np.argsort(place, kind="stable")]
    slots = tuple(np.flatnonzero(source == number) for number in range(len(counts)))
    rank = np.empty(SLOTS, np.int64)
    for own in slots:
        rank[own] = np.arange(len(own))
    return _Segment(start, shares, source, rank, slots, before)


def _slots_of_each(shares: Sequence[float]) -> list[int]:
    """How many slots each source gets, by largest remainder; at least one where its share is not 0."""
    exact = [share * SLOTS for share in shares]
    counts = [int(value) for value in exact]
    by_remainder = sorted(range(len(shares)), key=lambda i: (counts[i] - exact[i], i))
    for number in by_remainder[: SLOTS - sum(counts)]:
        counts[number] += 1
    for number, share in enumerate(shares):
        if share > 0 and counts[number] == 0:
            counts[number] = 1
            counts[counts.index(max(counts))] -= 1
    return counts


def _checked(weights: Sequence[float], changes: Sequence[Change]) -> list[Change]:
    every = [Change(0, tuple(weights)), *changes]
    for earlier, later in pairwise(every):
        if later.at <= earlier.at:
            raise UsageError(
                f"data.changes: position {later.at} comes after {earlier.at}. List the changes by ascending positions "
                "above 0."
            )
    for change in every:
        where = f"data.changes at {change.at}" if change.at else "data.sources"
        if len(change.weights) != len(weights):
            raise UsageError(f"{where} has {len(change.weights)} weights for {len(weights)} sources. Give each one.")
        if any(not 0 <= weight < float("inf") for weight in change.weights) or not any(change.weights):
            raise UsageError(f"{where}: weights {list(change.weights)} must be 0 or more, and one more than 0.")
    return every


def _named(history: Sequence[Any]) -> str:
    return "; ".join(
        f"from {entry['at']}: {', '.join(format(weight, '.4g') for weight in entry['weights'])}" for entry in history
    )


class MixtureExamples:
    """The examples of several sources, numbered one source after the other; see Examples."""

    def __init__(self, parts: Sequence[Examples], name: str = "train") -> None:
        assert parts
        self.name = name
        self.parts = tuple(parts)
        self.block_examples: np.ndarray = np.concatenate([part.block_examples for part in parts])
        self._ends = np.cumsum([len(part) for part in parts])  # (sources,)
        self.bases: np.ndarray = self._ends - [len(part) for part in parts]  # (sources,) int64: first id of each
        self._block_bases = np.cumsum([0, *(len(part.block_examples) for part in parts)])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def gather(self, ids: np.ndarray, out: Buffers | None = None, blocks: np.ndarray | None = None) -> dict[str, Any]:
        """See Examples. Raises UsageError where sources have different columns."""
        memory = Buffers() if out is None else out
        sources = self._ends.searchsorted(ids, side="right")
        used = np.unique(sources).tolist()
        rows = [np.flatnonzero(sources == source) for source in used]
        found = [
            self.parts[source].gather(
                ids[here] - self.bases[source],
                memory.part(source),
                None if blocks is None else blocks[here] - self._block_bases[source],
            )
            for source, here in zip(used, rows, strict=True)
        ]
        if len({tuple(sorted(arrays)) for arrays in found}) > 1:
            raise UsageError(
                f"The sources of the mixture have different columns: {'; '.join(', '.join(sorted(a)) for a in found)}. "
                "Mix sources of one kind."
            )
        names = found[0] if found else ()
        return {name: _scattered(name, [arrays[name] for arrays in found], rows, memory) for name in names}

    def prefetch(self, blocks: np.ndarray) -> None:
        """Say which blocks are wanted soon."""
        owners = self._block_bases[1:].searchsorted(blocks, side="right")
        for source in np.unique(owners).tolist():
            self.parts[source].prefetch(blocks[owners == source] - self._block_bases[source])


def _scattered(name: str, arrays: list[Any], rows: list[np.ndarray], memory: Buffers) -> Any:
    """What the sources gave, in the order of the rows."""
    if len(arrays) == 1:
        return arrays[0]
    count = sum(map(len, rows))
    if isinstance(arrays[0], Boundaries):
        return Boundaries.scattered(arrays, rows)
    if isinstance(arrays[0], Ragged):
        return _scattered_lists(name, arrays, rows, memory)
    first = arrays[0]
    if any(array.shape[1:] != first.shape[1:] or array.dtype != first.dtype for array in arrays):
        raise UsageError(
            f"The sources of the mixture have '{name}' of different kinds: "
            f"{', '.join(f'{array.dtype} {array.shape[1:]}' for array in arrays)}. Mix sources of one kind."
        )
    target = memory.take(name, (count, *first.shape[1:]), first.dtype)
    for array, here in zip(arrays, rows, strict=True):
        target[here] = array
    return target


def _scattered_lists(name: str, arrays: list[Ragged], rows: list[np.ndarray], memory: Buffers) -> Ragged:
    count = sum(map(len, rows))
    lengths = np.empty(count, np.int64)
    for array, here in zip(arrays, rows, strict=True):
        lengths[here] = array.lengths
    stops = np.cumsum(lengths)
    first = arrays[0].values
    target = memory.take(name, (int(lengths.sum()), *first.shape[1:]), first.dtype)
    for array, here in zip(arrays, rows, strict=True):
        for number, row in enumerate(here.tolist()):
            target[stops[row] - lengths[row] : stops[row]] = array[number]
    return Ragged(target, stops - lengths, lengths)


class MixtureOrder:
    """The order of a MixtureExamples: a schedule of sources, and an order for each."""

    epoch_length = None

    def __init__(self, orders: Sequence[Order], schedule: Schedule) -> None:
        assert len(orders) == schedule.num_sources
        self.schedule = schedule
        self.num_examples = sum(order.num_examples for order in orders)
        self._orders = tuple(orders)
        self.end = schedule.end
        self._bases = np.cumsum([0, *(order.num_examples for order in orders)])

    def sample_ids(self, positions: np.ndarray) -> np.ndarray:
        """See Order. Raises UsageError where every source has had its max_epochs."""
        sources, numbers = self.schedule(np.asarray(positions, np.int64))
        ids = np.empty_like(numbers)
        for source in np.unique(sources).tolist():
            here = sources == source
            ids[here] = self._orders[source].sample_ids(numbers[here]) + self._bases[source]
        return ids

    def metrics(self, names: Sequence[str], start: int, stop: int, given: np.ndarray | None = None) -> dict[str, float]:
        """Planned share of each source at positions start .. stop - 1, and its share of the examples that were given.

        given: (sources,), how many examples of each; None where it is those at these positions, and none was left out.
        """
        if stop == start:
            return {}
        if given is None:
            given = self.schedule.counts(stop) - self.schedule.counts(start)
        planned, shares = self.schedule.planned(start, stop), given / max(1, given.sum())
        return {f"data/{name}/planned_share": float(planned[i]) for i, name in enumerate(names)} | {
            f"data/{name}/share": float(shares[i]) for i, name in enumerate(names)
        }
