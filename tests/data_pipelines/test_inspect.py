from __future__ import annotations

import gzip
import io
import json
import lzma
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from configs.errors import UsageError
from data_pipelines import writer as writer_module
from data_pipelines.columns import KEY, Column
from data_pipelines.inspect import compressed_bits_per_byte, examples, length_histogram, pictures, summary
from data_pipelines.pictures import as_picture, half_blocks, png
from tests.data_pipelines.small_sets import COLUMNS, some_rows, write_set, write_texts

TEXTS = [f"{number} naïve 日本 😀 " * (number % 9) for number in range(60)]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "BLOCK_BYTES", 2000)
    monkeypatch.setattr(writer_module, "SHARD_BYTES", 8000)


def test_summary_counts_what_is_there(tmp_path: Path) -> None:
    dataset = write_texts(tmp_path / "texts", {"train": TEXTS[:50], "validation": TEXTS[50:]})
    found = json.loads(json.dumps(summary(dataset)))
    assert [column["name"] for column in found["columns"]] == ["key", "tokens", "num_bytes"]
    assert found["tokenizer"]["vocab_size"] == 257
    for split, texts in (("train", TEXTS[:50]), ("validation", TEXTS[50:])):
        counts, lengths = found["splits"][split], [len(text.encode()) for text in texts]
        assert (counts["rows"], counts["tokens"], counts["bytes"]) == (len(texts), sum(lengths), sum(lengths))
        assert counts["bytes_per_token"] == 1.0
        assert counts["blocks"] == len(dataset.index.splits[split]) and counts["stored_bytes"] > sum(lengths)
        histogram = counts["lengths"]["tokens"]
        assert (histogram["rows"], histogram["shortest"], histogram["longest"]) == (
            len(texts),
            min(lengths),
            max(lengths),
        )
        assert histogram["is_sample"] is False
        for row in histogram["classes"]:
            assert row["rows"] == sum(row["at_least"] <= length < row["below"] for length in lengths)
        assert sum(row["rows"] for row in histogram["classes"]) == len(texts)


def test_summary_of_other_data(tmp_path: Path) -> None:
    dataset = write_set(tmp_path, {"train": some_rows(60), "validation": []})
    found = json.loads(json.dumps(summary(dataset)))
    assert set(found["splits"]["train"]["lengths"]) == {"tokens", "audio", "raw", "caption"}
    assert found["splits"]["train"]["tokens"] is None and found["tokenizer"] is None
    empty = found["splits"]["validation"]
    assert (empty["rows"], empty["blocks"], empty["lengths"]["audio"]["classes"]) == (0, 0, [])


def test_lengths_are_read_from_blocks_spread_over_the_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"key": str(number), "raw": bytes(number)} for number in range(400)]
    dataset = write_set(tmp_path, {"train": rows}, (KEY, Column("raw", "binary")))
    monkeypatch.setattr("data_pipelines.inspect._LOOKED_AT_BLOCKS", 4)
    found = length_histogram(dataset, "train", "raw")
    assert 0 < found["rows"] < 400 and found["is_sample"] and found["shortest"] == 0 and found["longest"] > 200


def test_examples_are_shown_by_kind(tmp_path: Path) -> None:
    rows = [{**row, "raw": b"\x00\x01" * 30} for row in some_rows(40)]
    dataset = write_set(tmp_path / "set", {"train": rows})
    shown: list[dict[str, Any]] = json.loads(json.dumps(examples(dataset, "train", 4)))
    assert [row["key"] for row in shown] == [rows[number]["key"] for number in (0, 10, 20, 30)]
    first = shown[0]
    assert set(first) == {column.name for column in COLUMNS}
    assert first["label"] == rows[0]["label"] and first["caption"]["text"] == rows[0]["caption"]
    assert first["image"]["shape"] == [4, 4, 3] and len(first["image"]["picture"]) == 2
    assert first["tokens"]["first"] == rows[0]["tokens"][:8].tolist()
    assert first["raw"] == {"length": 60, "first": "00 01 00 01 00 01 00 01"}
    assert first["audio"]["shape"] == list(rows[0]["audio"].shape)
    texts = write_texts(tmp_path / "texts", {"train": TEXTS})
    assert [row["tokens"]["text"] for row in examples(texts, "train", 3)] == [TEXTS[n][:400] for n in (0, 20, 40)]
    assert examples(write_set(tmp_path / "empty", {"train": []}), "train") == []


def test_pictures_are_found_among_arrays_and_files(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    images = [generator.integers(0, 255, (6, 5, 3), dtype=np.uint8) for _ in range(3)]
    columns = (KEY, Column("image", "uint8", (6, 5, 3)), Column("file", "binary"), Column("mask", "uint8", (7,)))
    mask = np.zeros(7, np.uint8)
    rows = [{"key": str(n), "image": image, "file": png(image), "mask": mask} for n, image in enumerate(images)]
    dataset = write_set(tmp_path, {"train": rows}, columns)
    found = pictures(dataset, "train", 3)
    pytest.importorskip("PIL")
    assert set(found) == {f"{n}-{name}" for n in range(3) for name in ("image", "file")}
    for name, picture in found.items():
        assert np.array_equal(picture, images[int(name[0])])


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((4, 6), (4, 6, 3)),
        ((4, 6, 1), (4, 6, 3)),
        ((4, 6, 4), (4, 6, 3)),
        ((3, 4, 6), (4, 6, 3)),
        ((3, 4, 4), (4, 4, 3)),
        ((5, 6, 2), None),
    ],
)
def test_what_is_a_picture(shape: tuple[int, ...], expected: tuple[int, ...] | None) -> None:
    values = np.random.default_rng(0).integers(0, 255, shape, dtype=np.uint8)
    picture = as_picture(values)
    assert (picture if picture is None else picture.shape) == expected
    assert as_picture(values.astype(np.int16)) is None


def test_png_is_read_by_others() -> None:
    image_module = pytest.importorskip("PIL.Image")
    picture = np.random.default_rng(0).integers(0, 255, (7, 9, 3), dtype=np.uint8)
    with image_module.open(io.BytesIO(png(picture))) as image:
        assert np.array_equal(np.asarray(image), picture)


def test_half_blocks_show_two_pixels_a_character() -> None:
    picture = np.zeros((5, 100, 3), np.uint8)
    picture[0, 0] = (1, 2, 3)
    picture[3, 0] = (4, 5, 6)
    lines = half_blocks(picture, max_columns=34)
    assert len(lines) == 1 and lines[0].count("▀") == 34
    assert lines[0].startswith("\x1b[38;2;1;2;3;48;2;4;5;6m▀") and lines[0].endswith("\x1b[0m")


def test_compressed_bits_are_those_of_gzip_and_xz_on_each_document(tmp_path: Path) -> None:
    texts = [*TEXTS[:8], "x" * 5000, "ab\n" * 40_000]
    dataset = write_texts(tmp_path / "texts", {"train": texts})
    raw = [text.encode() for text in texts]
    total = sum(map(len, raw))
    seen: list[int] = []
    found = compressed_bits_per_byte(dataset, "train", lambda _, done: seen.append(done))
    assert (found["documents"], found["bytes"], seen) == (len(raw), total, list(range(1, len(raw) + 1)))
    assert found["gzip"] == pytest.approx(8 * sum(len(gzip.compress(text, 9)) for text in raw) / total)
    assert found["xz"] == pytest.approx(8 * sum(len(lzma.compress(text, preset=9)) for text in raw) / total)
    with pytest.raises(UsageError, match="holds no text"):
        compressed_bits_per_byte(write_set(tmp_path / "other", {"train": some_rows(3)}), "train")
