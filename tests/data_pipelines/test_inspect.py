from __future__ import annotations

import gzip
import json
import lzma
from pathlib import Path

import pytest

from data_pipelines.build import ensure_dataset
from data_pipelines.inspect import compressed_bits_per_byte, summary
from data_pipelines.shards import Dataset
from data_pipelines.storage import Store
from tests.data_pipelines.conftest import BYTES, sample_texts, write_jsonl


def test_summary_counts_what_is_there(dataset: Dataset) -> None:
    found = summary(dataset)
    json.dumps(found)
    splits = found["splits"].values()
    lengths = [len(text.encode()) for text in sample_texts()]
    assert sum(split["documents"] for split in splits) == len(lengths)
    assert sum(split["bytes"] for split in splits) == sum(split["tokens"] for split in splits) == sum(lengths)
    counted = [row for split in splits for row in split["document_tokens"]]
    for row in counted:
        assert row["below"] == 2 * row["at_least"]
    assert sum(row["documents"] for row in counted) == len(lengths)
    small = sum(row["documents"] for row in counted if row["below"] <= 128)
    assert small == sum(length < 128 for length in lengths)


def test_compressed_bits_are_those_of_gzip_and_xz_on_each_document(tmp_path: Path) -> None:
    texts = [*sample_texts(8), "x" * 5000, " ".join(sample_texts(200, seed=1)), "ab\n" * 40_000]
    dataset = ensure_dataset(Store(tmp_path / "s"), write_jsonl(tmp_path / "rows.jsonl", texts), BYTES)
    for split in dataset.splits:
        raw = [dataset.tokenizer.decode(tokens).encode() for _, tokens, _ in dataset.documents(split)]
        total = sum(map(len, raw))
        seen: list[int] = []
        found = compressed_bits_per_byte(dataset, split, lambda _, done, seen=seen: seen.append(done))
        assert (found["documents"], found["bytes"], seen) == (len(raw), total, list(range(1, len(raw) + 1)))
        assert found["gzip"] == pytest.approx(8 * sum(len(gzip.compress(text, 9)) for text in raw) / total)
        assert found["xz"] == pytest.approx(8 * sum(len(lzma.compress(text, preset=9)) for text in raw) / total)
