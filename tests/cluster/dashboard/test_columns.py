"""A run's metrics by column, against the record that they come from."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.dashboard import columns
from cluster.dashboard.columns import Columns
from data_pipelines.storage import Store
from trainer.record_rows import RowWriter, decode_value, read_rows

NAMES = ("loss", "lr", "step", "metric:x", "validation/loss", "grad norm")


def write(run: Store, seed: int, rows: int, attempt: int = 1) -> None:
    """Rows of an attempt, each with some of the metrics, of which some are not finite."""
    rng = random.Random(seed)
    writer = RowWriter(run, "metrics", attempt, "rank-00000")
    for step in range(rows):
        values = {name: rng.choice([rng.random(), math.nan, math.inf, 3]) for name in NAMES if rng.random() < 0.7}
        writer.append({"time": 1e9 + step, "attempt": attempt, "step": step, "values": values})
    writer.close()


def expected(run: Store) -> list[dict[str, Any]]:
    rows, _ = read_rows(run, "metrics")
    return [row | {"values": {key: decode_value(value) for key, value in row["values"].items()}} for row in rows]


def agree(found: Columns, run: Store) -> None:
    """Every metric, every place and every row are those of the record."""
    rows = expected(run)
    assert found.num_rows == len(rows)
    attempt, step, time = found.place()
    assert [*zip(attempt, step, time, strict=True)] == [(row["attempt"], row["step"], row["time"]) for row in rows]
    assert set(found.names) == {name for row in rows for name in row["values"]}
    for name in found.names:
        numbers, values = found.metric(name)
        wanted = {number: row["values"][name] for number, row in enumerate(rows) if name in row["values"]}
        assert list(numbers) == list(wanted)
        np.testing.assert_array_equal(values, list(wanted.values()))
    for number in {0, len(rows) // 2, len(rows) - 1} if rows else ():
        assert str(found.row(number)) == str(
            {key: rows[number][key] for key in ("attempt", "step", "time", "values")}
        ) or (found.row(number)["values"].keys() == rows[number]["values"].keys())


@pytest.fixture
def run(tmp_path: Path) -> Store:
    store = Store(tmp_path / "store" / "run")
    store.write_atomic("run.yaml", "name: run\n")
    return store


@pytest.fixture(params=[7, 100, 10_000])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(columns, "CHUNK", request.param)
    monkeypatch.setattr(columns, "_BLOCK_BYTES", 50 * request.param)
    return int(request.param)


def test_they_are_the_records_and_stay_so_as_it_grows(run: Store, tmp_path: Path, chunk: int) -> None:
    cache = tmp_path / "cache"
    one = Columns(run, cache)
    assert one.update() == 0
    agree(one, run)
    for attempt in range(1, 5):
        write(run, attempt, 40 * attempt, attempt)
        assert one.update() == 40 * attempt
        agree(one, run)
        assert one.update() == 0
        other = Columns(run, cache)  # a new process: from the cache, and what is after it
        other.update()
        agree(other, run)
    assert bool(list(cache.rglob("*.arrow"))) == (chunk < 400)


def test_what_is_kept_is_not_read_again(run: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns, "CHUNK", 10)
    write(run, 0, 100)
    Columns(run, tmp_path / "cache").update()
    run.delete_dir("metrics")
    assert Columns(run, tmp_path / "cache").num_rows == 100


@pytest.mark.parametrize("harm", ["cut", "noise", "gone", "empty"])
def test_a_damaged_cache_is_made_anew(run: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harm: str) -> None:
    monkeypatch.setattr(columns, "CHUNK", 10)
    monkeypatch.setattr(columns, "_BLOCK_BYTES", 500)
    write(run, 0, 100)
    Columns(run, tmp_path / "cache").update()
    victim = sorted((tmp_path / "cache").rglob("*.arrow"))[3]
    if harm == "gone":
        victim.unlink()
    else:
        data = victim.read_bytes()
        victim.write_bytes({"cut": data[: len(data) // 2], "noise": b"x" * len(data), "empty": b""}[harm])
    again = Columns(run, tmp_path / "cache")
    again.update()
    agree(again, run)


def test_another_run_of_the_same_name_is_not_the_former(run: Store, tmp_path: Path, chunk: int) -> None:
    write(run, 0, 150)
    followed = Columns(run, tmp_path / "cache")
    followed.update()
    run.delete_dir()
    run.write_atomic("run.yaml", "name: run of another kind\n")
    write(run, 1, 30)
    followed.update()
    agree(followed, run)
    fresh = Columns(run, tmp_path / "cache")
    fresh.update()
    agree(fresh, run)


def test_a_cache_that_cannot_be_written_costs_only_time(run: Store, tmp_path: Path, chunk: int) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    write(run, 0, 150)
    found = Columns(run, tmp_path / "cache")
    found.update()
    agree(found, run)


def test_rows_that_are_not_ours_are_left_out(run: Store, tmp_path: Path) -> None:
    write(run, 0, 5)
    path = run.local_path("metrics/0002-rank-00000-000001.jsonl")
    assert path is not None
    bad = [
        "{}",
        '{"attempt": 2, "step": "x", "time": 1, "values": {}}',
        '{"attempt":2,"step":1,"time":1,"values":{"a":"b"}}',
    ]
    path.write_text("\n".join(bad) + "\n")
    found = Columns(run, tmp_path / "cache")
    assert found.update() == 5
