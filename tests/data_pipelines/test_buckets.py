from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.buckets import BucketOrder, Lengths
from data_pipelines.order import BlockOrder, ExampleOrder
from tests.data_pipelines.fakes import random_documents, token_split


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


def test_lengths_are_those_of_the_stored_lists() -> None:
    blocks = random_documents(0, 5)
    split = token_split(blocks)
    expected = np.array([len(document) + 1 for documents in blocks for document in documents])
    lengths = Lengths(split, "tokens", max_blocks=2)
    ids = np.random.default_rng(0).integers(0, len(expected), 100)
    assert lengths(ids).tolist() == expected[ids].tolist()
    assert len(lengths._blocks) <= 2
