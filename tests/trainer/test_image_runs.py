"""Whole runs on rows as they are stored, without a tokenizer: resumed elsewhere, on changed data, on damaged data."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from configs.load import load
from data_pipelines import writer
from data_pipelines.shards import Dataset
from tests.pool import WorkerFailed
from tests.trainer.attempts import curve, data_state, state, train
from trainer.record import RunRecord
from trainer.run_data import open_datasets
from trainer.validate import validate

pytestmark = pytest.mark.distributed


def config(folder: Path, data: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    """5 examples in micro-batches of 2 are 3: on 2 workers one slot of each step is idle."""
    task = {"name": "image_classification", "num_classes": 4, "image_size": 8, "flip": True, "shift_px": 1}
    return {
        "name": "pictures",
        "steps": 8,
        "store": str(folder / "runs"),
        "task": task,
        "model": {"name": "cnn", "blocks": [1, 1], "width": 4, "dropout": 0.1},
        "data": {"name": "tests.trainer.pictures", "validation_fraction": 0.2} | (data or {}),
        "batch": {"global_batch_size": 5, "micro_batch_size": 2},
        "optimizer": {"lr": 0.01},
        "evaluation": {"every": 4, "examples": 7},
        "checkpoint": {"every": 2, "keep": None},
        "tracking": {"mlflow": None},
    } | changes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("images")


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> RunRecord:
    return train(config(folder))


def assert_close(found: RunRecord, expected: RunRecord) -> None:
    """Sums over another number of ranks are rounded otherwise; anything else would differ much more."""
    mine, theirs = state(found, 8), state(expected, 8)
    assert mine.keys() == theirs.keys()
    assert {"buffer/stem.norm.running_mean", "master/head.weight"} <= mine.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(mine[name], value, atol=1e-4, rtol=1e-3, msg=name)
    for row, wanted in zip(curve(found), curve(expected), strict=True):
        assert row == pytest.approx(wanted, rel=1e-3, abs=1e-4)


def test_the_record_of_a_run(undisturbed: RunRecord) -> None:
    rows = undisturbed.stitched()
    assert [row["examples"] for row in rows] == [5 * step for step in range(1, 9)]
    assert [row["step"] for row in rows if "validation/accuracy" in row] == [4, 8]
    assert "examples_per_s" in rows[0] and "tokens_per_s" not in rows[0]
    assert not [event for event in undisturbed.events() if event["kind"] == "sample"]
    assert "data/skipped_blocks" not in rows[-1]


def test_stopped_on_two_workers_resumed_on_three_then_on_one(folder: Path, undisturbed: RunRecord) -> None:
    """The same global batches, augmented alike; the running statistics go on too."""
    settings = config(folder, name="resized")
    train(settings, stop_after=2)
    train(settings, world_size=3, stop_after=4)
    resumed = train(settings, world_size=1)
    starts = [(event["step"], event["world_size"]) for event in resumed.events() if event["kind"] == "started"]
    assert starts == [(0, 2), (3, 3), (5, 1)]
    assert_close(resumed, undisturbed)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_the_same_run_at_another_stage(folder: Path, undisturbed: RunRecord, stage: int) -> None:
    assert_close(train(config(folder, name=f"stage-{stage}", zero={"stage": stage})), undisturbed)


def test_a_changed_data_set_is_refused_with_what_changed(folder: Path, undisturbed: RunRecord) -> None:
    source = undisturbed.store.path("checkpoints/step-00000004")
    branch = config(folder, name="branch", parent={"checkpoint": source, "state": "all"})
    train(branch)  # nothing changed
    # The source's content changes, its settings do not: what config alone cannot tell.
    other = folder / "other"
    shutil.copytree(folder / "runs" / "branch", other / "runs" / "branch")
    brighter = open_datasets(validate(load(config(other, {"brighter": 3}))))[0].path
    dataset = open_datasets(validate(load(config(other))))[0].path
    shutil.rmtree(dataset)
    shutil.copytree(brighter, dataset)
    changed = branch | {"store": str(other / "runs")}
    with pytest.raises(WorkerFailed, match=r"(?s)What changed: .*data\.brighter was unset and is 3; split 'train' had"):
        train(changed)


# --- damage


def built(folder: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]) -> Dataset:
    """The run's data set, in blocks of 20 pictures."""
    monkeypatch.setattr(writer, "BLOCK_BYTES", 20 * 8 * 8 * 3)
    dataset = open_datasets(validate(load(settings)))[0]
    assert len(dataset.index.splits["train"]) >= 4 and len(dataset.index.splits["validation"]) >= 2
    return dataset


def damage(dataset: Dataset, split: str, block: int) -> None:
    blocks = dataset.index.splits[split]
    path = Path(dataset.path) / dataset.index.file_names[int(blocks.file[block])]
    with path.open("r+b") as file:
        file.seek((int(blocks.start[block]) + int(blocks.stop[block])) // 2)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 0xFF]))


def test_damage_stops_the_run_and_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config(folder / "stops", {"rows": 240}, steps=30)
    dataset = built(folder / "stops", monkeypatch, settings)
    damage(dataset, "train", 1)
    with pytest.raises(WorkerFailed, match=r"(?s)block 1 .*set data\.damage to skip"):
        train(settings)


def test_damaged_blocks_are_left_out_alike_and_for_good(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A training and a validation block; a run at another world size, stopped and resumed, ends alike."""
    folder = folder / "skips"
    settings = config(folder, {"rows": 240, "damage": "skip"})
    dataset = built(folder, monkeypatch, settings)
    damage(dataset, "train", 1)
    damage(dataset, "validation", 0)
    record = train(settings)
    skipped = [tuple(block) for e in record.events() if e["kind"] == "data_skipped" for block in e["blocks"]]
    assert sorted(skipped) == [("train", 1), ("validation", 0)]
    exceptions = data_state(record, 8)["exceptions"]
    assert {(each["split"], each["block"]) for each in exceptions} == set(skipped)
    assert record.stitched()[-1]["data/skipped_blocks"] == 2
    assert sum(row["items"] for row in record.stitched()) < 40, "the block's examples are missing"
    assert np.isfinite(record.stitched()[-1]["validation/accuracy"])

    again = settings | {"name": "again"}
    train(again, world_size=3, stop_after=4)
    assert_close(train(again, world_size=1), record)
