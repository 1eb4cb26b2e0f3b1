from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.index import Block
from data_pipelines.pack import PackedSplit
from data_pipelines.shards import BlockData

EOS = 0
document_lists = st.lists(st.lists(st.integers(1, 500), max_size=12), min_size=1, max_size=8)


def packed(blocks: list[list[list[int]]], seq_len: int) -> PackedSplit:
    described, contents = [], {}
    for number, documents in enumerate(blocks):
        tokens = np.array([token for document in documents for token in document], np.uint16)
        offsets = np.cumsum([0, *map(len, documents)]).astype(np.int32)
        block = Block("f", number, 0, len(documents), 0, 0, len(tokens), 10 * len(documents), 0)
        described.append(block)
        contents[block] = BlockData([], tokens, offsets, offsets + np.arange(len(offsets)), np.array([]))
    return PackedSplit(described, contents.__getitem__, seq_len, EOS)


def expected_sequences(documents: list[list[int]], seq_len: int) -> list[dict[str, object]]:
    """The contract, spelled out one token at a time."""
    stream: list[int] = []
    begins: list[bool] = []
    for document in [*documents, []]:
        stream += [EOS, *document]
        begins += [True, *([False] * len(document))]
    sequences = []
    start = 0
    while start < len(stream) - 1:
        tokens, document_numbers, positions = [], [], []
        document, position = 0, 0
        for index in range(start, start + seq_len + 1):
            padding_begins = index == len(stream)
            if (padding_begins or (index < len(stream) and begins[index])) and index > start:
                document, position = document + 1, 0
            tokens.append(stream[index] if index < len(stream) else EOS)
            document_numbers.append(document)
            positions.append(position)
            position += 1
        valid = min(seq_len, len(stream) - 1 - start)
        sequences.append({"tokens": tokens, "document": document_numbers, "position": positions, "valid": valid})
        start += seq_len
    return sequences


@settings(deadline=None, max_examples=100)
@given(st.lists(document_lists, min_size=1, max_size=3), st.integers(1, 20))
def test_sequences_are_those_of_the_contract(blocks: list[list[list[int]]], seq_len: int) -> None:
    split = packed(blocks, seq_len)
    expected = [sequence for documents in blocks for sequence in expected_sequences(documents, seq_len)]
    assert len(split) == len(expected)
    for sample_id, sequence in enumerate(expected):
        actual = split[sample_id]
        assert {name: np.asarray(values).tolist() for name, values in actual.items()} == sequence
        assert all(actual[name].dtype == np.int32 for name in ("tokens", "document", "position"))  # type: ignore[literal-required]


@settings(deadline=None)
@given(st.lists(document_lists, min_size=1, max_size=3), st.integers(1, 20))
def test_every_token_and_every_end_is_a_label_once(blocks: list[list[list[int]]], seq_len: int) -> None:
    split = packed(blocks, seq_len)
    labels: list[int] = []
    for sample_id in range(len(split)):
        sequence = split[sample_id]
        labels += sequence["tokens"][1 : 1 + sequence["valid"]].tolist()
    assert labels == [token for documents in blocks for document in documents for token in [*document, EOS]]
    assert len(labels) == split.num_tokens
    assert split.num_bytes == 10 * split.num_documents == 10 * sum(map(len, blocks))


def test_beyond_the_end() -> None:
    split = packed([[[1, 2, 3]]], 2)
    assert len(split) == 2
    for beyond in (2, -1):
        with pytest.raises(IndexError):
            split[beyond]
    assert len(packed([], 4)) == 0


def test_a_sequence_is_its_own_copy() -> None:
    split = packed([[[1, 2, 3]]], 3)
    split[0]["tokens"][:] = 9
    assert split[0]["tokens"].tolist() == [0, 1, 2, 3]
