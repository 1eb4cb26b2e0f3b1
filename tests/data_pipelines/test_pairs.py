"""Rows of two texts, `source` and `target`, that one tokenizer makes ids of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from configs.errors import UsageError
from configs.schema import Plugin
from data_pipelines import inspect
from data_pipelines.build import ensure_dataset
from data_pipelines.build_steps import Work, sample_texts
from data_pipelines.columns import Column, texts_in, tokenized
from data_pipelines.export import export
from data_pipelines.index import Index
from data_pipelines.partition_rows import Job, source_of
from data_pipelines.shards import Dataset
from data_pipelines.split import Split
from data_pipelines.storage import Store
from data_pipelines.tokenizer import EOS_ID, TokenizerConfig

PAIRS = [(f"the {a} {b}", f"{b} zqzqzq {a} zqzqzq") for a in "abcdefgh" for b in ("cat", "naïve", "日本")]
BPE = TokenizerConfig(vocab_size=290)


def pairs(folder: Path, rows: list[tuple[str, str]], **more: list[Any]) -> Plugin:
    folder.mkdir(parents=True, exist_ok=True)
    table = pa.table({"source": [row[0] for row in rows], "target": [row[1] for row in rows], **more})
    pq.write_table(table, folder / "pairs.parquet")
    columns = {name: name for name in table.column_names}
    return Plugin(name="parquet", paths=[str(folder)], columns=columns, validation_fraction=0.2)


def texts(dataset: Dataset) -> list[tuple[str, str]]:
    decode = dataset.tokenizer.decode
    return sorted(
        (decode(row["source"]), decode(row["target"])) for split in dataset.splits for row in dataset.rows(split)
    )


@pytest.mark.parametrize("tokenizer", [BPE, TokenizerConfig(name="bytes")])
def test_both_become_ids_of_one_tokenizer_led_by_the_end_mark(tmp_path: Path, tokenizer: TokenizerConfig) -> None:
    data = pairs(tmp_path / "files", PAIRS, number=list(range(len(PAIRS))))
    dataset = ensure_dataset(Store(tmp_path / "store"), data, tokenizer)
    assert [(column.name, column.dtype, column.shape) for column in dataset.index.columns] == [
        ("key", "utf8", (None,)),
        ("source", "uint16", (None,)),
        ("target", "uint16", (None,)),
        ("number", "int64", ()),
    ]
    assert texts(dataset) == sorted(PAIRS)
    for split in dataset.splits:
        for row in dataset.rows(split):
            assert row["source"][0] == row["target"][0] == EOS_ID
            assert EOS_ID not in row["source"][1:] and EOS_ID not in row["target"][1:]
    read = Index.read(dataset.store)
    assert read.ids == ("source", "target") and read.tokenizer is not None
    assert read.tokenizer.vocab_size == dataset.tokenizer.vocab_size
    total = sum(dataset.split(split).num_bytes for split in dataset.splits)
    assert total == sum(len(text.encode()) for pair in PAIRS for text in pair)


def test_the_tokenizer_is_trained_on_both_sides_of_the_rows_to_train_on(tmp_path: Path) -> None:
    data = pairs(tmp_path / "files", [*PAIRS, ("held out", "xwxwxw")])
    source, config = source_of(data)
    job = Job(Store(tmp_path), data, source.partitions(config)[0], 0, split=Split(0.0))
    sampled = sample_texts(Work(lambda *_: None), [job])
    assert sampled == [text for pair in [*PAIRS, ("held out", "xwxwxw")] for text in pair]
    dataset = ensure_dataset(Store(tmp_path / "store"), data, BPE)
    (merged,) = dataset.tokenizer.encode([" zqzqzq"])
    assert len(merged) == 1, "a word that is on one side alone has an id of its own"


def test_a_pair_with_an_empty_side_is_left_out(tmp_path: Path) -> None:
    data = pairs(tmp_path / "files", [*PAIRS, ("", "x"), ("y", "")])
    dataset = ensure_dataset(Store(tmp_path / "store"), data, BPE)
    assert texts(dataset) == sorted(PAIRS) and dataset.index.dropped == {"empty": 2}


def test_beside_a_document_they_are_columns_as_any_other() -> None:
    columns = (Column("source", "utf8"), Column("text", "utf8"), Column("target", "utf8"))
    assert texts_in(columns) == ("text",)
    assert [column.name for column in tokenized(columns, "uint16")] == [
        "key",
        "tokens",
        "num_bytes",
        "source",
        "target",
    ]
    assert texts_in(columns[:1]) == () and texts_in((Column("source", "int32"), columns[2])) == ()


def test_they_are_shown_measured_and_exported_as_text(tmp_path: Path) -> None:
    dataset = ensure_dataset(Store(tmp_path / "store"), pairs(tmp_path / "files", PAIRS), BPE)
    summary = inspect.summary(dataset)["splits"]["train"]
    shortest = min(len(row["source"]) - 1 for row in dataset.rows("train"))
    assert summary["tokens"] is None and summary["lengths"]["source"]["shortest"] == shortest
    shown = inspect.examples(dataset, "train", 2)
    assert all((row["source"]["text"], row["target"]["text"]) in PAIRS for row in shown)
    found = []
    for name in export(dataset, tmp_path / "out"):
        table = pq.read_table(tmp_path / "out" / name)
        found += zip(table["source_text"].to_pylist(), table["target_text"].to_pylist(), strict=True)
        assert np.array_equal(table["source"][0].as_py()[:1], [EOS_ID])
    assert sorted(found) == sorted(PAIRS)
    for use in (lambda: dataset.packed("train", 8), lambda: inspect.compressed_bits_per_byte(dataset, "train")):
        with pytest.raises(UsageError, match="holds no t"):
            use()
