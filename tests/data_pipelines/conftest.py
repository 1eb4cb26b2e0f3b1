from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import fsspec
import pytest

from configs.schema import Plugin
from data_pipelines import writer
from data_pipelines.build import ensure_dataset
from data_pipelines.shards import Dataset
from data_pipelines.storage import Store
from data_pipelines.tokenizer import TokenizerConfig

BYTES = TokenizerConfig(name="bytes")


def write_jsonl(path: Path, texts: list[str]) -> Plugin:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return Plugin(name="jsonl", paths=[str(path)], validation_fraction=0.2)


def sample_texts(count: int = 60, seed: int = 0) -> list[str]:
    """Different texts from 1 to a few hundred characters."""
    generator = random.Random(seed)
    words = ["alpha", "beta", "gamma", "naïve", "日本", "x = 1\n", "\n    return", "😀", "0123456789"]
    return [f"{number} " + " ".join(generator.choices(words, k=generator.randint(0, 60))) for number in range(count)]


@pytest.fixture
def source(tmp_path: Path) -> Plugin:
    return write_jsonl(tmp_path / "source" / "rows.jsonl", sample_texts())


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks and files even in a tiny data set."""
    monkeypatch.setattr(writer, "BLOCK_BYTES", 2000)
    monkeypatch.setattr(writer, "SHARD_BYTES", 8000)


@pytest.fixture
def dataset(tmp_path: Path, source: Plugin, small_blocks: None) -> Dataset:
    return ensure_dataset(Store(tmp_path / "store"), source, BYTES)


@pytest.fixture
def remote() -> Iterator[Store]:
    """A store behind a URI that behaves like an object store: fsspec's, in memory."""
    memory = fsspec.filesystem("memory")
    root = f"bucket-{uuid4().hex}"
    yield Store(f"memory://{root}/store")
    if memory.exists(root):
        memory.rm(root, recursive=True)
