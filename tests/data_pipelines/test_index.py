from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import xxhash

from configs.errors import Damaged, NotFound
from data_pipelines.blocks import Blocks
from data_pipelines.columns import KEY, Column, num_buffers
from data_pipelines.index import BLOCKS_FILE, INDEX_FILE, Index, PackingFacts, TokenizerFacts
from data_pipelines.storage import Store
from tests.data_pipelines.small_sets import COLUMNS, damage, some_rows, write_set

FACTS = TokenizerFacts(257, 0, "ab" * 16)


def small_index(num_blocks: int = 40, compression: str | None = None) -> Index:
    """An index of files that are not there."""
    generator = np.random.default_rng(0)
    width = num_buffers(COLUMNS)

    def facts(number: int) -> dict[str, Any]:
        return {
            "file": number // 10,
            "number": number % 10,
            "start": 1000 * (number % 10),
            "stop": 1000 * (number % 10) + 992,
            "rows": 3,
            "tokens": number,
            "text_bytes": 2 * number,
            "xxh3": int(generator.integers(0, 2**64 - 1, dtype=np.uint64)),
            "content_xxh3": int(generator.integers(0, 2**64 - 1, dtype=np.uint64)),
            "content_bytes": 992,
            "content_buffers": [64 * buffer for buffer in range(width)],
            "packed": {8: number, 16: 2 * number},
        }

    blocks = Blocks.of([facts(number) for number in range(num_blocks)], width, compression is not None)
    cut = num_blocks * 3 // 4
    return Index(
        name="small",
        source={"name": "small", "paths": ["ü"]},
        columns=COLUMNS,
        files={f"train-{number:05d}-000.arrow": 10_000 for number in range(4)},
        splits={"train": blocks[:cut], "validation": blocks[cut:]},
        tokenizer=FACTS,
        compression=compression,
        quarantined=3,
        dropped={"exact duplicate": 7},
        packing=PackingFacts((8, 16)),
    )


def equal(a: Index, b: Index) -> bool:
    def facts(index: Index) -> Any:
        return {name: value for name, value in vars(index).items() if name not in ("splits", "blocks")}

    return facts(a) == facts(b) and all(
        np.array_equal(array, b.splits[split].arrays()[name])
        and array.dtype == b.splits[split].arrays()[name].dtype
        and array.shape == b.splits[split].arrays()[name].shape
        for split in a.splits
        for name, array in a.splits[split].arrays().items()
    )


@pytest.mark.parametrize("compression", [None, "zstd"])
@pytest.mark.parametrize("num_blocks", [0, 1, 40])
def test_what_was_written_is_read(tmp_path: Path, num_blocks: int, compression: str | None) -> None:
    index = small_index(num_blocks, compression)
    index.write(Store(tmp_path))
    found = Index.read(Store(tmp_path))
    _ = (index.fingerprint, index.ranges, found.ranges)
    assert equal(index, found)
    assert list(found.splits["train"].packed) == [8, 16]
    assert len(found.blocks) == num_blocks and found.ranges == {
        "train": (0, num_blocks * 3 // 4),
        "validation": (num_blocks * 3 // 4, num_blocks),
    }


def test_a_remote_index_is_read(remote: Store) -> None:
    small_index().write(remote)
    assert Index.read(remote).fingerprint == small_index().fingerprint


def test_splits_are_views_of_one_mapped_file(tmp_path: Path) -> None:
    small_index().write(Store(tmp_path))
    found = Index.read(Store(tmp_path))
    for array in found.splits["validation"].arrays().values():
        assert not array.flags.owndata and not array.flags.writeable
    assert np.shares_memory(found.blocks.start, found.splits["train"].start)


def test_any_arrow_library_reads_the_blocks(tmp_path: Path) -> None:
    index = small_index()
    index.write(Store(tmp_path))
    table = pa.ipc.open_file(tmp_path / BLOCKS_FILE).read_all()
    for name, array in index.blocks.arrays().items():
        assert table.column(name).to_pylist() == array.tolist()


def test_the_fingerprint_tells_the_content_and_nothing_else(tmp_path: Path) -> None:
    rows = {"train": some_rows(50), "validation": some_rows(9, seed=1)}
    whole = write_set(tmp_path / "whole", rows)
    assert write_set(tmp_path / "again", rows).fingerprint == whole.fingerprint
    assert write_set(tmp_path / "zstd", rows, compression="zstd").fingerprint == whole.fingerprint
    assert write_set(tmp_path / "source", rows, source={"name": "other"}).fingerprint == whole.fingerprint
    changed = [*rows["train"][:-1], {**rows["train"][-1], "label": 5}]
    others = {
        write_set(tmp_path / "a", {**rows, "train": changed}).fingerprint,
        write_set(tmp_path / "b", rows, tokenizer=FACTS).fingerprint,
        write_set(tmp_path / "c", rows, COLUMNS[:-1]).fingerprint,
        write_set(tmp_path / "d", {"train": rows["train"]}).fingerprint,
        write_set(tmp_path / "e", {"train": rows["validation"], "validation": rows["train"]}).fingerprint,
        whole.fingerprint,
    }
    assert len(others) == 6 and all(len(fingerprint) == 32 for fingerprint in others)


def test_no_index_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"no data set in .*index\.json.*Build the data set again"):
        Index.read(Store(tmp_path))


def test_an_index_of_another_version_says_so(tmp_path: Path) -> None:
    small_index().write(Store(tmp_path))
    file = tmp_path / INDEX_FILE
    file.write_text(file.read_text().replace('"format_version": 3', '"format_version": 2'))
    with pytest.raises(Damaged, match="format version 2; this program reads 3"):
        Index.read(Store(tmp_path))


@pytest.mark.parametrize("name", [INDEX_FILE, BLOCKS_FILE])
@pytest.mark.parametrize("seed", range(15))
def test_any_damage_is_an_error_for_people(tmp_path: Path, name: str, seed: int) -> None:
    small_index().write(Store(tmp_path))
    file, generator = tmp_path / name, random.Random(seed)
    if seed % 3 == 0:
        file.write_bytes(file.read_bytes()[: generator.randrange(file.stat().st_size)])
    elif seed % 3 == 1:
        damage(file, generator.randrange(file.stat().st_size))
    else:
        file.write_bytes(generator.randbytes(file.stat().st_size))
    with pytest.raises(Damaged, match=r"(index\.json|blocks\.arrow).*Delete that folder"):
        Index.read(Store(tmp_path))


def test_missing_blocks_are_named(tmp_path: Path) -> None:
    small_index().write(Store(tmp_path))
    (tmp_path / BLOCKS_FILE).unlink()
    with pytest.raises(Damaged, match=r"blocks\.arrow is missing"):
        Index.read(Store(tmp_path))


# --- what has the right digests, but was not written by Index.write


def rewrite(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change index.json, and give it the digest that it then must have."""
    content = json.loads((folder / INDEX_FILE).read_text())
    content.pop("digest")
    change(content)
    digest = xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())
    (folder / INDEX_FILE).write_text(json.dumps({"digest": digest, **content}))


def drop(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda content: content.pop(name)


def put(value: Any, *keys: Any) -> Callable[[dict[str, Any]], None]:
    def change(content: Any) -> None:
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = value

    return change


@pytest.mark.parametrize(
    "change",
    [
        *map(drop, ("name", "source", "columns", "files", "splits", "blocks", "tokenizer", "packing", "fingerprint")),
        drop("lengths"),
        put([], "columns"),
        put([{"name": "key", "dtype": "utf8", "shape": [None]}] * 2, "columns"),
        put("uint99", "columns", 1, "dtype"),
        put([-3], "columns", 2, "shape"),
        put([1 << 40], "columns", 2, "shape"),
        put([400], "columns", 2, "shape"),
        put("lz4", "compression"),
        put({}, "files"),
        put(5, "files"),
        put({f"../{number}.arrow": 10_000 for number in range(4)}, "files"),
        put(5000, "files", "train-00002-000.arrow"),
        put([0, 100], "splits", "train"),
        put([5, 30], "splits", "train"),
        put([-1, 30], "splits", "train"),
        put([30, 5], "splits", "train"),
        put(39, "blocks", "rows"),
        put(41, "blocks", "rows"),
        put(10**9, "blocks", "rows"),
        put(10**30, "blocks", "arrays", "start"),
        put(-8, "blocks", "arrays", "start"),
        put(1.5, "blocks", "arrays", "start"),
        put(3, "blocks", "arrays", "rows"),
        put(0, "blocks", "arrays", "surprise"),
        put([8], "packing"),
        put(7, "lengths"),
        put("many", "quarantined"),
        put({"vocab_size": "many", "eos_id": 0, "xxh3": ""}, "tokenizer"),
        put([], "tokenizer"),
    ],
)
def test_an_index_that_makes_no_sense_is_refused(tmp_path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    small_index().write(Store(tmp_path))
    rewrite(tmp_path, change)
    with pytest.raises(Damaged, match=r"index\.json"):
        Index.read(Store(tmp_path))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("file", -1),
        ("file", 4),
        ("start", -1),
        ("start", 2**62),
        ("stop", 2**62),
        ("stop", -(2**62)),
        ("stop", 10_001),
        ("rows", 0),
        ("rows", -5),
        ("rows", 2**62),
        ("rows", 200),
        ("tokens", 500),
        ("tokens", -1),
        ("tokens", 2**62),
        ("text_bytes", -1),
        ("number", -1),
        ("content_bytes", 5),
        ("content_bytes", 2**62),
        ("content_buffers", -1),
        ("content_buffers", 2**62),
        ("content_buffers", 984),
        ("content_buffers", 4),
        ("start", 2),
        ("packed_8", -1),
    ],
)
def test_blocks_that_lie_where_they_cannot_are_refused(tmp_path: Path, name: str, value: int) -> None:
    index = small_index()
    arrays = {key: array.copy() for key, array in index.blocks.arrays().items()}
    arrays[name][7] = value
    blocks = Blocks.from_arrays(arrays, False)
    changed = Index(**{**fields_of(index), "splits": {"train": blocks[:30], "validation": blocks[30:]}})
    changed.write(Store(tmp_path))
    with pytest.raises(Damaged, match="is not an index"):
        Index.read(Store(tmp_path))


def fields_of(index: Index) -> dict[str, Any]:
    return {name: getattr(index, name) for name in Index.__dataclass_fields__}


def test_columns_are_told_apart() -> None:
    assert KEY.num_buffers == 2 and KEY.shape == (None,) and KEY.item_bytes == 1
    vectors = Column("v", "float32", (None, 80))
    assert (vectors.num_buffers, vectors.item_shape, vectors.item_bytes) == (2, (80,), 320)
    assert str(vectors.arrow_type) == "list<item: fixed_size_list<item: float>[80]>"
    image = Column("i", "uint8", (3, 32, 32))
    assert (image.num_buffers, image.item_bytes, str(image.arrow_type)) == (
        1,
        3072,
        "fixed_size_list<item: uint8>[3072]",
    )
    assert Column.from_json(json.loads(json.dumps(image.to_json()))) == image
