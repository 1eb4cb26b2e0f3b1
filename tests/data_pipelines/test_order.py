from __future__ import annotations

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data_pipelines.order import sample_ids

seeds = st.integers(-(2**70), 2**70)


@settings(deadline=None, max_examples=200)
@given(seeds, st.integers(1, 3000), st.integers(0, 5))
@example(0, 1, 0)
@example(0, 2, 0)
def test_each_epoch_holds_each_id_once(seed: int, num_examples: int, epoch: int) -> None:
    first = epoch * num_examples
    ids = sample_ids(seed, num_examples, np.arange(first, first + num_examples))
    assert ids.dtype == np.int64
    assert np.array_equal(np.sort(ids), np.arange(num_examples))


@settings(deadline=None)
@given(seeds, st.integers(1, 10**13), st.lists(st.integers(0, 2**62), min_size=1, max_size=20))
def test_an_id_depends_on_its_position_alone(seed: int, num_examples: int, positions: list[int]) -> None:
    together = sample_ids(seed, num_examples, np.array(positions))
    alone = [int(sample_ids(seed, num_examples, np.array([position]))[0]) for position in positions]
    assert together.tolist() == alone
    assert all(0 <= sample_id < num_examples for sample_id in alone)


def test_epochs_and_seeds_differ() -> None:
    orders = [sample_ids(seed, 1000, np.arange(3000)).reshape(3, 1000) for seed in (0, 1, 2, -1)]
    rows = np.concatenate(orders)
    for first in range(len(rows)):
        for second in range(first):
            assert np.mean(rows[first] == rows[second]) < 0.02


def test_every_order_of_few_examples_comes_about_equally_often() -> None:
    orders = sample_ids(7, 4, np.arange(4 * 24_000)).reshape(-1, 4)
    _, counts = np.unique(orders, axis=0, return_counts=True)
    assert len(counts) == 24
    assert counts.min() > 850 and counts.max() < 1150  # 1000 expected, standard deviation 31


def test_neighbours_are_not_correlated() -> None:
    ids = sample_ids(3, 100_000, np.arange(100_000))
    assert abs(np.corrcoef(ids[:-1], ids[1:])[0, 1]) < 0.015
    assert abs(np.corrcoef(np.arange(100_000), ids)[0, 1]) < 0.015
    assert np.mean(np.abs(np.diff(ids)) < 1000) < 0.025  # 0.02 by chance


def test_no_position_gives_no_id() -> None:
    assert sample_ids(0, 5, np.array([], np.int64)).tolist() == []
