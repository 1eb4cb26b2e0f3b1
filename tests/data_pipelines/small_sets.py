"""Small data sets written straight through the writer, with rows that are known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from data_pipelines.blocks import join_parts
from data_pipelines.columns import KEY, Column, num_buffers, token_columns
from data_pipelines.index import TOKENIZER_FILE, Index, TokenizerFacts
from data_pipelines.lengths import join as join_lengths
from data_pipelines.lengths import length_columns
from data_pipelines.shards import Dataset
from data_pipelines.storage import Store
from data_pipelines.tokenizer import TokenizerConfig, train_tokenizer
from data_pipelines.writer import ShardWriter

# One column of every kind.
COLUMNS = (
    KEY,
    Column("tokens", "uint16", (None,)),
    Column("image", "uint8", (3, 4, 4)),
    Column("audio", "float32", (None, 5)),
    Column("label", "int64"),
    Column("weight", "float16"),
    Column("raw", "binary"),
    Column("caption", "utf8"),
)
Rows = Sequence[Mapping[str, Any]]


def some_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows for COLUMNS; empty lists, texts and bytes among them."""
    generator = np.random.default_rng(seed)
    words = ["", "naïve", "日本", "x = 1", "😀"]
    return [
        {
            "key": f"row {seed}:{number}",
            "tokens": np.concatenate([[0], generator.integers(1, 99, generator.integers(0, 40))]).astype(np.uint16),
            "image": generator.integers(0, 255, (3, 4, 4), dtype=np.uint8),
            "audio": generator.random((generator.integers(0, 4), 5), dtype=np.float32),
            "label": int(generator.integers(-(2**62), 2**62)),
            "weight": np.float16(generator.random()),
            "raw": generator.bytes(generator.integers(0, 30)),
            "caption": words[generator.integers(len(words))],
        }
        for number in range(count)
    ]


def write_set(
    folder: Path | Store,
    splits: Mapping[str, Rows],
    columns: Sequence[Column] = COLUMNS,
    *,
    parts: int = 2,
    tokenizer: TokenizerFacts | None = None,
    compression: Any = None,
    source: Mapping[str, Any] | None = None,
) -> Dataset:
    """Write rows, each split by `parts` writers, and open the data set."""
    store = folder if isinstance(folder, Store) else Store(folder)
    written: dict[str, list[Any]] = {split: [] for split in splits}
    lengths: list[str] = []
    for split, rows in splits.items():
        cuts = np.linspace(0, len(rows), parts + 1).astype(int).tolist()
        for part, (start, stop) in enumerate(pairwise(cuts)):
            lengths.append(f"{split}-{part:05d}.lengths")
            with (
                store.open_output(lengths[-1]) as file,
                ShardWriter(store, f"{split}-{part:05d}", columns, compression, lengths=file) as writer,
            ):
                for row in rows[start:stop]:
                    writer.add(row, row.get("num_bytes", 10))
            written[split].append((writer.files, writer.blocks))
    files, blocks = join_parts(written, num_buffers(columns), compression is not None)
    digest = join_lengths(store, lengths) if length_columns(columns) else None
    for each in lengths:
        store.delete(each)
    facts = {"tokenizer": tokenizer, "compression": compression, "lengths": digest}
    Index("small", source or {"name": "small"}, tuple(columns), files, blocks, **facts).write(store)
    return Dataset.open(store)


def write_texts(folder: Path, splits: Mapping[str, Sequence[str]]) -> Dataset:
    """A data set of texts as tokens (bytes), with its tokenizer."""
    tokenizer = train_tokenizer(TokenizerConfig(name="bytes"), [])
    folder.mkdir(parents=True)
    (folder / TOKENIZER_FILE).write_text(tokenizer.to_json())
    facts = TokenizerFacts(tokenizer.vocab_size, 0, xxhash.xxh3_128_hexdigest(tokenizer.to_json().encode()))
    rows = {
        split: [
            {"key": f"text {number}", "tokens": np.concatenate([[0], ids]), "num_bytes": len(text.encode())}
            for number, (text, ids) in enumerate(zip(texts, tokenizer.encode(texts), strict=True))
        ]
        for split, texts in splits.items()
    }
    return write_set(folder, rows, token_columns("uint16"), tokenizer=facts)


def same(found: Any, expected: Any) -> bool:
    """Whether a value is the one that was written."""
    if isinstance(expected, np.ndarray):
        return isinstance(found, np.ndarray) and found.dtype == expected.dtype and np.array_equal(found, expected)
    return bool(found == expected)


def same_rows(found: Rows, expected: Rows) -> bool:
    """Whether rows are those that were written."""
    return len(found) == len(expected) and all(
        got.keys() == want.keys() and all(same(got[name], want[name]) for name in want)
        for got, want in zip(found, expected, strict=True)
    )


def damage(file: Path, position: int) -> None:
    """Flip one bit of a byte."""
    with file.open("r+b") as opened:
        opened.seek(position)
        byte = opened.read(1)[0]
        opened.seek(position)
        opened.write(bytes([byte ^ 1]))
