from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.errors import Damaged, UsageError
from data_pipelines.loader import Loader, MicroBatch, evaluation_batches
from data_pipelines.order import sample_ids

WORLD_SIZES = (1, 2, 3, 4, 6)


class Numbers:
    """Examples that are their own sample id; sample `broken` cannot be read."""

    def __init__(self, count: int, broken: int | None = None) -> None:
        self.count = count
        self.broken = broken

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, sample_id: int) -> int:
        if sample_id == self.broken:
            raise Damaged("block 7 is damaged")
        return sample_id


def prepare(row: int, generator: np.random.Generator) -> dict[str, np.ndarray]:
    return {"id": np.array([row, row]), "noise": generator.random(3)}


def loaders(examples: Numbers, world_size: int, **settings: Any) -> Iterator[Loader]:
    for rank in range(world_size):
        loader = Loader(examples, prepare, rank=rank, world_size=world_size, **settings)
        yield loader
        loader.close()


def global_batch(micro_batches: list[MicroBatch]) -> tuple[list[int], np.ndarray]:
    """Sample ids and noise of a step in the order of k, over all ranks; checks that each k comes once."""
    real = sorted((batch for batch in micro_batches if not batch.idle), key=lambda batch: batch.index)
    assert [batch.index for batch in real] == list(range(len(real)))
    ids = [sample_id for batch in real for sample_id in batch.sample_ids.tolist()]
    assert ids == [row for batch in real for row in batch.tensors["id"][:, 0].tolist()]
    return ids, np.concatenate([batch.tensors["noise"].numpy() for batch in real])


@settings(deadline=None, max_examples=40)
@given(st.data(), st.integers(0, 2**40), st.integers(1, 60), st.integers(1, 25), st.integers(0, 200))
def test_the_same_global_batch_at_every_world_size(
    data: st.DataObject, seed: int, num_examples: int, global_batch_size: int, examples_seen: int
) -> None:
    micro_batch_size = data.draw(st.integers(1, global_batch_size))
    start_step = data.draw(st.integers(0, 5))
    step = start_step + data.draw(st.integers(0, 5))
    first = examples_seen + (step - start_step) * global_batch_size
    expected = sample_ids(seed, num_examples, np.arange(first, first + global_batch_size)).tolist()
    num_micro_batches = -(-global_batch_size // micro_batch_size)
    reference: np.ndarray | None = None
    for world_size in WORLD_SIZES:
        every: list[MicroBatch] = []
        for loader in loaders(
            Numbers(num_examples),
            world_size,
            seed=seed,
            global_batch_size=global_batch_size,
            micro_batch_size=micro_batch_size,
            start_step=start_step,
            examples_seen=examples_seen,
            prefetch=0,
        ):
            mine = loader.step(step)
            assert len(mine) == -(-num_micro_batches // world_size)
            assert all(batch.index == num_micro_batches - 1 for batch in mine if batch.idle)
            every += mine
        ids, noise = global_batch(every)
        assert ids == expected
        assert reference is None or np.array_equal(noise, reference)
        reference = noise


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_each_example_once_an_epoch_across_uneven_steps_and_resumes(world_size: int) -> None:
    examples, seen, ids, noise = Numbers(101), 0, [], []
    for start_step, stop_step in ((0, 7), (7, 20), (20, 31)):  # stopped and resumed twice
        batches: dict[int, list[MicroBatch]] = {step: [] for step in range(start_step, stop_step)}
        for loader in loaders(
            examples,
            world_size,
            seed=5,
            global_batch_size=10,
            micro_batch_size=4,
            start_step=start_step,
            examples_seen=seen,
        ):
            for step in batches:
                batches[step] += loader.step(step)
        noise += [row for step in batches for row in global_batch(batches[step])[1].tolist()]
        ids += [sample_id for step in batches for sample_id in global_batch(batches[step])[0]]
        seen += 10 * len(batches)
    assert ids == sample_ids(5, 101, np.arange(310)).tolist()
    assert len({tuple(row) for row in noise}) == 310  # each position has random numbers of its own
    for epoch in range(3):
        assert sorted(ids[101 * epoch : 101 * (epoch + 1)]) == list(range(101))


def test_any_step_may_be_asked_and_nothing_stays_behind() -> None:
    before = set(threading.enumerate())
    loader = Loader(
        Numbers(50), prepare, seed=0, global_batch_size=4, micro_batch_size=2, rank=0, world_size=1, prefetch=3
    )
    for step in (0, 1, 2, 40, 41, 3, 3, 0):
        assert global_batch(loader.step(step))[0] == sample_ids(0, 50, np.arange(4 * step, 4 * step + 4)).tolist()
        assert loader.wait_s >= 0
        assert len(loader._ahead) <= 3
    assert set(threading.enumerate()) > before
    loader.close()
    loader.close()
    assert set(threading.enumerate()) == before


def test_steps_ahead_are_read_before_they_are_asked_for() -> None:
    seen = threading.Event()

    class Watched(Numbers):
        def __getitem__(self, sample_id: int) -> int:
            if sample_id in later:
                seen.set()
            return sample_id

    later = sample_ids(0, 100, np.arange(4, 8)).tolist()
    loader = Loader(Watched(100), prepare, seed=0, global_batch_size=2, micro_batch_size=2, rank=0, world_size=1)
    try:
        loader.step(0)
        loader.step(1)
        assert seen.wait(timeout=10)
    finally:
        loader.close()


def test_an_error_in_the_thread_is_raised_by_its_step() -> None:
    order = sample_ids(0, 40, np.arange(40))
    loader = Loader(
        Numbers(40, broken=int(order[9])),
        prepare,
        seed=0,
        global_batch_size=4,
        micro_batch_size=2,
        rank=0,
        world_size=1,
    )
    try:
        loader.step(0)
        loader.step(1)
        with pytest.raises(Damaged, match="block 7"):
            loader.step(2)
        loader.step(3)
    finally:
        loader.close()


def test_an_empty_split_is_refused() -> None:
    with pytest.raises(UsageError, match="empty"):
        Loader(Numbers(0), prepare, seed=0, global_batch_size=1, micro_batch_size=1, rank=0, world_size=1)


@pytest.mark.parametrize("num_examples", [None, 1, 7, 64, 1000])
@pytest.mark.parametrize("total", [0, 1, 5, 64, 101])
def test_evaluation_counts_each_example_once(total: int, num_examples: int | None) -> None:
    count = total if num_examples is None else min(total, num_examples)
    reference: list[int] | None = None
    for world_size in WORLD_SIZES:
        ranks = [
            list(
                evaluation_batches(
                    Numbers(total),
                    prepare,
                    micro_batch_size=4,
                    rank=rank,
                    world_size=world_size,
                    num_examples=num_examples,
                )
            )
            for rank in range(world_size)
        ]
        assert len({len(batches) for batches in ranks}) == 1
        ids = sorted(i for batches in ranks for batch in batches if not batch.idle for i in batch.sample_ids.tolist())
        assert len(ids) == len(set(ids)) == count
        assert reference is None or ids == reference
        reference = ids
