from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import xxhash

from configs.errors import ShardyardError, UsageError
from data_pipelines import writer as writer_module
from data_pipelines.blocks import Blocks, join_parts
from data_pipelines.columns import KEY, Column, arrow_schema, num_buffers, token_columns
from data_pipelines.storage import OutputFile, Store
from data_pipelines.writer import ShardWriter, decompressed
from tests.data_pipelines.small_sets import COLUMNS, some_rows


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "BLOCK_BYTES", 3000)
    monkeypatch.setattr(writer_module, "SHARD_BYTES", 12_000)


def write(folder: Path, rows: Any, columns: Any = COLUMNS, **options: Any) -> ShardWriter:
    with ShardWriter(Store(folder), "train-00003", columns, **options) as writer:
        for row in rows:
            writer.add(row, 7)
    return writer


@pytest.mark.parametrize("compression", [None, "zstd"])
def test_any_arrow_library_reads_the_files(tmp_path: Path, compression: Any) -> None:
    rows = some_rows(150)
    written = write(tmp_path, rows, compression=compression)
    assert list(written.files) == [f"train-00003-{number:03d}.arrow" for number in range(len(written.files))]
    assert len(written.files) > 2
    found: dict[str, list[Any]] = {column.name: [] for column in COLUMNS}
    for name, size in written.files.items():
        assert (tmp_path / name).stat().st_size == size
        table = pa.ipc.open_file(tmp_path / name).read_all()
        table.validate(full=True)
        assert table.schema == arrow_schema(COLUMNS)
        for column in COLUMNS:
            found[column.name] += table.column(column.name).to_pylist()
    for column in COLUMNS:
        for got, row in zip(found[column.name], rows, strict=True):
            want = row[column.name]
            if isinstance(want, np.ndarray):
                want = (want.reshape(-1) if column.name == "image" else want).tolist()
            assert got == want, column


@pytest.mark.parametrize("compression", [None, "zstd"])
def test_each_block_is_the_message_that_its_facts_say(tmp_path: Path, compression: Any) -> None:
    written = write(tmp_path, some_rows(150), compression=compression)
    blocks, names = written.blocks, list(written.files)
    for block in range(len(blocks)):
        raw = (tmp_path / names[blocks.file[block]]).read_bytes()
        message = raw[blocks.start[block] : blocks.stop[block]]
        batch = pa.ipc.open_file(pa.py_buffer(raw)).get_batch(int(blocks.number[block]))
        assert message[:4] == b"\xff\xff\xff\xff" and pa.ipc.read_message(message).metadata is not None
        assert pa.ipc.read_record_batch(pa.py_buffer(message), arrow_schema(COLUMNS)).equals(batch)
        assert blocks.rows[block] == batch.num_rows and blocks.text_bytes[block] == 7 * batch.num_rows
        assert blocks.tokens[block] == len(batch.column("tokens").values)
        assert blocks.xxh3[block] == xxhash.xxh3_64_intdigest(message)
        content = message if compression is None else bytes(decompressed(message, COLUMNS))
        assert len(content) == blocks.content_bytes[block]
        body = bytes(decompressed(message, COLUMNS))
        assert blocks.content_xxh3[block] == xxhash.xxh3_64_intdigest(body)
        assert_buffers(batch, content, blocks.content_buffers[block].tolist())
        assert (
            blocks.buffers[block] == (-1 if compression else blocks.content_buffers[block] + blocks.start[block])
        ).all()


def assert_buffers(batch: pa.RecordBatch, content: bytes, places: list[int]) -> None:
    """Each data buffer of the record batch stands in the content, in the order of the columns."""
    data = [buffer for column in batch.columns for buffer in column.buffers() if buffer is not None]
    assert len(places) == len(data) == num_buffers(COLUMNS)
    for buffer, place in zip(data, places, strict=True):
        assert content[place : place + buffer.size] == buffer.to_pybytes()


def test_compression_changes_no_content(tmp_path: Path) -> None:
    plain, small = (write(tmp_path / str(c), some_rows(100), compression=c).blocks for c in (None, "zstd"))
    assert plain.content_xxh3.tolist() == small.content_xxh3.tolist() and plain.rows.tolist() == small.rows.tolist()
    assert plain.xxh3.tolist() != small.xxh3.tolist() and small.compressed and not plain.compressed


@pytest.mark.parametrize("compression", [None, "zstd"])
def test_the_same_rows_give_the_same_bytes(tmp_path: Path, compression: Any) -> None:
    files = [write(tmp_path / name, some_rows(80), compression=compression).files for name in "ab"]
    assert files[0] == files[1]
    for name in files[0]:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_blocks_hold_between_half_and_twice_the_limit_unless_a_row_is_larger(tmp_path: Path) -> None:
    columns = (KEY, Column("raw", "binary"))
    generator = np.random.default_rng(0)
    sizes = [*generator.integers(0, 2500, 200).tolist(), 20_000, 10, 2990, 2990, 10]
    written = write(tmp_path, [{"key": str(n), "raw": bytes(size)} for n, size in enumerate(sizes)], columns)
    first = 0
    for block in range(len(written.blocks)):
        held = sizes[first : first + written.blocks.rows[block]]
        first += len(held)
        assert sum(held) + 20 * len(held) > 1500 or block == len(written.blocks) - 1
        assert sum(held) < 6000 or max(held) == 20_000
    assert first == len(sizes)


def test_a_partition_without_rows_has_no_file(tmp_path: Path) -> None:
    written = write(tmp_path, [])
    assert (written.files, len(written.blocks), list(tmp_path.iterdir())) == ({}, 0, [])


def test_packing_counts_are_asked_for_once_a_block(tmp_path: Path) -> None:
    seen: list[np.ndarray] = []

    def count(lengths: np.ndarray) -> dict[int, int]:
        seen.append(lengths)
        return {8: int(lengths.sum()) // 8, 16: len(lengths)}

    rows = [{"key": str(n), "tokens": np.arange(n, dtype=np.uint16), "num_bytes": n} for n in range(1, 120)]
    blocks = write(tmp_path, rows, token_columns("uint16"), packed=count).blocks
    assert np.concatenate(seen).tolist() == list(range(1, 120)) and len(seen) == len(blocks) > 2
    assert blocks.packed[16].tolist() == blocks.rows.tolist()
    assert blocks.packed[8].tolist() == (blocks.tokens // 8).tolist()


def test_parts_of_a_build_are_kept_as_json_and_joined(tmp_path: Path) -> None:
    parts = []
    for number in range(3):
        with ShardWriter(Store(tmp_path), f"train-{number:05d}", COLUMNS) as writer:
            for row in some_rows(40 * number, seed=number):
                writer.add(row)
        kept = json.loads(json.dumps(writer.blocks.to_json()))
        parts.append((writer.files, Blocks.from_json(kept, num_buffers(COLUMNS), False)))
        for name, array in writer.blocks.arrays().items():
            again = parts[-1][1].arrays()[name]
            assert again.dtype == array.dtype and np.array_equal(again, array)
    files, splits = join_parts({"train": parts, "validation": []}, num_buffers(COLUMNS), False)
    names = list(files)
    assert len(splits["validation"]) == 0 and splits["validation"].content_buffers.shape == (0, num_buffers(COLUMNS))
    assert [names[number] for number in splits["train"].file] == [
        list(sizes)[number] for sizes, blocks in parts for number in blocks.file
    ]
    assert splits["train"].rows.sum() == 120


@pytest.mark.parametrize(
    ("column", "value"),
    [
        (Column("v", "uint16", (None,)), [70_000]),
        (Column("v", "uint16", (None,)), np.array([-1])),
        (Column("v", "uint16", (None,)), [1.5]),
        (Column("v", "uint16", (None,)), [[1, 2]]),
        (Column("v", "uint16", (None,)), "text"),
        (Column("v", "uint8", (2, 3)), np.zeros((3, 2), np.uint8)),
        (Column("v", "float32", (None, 3)), np.zeros((4, 2), np.float32)),
        (Column("v", "int64"), None),
        (Column("v", "int64"), [1, 2]),
        (Column("v", "int64"), 2**80),
        (Column("v", "utf8"), b"bytes"),
        (Column("v", "utf8"), "\ud800"),
        (Column("v", "binary"), "text"),
    ],
)
def test_a_value_that_does_not_fit_is_named(tmp_path: Path, column: Column, value: Any) -> None:
    writer = ShardWriter(Store(tmp_path), "train", (KEY, column))
    with pytest.raises(UsageError, match=r"does not fit column 'v' of .*Change the source"):
        writer.add({"key": "a", "v": value})


def test_values_that_fit_are_stored_in_the_columns_dtype(tmp_path: Path) -> None:
    columns = (Column("a", "uint16", (None,)), Column("b", "float32"), Column("c", "int8", (2,)), Column("d", "binary"))
    write(tmp_path, [{"a": [1, 2], "b": 1, "c": np.array([3, -4]), "d": np.arange(3, dtype=np.uint8)}], columns)
    row = pa.ipc.open_file(tmp_path / "train-00003-000.arrow").read_all().to_pylist()[0]
    assert row == {"a": [1, 2], "b": 1.0, "c": [3, -4], "d": b"\0\1\2"}


@pytest.mark.parametrize(
    ("dtype", "shape"),
    [
        ("bool", ()),
        ("text", ()),
        ("int64", (0,)),
        ("int64", (3, None)),
        ("utf8", (3,)),
        ("float32", (1 << 20, 1 << 20)),
    ],
)
def test_columns_that_cannot_be_are_refused(dtype: str, shape: tuple[int | None, ...]) -> None:
    with pytest.raises(ValueError, match="column 'x': dtype"):
        Column("x", dtype, shape)


def test_a_build_that_fails_leaves_no_unfinished_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KeyError), ShardWriter(Store(tmp_path), "train", COLUMNS) as writer:
        for row in some_rows(30):
            writer.add(row)
        raise KeyError
    assert (
        sorted(path.name for path in tmp_path.iterdir()) == [name for name, size in writer.files.items() if size][:-1]
    )

    def full(self: OutputFile, data: Any) -> int:
        raise ShardyardError("the disk is full")

    monkeypatch.setattr(OutputFile, "write", full)
    with pytest.raises(ShardyardError, match="full"), ShardWriter(Store(tmp_path / "full"), "train", COLUMNS) as writer:
        writer.add(some_rows(1)[0])
    assert list((tmp_path / "full").iterdir()) == []
