"""Evaluation without damaged blocks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from configs.errors import Damaged
from data_pipelines.buffers import Buffers
from data_pipelines.damage import BlockDamaged, DamagedBlock
from data_pipelines.data_state import Exceptions
from trainer.distributed import World
from trainer.skipping import WithoutBlocks, unreadable, without_skipped


class Numbers:
    """Examples that are their own numbers, some blocks damaged."""

    name = "validation"

    def __init__(self, sizes: list[int], damaged: set[int] = frozenset()) -> None:  # type: ignore[assignment]
        self.block_examples = np.array(sizes, np.int64)
        self.damaged = damaged

    def __len__(self) -> int:
        return int(self.block_examples.sum())

    def gather(self, ids: np.ndarray, out: Buffers | None = None, blocks: Any = None) -> dict[str, Any]:
        blocks = np.cumsum(self.block_examples).searchsorted(ids, side="right")
        if met := self.damaged & set(blocks.tolist()):
            raise BlockDamaged([DamagedBlock(min(met), "f.arrow", 0, 0, 1, "fails its digest")])
        return {"number": np.array(ids)}


sizes_and_left_out = st.lists(st.integers(0, 6), min_size=1, max_size=8).flatmap(
    lambda sizes: st.tuples(st.just(sizes), st.sets(st.integers(0, len(sizes) - 1)))
)


@given(sizes_and_left_out)
def test_what_stays_is_numbered_without_gaps(case: tuple[list[int], set[int]]) -> None:
    sizes, left_out = case
    examples = WithoutBlocks(Numbers(sizes), left_out)
    numbers = np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])
    expected = [number for block, part in enumerate(numbers) if block not in left_out for number in part.tolist()]
    assert examples.gather(np.arange(len(examples)))["number"].tolist() == expected
    assert examples.block_examples.tolist() == [n for block, n in enumerate(sizes) if block not in left_out]


def world(rank: int, size: int) -> World:
    return World(rank, size, rank, torch.device("cpu"))


@given(sizes_and_left_out, st.integers(1, 3), st.one_of(st.none(), st.integers(1, 9)))
def test_ranks_together_find_what_an_evaluation_meets(
    case: tuple[list[int], set[int]], size: int, num_examples: int | None
) -> None:
    """As the session asks: until nobody finds any more, what the others found left out too."""
    sizes, damaged = case
    source = Numbers(sizes, damaged)
    exceptions = Exceptions()
    if sum(sizes) and not any(n for block, n in enumerate(sizes) if block not in damaged):
        return  # below
    while True:
        examples = without_skipped(source, exceptions)
        found = {block for rank in range(size) for block in unreadable(examples, world(rank, size), 2, num_examples)}
        if not found:
            break
        exceptions = exceptions.skip(sorted(found), 0)
    skipped = {each.block for each in exceptions.skipped}
    assert skipped <= damaged
    if num_examples is None:
        assert skipped == {block for block in damaged if sizes[block]}
    total = len(examples)
    count = total if num_examples is None else min(num_examples, total)
    examples.gather(np.arange(count) * total // max(count, 1))  # raises nothing


def test_nothing_left_is_an_error() -> None:
    with pytest.raises(Damaged, match="Every block of split 'validation' that is left is damaged"):
        unreadable(without_skipped(Numbers([2, 3], {0, 1}), Exceptions()), world(0, 1), 2, None)
