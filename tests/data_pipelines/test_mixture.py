from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.errors import UsageError
from data_pipelines import mixture
from data_pipelines.buffers import Buffers
from data_pipelines.mixture import Change, MixtureExamples, MixtureOrder, Schedule
from data_pipelines.order import BlockOrder, Order, SequentialOrder
from tests.data_pipelines.fakes import Lists, Numbers, packed, random_documents

weight_lists = st.lists(st.floats(0.01, 100), min_size=1, max_size=6)


@settings(deadline=None, max_examples=60)
@given(weight_lists)
def test_every_stretch_holds_each_source_nearly_in_its_share(weights: list[float]) -> None:
    schedule = Schedule(weights)
    sources, _ = schedule(np.arange(2 * mixture.SLOTS))
    shares = np.array(weights) / sum(weights)
    for source, share in enumerate(shares.tolist()):
        counts = np.cumsum(sources == source)
        expected = share * np.arange(1, len(sources) + 1)
        # One example for each source, and what rounding to slots adds up to.
        assert np.abs(counts - expected).max() <= len(weights) + 2


@settings(deadline=None, max_examples=60)
@given(st.data(), weight_lists)
def test_a_source_gives_its_examples_one_after_the_other(data: st.DataObject, weights: list[float]) -> None:
    """Whatever the caps and changes: source i's k-th place holds its example k, and no cap is passed."""
    count = len(weights)
    caps = data.draw(st.lists(st.none() | st.integers(1, 4000), min_size=count, max_size=count))
    places = data.draw(st.lists(st.integers(1, 15_000), max_size=3, unique=True))
    changes = [
        Change(
            at, tuple(data.draw(st.lists(st.sampled_from([0.0, 1.0, 2.5]), min_size=count, max_size=count).filter(any)))
        )
        for at in sorted(places)
    ]
    schedule = Schedule(weights, caps, changes)
    stop = min(20_000, schedule.end if schedule.end is not None else 20_000)
    sources, numbers = schedule(np.arange(stop))
    for source, cap in enumerate(caps):
        own = numbers[sources == source]
        assert np.array_equal(own, np.arange(len(own)))
        assert cap is None or len(own) <= cap
    for position in data.draw(st.lists(st.integers(0, max(stop - 1, 0)), max_size=5)):
        assert schedule.counts(position).tolist() == np.bincount(sources[:position], minlength=count).tolist()
    if schedule.end is not None:
        with pytest.raises(UsageError, match="max_epochs"):
            schedule(np.array([schedule.end]))


@settings(deadline=None, max_examples=60)
@given(st.data(), weight_lists)
def test_without_a_fault_the_shares_are_those_planned_and_what_is_left_out_shows(
    data: st.DataObject, weights: list[float]
) -> None:
    """Over any window, across changes and the ends of sources; the oracle counts position by position."""
    count = len(weights)
    caps = data.draw(st.lists(st.none() | st.integers(1, 4000), min_size=count, max_size=count))
    places = sorted(data.draw(st.lists(st.integers(1, 15_000), max_size=3, unique=True)))
    some = st.lists(st.sampled_from([0.0, 1.0, 2.5]), min_size=count, max_size=count).filter(any)
    schedule = Schedule(weights, caps, [Change(at, tuple(data.draw(some))) for at in places])
    end = min(20_000, schedule.end if schedule.end is not None else 20_000)
    start = data.draw(st.integers(0, end - 1))
    stop = data.draw(st.integers(start + 1, end))
    orders: list[Order] = [SequentialOrder(10) for _ in weights]
    names = [str(number) for number in range(count)]
    order = MixtureOrder(orders, schedule)
    window = np.arange(start, stop)
    found = order.metrics(names, start, stop)
    planned = np.array([found[f"data/{name}/planned_share"] for name in names])
    shares = np.array([found[f"data/{name}/share"] for name in names])
    assert planned == pytest.approx(np.mean([schedule.weights(position) for position in window.tolist()], axis=0))
    # Each segment begins and ends with an example for each source more or less, and what rounding to slots adds up to.
    segments = len(places) + count + 1
    assert np.abs(shares - planned).max() * len(window) <= segments * (count + 2) * 2

    left_out = window[np.array(data.draw(st.lists(st.booleans(), min_size=7, max_size=7)))[window % 7]]
    sources, _ = schedule(np.setdiff1d(window, left_out))
    given = np.bincount(sources, minlength=count)
    found = order.metrics(names, start, stop, given)
    expected = given / max(1, len(sources))
    assert [found[f"data/{name}/share"] for name in names] == pytest.approx(expected.tolist())


def test_the_example_of_the_documentation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixture, "SLOTS", 5)
    sources, numbers = Schedule([3, 2])(np.arange(8))
    assert sources.tolist() == [0, 1, 0, 1, 0, 0, 1, 0]
    assert numbers.tolist() == [0, 0, 1, 1, 2, 3, 2, 4]


def test_a_source_that_ends_leaves_its_share_to_the_others() -> None:
    schedule = Schedule([0.5, 0.25, 0.25], [None, 100, None])
    sources, _ = schedule(np.arange(30_000))
    last = int(np.flatnonzero(sources == 1)[-1])
    assert np.count_nonzero(sources == 1) == 100
    assert 380 < last < 420
    assert schedule.weights(last) == (0.5, 0.25, 0.25)
    assert schedule.weights(last + 4) == pytest.approx((2 / 3, 0, 1 / 3))
    assert np.mean(sources[last + 1 :] == 0) == pytest.approx(2 / 3, abs=1e-3)


def test_a_change_takes_effect_at_its_position_and_alters_nothing_before() -> None:
    positions = np.arange(5000)
    before, after = Schedule([1, 1])(positions), Schedule([1, 1], None, [Change(2345, (0, 1))])(positions)
    assert np.array_equal(before[0][:2345], after[0][:2345]) and np.array_equal(before[1][:2345], after[1][:2345])
    assert (after[0][2345:] == 1).all()


def test_a_small_weight_is_not_rounded_away() -> None:
    assert np.count_nonzero(Schedule([1e-9, 1])(np.arange(mixture.SLOTS))[0] == 0) == 1


@pytest.mark.parametrize(
    ("weights", "changes", "message"),
    [
        ([1, -1], [], "0 or more"),
        ([0, 0], [], "more than 0"),
        ([1, float("nan")], [], "0 or more"),
        ([1, 1], [Change(5, (1,))], "1 weights for 2 sources"),
        ([1, 1], [Change(0, (1, 2))], "ascending"),
        ([1, 1], [Change(9, (1, 2)), Change(9, (2, 1))], "ascending"),
    ],
)
def test_weights_that_cannot_be_are_refused(weights: list[float], changes: list[Change], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Schedule(weights, None, changes)


def test_the_past_of_a_resumed_run_must_be_the_same() -> None:
    schedule = Schedule([1, 3], [50, None], [Change(1000, (1, 1))])
    history = json.loads(json.dumps(schedule.history(900)))
    schedule.check_history(history, 900)
    Schedule([1, 3], [50, None], [Change(950, (1, 2))]).check_history(history, 900)  # the future may be another
    for other in (
        Schedule([1, 2], [50, None]),
        Schedule([1, 3], [60, None]),
        Schedule([1, 3], [50, None], [Change(800, (1, 1))]),
    ):
        with pytest.raises(UsageError, match=r"from 0: 0\.25"):
            other.check_history(history, 900)


def test_a_mixture_holds_each_source_s_own_order() -> None:
    parts = [Numbers([3, 4, 2]), Numbers([5, 5])]
    orders: list[Order] = [BlockOrder(1, parts[0].block_examples), SequentialOrder(10)]
    order = MixtureOrder(orders, Schedule([2, 1]))
    examples = MixtureExamples(parts)
    assert order.num_examples == len(examples) == 19
    assert examples.block_examples.tolist() == [3, 4, 2, 5, 5]
    ids = order.sample_ids(np.arange(3000))
    first = ids[ids < 9]
    assert first.tolist() == orders[0].sample_ids(np.arange(len(first))).tolist()
    assert (ids[ids >= 9] - 9).tolist() == orders[1].sample_ids(np.arange(3000 - len(first))).tolist()
    shuffled = np.random.default_rng(0).permutation(ids)
    assert order.sample_ids(np.array([17, 3])).tolist() == ids[[17, 3]].tolist()
    buffers = Buffers()
    for _ in range(2):
        rows = examples.gather(shuffled, buffers)["id"][:, 0]
        assert rows.tolist() == [number if number < 9 else number - 9 for number in shuffled.tolist()]
    examples.prefetch(np.array([0, 4, 3]))
    assert parts[0].asked == {0} and parts[1].asked == {0, 1}
    metrics = order.metrics(["a", "b"], 0, 3000)
    assert metrics["data/a/planned_share"] == pytest.approx(2 / 3)
    assert metrics["data/a/share"] == pytest.approx(len(first) / 3000)


def test_lists_and_packed_sequences_are_mixed_row_by_row() -> None:
    lists = MixtureExamples([Lists([4]), Lists([6])])
    ids = np.array([9, 0, 3, 4, 7])
    found = lists.gather(ids)["list"]
    own = [number if number < 4 else number - 4 for number in ids.tolist()]
    assert [row.tolist() for row in found] == [[number] * (number * 7 % 10) for number in own]

    parts = [packed(random_documents(seed, 2), 6, kind) for seed, kind in ((0, "concat"), (1, "best_fit"))]
    together = MixtureExamples(parts)
    every = together.gather(np.arange(len(together)))
    assert np.array_equal(every["tokens"], np.concatenate([p.gather(np.arange(len(p)))["tokens"] for p in parts]))
    order = np.random.default_rng(1).permutation(len(together))
    assert np.array_equal(together.gather(order)["valid"], every["valid"][order])


def test_sources_of_different_kinds_are_refused() -> None:
    wide = packed([[[1, 2]]], 2, dtype="uint32")
    for other, message in ((Numbers([2]), "different columns"), (wide, "different kinds")):
        examples = MixtureExamples([packed([[[1, 2]]], 2), other])
        with pytest.raises(UsageError, match=message):
            examples.gather(np.array([0, len(examples) - 1]))
