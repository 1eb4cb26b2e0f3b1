"""A run's metrics by column, against the record that they come from."""

from __future__ import annotations

import json
import math
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from data_pipelines.storage import Store
from trainer import columns
from trainer.columns import Columns
from trainer.record_rows import RowWriter, decode_rows, decode_value, encode_row, read_rows

NAMES = ("loss", "lr", "step", "metric:x", "validation/loss", "grad norm")


def write(run: Store, seed: int, rows: int, attempt: int = 1) -> None:
    """Rows of an attempt, each with some of the metrics, of which some are not finite."""
    rng = random.Random(seed)
    writer = RowWriter(run, "metrics", attempt, "rank-00000")
    for step in range(rows):
        values = {name: rng.choice([rng.random(), math.nan, math.inf, 3]) for name in NAMES if rng.random() < 0.7}
        writer.append({"time": 1e9 + step / 4, "attempt": attempt, "step": step, "values": values})
    writer.close()


def expected(run: Store) -> list[dict[str, Any]]:
    rows, _ = read_rows(run, "metrics")
    return [row | {"values": {key: decode_value(value) for key, value in row["values"].items()}} for row in rows]


def agree(found: Columns, run: Store) -> None:
    """Every metric, every place and every row are those of the record."""
    rows = expected(run)
    assert found.num_rows == len(rows)
    assert [*zip(*found.place(), strict=True)] == [(row["attempt"], row["step"], row["time"]) for row in rows]
    assert set(found.names) == {name for row in rows for name in row["values"]}
    for name in found.names:
        numbers, values = found.metric(name)
        wanted = {number: row["values"][name] for number, row in enumerate(rows) if name in row["values"]}
        assert list(numbers) == list(wanted)
        np.testing.assert_array_equal(values, list(wanted.values()))
    for start, stop in ((0, len(rows)), (len(rows) // 3, len(rows) // 2), (len(rows) - 1, len(rows) + 5)):
        assert comparable(found.rows(max(start, 0), stop)) == comparable(rows[max(start, 0) : stop])


def comparable(rows: list[dict[str, Any]]) -> list[Any]:
    """NaN is not itself."""
    keys = ("attempt", "step", "time")
    return [
        ([row[key] for key in keys], {key: repr(float(value)) for key, value in row["values"].items()}) for row in rows
    ]


@pytest.fixture
def run(tmp_path: Path) -> Store:
    store = Store(tmp_path / "store" / "run")
    store.write_atomic("run.yaml", "name: run\n")
    return store


@pytest.fixture(params=[(7, 0), (100, 0), (100, 1 << 30), (10_000, 0), (10_000, 1 << 30)])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    size, few = request.param
    monkeypatch.setattr(columns, "CHUNK", size)
    monkeypatch.setattr(columns, "_BLOCK_BYTES", 50 * size)
    monkeypatch.setattr(columns, "_PIECE_BYTES", 9 * size)
    monkeypatch.setattr(columns, "_FEW_BYTES", few)
    monkeypatch.setattr(columns, "_FEW_ROWS", 60)
    return int(size)


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


def test_a_cache_that_is_cleared_meanwhile_is_made_anew(
    run: Store, tmp_path: Path, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    followed = Columns(run, tmp_path / "cache")
    for attempt in (1, 2):
        write(run, attempt, 150, attempt)
        followed.update()
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        agree(followed, run)


def test_what_training_keeps_a_reader_need_not_read(run: Store, tmp_path: Path, chunk: int) -> None:
    """Its own files begin where the run's end, whoever of the two comes first."""
    kept, cache = Columns(run, None), tmp_path / "cache"
    for attempt in range(1, 5):
        write(run, attempt, 40 * attempt, attempt)
        early = Columns(run, cache)
        early.update()
        agree(early, run)
        kept.update()
        kept = Columns(run, None)  # by the next attempt's process
        kept.update()
        agree(kept, run)
        late = Columns(run, cache)
        late.update()
        agree(late, run)
        used = {file.path for file in late._chunks if isinstance(file, columns._Kept)}
        assert set(cache.rglob("*.arrow")) <= used, "what is of no use any more is gone"
        agree(early, run)
    whole = run.local_path(columns.FOLDER)
    assert whole is not None and bool(list(whole.glob("*.arrow"))) == (chunk < 400)


def test_a_run_that_was_moved_keeps_its_columns(run: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns, "_WORTH_KEEPING", 50)
    write(run, 0, 100)
    kept = Columns(run, None)
    kept.update()
    kept.close()
    run.delete_dir("metrics")
    shutil.move(run.path(), tmp_path / "elsewhere")
    found = Columns(Store(tmp_path / "elsewhere"), tmp_path / "cache")
    assert found.num_rows == 100 and not (tmp_path / "cache").exists()


@pytest.mark.parametrize("harm", [b"", b"nonsense", None])
def test_a_run_whose_columns_are_damaged_is_read_all_the_same(
    run: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harm: bytes | None
) -> None:
    monkeypatch.setattr(columns, "CHUNK", 60)
    monkeypatch.setattr(columns, "_BLOCK_BYTES", 500)
    write(run, 0, 100)
    Columns(run, None).update()
    victim = sorted((tmp_path / "store/run/columns").iterdir())[1]
    victim.unlink() if harm is None else victim.write_bytes(harm)
    read = Columns(run, tmp_path / "cache")
    read.update()
    agree(read, run)
    assert harm is None or victim.read_bytes() == harm, "a reader leaves the run as it is"
    kept = Columns(run, None)
    kept.update()
    agree(kept, run)
    assert victim.exists() and victim.read_bytes() != harm, "whoever writes it makes it anew"
    shutil.rmtree(tmp_path / "cache")
    again = Columns(run, tmp_path / "cache")
    assert again.num_rows > 50


PLAIN = st.one_of(st.floats(allow_nan=False, allow_infinity=False), st.integers(-(2**62), 2**62))
ANY = st.one_of(st.floats(), st.integers(), st.booleans(), st.sampled_from(["NaN", "x", None, [1], {"b": 1}]))
TWO_IN_ONE_LINE = b'{"time":1,"attempt":1,"step":1,"values":{"loss":1}}{"time":1,"attempt":1,"step":2,"values":{}}\n'
LINES = [
    b"\n",
    b"{}\n",
    b"nonsense\n",
    b'{"attempt":1}\n',
    TWO_IN_ONE_LINE,
    b'{"time":1,"attempt":1,"step":1.5,"values":{"loss":1}}\n',
    b'{"time":"1","attempt":1,"step":1,"values":{"loss":1}}\n',
    b'{"time":1,"attempt":1,"step":99999999999999999999,"values":{"loss":1}}\n',
    b'{"time":1,"attempt":1,"step":1,"values":{"loss":1e999}}\n',
    b'{"time":1,"attempt":1,"step":1,"values":null}\n',
    b'{"time":1,"attempt":1,"step":1,"values":{"loss":1,"loss":2}}\n',
    b'{"time":1,"attempt":1,"step":1,"values":{"\xff":1}}\n',
    b'{"time":1,"attempt":1,"step":1,"values":{"2020-01-01":"2020-01-01"}}\n',
]


@given(
    st.lists(st.dictionaries(st.sampled_from(["a", "b", "é", "\\"]), PLAIN), max_size=6),
    st.lists(st.dictionaries(st.sampled_from(["a", "b"]), ANY, max_size=2), max_size=2),
    st.lists(st.sampled_from(LINES), max_size=2),
)
@example([{"a": 1.0}], [{"a": None}], [])
@example([{"a": 1.0}], [], [TWO_IN_ONE_LINE])
@example([{"a": 1.0}], [], [b"\n", TWO_IN_ONE_LINE])
def test_arrow_reads_what_python_reads(
    plain: list[dict[str, Any]], odd: list[dict[str, Any]], broken: list[bytes]
) -> None:
    rows = [{"time": 1.5, "attempt": 1, "step": step, "values": values} for step, values in enumerate(plain + odd)]
    lines = b"".join([*(json.dumps(row).encode() + b"\n" for row in rows), *broken])
    good = [row for row in decode_rows(lines) if columns._is_row(row)]
    wanted = [row | {"values": {key: decode_value(value) for key, value in row["values"].items()}} for row in good]
    found = columns._decoded(lines)
    if found is not None:
        assert comparable([columns._row(row) for row in found.to_pylist()]) == comparable(wanted)
        names = {name: None for row in good for name in row["values"]}
        assert columns._metrics_of(found) == list(names)


def test_arrow_reads_the_rows_of_a_usual_run() -> None:
    rows = [{"time": 1e9, "attempt": 1, "step": step, "values": {"loss": 1.5, "lr": 1}} for step in range(5)]
    rows[2]["values"] = {"lr": 1e-3, "validation/loss": 2}  # of another kind
    assert columns._decoded("".join(encode_row(row) for row in rows).encode()) is not None


@pytest.mark.parametrize("few", [0, 1 << 30])
def test_plain_and_odd_rows_may_alternate(
    run: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, few: int
) -> None:
    monkeypatch.setattr(columns, "_FEW_BYTES", few)
    followed = Columns(run, tmp_path / "cache")
    writer = RowWriter(run, "metrics", 1, "rank-00000")
    for step in range(40):
        value = math.nan if step % 3 == 0 else step
        writer.append({"time": 1e9, "attempt": 1, "step": step, "values": {"loss": value, f"of {step // 10}": 1.0}})
        writer.flush()
        followed.update()
        agree(followed, run)


def test_closed_it_keeps_what_takes_long_to_read(run: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns, "_WORTH_KEEPING", 50)
    followed = Columns(run, tmp_path / "cache")
    kept = []
    for attempt, rows in enumerate((60, 10, 45), start=1):
        write(run, attempt, rows, attempt)
        followed.update()
        followed.close()
        agree(followed, run)
        kept.append(Columns(run, tmp_path / "cache").num_rows)
    assert kept == [60, 60, 115]


def test_where_a_part_of_an_array_has_values() -> None:
    array = pa.array([1, None, 2, None, None, 3] * 5)
    for start in range(10):
        part = array.slice(start, 17)
        assert list(columns._is_there(part)) == [each is not None for each in part.to_pylist()]
    assert columns._is_there(pa.array([1, 2])).all()


def test_arrow_does_not_bring_pandas(tmp_path: Path) -> None:
    script = (
        "import sys; from trainer.columns import Columns; from data_pipelines.storage import Store\n"
        "found = Columns(Store(sys.argv[1]), __import__('pathlib').Path(sys.argv[2])); found.update()\n"
        "found.metric('loss'), found.place(), found.rows(0, 10), found.close()\n"
        "heavy = {'torch', 'ray', 'pandas', 'mlflow', 'transformers'} & set(sys.modules)\n"
        "assert found.num_rows == 2000 and not heavy, heavy"
    )
    run = Store(tmp_path / "run")
    write(run, 0, 2000)
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "run"), str(tmp_path / "cache")], check=True)


def test_what_is_kept_is_not_read_again(run: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns, "CHUNK", 60)
    write(run, 0, 100)
    Columns(run, tmp_path / "cache").update()
    run.delete_dir("metrics")
    assert Columns(run, tmp_path / "cache").num_rows == 100


@pytest.mark.parametrize("harm", ["cut", "noise", "gone", "empty"])
def test_a_damaged_cache_is_made_anew(run: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harm: str) -> None:
    monkeypatch.setattr(columns, "CHUNK", 24)
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
