"""Whole runs on rows that differ in length, like ones side by side: resumed elsewhere, on damaged data, in mixtures."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from configs.load import load
from configs.problems import ConfigError
from data_pipelines import writer
from data_pipelines.buckets import BucketOrder
from data_pipelines.lengths import LENGTHS_FILE
from tests.pool import WorkerFailed
from tests.trainer.attempts import curve, data_state, state, train
from tests.trainer.test_image_runs import damage
from trainer.distributed import World
from trainer.record import RunRecord
from trainer.run_data import Position, RunData, open_datasets
from trainer.validate import validate

distributed = pytest.mark.distributed


def config(folder: Path, data: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    """5 examples in micro-batches of 2 are 3: on 2 workers one slot of each step is idle. An epoch ends in step 10."""
    return {
        "name": "signals",
        "steps": 12,
        "store": str(folder / "runs"),
        "task": {"name": "tests.trainer.ragged_task"},
        "model": {"name": "tests.trainer.ragged_model"},
        "data": {"name": "tests.trainer.ragged_source", "validation_fraction": 0.2} | (data or {}),
        "batch": {"global_batch_size": 5, "micro_batch_size": 2},
        "optimizer": {"lr": 0.05},
        "evaluation": {"every": 4, "examples": 7},
        "checkpoint": {"every": 2, "keep": None},
        "tracking": {"mlflow": None},
    } | changes


def mixture(folder: Path, *changes: dict[str, Any], **run: Any) -> dict[str, Any]:
    """Two sources of signals, one of which ends after half an epoch."""
    sources = [
        {"weight": weight, "max_epochs": most, "data": config(folder, {"kind": kind, "rows": 30})["data"]}
        for weight, most, kind in ((0.7, None, 1), (0.3, 0.5, 2))
    ]
    return config(folder, **run) | {"data": {"name": "mixture", "sources": sources, "changes": list(changes)}}


CHANGE = {"at": 24, "weights": [0.5, 0.5]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ragged")


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> RunRecord:
    return train(config(folder))


def assert_close(found: RunRecord, expected: RunRecord) -> None:
    """Sums over another number of ranks are rounded otherwise; anything else would differ much more."""
    mine, theirs = state(found, 12), state(expected, 12)
    assert mine.keys() == theirs.keys() >= {"master/head.weight"}
    for name, value in theirs.items():
        torch.testing.assert_close(mine[name], value, atol=1e-5, rtol=1e-4, msg=name)
    for row, wanted in zip(curve(found), curve(expected), strict=True):
        assert row == pytest.approx(wanted, rel=1e-4, abs=1e-5)


def opened(settings: dict[str, Any]) -> RunData:
    plan = validate(load(settings))
    return RunData.of(open_datasets(plan), plan)


# --- the order


def padding_share(settings: dict[str, Any]) -> float:
    """Of an epoch's training batches."""
    resolved, data = load(settings), opened(settings)
    loader = data.loader(resolved.config, World(0, 1, 0, torch.device("cpu")), Position())
    real = padded = 0
    for step in range(len(data.train) // 5):
        for batch in loader.step(step):
            real += int(batch.tensors["signal_length"].sum())
            padded += batch.tensors["signal"][..., 0].numel()
    loader.close()
    data.close()
    return 1 - real / padded


@pytest.mark.parametrize("by", ["signal", "moments"])
def test_less_is_padded_than_in_the_plain_order(folder: Path, by: str) -> None:
    def share(by: str | None) -> float:
        task = {"name": "tests.trainer.ragged_task", "by": by}
        return padding_share(config(folder, {"rows": 300, "kind": 5}, task=task))

    assert share(by) < 0.1 < 0.2 < share(None)


def test_rows_are_prepared_in_as_many_threads_as_wanted(folder: Path) -> None:
    def threads_beside(loader_threads: int) -> int:
        settings = config(folder, resources={"loader_threads": loader_threads})
        data = opened(settings)
        loader = data.loader(load(settings).config, World(0, 1, 0, torch.device("cpu")), Position())
        loader.step(0)
        found = sum(thread.name.startswith("prepare") for thread in threading.enumerate())
        loader.close()
        data.close()
        return found

    assert threads_beside(1) == 0 < threads_beside(3) <= 3


def test_a_length_column_must_have_lengths(folder: Path) -> None:
    task = {"name": "tests.trainer.ragged_task", "by": "moments"}
    with pytest.raises(ConfigError, match=r"rows of like 'moments' side by side.* column is int64\[\]"):
        validate(load(config(folder, {"integers": True}, task=task)))
    with pytest.raises(ConfigError, match="column is not there"):
        validate(load(config(folder, task=task | {"by": "weight"})))


def test_a_mixture_keeps_its_shares_between_changes(folder: Path) -> None:
    data = opened(mixture(folder, CHANGE))
    assert data.mixture is not None and isinstance(data.order, BucketOrder)
    ids = data.order.sample_ids(np.arange(60))
    second = np.cumsum(ids >= len(data.datasets[0].split("train")))
    changes = data.mixture.schedule.changes
    assert changes[0] == 24 < changes[1] < 60, "the last is the end of the second source"
    assert [second[at - 1] for at in changes] == [data.mixture.schedule.counts(at)[1] for at in changes]
    assert data.order.state(20)["window"] == [0, 24]
    assert data.metrics(Position(4, 24))["data/1-tests.trainer.ragged_source/share"] == second[23] / 24
    data.close()


# --- runs


@distributed
def test_stopped_on_two_workers_resumed_on_three_then_on_one(folder: Path, undisturbed: RunRecord) -> None:
    """The same global batches, prepared alike, across an epoch's end."""
    settings = config(folder, name="resized", resources={"loader_threads": 1})
    train(settings, stop_after=3)
    train(settings, world_size=3, stop_after=6)
    resumed = train(settings, world_size=1)
    starts = [(event["step"], event["world_size"]) for event in resumed.events() if event["kind"] == "started"]
    assert starts == [(0, 2), (4, 3), (7, 1)]
    assert_close(resumed, undisturbed)


@distributed
def test_without_buckets_it_is_another_run(folder: Path, undisturbed: RunRecord) -> None:
    plain = train(config(folder, name="plain", task={"name": "tests.trainer.ragged_task", "by": None}))
    assert "buckets" not in data_state(plain, 4)
    assert abs(plain.stitched()[0]["loss"] - undisturbed.stitched()[0]["loss"]) > 1e-3


@distributed
def test_another_batch_size_inside_a_window_is_refused(folder: Path, undisturbed: RunRecord) -> None:
    length = opened(config(folder)).order.epoch_length
    assert data_state(undisturbed, 4)["buckets"] == {
        "column": "signal",
        "global_batch_size": 5,
        "micro_batch_size": 2,
        "window": [0, length],
    }
    parent = {"checkpoint": undisturbed.store.path("checkpoints/step-00000004"), "state": "all"}
    batch, micro = {"global_batch_size": 4, "micro_batch_size": 2}, {"global_batch_size": 5, "micro_batch_size": 3}
    with pytest.raises(WorkerFailed, match=r"(?s)position 20, among .* of 5 and 2.* of 4 and 2.* seen twice"):
        train(config(folder, name="other-batch", parent=parent, batch=batch), world_size=1)
    with pytest.raises(WorkerFailed, match="seen twice"):
        train(config(folder, name="other-micro", parent=parent, batch=micro), world_size=1)
    train(config(folder, name="same-batch", parent=parent), world_size=1)


@distributed
def test_damaged_blocks_are_left_out_alike_and_for_good(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is planned does not change, and no block is read for it."""
    folder = folder / "skips"
    monkeypatch.setattr(writer, "BLOCK_BYTES", 3000)
    settings = config(folder, {"damage": "skip"})
    dataset = open_datasets(validate(load(settings)))[0]
    assert len(dataset.index.splits["train"]) >= 3
    damage(dataset, "train", 1)
    record = train(settings)
    skipped = [tuple(block) for e in record.events() if e["kind"] == "data_skipped" for block in e["blocks"]]
    assert skipped == [("train", 1)]
    assert sum(row["items"] for row in record.stitched()) < 60, "the block's examples are missing"
    again = settings | {"name": "again"}
    train(again, world_size=3, stop_after=4)
    assert_close(train(again, world_size=1), record)


@distributed
def test_damaged_lengths_stop_the_run(folder: Path) -> None:
    settings = config(folder / "lengths", {"damage": "skip"})
    file = Path(open_datasets(validate(load(settings)))[0].path) / LENGTHS_FILE
    file.write_bytes(bytes(file.stat().st_size))
    with pytest.raises(WorkerFailed, match=r"lengths\.bin fails its digest"):
        train(settings, world_size=1)


@distributed
def test_a_mixture_resumed_on_other_numbers_of_workers(folder: Path) -> None:
    whole = train(mixture(folder, CHANGE, name="mixed"))
    settings = mixture(folder, CHANGE, name="mixed-resized")
    train(settings, world_size=3, stop_after=5)
    assert_close(train(settings, world_size=1), whole)
    at_4 = {"checkpoint": whole.store.path("checkpoints/step-00000004"), "state": "all"}
    earlier = mixture(folder, {"at": 22, "weights": [0.1, 0.9]}, name="earlier", parent=at_4)
    with pytest.raises(WorkerFailed, match=r"(?s)changes of a mixture begin at position 24 or later"):
        train(earlier, world_size=1)
