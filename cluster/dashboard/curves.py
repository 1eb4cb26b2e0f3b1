"""What is drawn of a metric: a curve of the weights that survive, reduced so that nothing that stands out is lost.

A chart is some hundred pixels wide and a run a million steps long. Each pixel gets the smallest and the largest value
that fall on it, never a sample of them, so that a spike of one step is seen at every zoom. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Whole = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


def surviving(attempt: Whole, step: Whole) -> Mask:
    """Which rows are of weights that were kept, as trainer/history.py tells: an attempt, or within one what follows a
    fall of `step`, supersedes everything before it from its own first step on.

    attempt, step: of each row, in the order of the record.
    """
    if not len(step):
        return np.empty(0, bool)
    cuts = np.flatnonzero((np.diff(attempt) != 0) | (np.diff(step) < 0)) + 1
    starts = np.concatenate([[0], cuts])
    # Of each take: the smallest first step of those that follow.
    firsts = step[starts]
    following = np.append(np.minimum.accumulate(firsts[::-1])[::-1][1:], np.iinfo(np.int64).max)
    return step < np.repeat(following, np.diff(np.append(starts, len(step))))


@dataclass(frozen=True)
class Curve:
    """One value an x, in order. x: step, time or tokens. values: may not be finite.

    low, high: extremes of what the value stands for, None where it stands for itself; NaN where one is unknown.
    bad: how much of that is not finite.
    """

    x: Floats
    values: Floats
    low: Floats | None = None
    high: Floats | None = None
    bad: Floats | None = None

    def within(self, start: float | None, stop: float | None) -> Curve:
        """What lies from `start` to `stop`, both included, and one neighbour on each side to draw a line to."""
        first = 0 if start is None else max(int(np.searchsorted(self.x, start, "left")) - 1, 0)
        last = len(self.x) if stop is None else int(np.searchsorted(self.x, stop, "right")) + 1
        return self._taken(slice(first, last))

    def _taken(self, places: slice | Whole | Mask) -> Curve:
        bounds = (None if each is None else each[places] for each in (self.low, self.high, self.bad))
        return Curve(self.x[places], self.values[places], *bounds)

    def smoothed(self, width: int) -> Curve:
        """Means over `width` values up to each (fewer at the beginning), of those that are finite."""
        good = np.isfinite(self.values)
        sums = np.concatenate([[0.0], np.cumsum(np.where(good, self.values, 0.0))])
        counts = np.concatenate([[0], np.cumsum(good)])
        stop = np.arange(1, len(self.values) + 1)
        start = np.maximum(stop - width, 0)
        number = counts[stop] - counts[start]
        means = np.divide(sums[stop] - sums[start], number, out=np.full(len(stop), np.nan), where=number > 0)
        return Curve(self.x, means)


def curve_of(
    x: Floats, values: Floats, low: Floats | None = None, high: Floats | None = None, bad: Floats | None = None
) -> Curve:
    """A curve in the order of x; of several values at one x the last stands."""
    if (x[1:] > x[:-1]).all():  # of a run that was never interrupted
        return Curve(x, values, low, high, bad)
    order = np.argsort(x, kind="stable")
    curve = Curve(x, values, low, high, bad)._taken(order)
    last = np.append(curve.x[1:] != curve.x[:-1], True) if len(x) else np.empty(0, bool)
    return curve._taken(last)


@dataclass(frozen=True)
class Reduced:
    """A curve in buckets of equal width; those without a value are left out.

    x: of the last value in each. smallest, largest, mean: of its finite values, NaN where there are none.
    count: values in each. bad: how much of what they stand for is not finite.
    """

    x: Floats
    smallest: Floats
    largest: Floats
    mean: Floats
    count: Whole
    bad: Whole


def reduced(curve: Curve, buckets: int) -> Reduced:
    """At most `buckets` buckets; a curve of fewer values keeps each."""
    x, values = curve.x, curve.values
    if len(x) <= buckets:
        place = np.arange(len(x))
    else:
        width = (x[-1] - x[0]) / buckets
        place = np.minimum(((x - x[0]) / width).astype(np.int64), buckets - 1)
    starts = np.flatnonzero(np.diff(place, prepend=-1))
    if not len(starts):
        nothing = np.empty(0)
        return Reduced(nothing, nothing, nothing, nothing, np.empty(0, np.int64), np.empty(0, np.int64))
    good = np.isfinite(values)
    count = np.diff(np.append(starts, len(x)))
    num_good = np.add.reduceat(good.astype(np.int64), starts)
    some = num_good > 0
    bad = np.where(good, 0, 1) if curve.bad is None else np.maximum(np.nan_to_num(curve.bad), ~good).astype(np.int64)
    smallest = np.fmin.reduceat(_finite_or_nan(values, curve.low), starts)
    largest = np.fmax.reduceat(_finite_or_nan(values, curve.high), starts)
    sums = np.add.reduceat(np.where(good, values, 0.0), starts)
    return Reduced(
        x=x[starts + count - 1],
        smallest=smallest,
        largest=largest,
        mean=np.divide(sums, num_good, out=np.full(len(starts), np.nan), where=some),
        count=count,
        bad=np.add.reduceat(bad, starts),
    )


def _finite_or_nan(values: Floats, bound: Floats | None) -> Floats:
    """Bounds of the values, which are their own where none is known."""
    known = values if bound is None else np.where(np.isnan(bound), values, bound)
    return np.where(np.isfinite(known), known, np.nan)
