from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data_pipelines import writer as writer_module
from data_pipelines.diff import diff
from data_pipelines.rows import Split
from data_pipelines.shards import Dataset
from tests.data_pipelines.small_sets import COLUMNS, some_rows, write_set, write_texts

ROWS = some_rows(150)
OTHERS = some_rows(30, seed=1)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "BLOCK_BYTES", 2000)


def compared(a: Dataset, b: Dataset) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(json.dumps(diff(a, b)))
    return found


def test_equal_content_has_no_differences(tmp_path: Path) -> None:
    a = write_set(tmp_path / "a", {"train": ROWS}, source={"name": "one"})
    b = write_set(tmp_path / "b", {"train": ROWS}, source={"name": "other"})
    assert compared(a, b) == {"same": True}


def test_changed_added_and_missing_rows_are_named(tmp_path: Path) -> None:
    changed = [row for number, row in enumerate(ROWS) if number not in (7, 90)] + OTHERS[:2]
    changed[20] = {**changed[20], "caption": "changed"}
    a = write_set(tmp_path / "a", {"train": ROWS, "validation": OTHERS})
    b = write_set(tmp_path / "b", {"train": changed, "validation": OTHERS})
    found = compared(a, b)
    assert set(found) == {"same", "splits"} and set(found["splits"]) == {"train"}
    train = found["splits"]["train"]
    assert train["rows"] == [150, 150] and train["first_block"] == 0
    assert (train["only_a"], train["only_b"], train["changed"]) == (2, 2, 1)
    assert train["examples"] == {
        "only_a": [ROWS[7]["key"], ROWS[90]["key"]],
        "only_b": [row["key"] for row in OTHERS[:2]],
        "changed": [changed[20]["key"]],
    }


def test_blocks_in_both_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changed = [*ROWS[:-1], {**ROWS[-1], "label": 1}]
    a, b = (write_set(tmp_path / name, {"train": rows}) for name, rows in (("a", ROWS), ("b", changed)))
    read: list[int] = []
    block = Split.block
    monkeypatch.setattr(Split, "block", lambda self, number, columns=None: read.append(number) or block(self, number, columns))  # type: ignore[func-returns-value]  # fmt: skip  # noqa: E501
    last = len(a.index.splits["train"]) - 1
    found = compared(a, b)["splits"]["train"]
    assert read == [last, last] and last > 5
    assert (found["first_block"], found["changed"], found["only_a"]) == (last, 1, 0)


def test_the_same_rows_cut_otherwise_are_no_changed_rows(tmp_path: Path) -> None:
    a = write_set(tmp_path / "a", {"train": ROWS}, parts=1)
    b = write_set(tmp_path / "b", {"train": ROWS}, parts=3)
    train = compared(a, b)["splits"]["train"]
    assert (train["only_a"], train["only_b"], train["changed"], train["examples"]) == (0, 0, 0, {})
    assert train["blocks"][0] != train["blocks"][1]


def test_columns_splits_tokenizers_and_sources_are_compared(tmp_path: Path) -> None:
    a = write_set(tmp_path / "a", {"train": ROWS[:20]}, source={"name": "x", "paths": ["1"]})
    b = write_set(tmp_path / "b", {"train": ROWS[:20], "extra": OTHERS}, COLUMNS[:-1], source={"name": "x"})
    found = compared(a, b)
    assert found["columns"] == {"only_a": ["caption"], "only_b": [], "changed": {}}
    assert found["source"] == {"paths": [["1"], None]}
    assert found["splits"]["extra"]["rows"] == [None, 30]
    assert (found["splits"]["train"]["changed"], found["splits"]["train"]["only_a"]) == (0, 0)
    c = write_texts(tmp_path / "c", {"train": ["a", "b"]})
    mixed = compared(a, c)
    assert mixed["tokenizer"][0] is None and mixed["tokenizer"][1]["vocab_size"] == 257
    assert mixed["columns"]["only_b"] == ["num_bytes"] and mixed["splits"]["train"]["only_a"] == 20
