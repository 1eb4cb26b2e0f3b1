"""Runs that are followed: what an idle one costs, and that nothing that has changed is missed."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest

from cluster.dashboard import run_view, store_view
from cluster.dashboard.run_view import RunView
from cluster.dashboard.store_view import StoreView
from configs.errors import NotFound
from data_pipelines.storage import Store
from tests.cluster.dashboard.records import new_run, train
from trainer.lease import Lease
from trainer.record import RunRecord


@pytest.fixture
def record(tmp_path: Path) -> RunRecord:
    return new_run(tmp_path / "store")


@pytest.fixture
def store(tmp_path: Path, record: RunRecord) -> StoreView:
    return StoreView(str(tmp_path / "store"), tmp_path / "cache")


def test_a_run_in_which_nothing_happens_is_not_read_again(
    store: StoreView, record: RunRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(record, 1, 5)
    record.event("stopped", step=5)
    wanted = store.run("run").summary()
    opened: list[str] = []
    real = Store.open_input
    monkeypatch.setattr(Store, "open_input", lambda self, path: opened.append(path) or real(self, path))
    for _ in range(3):
        assert store.summaries() == [wanted]
    assert opened == []


def test_whatever_happens_is_seen(store: StoreView, record: RunRecord) -> None:
    view = store.run("run")
    assert (view.summary()["step"], view.summary()["status"]) == (0, "failed") or view.summary()["status"] == "lost"
    train(record, 1, 5)
    assert view.summary()["step"] == 5
    lease = Lease.acquire(record.store)
    assert view.summary()["status"] == "running"
    train(record, 6, 6)
    assert view.summary()["step"] == 6
    lease.release()
    assert view.summary()["status"] == "lost"
    record.event("finished", step=6)
    assert view.summary()["status"] == "finished"


def test_time_alone_ends_a_lease(store: StoreView, record: RunRecord, monkeypatch: pytest.MonkeyPatch) -> None:
    view = store.run("run")
    with Lease.acquire(record.store):
        assert view.summary()["status"] == "running"
        now, ticks = time.time(), time.monotonic()
        monkeypatch.setattr(time, "time", lambda: now + 1000)
        monkeypatch.setattr(time, "monotonic", lambda: ticks + 1000)  # it is looked at every other second
        assert view.summary()["status"] == "lost"


def test_a_run_that_is_deleted_is_not_shown_as_it_was(store: StoreView, record: RunRecord, tmp_path: Path) -> None:
    view = store.run("run")
    view.summary()
    record.close()
    shutil.rmtree(tmp_path / "store" / "run")
    with pytest.raises(NotFound, match="deleted"):
        view.summary()
    assert store.summaries() == []
    new_run(tmp_path / "store", steps=50)
    with pytest.raises(NotFound, match="deleted"):
        view.summary()
    assert store.run("run").summary()["steps"] == 50


def test_the_curves_of_few_runs_are_in_memory(
    store: StoreView, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_view, "REST_EVERY_S", 0.0)
    names = [f"run-{number}" for number in range(7)]
    for name in names:
        train(new_run(tmp_path / "store", name), 1, 3)
    views = [store.run(name) for name in names]
    for view in views:
        assert view.series("loss").curve.x.tolist() == [1, 2, 3]
        store.run("run")
    awake = [view.name for view in views if view.unused_s is not None]
    assert awake == names[-store_view.MOST_AWAKE :]
    monkeypatch.setattr(store_view, "AWAKE_S", 0.0)
    store.run("run")
    assert [view for view in views if view.unused_s is not None] == []
    assert views[0].series("loss").curve.x.tolist() == [1, 2, 3]


def test_a_run_that_rests_goes_on_from_its_place(store: StoreView, record: RunRecord) -> None:
    view = store.run("run")
    train(record, 1, 5)
    place = view.num_rows()
    view.rest()
    train(record, 6, 8)
    assert [row["step"] for row in view.rows(place, view.num_rows())] == [6, 7, 8]


@pytest.mark.parametrize("steps", [0, 1, 2, 59, 61, 5000])
def test_a_sparkline_is_of_rows_all_over_the_record(store: StoreView, record: RunRecord, steps: int) -> None:
    train(record, 1, steps)
    record.metrics(steps, {"validation/loss": 1.0})
    record.flush()
    found = store.run("run").sparkline()
    assert len(found) <= run_view.SPARKLINE_BUCKETS + 1 and found == sorted(found, reverse=True)
    places = [round(1 / value) for value in found]
    assert len(set(places)) == len(places) >= min(steps, 30)
    if steps:
        assert places[0] == 1 and places[-1] >= steps * 0.95 - 1


def test_a_sparkline_leaves_out_what_was_rolled_back(store: StoreView, record: RunRecord) -> None:
    train(record, 1, 3000)
    record.next_attempt()
    train(record, 1001, 2000)
    places = [round(1 / value) for value in store.run("run").sparkline()]
    assert places == sorted(set(places)) and places[-1] <= 2000


def test_a_sparkline_reads_little_of_a_long_run(
    store: StoreView, record: RunRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(record, 1, 100)
    monkeypatch.setattr(RunView, "series", lambda *_, **__: pytest.fail("it reads everything"))
    assert store.run("run").sparkline()


def test_a_damaged_record_is_told_as_far_as_it_can_be_read(store: StoreView, record: RunRecord) -> None:
    train(record, 1, 3)
    for folder in ("events", "metrics"):
        path = record.store.local_path(f"{folder}/0001-rank-00007-000001.jsonl")
        assert path is not None
        path.write_bytes(b'\xff\x00{"kind": 3}\n{"kind":"x"}\n[]\n{"step":\n"x"\n{"time":"x","attempt":1,"kind":"x"}\n')
    view = store.run("run")
    assert view.summary()["step"] == 3 and [event["kind"] for event in view.events()] == ["created", "started"]
    assert view.series("loss").curve.x.tolist() == [1, 2, 3]
    assert len(view.sparkline()) == 3
