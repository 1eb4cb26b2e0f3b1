from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.ownership import owners

SIZES = st.one_of(
    st.lists(st.integers(0, 9), min_size=1, max_size=40),
    st.lists(st.integers(511, 513), min_size=1, max_size=40),
    st.lists(st.sampled_from([0, 1, 100_000]), min_size=1, max_size=40),
)


@settings(deadline=None)
@given(SIZES, st.integers(0, 2**32))
def test_as_a_binary_search_finds_them(sizes: list[int], seed: int) -> None:
    ends = np.cumsum(np.array(sizes, np.int64))
    if ends[-1] == 0:
        return
    numbers = np.random.default_rng(seed).integers(0, ends[-1], 200)
    numbers[:2] = 0, ends[-1] - 1
    found = owners(ends, numbers)
    assert found.dtype == np.int64
    assert found.tolist() == ends.searchsorted(numbers, side="right").tolist()


def test_of_nothing() -> None:
    assert owners(np.array([], np.int64), np.array([], np.int64)).tolist() == []
    assert owners(np.array([3]), np.array([], np.int64)).tolist() == []
