"""Metrics that training keeps as columns, too, beside the rows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import fsspec
import pytest

from configs.load import load
from data_pipelines.storage import Store
from tests.cluster.waiting import wait_for
from tests.configs.minimal import minimal
from trainer import columns, record
from trainer.columns import Columns
from trainer.record import RunRecord

NAME = "demo"


@pytest.fixture(params=["local", "remote"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    if request.param == "local":
        yield Store(tmp_path / "runs")
        return
    root = f"bucket-{uuid4().hex}"
    yield Store(f"memory://{root}/store")
    fsspec.filesystem("memory").rm(root, recursive=True)


def begin(store: Store) -> tuple[RunRecord, RunRecord]:
    """A launcher's record, and a worker's."""
    launcher = RunRecord.create(store, load(minimal(name=NAME)))
    launcher.next_attempt()
    return launcher, RunRecord.open(store.uri, NAME, rank=0)


def write(worker: RunRecord, first: int, last: int) -> None:
    for step in range(first, last + 1):
        worker.metrics(step, {"loss": 1 / step})


def test_who_writes_metrics_keeps_them_on_a_local_disk(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record, "_COLUMNS_EVERY_S", 0.0)
    monkeypatch.setattr(columns, "CHUNK", 500)
    launcher, worker = begin(store)
    write(worker, 1, 600)
    folder = store.child(NAME).local_path(columns.FOLDER)
    if folder is not None:
        wait_for(lambda: any(folder.glob("*.arrow")), "columns while it trains", 20)
    write(worker, 601, 2000)
    worker.close()
    launcher.event("finished")
    launcher.close()
    assert len(launcher.metrics_table()) == 2000
    assert ("columns" in store.list_dirs(NAME)) == store.is_local
    if store.is_local:
        store.delete_dir(f"{NAME}/metrics")
        numbers, values = Columns(store.child(NAME), tmp_path / "cache").metric("loss")
        assert list(numbers) == list(range(2000)) and values[-1] == 1 / 2000


def test_the_next_attempt_goes_on_with_them(tmp_path: Path) -> None:
    store = Store(tmp_path / "runs")
    for attempt in range(3):
        launcher, worker = begin(store)
        write(worker, 1 + 1000 * attempt, 2000 + 1000 * attempt)  # half of it repeats what was lost
        worker.close()
        launcher.close()
    store.delete_dir(f"{NAME}/metrics")
    found = Columns(store.child(NAME), tmp_path / "cache")
    attempts, steps, _ = found.place()
    assert list(steps) == [*range(1, 2001), *range(1001, 3001), *range(2001, 4001)]
    assert list(attempts) == [1] * 2000 + [2] * 2000 + [3] * 2000


def test_where_they_cannot_be_kept_training_goes_on(tmp_path: Path) -> None:
    _, worker = begin(Store(tmp_path / "runs"))
    (tmp_path / "runs" / NAME / columns.FOLDER).write_text("a file where the folder should be")
    write(worker, 1, 2000)
    worker.close()
    assert len(worker.metrics_table()) == 2000


def test_a_little_at_a_time_is_kept_in_the_end_and_by_nobody_else(tmp_path: Path) -> None:
    store = Store(tmp_path / "runs")
    launcher, worker = begin(store)
    for first in (1, 701):
        write(worker, first, first + 699)
        worker.flush()
        worker._keep_columns()
    launcher.event("failed")
    launcher.close()
    folder = tmp_path / "runs" / NAME / columns.FOLDER
    assert not folder.exists()
    worker.close()
    assert Columns(store.child(NAME), tmp_path / "cache").num_rows == 1400


def test_whatever_befalls_them_rows_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(self: Columns) -> int:
        raise MemoryError("no room")

    monkeypatch.setattr(Columns, "update", fail)
    monkeypatch.setattr(record, "_COLUMNS_EVERY_S", 0.0)
    _, worker = begin(Store(tmp_path / "runs"))
    write(worker, 1, 10)
    wait_for(lambda: "rows alone" in capsys.readouterr().err, "the failure", 20)
    write(worker, 11, 20)
    wait_for(lambda: len(worker.metrics_table()) == 20, "rows by the same thread", 20)
    worker.close()
    assert capsys.readouterr().err == "", "it is told once"
