from __future__ import annotations

import bisect

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.errors import Damaged
from data_pipelines import best_fit
from data_pipelines.buffers import Buffers
from data_pipelines.pack import PackedSplit, best_fit_counts
from tests.data_pipelines.fakes import EOS, packed, random_documents, token_split

document_lists = st.lists(st.lists(st.integers(1, 500), max_size=12), min_size=1, max_size=8)
block_lists = st.lists(document_lists, min_size=1, max_size=3)


def expected_cuts(documents: list[list[int]], seq_len: int) -> list[tuple[list[int], int]]:
    """The contract of concat, spelled out one token at a time."""
    stream = [token for document in documents for token in [EOS, *document]]
    sequences = []
    for start in range(0, len(stream), seq_len):
        tokens = [stream[i] if i < len(stream) else EOS for i in range(start, start + seq_len + 1)]
        sequences.append((tokens, min(seq_len, len(stream) - start)))
    return sequences


def labels_of(split: PackedSplit) -> list[int]:
    found = split.gather(np.arange(len(split)))
    return [
        token
        for tokens, valid in zip(found["tokens"].tolist(), found["valid"].tolist(), strict=True)
        for token in tokens[1 : 1 + valid]
    ]


@settings(deadline=None, max_examples=100)
@given(block_lists, st.integers(1, 20), st.sampled_from(["uint16", "uint32"]), st.randoms())
def test_concat_gives_the_sequences_of_the_contract(
    blocks: list[list[list[int]]], seq_len: int, dtype: str, random: object
) -> None:
    split = packed(blocks, seq_len, dtype=dtype)
    expected = [sequence for documents in blocks for sequence in expected_cuts(documents, seq_len)]
    assert len(split) == len(expected) == split.block_examples.sum()
    ids = np.random.default_rng(len(expected)).integers(0, len(split), 2 * len(split) + 1)  # any order, some twice
    buffers = Buffers()
    for _ in range(2):  # the second time over used memory
        found = split.gather(ids, buffers)
        assert found["tokens"].dtype == dtype
        assert found["tokens"].tolist() == [expected[number][0] for number in ids.tolist()]
        assert found["valid"].tolist() == [expected[number][1] for number in ids.tolist()]


@settings(deadline=None)
@given(block_lists, st.integers(1, 20), st.sampled_from(["concat", "best_fit"]))
def test_every_token_and_every_end_is_a_label_once(blocks: list[list[list[int]]], seq_len: int, kind: str) -> None:
    split = packed(blocks, seq_len, kind)
    labels = labels_of(split)
    expected = [token for documents in blocks for document in documents for token in [*document, EOS]]
    assert (labels if kind == "concat" else sorted(labels)) == (expected if kind == "concat" else sorted(expected))
    assert len(labels) == split.num_tokens
    assert split.waste == pytest.approx(1 - len(labels) / (len(split) * seq_len))
    assert split.num_bytes == 10 * split.num_documents == 10 * sum(map(len, blocks))


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32), st.integers(1, 40), st.integers(1, 4))
def test_best_fit_splits_only_documents_that_do_not_fit(seed: int, seq_len: int, num_blocks: int) -> None:
    blocks = random_documents(seed, num_blocks, longest=3 * seq_len)
    split = packed(blocks, seq_len, "best_fit")
    found = split.gather(np.arange(len(split)))
    whole = {tuple(document) for documents in blocks for document in documents if 0 < len(document) < seq_len}
    pieces = set()
    for tokens, valid in zip(found["tokens"].tolist(), found["valid"].tolist(), strict=True):
        assert tokens[valid + 1 :] == [EOS] * (seq_len - valid)
        piece: list[int] = []
        for token in [*tokens[: valid + 1], EOS]:
            if token == EOS:
                pieces.add(tuple(piece))
                piece = []
            else:
                piece.append(token)
    assert whole <= pieces
    order = np.random.default_rng(seed).permutation(len(split))
    again = split.gather(order, Buffers())
    assert np.array_equal(again["tokens"], found["tokens"][order])
    assert np.array_equal(again["valid"], found["valid"][order])


@pytest.mark.parametrize("mean", [20, 100, 300, 1000, 3000])
@pytest.mark.parametrize("seq_len", [256, 2048])
def test_best_fit_needs_hardly_more_sequences_than_one_piece_at_a_time(mean: int, seq_len: int) -> None:
    generator = np.random.default_rng(mean)
    lengths = np.maximum(1, generator.lognormal(np.log(mean), 1.0, 300_000 // mean)).astype(np.int64)
    sequences = best_fit.num_sequences(lengths, seq_len)
    plan = best_fit.plan(lengths, seq_len)
    filled = np.add.reduceat(plan.lengths, plan.bins[:-1])
    assert len(plan) == sequences and filled.max() <= seq_len and filled.min() > 0
    rooms: list[int] = []
    reference = int((lengths // seq_len).sum())
    for length in sorted((lengths % seq_len).tolist(), reverse=True):  # best fit decreasing, one by one
        place = bisect.bisect_left(rooms, length)
        room = rooms.pop(place) if place < len(rooms) else seq_len
        reference += room == seq_len and length > 0
        if 0 < room - length < seq_len:
            bisect.insort(rooms, room - length)
    assert sequences <= reference * 1.015 + 1
    assert best_fit_counts(lengths, [seq_len, 64]) == {
        seq_len: sequences,
        64: best_fit.num_sequences(lengths, 64),
    }


def test_counts_of_the_index_are_used_and_wrong_ones_are_refused() -> None:
    blocks = random_documents(3, 4)
    split = token_split(blocks)
    right = PackedSplit(split, 16, EOS, "best_fit").block_examples
    object.__setattr__(split.blocks, "packed", {16: right})
    split.source.broken = {0, 1, 2, 3}  # type: ignore[attr-defined]  # nothing is read
    assert PackedSplit(split, 16, EOS, "best_fit").block_examples.tolist() == right.tolist()
    split.source.broken = set()  # type: ignore[attr-defined]
    object.__setattr__(split.blocks, "packed", {16: right + 1})
    with pytest.raises(Damaged, match="block 2"):
        PackedSplit(split, 16, EOS, "best_fit").gather(np.array([int(right[:2].sum()) + 2]))


def test_nothing_is_read_beyond_a_block_and_all_is_released() -> None:
    blocks: list[list[list[int]]] = [[[1, 2, 3]], [[4, 5, 6, 7]], [[]]]
    split = token_split(blocks)
    for kind in ("concat", "best_fit"):
        found = PackedSplit(split, 4, EOS, kind).gather(np.array([0, 1, 3, 2]))
        assert found["tokens"][0].tolist() == [0, 1, 2, 3, 0]
        assert split.source.held == []  # type: ignore[attr-defined]


def test_beyond_the_end_and_none() -> None:
    split = packed([[[1, 2, 3]]], 2)
    assert len(split) == 2
    for beyond in (2, -1):
        with pytest.raises(IndexError):
            split.gather(np.array([0, beyond]))
    assert split.gather(np.array([], np.int64))["tokens"].shape == (0, 3)
    assert len(packed([], 4)) == 0
