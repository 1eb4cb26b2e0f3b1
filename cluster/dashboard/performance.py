"""Where a run's time goes: parts of its steps, by step and by rank, and who holds the others up."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from cluster.dashboard.curves import Floats, Whole, surviving
from cluster.dashboard.rank_rows import MEMORY, OWN, RankTable, of_kept_attempts
from trainer.step_times import PARTS

if TYPE_CHECKING:
    from trainer.columns import Columns

Row = dict[str, Any]
Part = Literal["data", "forward", "backward", "collective", "optimizer", "checkpoint", "evaluation", "other"]

# In the order in which they are stacked.
SPLIT: tuple[Part, ...] = (
    "data",
    "forward",
    "backward",
    "collective",
    "optimizer",
    "checkpoint",
    "evaluation",
    "other",
)
_OF_METRICS: dict[Part, str] = {  # checkpoint_s is told by events, with what a save takes outside the step
    "data": "data_wait_s",
    "forward": "forward_s",
    "backward": "backward_s",
    "collective": "collective_s",
    "optimizer": "optimizer_s",
}
READINGS = 16  # the last ones of a rank, by which it is judged
FEWEST_READINGS = 4
STRAGGLER_FACTOR = 1.3


# --- over steps


@dataclass(frozen=True)
class Split:
    """Seconds a step of each part, in buckets of steps. x: the last step of each. steps: how many each stands for."""

    x: Whole
    steps: Whole
    parts: Mapping[Part, Floats]

    def totals(self) -> dict[Part, float]:
        """Seconds of each part in all of these steps."""
        return {name: float((values * self.steps).sum()) for name, values in self.parts.items()}


def split(
    columns: Columns, events: Iterable[Row], *, start: float | None = None, stop: float | None = None, buckets: int
) -> Split:
    """How rank 0 spent the steps from `start` to `stop` that survive: parts of the step, saves and evaluations.

    What lies between steps but for those (writing the record, a rollback) is not in it.
    """
    attempt, step, _ = columns.place()
    kept = surviving(attempt, step)
    starts = _starts(events)

    def by_row(name: str) -> Floats:
        rows, values = columns.metric(name)
        found = np.zeros(len(step))
        found[rows] = np.where(np.isfinite(values), values, 0.0)
        return found

    step_s = by_row("step_s")
    training = np.flatnonzero(kept & (step_s > 0))
    training = training[np.argsort(step[training], kind="stable")]
    done = step[training]
    covered = np.diff(done, prepend=min(starts.values(), default=0))  # each row tells of the steps since the one before
    inside = _between(done, start, stop) & (covered > 0)
    training, done, covered = training[inside], done[inside], covered[inside]
    place, x = bucketed(done, buckets)

    def summed(seconds: Floats) -> Floats:
        return _sums(place, seconds * covered, len(x))

    sums: dict[Part, Floats] = {part: summed(by_row(metric)[training]) for part, metric in _OF_METRICS.items()}
    known = sum(by_row(name)[training] for name in PARTS)
    sums["other"] = summed(np.maximum(step_s[training] - known, 0.0))
    evaluated = by_row("validation/seconds")
    sums["evaluation"] = _at_steps(x, step[kept], evaluated[kept], start, stop)
    saved, stalls = _stalls(events, starts)
    sums["checkpoint"] = _at_steps(x, saved, stalls, start, stop)
    steps = np.bincount(place, weights=covered, minlength=len(x)).astype(np.int64)
    return Split(x, steps, {name: sums[name] / np.maximum(steps, 1) for name in SPLIT})


def _starts(events: Iterable[Row]) -> dict[int, int]:
    """attempt -> completed steps at its start."""
    return {event["attempt"]: int(event.get("step") or 0) for event in events if event["kind"] == "started"}


def _stalls(events: Iterable[Row], starts: Mapping[int, int]) -> tuple[Whole, Floats]:
    """(steps of the saves that survive, seconds that training waited for each)."""
    saves = [event for event in events if event["kind"] in {"checkpoint", "checkpoint_failed"} and "stall_s" in event]
    attempt = np.array([event["attempt"] for event in saves], np.int64)
    step = np.array([event["step"] for event in saves], np.int64)
    kept = of_kept_attempts(starts, attempt, step)
    return step[kept], np.array([event["stall_s"] for event in saves], np.float64)[kept]


def _at_steps(x: Whole, step: Whole, seconds: Floats, start: float | None, stop: float | None) -> Floats:
    """Sums of seconds by bucket. x: the last step of each."""
    if not len(x):
        return np.zeros(0)
    inside = _between(step, start, stop)
    place = np.minimum(np.searchsorted(x, step[inside]), len(x) - 1)
    return _sums(place, seconds[inside], len(x))


def _sums(place: Whole, values: Floats, length: int) -> Floats:
    """(length,): of the values at each place."""
    return np.bincount(place, weights=values, minlength=length).astype(np.float64)


def _between(step: Whole, start: float | None, stop: float | None) -> np.ndarray:
    inside: np.ndarray = (step >= (-np.inf if start is None else start)) & (step <= (np.inf if stop is None else stop))
    return inside


def bucketed(step: Whole, buckets: int) -> tuple[Whole, Whole]:
    """(number of each step's bucket, last step of each bucket): at most `buckets` of equal width, none empty.

    step: in any order.
    """
    found, place = np.unique(step, return_inverse=True)
    if len(found) <= buckets:
        return place, found
    width = (found[-1] - found[0]) / buckets
    wide = np.minimum(((found - found[0]) / width).astype(np.int64), buckets - 1)
    cuts = np.flatnonzero(np.diff(wide, prepend=-1))
    number = np.cumsum(np.diff(wide, prepend=wide[0]) > 0)
    return number[place], found[np.append(cuts[1:], len(found)) - 1]


# --- over ranks


@dataclass(frozen=True)
class Matrix:
    """A metric of R ranks in B buckets of steps. x (B,): the last step of each. ranks (R,).

    mean, largest (R, B): of the readings of a rank in a bucket; NaN where it has none.
    """

    x: Whole
    ranks: Whole
    mean: Floats
    largest: Floats


def matrix(
    table: RankTable, metric: str, *, start: float | None = None, stop: float | None = None, buckets: int
) -> Matrix:
    """metric: one of rank_rows.METRICS. The largest step_s is that of the longest step, not of a mean."""
    values = table.metric(metric)
    highs = table.metric("step_s_max") if metric == "step_s" else values
    rows = np.flatnonzero(_between(table.step, start, stop) & np.isfinite(values))
    place, x = bucketed(table.step[rows], buckets)
    ranks, row = np.unique(table.rank[rows], return_inverse=True)
    shape = (len(ranks), len(x))
    cell = row * len(x) + place
    size = shape[0] * shape[1]
    count = np.bincount(cell, minlength=size)
    sums = np.bincount(cell, weights=values[rows], minlength=size)
    largest = np.full(size, np.nan)
    np.fmax.at(largest, cell, highs[rows])
    mean = np.divide(sums, count, out=np.full(size, np.nan), where=count > 0)
    return Matrix(x, ranks, mean.reshape(shape), largest.reshape(shape))


def own_medians(table: RankTable, start: float | None, stop: float | None) -> dict[int, float]:
    """By rank, the median of its own seconds a step."""
    own = table.metric(OWN)
    rows = np.flatnonzero(_between(table.step, start, stop) & np.isfinite(own))
    ranks, firsts = np.unique(table.rank[rows], return_index=True)  # a rank's rows lie together
    pieces = np.split(own[rows], firsts[1:])
    return {int(rank): float(np.median(piece)) for rank, piece in zip(ranks, pieces, strict=False)}


def slower_than_median(own_s: Mapping[int, float]) -> list[tuple[int, float]]:
    """(rank, its seconds over the median's), the slowest first.

    Of an even number the lower of the two in the middle is the median: of two ranks the faster one.
    """
    middle = statistics.median_low(own_s.values()) if own_s else 0.0
    if middle <= 0:
        return []
    return sorted(((rank, seconds / middle) for rank, seconds in own_s.items()), key=lambda each: (-each[1], each[0]))


def stragglers(recent: Mapping[int, Sequence[float]]) -> list[tuple[int, float]]:
    """(rank, factor) of the ranks that take over STRAGGLER_FACTOR times the median rank's own time, slowest first.

    recent: by rank, its own seconds a step in its last readings. All ranks end a step together, so that only the time
    without waits for others tells who is slow. Medians of several readings: one slow step is no straggler.
    """
    usual = {
        rank: statistics.median(values[-READINGS:]) for rank, values in recent.items() if len(values) >= FEWEST_READINGS
    }
    return [(rank, factor) for rank, factor in slower_than_median(usual) if factor > STRAGGLER_FACTOR]


def memory(table: RankTable) -> dict[int, Row]:
    """By rank: bytes used, reserved and free at its last look, and at the worst of its looks.

    {used, reserved, free, most_used, most_reserved, least_free}; NaN where nothing is known.
    """
    found = {}
    for rank in np.unique(table.rank):
        rows = table.rank == rank
        used, reserved, free = (values[np.isfinite(values)] for values in (table.metric(name)[rows] for name in MEMORY))
        found[int(rank)] = {
            "used": _or_nan(used[-1:]),
            "reserved": _or_nan(reserved[-1:]),
            "free": _or_nan(free[-1:]),
            "most_used": _or_nan(np.sort(used)[-1:]),
            "most_reserved": _or_nan(np.sort(reserved)[-1:]),
            "least_free": _or_nan(np.sort(free)[:1]),
        }
    return found


def _or_nan(values: Floats) -> float:
    return float(values[0]) if len(values) else float("nan")
