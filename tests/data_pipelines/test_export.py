from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from configs.errors import Damaged, UsageError
from data_pipelines import export as export_module
from data_pipelines import writer as writer_module
from data_pipelines.export import export
from data_pipelines.shards import Dataset
from tests.data_pipelines.small_sets import COLUMNS, damage, some_rows, write_set, write_texts

ROWS = {"train": some_rows(150), "validation": some_rows(5, seed=1), "empty": []}
TEXTS = [f"{number} naïve 日本 😀 " * (number % 9) for number in range(60)]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "BLOCK_BYTES", 2000)


def test_parquet_holds_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_module, "_FILE_BYTES", 8000)
    dataset = write_set(tmp_path / "set", ROWS)
    seen: list[tuple[str, int]] = []
    names = export(dataset, tmp_path / "out", lambda what, done: seen.append((what, done)))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(names)
    assert len([name for name in names if name.startswith("train-")]) > 2 and "empty-00000.parquet" in names
    assert seen[-1] == ("exporting validation", len(dataset.index.splits["validation"]))
    for split, rows in ROWS.items():
        files = [tmp_path / "out" / name for name in names if name.startswith(split)]
        table = pa.concat_tables([pq.read_table(file) for file in files])
        assert table.num_rows == len(rows) and table.column_names == [column.name for column in COLUMNS]
        for column in COLUMNS:
            for got, row in zip(table.column(column.name).to_pylist(), rows, strict=True):
                want = row[column.name]
                if isinstance(want, np.ndarray):
                    want = (want.reshape(-1) if column.name == "image" else want).tolist()
                assert got == want


def test_tokens_are_exported_with_their_text(tmp_path: Path) -> None:
    dataset = write_texts(tmp_path / "texts", {"train": TEXTS})
    (name,) = export(dataset, tmp_path / "out")
    table = pq.read_table(tmp_path / "out" / name)
    assert table.column("text").to_pylist() == TEXTS
    assert table.column("tokens").to_pylist() == [row["tokens"].tolist() for row in dataset.rows("train")]
    assert table.schema.field("tokens").type == pa.list_(pa.uint16())


def test_an_export_writes_over_nothing(tmp_path: Path) -> None:
    dataset = write_set(tmp_path / "set", ROWS)
    export(dataset, tmp_path / "out")
    with pytest.raises(UsageError, match=r"already holds .*parquet.*empty folder"):
        export(dataset, tmp_path / "out")


def test_an_export_that_fails_leaves_nothing(tmp_path: Path) -> None:
    dataset = write_set(tmp_path / "set", ROWS)
    blocks = dataset.index.splits["train"]
    damage(tmp_path / "set" / dataset.index.file_names[int(blocks.file[-1])], int(blocks.stop[-1]) - 9)
    with pytest.raises(Damaged):
        export(Dataset.open(tmp_path / "set"), tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []
