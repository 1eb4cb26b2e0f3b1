"""What is drawn: nothing that stands out is lost, and what was rolled back is told from what survives."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.dashboard.curves import Curve, curve_of, reduced, surviving
from trainer import history

NUMBERS = st.one_of(st.floats(-1e6, 1e6), st.just(float("nan")), st.just(float("inf")), st.just(float("-inf")))


@given(st.lists(st.lists(st.integers(0, 12), max_size=12), max_size=5))
def test_the_rows_that_survive_are_those_of_the_history(attempts: list[list[int]]) -> None:
    rows = [
        {"attempt": number, "step": step, "time": 0.0}
        for number, steps in enumerate(attempts, start=1)
        for step in steps
    ]
    for number, row in enumerate(rows):
        row["number"] = number
    kept = surviving(
        np.array([row["attempt"] for row in rows], np.int64), np.array([row["step"] for row in rows], np.int64)
    )
    # history merges the rows of a step; the last of them names it
    last = {row["step"]: row["number"] for row, keep in zip(rows, kept, strict=True) if keep}
    assert [row["number"] for row in history.stitched(rows)] == [last[step] for step in sorted(last)]


@given(st.lists(NUMBERS, min_size=1, max_size=400), st.integers(1, 50))
def test_the_extremes_of_every_stretch_are_kept(values: list[float], buckets: int) -> None:
    curve = Curve(np.arange(len(values), dtype=float), np.array(values))
    found = reduced(curve, buckets)
    assert len(found.x) <= max(buckets, 1) and found.count.sum() == len(values)
    assert found.x[-1] == len(values) - 1 and (np.diff(found.x) > 0).all()
    place = 0
    for number, count in enumerate(found.count):
        part = curve.values[place : place + count]
        good = part[np.isfinite(part)]
        assert found.bad[number] == count - len(good)
        if len(good):
            assert (found.smallest[number], found.largest[number]) == (good.min(), good.max())
            assert np.isclose(found.mean[number], good.mean(), atol=1e-6)
        else:
            assert np.isnan([found.smallest[number], found.largest[number], found.mean[number]]).all()
        place += count


@pytest.mark.parametrize("step", [0, 1, 499_999, 777_777, 999_999])
def test_one_spike_in_a_million_is_seen(step: int) -> None:
    values = np.full(1_000_000, 2.0)
    values[step] = 9.0
    assert reduced(Curve(np.arange(1_000_000.0), values), 600).largest.max() == 9.0


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 100)), max_size=40))
def test_of_several_values_at_one_place_the_last_stands(points: list[tuple[int, int]]) -> None:
    found = curve_of(np.array([x for x, _ in points], float), np.array([y for _, y in points], float))
    last = dict(points)
    assert list(zip(found.x, found.values, strict=True)) == [(x, last[x]) for x in sorted(last)]


@given(st.lists(st.integers(0, 100), unique=True, max_size=40), st.integers(-5, 105), st.integers(-5, 105))
def test_a_range_has_what_lies_in_it_and_a_neighbour_on_each_side(places: list[int], start: int, stop: int) -> None:
    places = sorted(places)
    found = Curve(np.array(places, float), np.array(places, float)).within(start, stop).x
    inside = [x for x in places if start <= x <= stop]
    assert set(inside) <= set(found) and len(found) <= len(inside) + 2
    assert all(b == places[places.index(a) + 1] for a, b in pairwise(found))


@given(st.lists(NUMBERS, max_size=60), st.integers(1, 10))
def test_smoothed_is_the_mean_of_what_is_finite(values: list[float], width: int) -> None:
    found = Curve(np.arange(len(values), dtype=float), np.array(values, float)).smoothed(width).values
    for number in range(len(values)):
        part = np.array(values[max(number + 1 - width, 0) : number + 1])
        good = part[np.isfinite(part)]
        assert np.isnan(found[number]) if not len(good) else np.isclose(found[number], good.mean(), atol=1e-6)
