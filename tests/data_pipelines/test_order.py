from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from configs.errors import UsageError
from data_pipelines import order as order_module
from data_pipelines.order import BlockOrder, ExampleOrder, Order, SequentialOrder, choose_order, sample_ids
from data_pipelines.permutation import keys, permute

seeds = st.integers(-(2**70), 2**70)
block_sizes = st.lists(st.integers(0, 9), min_size=1, max_size=60).filter(any)


@pytest.fixture(params=[False, True], ids=["one region", "regions"], autouse=True)
def regions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every property holds also where blocks are so many that they are permuted in runs and regions."""
    if request.param:
        monkeypatch.setattr(order_module, "_MOST_RUNS", 9)
        monkeypatch.setattr(order_module, "_REGION_RUNS", 3)


# --- permutations


@settings(deadline=None, max_examples=200)
@given(seeds, st.integers(1, 3000), st.integers(0, 5))
@example(0, 1, 0)
@example(0, 2, 0)
def test_a_permutation_is_one_to_one(seed: int, size: int, counter: int) -> None:
    values = permute(np.arange(size), size, keys(seed, counter))
    assert values.dtype == np.int64
    assert np.array_equal(np.sort(values), np.arange(size))


@settings(deadline=None)
@given(seeds, st.sampled_from([2**16, 2**31 + 5, 2**32 - 1, 2**32, 2**32 + 1, 10**13, 2**61]), st.integers(0, 2**60))
def test_large_ones_stay_inside_and_do_not_collide(seed: int, size: int, first: int) -> None:
    places = (first % size + np.arange(500)) % size
    values = permute(places, size, keys(seed, 1))
    assert values.min() >= 0 and values.max() < size
    assert len(np.unique(values)) == len(np.unique(places))


@settings(deadline=None)
@given(seeds, st.lists(st.integers(1, 5000), min_size=1, max_size=30))
def test_many_permutations_at_once_are_each_as_alone(seed: int, sizes: list[int]) -> None:
    places = np.array([size * 7 // 11 for size in sizes])
    counters = np.arange(len(sizes)) % 3
    together = permute(places, np.array(sizes), keys(seed, 9, counters))
    alone = [int(permute(places[i : i + 1], size, keys(seed, 9, int(counters[i])))[0]) for i, size in enumerate(sizes)]
    assert together.tolist() == alone


def test_every_permutation_of_four_comes_about_equally_often() -> None:
    counters = np.repeat(np.arange(24_000), 4)
    orders = permute(np.tile(np.arange(4), 24_000), np.full(96_000, 4), keys(7, counters)).reshape(-1, 4)
    _, counts = np.unique(orders, axis=0, return_counts=True)
    assert len(counts) == 24
    assert counts.min() > 850 and counts.max() < 1150  # 1000 expected, standard deviation 31


# --- orders


def every_order(seed: int, sizes: list[int], window_blocks: int) -> list[Order]:
    blocks = np.array(sizes)
    return [
        BlockOrder(seed, blocks, window_blocks),
        ExampleOrder(seed, int(blocks.sum())),
        SequentialOrder(int(blocks.sum())),
    ]


@settings(deadline=None, max_examples=100)
@given(seeds, block_sizes, st.integers(1, 20), st.integers(0, 2**20))
def test_each_epoch_holds_each_example_once(seed: int, sizes: list[int], window_blocks: int, epoch: int) -> None:
    for order in every_order(seed, sizes, window_blocks):
        count = order.num_examples
        assert order.epoch_length == count == sum(sizes)
        ids = order.sample_ids(np.arange(epoch * count, (epoch + 1) * count))
        assert ids.dtype == np.int64
        assert np.array_equal(np.sort(ids), np.arange(count))


@settings(deadline=None)
@given(seeds, block_sizes, st.integers(1, 20), st.lists(st.integers(0, 2**40), min_size=1, max_size=20))
def test_an_id_depends_on_its_position_alone(
    seed: int, sizes: list[int], window_blocks: int, positions: list[int]
) -> None:
    for order, another in zip(
        every_order(seed, sizes, window_blocks), every_order(seed, sizes, window_blocks), strict=True
    ):
        together = order.sample_ids(np.array(positions))
        alone = [int(another.sample_ids(np.array([position]))[0]) for position in positions]
        assert together.tolist() == alone


@settings(deadline=None, max_examples=50)
@given(seeds, block_sizes, st.integers(1, 20))
def test_a_window_holds_its_blocks_whole_and_alone(seed: int, sizes: list[int], window_blocks: int) -> None:
    order = BlockOrder(seed, np.array(sizes), window_blocks)
    ends = np.cumsum(sizes)
    position = order.num_examples  # of the second epoch
    seen = 0
    while position < 2 * order.num_examples:
        blocks, stop = order.window_at(position)
        assert len(blocks) <= window_blocks
        ids = order.sample_ids(np.arange(position, stop))
        assert set(ends.searchsorted(ids, side="right").tolist()) == {b for b in blocks.tolist() if sizes[b]}
        assert len(ids) == sum(sizes[block] for block in blocks)
        seen += len(ids)
        position = stop
    assert seen == order.num_examples


def test_windows_are_of_nearly_one_size() -> None:
    for num_blocks in range(1, 300):
        order = BlockOrder(0, np.ones(num_blocks, np.int64), 64)
        sizes, position = [], 0
        while position < num_blocks:
            _, stop = order.window_at(position)
            sizes.append(stop - position)
            position = stop
        assert max(sizes) <= 64
        if len(order._region_runs) == 2:
            assert max(sizes) - min(sizes) <= 1


def test_epochs_and_seeds_differ() -> None:
    for name in ("blocks", "examples"):
        orders = [choose_order(name, seed, np.full(100, 10)).sample_ids(np.arange(3000)) for seed in (0, 1, 2, -1)]
        rows = np.concatenate([ids.reshape(3, 1000) for ids in orders])
        for first in range(len(rows)):
            for second in range(first):
                assert np.mean(rows[first] == rows[second]) < 0.02


def test_neighbours_are_not_correlated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    for order in (ExampleOrder(3, 100_000), BlockOrder(3, np.full(200, 500), 64)):
        ids = order.sample_ids(np.arange(100_000))
        assert abs(np.corrcoef(ids[:-1], ids[1:])[0, 1]) < 0.03
        assert abs(np.corrcoef(np.arange(100_000), ids)[0, 1]) < 0.03


def test_neighbours_seldom_come_from_one_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    # 12 blocks: by chance 1 in 12, 0.083.
    blocks = BlockOrder(5, np.full(12, 1000)).sample_ids(np.arange(12_000)) // 1000
    assert np.mean(blocks[1:] == blocks[:-1]) <= 0.10


def test_a_seek_looks_at_few_blocks_and_keeps_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    order = BlockOrder(1, np.full(2_000_000, 500))
    for epoch in range(4):
        assert order.sample_ids(np.array([epoch * 10**9, epoch * 10**9 + 5 * 10**8])).max() < 10**9
    assert len(order._epochs) <= 2 and len(order._regions) <= 3
    assert max(len(region.blocks) for region in order._regions.values()) < 4000
    kept = [*order._epochs.values(), *order._regions.values()]
    assert sum(array.nbytes for table in kept for array in table) < 2_000_000


def test_a_window_draws_on_all_of_a_large_region(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of one window seldom lie side by side: by chance 1 pair in 33 is of one run of 62 blocks."""
    monkeypatch.undo()
    order = BlockOrder(1, np.full(2_000_000, 500))
    blocks, _ = order.window_at(123_456_789)
    runs = np.sort(blocks) // order._run_blocks
    same = np.mean(runs[:, None] == runs) - 1 / len(runs)
    assert len(blocks) == 128 and same < 0.05


def test_sample_ids_are_those_of_an_example_order() -> None:
    positions = np.array([3, 0, 12, 25])
    assert sample_ids(4, 11, positions).tolist() == ExampleOrder(4, 11).sample_ids(positions).tolist()
    assert sample_ids(0, 5, np.array([], np.int64)).tolist() == []
    assert BlockOrder(0, np.array([5])).sample_ids(np.array([], np.int64)).tolist() == []


def test_an_unknown_shuffle_is_refused() -> None:
    with pytest.raises(UsageError, match="blocks, examples, sequential"):
        choose_order("random", 0, np.array([3]))
