from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.boundaries import Boundaries
from data_pipelines.buffers import Buffers

EOS = 0


def expected(tokens: np.ndarray) -> list[int]:
    """By the definition, one input after the other."""
    seq_len = tokens.shape[1] - 1
    starts = [
        row * seq_len + i for row in range(len(tokens)) for i in range(seq_len) if i == 0 or tokens[row, i] == EOS
    ]
    return [*starts, len(tokens) * seq_len]


@settings(deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=5), st.integers(1, 12), st.integers(0, 2**32))
def test_each_micro_batch_has_the_boundaries_of_its_documents(counts: list[int], seq_len: int, seed: int) -> None:
    tokens = np.random.default_rng(seed).integers(0, 4, (sum(counts), seq_len + 1)).astype(np.uint16)
    cuts, sizes = Boundaries.of(tokens, EOS, Buffers()).cut(np.array(counts), Buffers())
    parts = np.split(tokens, np.cumsum(counts)[:-1])
    assert cuts.dtype == np.int32
    assert [cut.tolist() for cut in np.split(cuts, np.cumsum(sizes)[:-1])] == [expected(part) for part in parts]


@settings(deadline=None)
@given(st.integers(1, 9), st.integers(1, 8), st.integers(0, 2**32))
def test_parts_are_put_in_order(num_rows: int, seq_len: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 4, (num_rows, seq_len + 1)).astype(np.uint16)
    owner = rng.integers(0, 3, num_rows)
    rows = [np.flatnonzero(owner == part) for part in range(3)]
    parts = [Boundaries.of(tokens[here], EOS, Buffers()) for here in rows]
    whole = Boundaries.scattered(parts, rows)
    assert [*whole.starts.tolist(), num_rows * seq_len] == expected(tokens)
