"""What is drawn: nothing that stands out is lost, and what was rolled back is told from what survives."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.dashboard.curves import Curve, curve_of, reduced, surviving
from trainer import history
from trainer.extremes import BOUNDS, Extremes

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


@given(st.lists(NUMBERS, min_size=1, max_size=120), st.integers(1, 20), st.integers(1, 12))
def test_a_curve_of_rare_readings_has_the_extremes_of_every_step(values: list[float], every: int, buckets: int) -> None:
    extremes, rows = Extremes(), []
    for step, value in enumerate(values, start=1):
        extremes.add((value, None))
        if step % every == 0 or step == len(values):
            rows.append((float(step), value, extremes.read()))
    bounds = (np.array([row[2].get("loss" + each, np.nan) for row in rows]) for each in BOUNDS)
    found = reduced(curve_of(np.array([row[0] for row in rows]), np.array([row[1] for row in rows]), *bounds), buckets)
    first = 0
    for number, x in enumerate(found.x):
        part = np.array(values[first : int(x)])
        good = part[np.isfinite(part)]
        first = int(x)
        assert found.bad[number] == len(part) - len(good)
        wanted = (good.min(), good.max()) if len(good) else (np.nan, np.nan)
        np.testing.assert_array_equal((found.smallest[number], found.largest[number]), wanted)
    assert first == len(values)


def test_a_window_of_a_curve_keeps_its_bounds() -> None:
    x = np.arange(10.0)
    curve = curve_of(x[::-1], x[::-1], x[::-1] - 1, x[::-1] + 1, np.full(10, np.nan)).within(4, 5)
    assert curve.low is not None and curve.high is not None
    assert (curve.x.tolist(), curve.low.tolist(), curve.high.tolist()) == ([3, 4, 5, 6], [2, 3, 4, 5], [4, 5, 6, 7])
    found = reduced(curve, 1)
    assert (found.smallest[0], found.largest[0], found.bad[0]) == (2, 7, 0)
