from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.errors import Damaged
from data_pipelines.data_state import Exceptions

blocks = st.tuples(st.sampled_from(["train", "validation"]), st.integers(0, 5))
skips = st.lists(st.tuples(st.lists(blocks, max_size=3), st.integers(0, 20)), max_size=6)


@given(skips)
def test_a_block_is_left_out_from_the_first_position_it_was_skipped_at(steps: list[Any]) -> None:
    exceptions = Exceptions()
    for some, position in steps:
        exceptions = exceptions.skip(some, position)
    assert Exceptions.from_state(json.loads(json.dumps(exceptions.state()))) == exceptions
    assert list(exceptions.skipped) == sorted(exceptions.skipped)
    for split in ("train", "validation"):
        numbers, positions = np.divmod(np.arange(6 * 25), 25)
        kept = exceptions.kept(split, numbers, positions).tolist()
        for number, position, stays in zip(numbers.tolist(), positions.tolist(), kept, strict=True):
            assert stays != any((split, number) in some and at <= position for some, at in steps)


@pytest.mark.parametrize(
    "state", [[{}], [1], None, [{"position": "x", "kind": "skip_block", "split": "a", "block": 0}]]
)
def test_a_state_that_cannot_be_read_is_damage(state: Any) -> None:
    with pytest.raises(Damaged, match="cannot be read"):
        Exceptions.from_state(state)


def test_a_state_of_a_later_version_is_refused() -> None:
    with pytest.raises(Damaged, match="skip_row"):
        Exceptions.from_state([{"position": 0, "kind": "skip_row", "split": "train", "block": 0}])


@given(st.integers(1, 4), st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5)), max_size=6))
def test_what_is_passed_over_moves_later_examples_up(size: int, rollbacks: list[tuple[int, int]]) -> None:
    """As a run does it: of steps of `size` one goes wrong, a few steps after a checkpoint; a list is the oracle."""
    order, exceptions, begin = list(range(200)), Exceptions(), 0
    for steps_before, wrong in rollbacks:
        steps = np.arange(steps_before * size)
        assert exceptions.positions(begin, steps).tolist() == order[: len(steps)]
        if steps_before:  # a checkpoint after them
            begin, order = order[len(steps) - 1] + 1, order[len(steps) :]
        bad = exceptions.positions(begin, np.arange(wrong * size, (wrong + 1) * size))
        assert bad.tolist() == order[wrong * size : (wrong + 1) * size]
        del order[wrong * size : (wrong + 1) * size]
        exceptions = Exceptions.from_state(json.loads(json.dumps(exceptions.pass_over(bad).state())))
    assert exceptions.positions(begin, np.arange(40)).tolist() == order[:40]
    assert exceptions.num_passed(0) == size * len(rollbacks)
