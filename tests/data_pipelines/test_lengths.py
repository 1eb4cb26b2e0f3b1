from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from configs.errors import Damaged
from data_pipelines import build_steps, partition, writer
from data_pipelines.build import ensure_dataset
from data_pipelines.columns import KEY, Column, token_columns
from data_pipelines.damage import DamagePolicy
from data_pipelines.lengths import LENGTHS_FILE, MixtureLengths, length_columns
from data_pipelines.shards import Dataset
from data_pipelines.storage import Store
from data_pipelines.tokenizer import TokenizerConfig
from tests.data_pipelines.lines_source import write_lines
from tests.data_pipelines.small_sets import COLUMNS, damage, some_rows, write_set

# With a number that counts as a length.
SIZED = (*COLUMNS, Column("pixels", "int32"), Column("small", "uint8", (2,)))
NAMES = ["tokens", "audio", "raw", "caption", "pixels"]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "BLOCK_BYTES", 700)


def sized_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    pixels = np.random.default_rng(seed).integers(-(2**31), 2**31, count)
    return [
        row | {"pixels": np.int32(number), "small": np.zeros(2, np.uint8)}
        for row, number in zip(some_rows(count, seed), pixels.tolist(), strict=True)
    ]


def expected(rows: Sequence[dict[str, Any]], name: str) -> list[int]:
    def length(value: Any) -> int:
        return len(value.encode()) if isinstance(value, str) else len(value) if np.ndim(value) else int(value)

    return [len(row[name]) if name == "raw" else length(row[name]) for row in rows]


def test_which_columns_have_lengths() -> None:
    assert length_columns(SIZED) == NAMES
    assert length_columns((KEY, Column("image", "uint8", (3, 4, 4)), Column("label", "int64"))) == []
    assert length_columns(token_columns("uint16")) == ["tokens"]


@pytest.mark.parametrize("compression", [None, "zstd"])
def test_lengths_are_those_of_the_rows(tmp_path: Path, compression: str | None) -> None:
    splits = {"train": sized_rows(60), "validation": sized_rows(17, seed=1), "none": []}
    dataset = write_set(tmp_path, splits, SIZED, parts=3, compression=compression)
    assert len(dataset.index.splits["train"]) > 6 and dataset.verify() == []
    for split in ("train", "validation"):
        ids = np.random.default_rng(0).integers(0, len(splits[split]), 200)
        for name in NAMES:
            lengths = dataset.lengths(split, name)
            assert len(lengths) == len(splits[split])
            assert lengths(ids).tolist() == np.array(expected(splits[split], name))[ids].tolist()
    assert len(dataset.lengths("none", "raw")) == 0
    parts = [dataset.lengths(split, "audio") for split in splits]
    mixed = expected([*splits["train"], *splits["validation"]], "audio")
    ids = np.random.default_rng(0).permutation(77)
    assert MixtureLengths(parts)(ids).tolist() == np.array(mixed)[ids].tolist()


def test_no_block_is_read_for_them(tmp_path: Path) -> None:
    rows = sized_rows(60)
    write_set(tmp_path, {"train": rows}, SIZED)
    for shard in tmp_path.glob("train-*.arrow"):
        shard.unlink()
    lengths = Dataset.open(tmp_path, damage=DamagePolicy("skip")).lengths("train", "tokens")
    assert lengths(np.arange(60)).tolist() == expected(rows, "tokens")


@pytest.mark.parametrize("kind", ["damaged", "cut", "missing"])
def test_damage_is_named_and_never_planned_with(tmp_path: Path, kind: str) -> None:
    write_set(tmp_path, {"train": sized_rows(20)}, SIZED)
    file = tmp_path / LENGTHS_FILE
    if kind == "damaged":
        damage(file, 50)
    elif kind == "cut":
        file.write_bytes(file.read_bytes()[:-4])
    else:
        file.unlink()
    dataset = Dataset.open(tmp_path)
    with pytest.raises(Damaged, match=r"lengths\.bin.*Delete that folder"):
        dataset.lengths("train", "tokens")
    assert [found.file for found in dataset.verify()] == [LENGTHS_FILE]


# --- builds


@pytest.mark.parametrize("tokenizer", [TokenizerConfig(name="bytes"), None])
def test_a_build_stores_them(tmp_path: Path, tokenizer: TokenizerConfig | None, remote: Store) -> None:
    """Several partitions and blocks, bad rows between; on a disk and in an object store the same."""
    words = [["x" * (7 * n % 300) + str((n, part)) for n in range(40)] for part in range(3)]
    data = write_lines(tmp_path / "source", [[*rows[:5], b"bad", *rows[5:]] for rows in words], max_bad_share=0.1)
    built = [ensure_dataset(store, data, tokenizer) for store in (Store(tmp_path / "s"), remote)]
    name = "text" if tokenizer is None else "tokens"
    for dataset in built:
        for split in dataset.splits:
            rows = list(dataset.rows(split))
            assert dataset.lengths(split, name)(np.arange(len(rows))).tolist() == expected(rows, name)
        assert len(dataset.index.splits["train"]) > 6 and len(dataset.index.splits["validation"]) > 1
    assert built[0].store.read_bytes(LENGTHS_FILE) == built[1].store.read_bytes(LENGTHS_FILE)
    assert built[0].store.size(LENGTHS_FILE) == 4 * 120


def test_a_partition_whose_lengths_have_gone_is_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_lines(tmp_path / "source", [[f"{n} {part}" for n in range(9)] for part in range(3)])
    whole = ensure_dataset(Store(tmp_path / "whole"), data, None)
    store = Store(tmp_path / "again")

    def cut_off(*_: Any) -> None:
        parts = sorted((tmp_path / "again").rglob("*.train.lengths"))
        assert len(parts) == 3
        parts[0].unlink()
        parts[1].write_bytes(parts[1].read_bytes()[:-4])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(build_steps, "join_lengths", cut_off)
        with pytest.raises(KeyboardInterrupt):
            ensure_dataset(store, data, None)
    written: list[int] = []
    really = partition._writer

    def counted(job: Any, *rest: Any) -> Any:
        written.append(job.number)
        return really(job, *rest)

    monkeypatch.setattr(partition, "_writer", counted)
    again = ensure_dataset(store, data, None)
    assert set(written) == {0, 1}
    assert again.store.read_bytes(LENGTHS_FILE) == whole.store.read_bytes(LENGTHS_FILE)
    assert again.store.list("parts") == []


def test_tokens_take_hardly_more_than_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Documents of 2,048 tokens of 2 bytes: 1 %, everything counted but the tokenizer."""
    monkeypatch.undo()
    rows = [
        {"key": f"train.jsonl:{number}", "tokens": np.full(2048, 7, np.uint16), "num_bytes": 8000}
        for number in range(3000)
    ]
    write_set(tmp_path, {"train": rows}, token_columns("uint16"))
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 1.01 * 2 * 2048 * len(rows)
