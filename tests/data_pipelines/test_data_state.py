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
