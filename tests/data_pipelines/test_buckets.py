from __future__ import annotations

from itertools import pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.buckets import BucketOrder
from data_pipelines.mixture import Change, MixtureOrder, Schedule
from data_pipelines.order import BlockOrder, ExampleOrder


@settings(deadline=None, max_examples=80)
@given(st.integers(0, 2**40), st.integers(1, 200), st.integers(1, 30), st.integers(1, 60), st.data())
def test_each_epoch_holds_each_example_once_and_any_position_is_as_alone(
    seed: int, num_examples: int, global_batch_size: int, window: int, data: st.DataObject
) -> None:
    micro_batch_size = data.draw(st.integers(1, global_batch_size))
    lengths = np.random.default_rng(seed).integers(1, 50, num_examples)

    def order() -> BucketOrder:
        return BucketOrder(
            ExampleOrder(seed, num_examples),
            lengths.__getitem__,
            seed=seed,
            global_batch_size=global_batch_size,
            micro_batch_size=micro_batch_size,
            window=window,
        )

    ids = order().sample_ids(np.arange(3 * num_examples))
    for epoch in range(3):
        assert np.array_equal(np.sort(ids[epoch * num_examples : (epoch + 1) * num_examples]), np.arange(num_examples))
    positions = np.random.default_rng(seed).integers(0, 3 * num_examples, 20)
    assert order().sample_ids(positions).tolist() == ids[positions].tolist()


def test_micro_batches_hold_like_lengths_and_come_in_no_order_of_length() -> None:
    lengths = np.random.default_rng(0).integers(1, 1000, 4000)
    base = BlockOrder(1, np.full(40, 100))
    order = BucketOrder(base, lengths.__getitem__, seed=1, global_batch_size=10, micro_batch_size=4, window=2000)
    ids = order.sample_ids(np.arange(4000)).reshape(-1, 10)  # micro-batches of 4, 4 and 2
    cuts = [slice(0, 4), slice(4, 8), slice(8, 10)]

    def padded(rows: np.ndarray) -> int:
        return sum(int((lengths[rows[:, cut]].max(axis=1) * (cut.stop - cut.start)).sum()) for cut in cuts)

    assert padded(ids) < 1.02 * lengths.sum()
    assert padded(base.sample_ids(np.arange(4000)).reshape(-1, 10)) > 1.4 * lengths.sum()
    longest = lengths[ids[:, :4]].max(axis=1).astype(float)
    assert abs(np.corrcoef(longest[:-1], longest[1:])[0, 1]) < 0.2


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**40), st.integers(1, 12), st.lists(st.integers(1, 400), max_size=4), st.integers(1, 60))
def test_windows_end_where_the_shares_of_a_mixture_change(
    seed: int, global_batch_size: int, changes: list[int], window: int
) -> None:
    """Between two changes each stretch holds the examples that it holds without buckets, also where a source ends."""
    sizes = (40, 70)
    schedule = Schedule(
        (1, 2), (None, 150), [Change(at, (1 + number % 3, 1)) for number, at in enumerate(sorted(set(changes)))]
    )
    base = MixtureOrder([ExampleOrder(seed + number, size) for number, size in enumerate(sizes)], schedule)
    assert set(changes) <= set(schedule.changes)
    lengths = np.random.default_rng(seed).integers(1, 50, sum(sizes))
    sizes_of = {"global_batch_size": global_batch_size, "micro_batch_size": -(-global_batch_size // 3)}
    order = BucketOrder(base, lengths.__getitem__, seed=seed, cuts=schedule.changes, window=window, **sizes_of)
    positions = np.arange(600)
    ids, plain = order.sample_ids(positions), base.sample_ids(positions)
    for start, stop in pairwise(
        [0, *(at for at in schedule.changes if at < 600), 600 // order._window * order._window]
    ):
        assert sorted(ids[start:stop].tolist()) == sorted(plain[start:stop].tolist())


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 60), st.integers(0, 40), st.integers(20, 70))
def test_where_the_state_says_so_a_run_may_go_on_in_another_order(
    first: int, second: int, window: int, steps: int, num_examples: int
) -> None:
    """And where it does not, and the batch changes, examples may come twice or not at all."""
    lengths = np.random.default_rng(window).integers(1, 50, num_examples)

    def order(size: int) -> BucketOrder:
        sizes = {"global_batch_size": size, "micro_batch_size": size}
        return BucketOrder(ExampleOrder(1, num_examples), lengths.__getitem__, seed=1, window=window, **sizes)

    position = first * steps
    states = [each.state(position) for each in (order(first), order(second))]
    if all(state["window"][1] <= position for state in states):
        before, after = np.arange(position), np.arange(position, position + 2 * num_examples)
        seen = [*order(first).sample_ids(before).tolist(), *order(second).sample_ids(after).tolist()]
        for epoch in range(position // num_examples + 1):
            part = seen[epoch * num_examples : (epoch + 1) * num_examples]
            assert sorted(part) == list(range(num_examples))
    whole_epochs = position % num_examples == 0
    assert not whole_epochs or all(state["window"][1] <= position for state in states)
