from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from data_pipelines.blocks import Blocks
from data_pipelines.columns import Column, token_columns
from data_pipelines.index import Index, TokenizerFacts
from trainer.data_position import describe, differences


def blocks(*contents: int, rows: int = 5) -> Blocks:
    count = len(contents)
    numbers = np.arange(count)
    return Blocks(
        file=numbers.astype(np.int32),
        number=numbers.astype(np.int32),
        start=numbers * 100,
        stop=numbers * 100 + 100,
        rows=np.full(count, rows),
        tokens=np.full(count, 70),
        text_bytes=np.full(count, 300),
        xxh3=np.array(contents, np.uint64),
        content_xxh3=np.array(contents, np.uint64),
        content_bytes=np.full(count, 100),
        content_buffers=np.zeros((count, 5), np.int64),
    )


INDEX = Index(
    name="text",
    source={"name": "text", "paths": ["a"]},
    columns=token_columns("uint16"),
    files={"train-00000-000.arrow": 300},
    splits={"train": blocks(1, 2), "validation": blocks(3)},
    tokenizer=TokenizerFacts(300, 0, "ab" * 16),
)
IMAGES = replace(INDEX, columns=(Column("image", "uint8", (8, 8, 3)),), tokenizer=None)


def compare(then: Index, now: Index) -> list[str]:
    stored = json.loads(json.dumps(describe(then)))  # as in a checkpoint
    return differences(stored, describe(now))


def test_the_same_data_differs_in_nothing() -> None:
    assert compare(INDEX, INDEX) == []
    moved = replace(INDEX, files={"elsewhere.arrow": 300}, compression="zstd")
    assert compare(INDEX, moved) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"source": {"name": "text", "paths": ["a", "b"]}}, ["data.paths was ['a'] and is ['a', 'b']"]),
        ({"splits": {"train": blocks(1, 2, 4), "validation": blocks(3)}}, ["split 'train' had 10 rows and has 15"]),
        ({"splits": {"train": blocks(1, 4), "validation": blocks(3)}}, ["'train' has as many rows", "other content"]),
        ({"splits": {"train": blocks(1, 2)}}, ["split 'validation' is gone"]),
        ({"tokenizer": TokenizerFacts(301, 0, "cd" * 16)}, ["the tokenizer had 300 ids and has 301"]),
        ({"tokenizer": TokenizerFacts(300, 0, "cd" * 16)}, ["another one of the same size"]),
        ({"columns": token_columns("uint32")}, ["column 'tokens' was uint16", "and is uint32"]),
    ],
)
def test_each_change_is_named(change: dict[str, Any], said: list[str]) -> None:
    (message,) = compare(INDEX, replace(INDEX, **change))
    assert all(part in message for part in said), message


def test_other_data_altogether() -> None:
    assert any("the data was not tokenized" in message for message in compare(IMAGES, INDEX))
    assert any("the data was tokenized" in message for message in compare(INDEX, IMAGES))
    assert compare(INDEX, IMAGES)[0] == "column 'key' was utf8[None] and is unset"


def test_a_checkpoint_that_says_little_is_no_error() -> None:
    assert differences({}, describe(INDEX))
