"""Where time goes: splits, matrices and stragglers, against plain loops over the rows."""

from __future__ import annotations

import math
import random
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.dashboard import performance, rank_rows
from cluster.dashboard.performance import bucketed, matrix, memory, slower_than_median, split, stragglers
from cluster.dashboard.rank_rows import RankRows, RankTable
from cluster.dashboard.store_view import StoreView
from configs.load import load
from data_pipelines.storage import Store
from tests.configs.minimal import minimal
from trainer.columns import Columns
from trainer.record import RunRecord
from trainer.record_rows import RowWriter
from trainer.step_times import PARTS

# --- stragglers


@pytest.mark.parametrize(
    ("recent", "expected"),
    [
        ({}, []),
        ({0: [1.0] * 16}, []),
        ({0: [1.0] * 16, 1: [1.29] * 16}, []),
        ({0: [1.0] * 16, 1: [1.31] * 16}, [1]),
        ({0: [1.0] * 16, 1: [9.0] * 3}, []),  # too few to tell
        ({0: [1.0] * 16, 1: [1.0] * 15 + [99.0]}, []),  # one slow step
        ({0: [1.0] * 16, 1: [1.0] * 7 + [2.0] * 9}, [1]),
        ({0: [1.0] * 16, 1: [5.0] * 100 + [1.0] * 16}, []),  # long ago
        ({0: [1.0] * 16, 1: [1.5] * 16, 2: [1.1] * 16, 3: [3.0] * 16}, [3, 1]),
        ({0: [0.0] * 16, 1: [1.0] * 16}, []),  # no clock is that fine
    ],
)
def test_who_is_a_straggler(recent: dict[int, list[float]], expected: list[int]) -> None:
    assert [rank for rank, _ in stragglers(recent)] == expected


def test_how_much_slower_than_the_median_rank() -> None:
    assert slower_than_median({0: 1.0, 1: 2.0}) == [(1, 2.0), (0, 1.0)]
    assert slower_than_median({0: 4.0, 1: 2.0, 2: 1.0}) == [(0, 2.0), (1, 1.0), (2, 0.5)]


# --- buckets and matrices


@given(st.lists(st.integers(0, 300), max_size=200), st.integers(1, 30))
def test_buckets_are_few_full_and_in_order(steps: list[int], buckets: int) -> None:
    place, x = bucketed(np.array(steps, np.int64), buckets)
    assert len(x) <= max(buckets, 0) and (np.diff(x) > 0).all()
    for number, last in enumerate(x):
        inside = [step for step, where in zip(steps, place, strict=True) if where == number]
        assert max(inside) == last
        if number:
            assert min(inside) > x[number - 1]
    if len(set(steps)) <= buckets:
        assert list(x) == sorted(set(steps))


def table_of(rows: list[tuple[int, int, float, float]]) -> RankTable:
    """rows: (rank, step, step_s, step_s_max); half of a step is a wait."""
    rows = sorted(rows, key=lambda row: row[0])
    column = {name: np.full(len(rows), np.nan) for name in rank_rows.RECORDED}
    column["step_s"] = np.array([row[2] for row in rows])
    column["step_s_max"] = np.array([row[3] for row in rows])
    column["collective_s"] = column["step_s"] / 2
    return RankTable(np.array([r[0] for r in rows], np.int64), np.array([r[1] for r in rows], np.int64), column)


@given(st.randoms(use_true_random=False), st.integers(1, 20), st.booleans())
def test_a_matrix_has_the_mean_and_the_longest_step_of_each_cell(rng: random.Random, buckets: int, cut: bool) -> None:
    rows = [
        (rank, step, seconds := rng.random(), seconds + rng.random())
        for rank in rng.sample(range(50), 4)
        for step in range(5, 100, 5)
        if rng.random() < 0.8
    ]
    start, stop = (20.0, 70.0) if cut else (None, None)
    found = matrix(table_of(rows), "step_s", start=start, stop=stop, buckets=buckets)
    inside = [row for row in rows if not cut or 20 <= row[1] <= 70]
    assert list(found.ranks) == sorted({row[0] for row in inside})
    edges = [-1, *found.x]
    for number, rank in enumerate(found.ranks):
        for bucket in range(len(found.x)):
            cell = [row for row in inside if row[0] == rank and edges[bucket] < row[1] <= edges[bucket + 1]]
            mean, largest = found.mean[number, bucket], found.largest[number, bucket]
            if cell:
                assert mean == pytest.approx(statistics.mean(row[2] for row in cell))
                assert largest == max(row[3] for row in cell)
            else:
                assert math.isnan(mean) and math.isnan(largest)


def test_a_ranks_own_time_is_without_its_waits() -> None:
    table = table_of([(0, 1, 4.0, 4.0), (0, 2, 8.0, 8.0), (1, 1, 2.0, 2.0)])
    assert matrix(table, "own_s", buckets=9).mean[0].tolist() == [2.0, 4.0]
    assert performance.own_medians(table, None, None) == {0: 3.0, 1: 1.0}
    assert performance.own_medians(table, 2, None) == {0: 4.0}


# --- the rows of ranks


def write_ranks(run: Store, attempt: int, start: int, steps: list[int], ranks: int, **values: float) -> None:
    for rank in range(ranks):
        writer = RowWriter(run, "ranks", attempt, f"rank-{rank:05d}")
        facts = {"time": 0.0, "attempt": attempt, "rank": rank}
        place = {"host": f"node{attempt}{rank // 2}", "world_size": ranks, "device": "cpu"}
        writer.append(facts | {"step": start, "place": place, "values": {}})
        for step in steps:
            seconds = {"step_s": 10.0 * attempt + rank, "collective_s": float(rank)} | values
            writer.append(facts | {"step": step, "values": seconds})
        writer.close()


def test_a_run_that_changes_its_size_has_the_rows_of_the_steps_that_survive(tmp_path: Path) -> None:
    run = Store(tmp_path / "run")
    rows = RankRows(run)
    rows.update()
    assert len(rows.table().rank) == 0
    write_ranks(run, 1, 0, [5, 10, 15], ranks=3)
    rows.update()
    assert matrix(rows.table(), "step_s", buckets=9).mean.shape == (3, 3)
    write_ranks(run, 2, 10, [15, 20], ranks=1)  # ranks 1 and 2 are gone, and so is what they did after step 10
    write_ranks(run, 3, 20, [25, 30, 24, 29], ranks=2)  # rolled back from 30 to 23
    rows.update()
    found = matrix(rows.table(), "step_s", buckets=99)
    assert list(found.x) == [5, 10, 15, 20, 24, 29]
    nan = math.nan
    np.testing.assert_array_equal(
        found.mean, [[10, 10, 20, 20, 30, 30], [11, 11, nan, nan, 31, 31], [12, 12, nan, nan, nan, nan]]
    )
    assert [rows.places()[rank]["host"] for rank in range(3)] == ["node30", "node30", "node11"]
    other = RankRows(run)  # all at once
    other.update()
    np.testing.assert_array_equal(matrix(other.table(), "step_s", buckets=99).mean, found.mean)


def test_what_is_no_row_is_passed_over(tmp_path: Path) -> None:
    run = Store(tmp_path / "run")
    write_ranks(run, 1, 0, list(range(1, 20)), ranks=2)
    with Path(run.uri, "ranks/0001-rank-00001-000001.jsonl").open("a") as file:
        file.write('{"attempt": 1}\n{"attempt": 1, "rank": 0, "step": 3, "values": 7}\n[1]\nnonsense\n{"torn": ')
    (Path(run.uri) / "ranks/notes.txt").write_text("mine")
    rows = RankRows(run)
    rows.update()
    assert len(rows.table().rank) == 38
    assert rank_rows.recent_own_s(run) == {0: [10.0] * 19, 1: [10.0] * 19}


def test_the_last_readings_are_those_of_the_newest_attempt(tmp_path: Path) -> None:
    run = Store(tmp_path / "run")
    assert rank_rows.recent_own_s(run) == {}
    write_ranks(run, 1, 0, list(range(1, 400)), ranks=3)
    write_ranks(run, 2, 399, list(range(400, 900)), ranks=2, collective_s=5.0)
    found = rank_rows.recent_own_s(run)
    assert found.keys() == {0, 1}
    assert 16 <= len(found[1]) < 400 and set(found[1]) == {16.0}
    assert rank_rows.place_of(run, 1)["host"] == "node20"
    assert rank_rows.place_of(run, 7) == {}


def test_memory_at_the_last_look_and_at_the_worst(tmp_path: Path) -> None:
    run = Store(tmp_path / "run")
    writer = RowWriter(run, "ranks", 1, "rank-00000")
    for step, values in enumerate(
        [{"memory_used_bytes": 7.0, "memory_free_bytes": 1.0}, {}, {"memory_used_bytes": 5.0, "memory_free_bytes": 3.0}]
    ):
        writer.append({"time": 0.0, "attempt": 1, "rank": 0, "step": step, "values": {"step_s": 1.0} | values})
    writer.close()
    rows = RankRows(run)
    rows.update()
    (found,) = memory(rows.table()).values()
    assert (found["used"], found["free"], found["most_used"], found["least_free"]) == (5.0, 3.0, 7.0, 1.0)
    assert math.isnan(found["reserved"]) and math.isnan(found["most_reserved"])


# --- the split


def test_a_split_accounts_for_every_second_of_the_steps_that_survive(tmp_path: Path) -> None:
    run = Store(tmp_path / "store" / "run")
    run.write_atomic("run.yaml", "")
    parts = dict(zip(PARTS, (1.0, 2.0, 3.0, 4.0, 5.0, 0.5), strict=True))  # and 0.5 of other work

    def rows(attempt: int, steps: list[int], **values: float) -> None:
        writer = RowWriter(run, "metrics", attempt, "rank-00000")
        for step in steps:
            row = {"time": 0.0, "attempt": attempt, "step": step}
            writer.append(row | {"values": {"step_s": 16.0, "loss": 1.0} | parts | values})
            if step == 20:
                writer.append(row | {"values": {"validation/seconds": 30.0}})
        writer.close()

    rows(1, [10, 20, 30])
    rows(2, [30, 35], data_wait_s=2.0, step_s=17.0)  # from the checkpoint of step 20, and stopped in between
    events: list[dict[str, Any]] = [
        {"attempt": 1, "kind": "started", "step": 0},
        {"attempt": 1, "kind": "checkpoint", "step": 20, "stall_s": 6.0},
        {"attempt": 1, "kind": "checkpoint", "step": 28, "stall_s": 99.0},  # damaged, so 20 was gone on from
        {"attempt": 2, "kind": "started", "step": 20},
        {"attempt": 2, "kind": "checkpoint_failed", "step": 35, "stall_s": 2.0},
        {"attempt": 2, "kind": "checkpoint_failed", "step": 30},  # of an earlier version
    ]
    columns = Columns(run, tmp_path / "cache")
    columns.update()
    found = split(columns, events, buckets=9)
    assert (list(found.x), list(found.steps)) == ([10, 20, 30, 35], [10, 10, 10, 5])
    assert list(found.parts) == list(performance.SPLIT)
    expected = {
        "data": [1, 1, 2, 2],
        "forward": [2] * 4,
        "backward": [3] * 4,
        "collective": [5] * 4,
        "optimizer": [4] * 4,
        "checkpoint": [0, 0.6, 0, 0.4],
        "evaluation": [0, 3, 0, 0],
        "other": [0.5] * 4,
    }
    expected["collective"], expected["optimizer"] = [5.0] * 4, [4.0] * 4
    for part, values in expected.items():
        assert found.parts[part].tolist() == pytest.approx(values), part  # type: ignore[index]
    assert found.totals()["data"] == 10 + 10 + 20 + 10
    one = split(columns, events, start=11, stop=30, buckets=1)
    assert (list(one.x), list(one.steps)) == ([30], [20])
    assert one.parts["data"].tolist() == [1.5]
    assert one.parts["evaluation"].tolist() == [1.5]
    assert one.parts["checkpoint"].tolist() == pytest.approx([0.3])


def test_a_split_of_nothing_is_empty(tmp_path: Path) -> None:
    run = Store(tmp_path / "store" / "run")
    run.write_atomic("run.yaml", "")
    columns = Columns(run, tmp_path / "cache")
    columns.update()
    found = split(columns, [], buckets=5)
    assert len(found.x) == 0 and set(found.totals().values()) == {0.0}


# --- what a run tells of it


def test_a_straggler_is_named_while_the_run_goes_on(tmp_path: Path) -> None:
    record = RunRecord.create(Store(tmp_path), load(minimal(resources={"workers": 4})))
    with record.acquire_lease():
        attempt = record.next_attempt()
        record.event("started", step=0, world_size=4)
        record.metrics(20, {"loss": 1.0, "step_s": 0.1})
        record.flush()
        write_ranks(record.store, attempt, 0, list(range(1, 21)), ranks=4)
        for rank in (1, 3):
            writer = RowWriter(record.store, "ranks", attempt, f"rank-{rank:05d}")
            for step in range(21, 41):
                row = {"time": 0.0, "attempt": attempt, "rank": rank, "step": step}
                writer.append(row | {"values": {"step_s": 20.0 + rank, "collective_s": 0.0}})
            writer.close()
        view = StoreView(str(tmp_path), tmp_path / "cache").run("small")
        (found,) = [each for each in view.summary()["attention"] if each["kind"] == "straggler"]
        assert (found["rank"], found["node"]) == (3, "node11")
        assert found["text"] == "rank 3 on node11 takes 2.3 times the median rank's time a step, and 1 more does"
        record.event("stopped", step=20)
    view = StoreView(str(tmp_path), tmp_path / "cache").run("small")
    assert view.summary()["attention"] == []
    record.close()


def test_a_runs_curve_shows_what_lies_between_readings(tmp_path: Path) -> None:
    record = RunRecord.create(Store(tmp_path), load(minimal()))
    for attempt, high in ((1, 70.0), (2, 50.0)):  # the first one's step 20 is repeated
        record.attempt = attempt
        for step in (20, 30) if attempt == 2 else (10, 20):
            bounds = {"loss_min": 0.5, "loss_max": high} if step == 20 else {}
            record.metrics(step, {"loss": 2.0} | bounds | ({"loss_bad": 3.0} if step == 30 else {}))
    record.close()
    view = StoreView(str(tmp_path), tmp_path / "cache").run("small")
    assert view.metric_names() == ["loss"]
    found = view.series("loss")
    assert found.curve.x.tolist() == [10, 20, 30]
    assert (found.curve.smallest.tolist(), found.curve.largest.tolist()) == ([2, 0.5, 2], [2, 50, 2])
    assert found.curve.bad.tolist() == [0, 0, 3]
    assert found.superseded == [(20.0, 0.5), (20.0, 70.0)]
    assert view.series("loss", buckets=1).curve.largest.tolist() == [50]
    assert view.series("loss_max").curve.largest.tolist() == [50], "whoever asks for it gets it"
