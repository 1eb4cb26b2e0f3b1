from __future__ import annotations

import json
import math
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import fsspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from configs.errors import Damaged, NotFound, ShardyardError, Unreachable, UsageError
from configs.load import Resolved, load
from data_pipelines.storage import Store
from trainer import history, record_rows
from trainer.record import RunRecord, list_runs
from trainer.record_rows import RowWriter, read_rows
from trainer.step_times import rank_rows_every

RECIPE: dict[str, Any] = {
    "name": "demo",
    "steps": 10,
    "task": {"name": "language_modeling", "seq_len": 8, "tokenizer": {"name": "bytes"}},
    "model": {"name": "gpt", "num_layers": 1, "hidden_size": 8, "num_heads": 1},
    "data": {"name": "text", "path": "corpus"},
    "batch": {"global_batch_size": 2, "micro_batch_size": 1},
    "optimizer": {"lr": 0.001},
}


def resolved(**changes: Any) -> Resolved:
    return load(RECIPE | changes)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "runs"))


def test_a_new_run_can_be_opened_with_the_same_config(store: Store) -> None:
    given_config = resolved()
    RunRecord.create(store, given_config).close()
    opened = RunRecord.open(store.uri, "demo")
    assert opened.resolved == replace(given_config, config=given_config.config.model_copy(update={"store": store.uri}))
    assert [event["kind"] for event in opened.events()] == ["created"]
    assert opened.lineage()["python"]
    assert list_runs(store) == ["demo"]


def test_the_same_config_goes_on_and_another_is_refused_with_its_keys(store: Store) -> None:
    RunRecord.create(store, resolved()).close()
    assert RunRecord.create(store, resolved()).attempt == 0
    before = store.read_bytes("demo/run.yaml")
    with pytest.raises(UsageError) as refused:
        RunRecord.create(store, resolved(steps=11, optimizer={"lr": 0.5}))
    message = str(refused.value)
    assert "steps: 10 there, 11 here" in message
    assert "optimizer.lr: 0.001 there, 0.5 here" in message
    assert "name=" in message and "--from demo" in message
    assert "seed" not in message
    assert store.read_bytes("demo/run.yaml") == before


def test_a_run_in_a_moved_store_goes_on(store: Store, tmp_path: Path) -> None:
    RunRecord.create(store, resolved(store=store.uri)).close()
    os.rename(tmp_path / "runs", tmp_path / "moved")
    moved = Store(str(tmp_path / "moved"))
    RunRecord.create(moved, resolved(store=moved.uri)).close()


def test_the_config_of_a_moved_run_names_the_place_where_it_was_found(store: Store, tmp_path: Path) -> None:
    RunRecord.create(store, resolved(store=store.uri)).close()
    os.rename(tmp_path / "runs", tmp_path / "moved")
    os.rename(tmp_path / "moved" / "demo", tmp_path / "moved" / "renamed")
    for rank in (None, 1):
        config = RunRecord.open(str(tmp_path / "moved"), "renamed", rank=rank).config
        assert (config.store, config.name) == (str(tmp_path / "moved"), "renamed")


def test_a_folder_that_is_no_run_is_left_alone(store: Store) -> None:
    store.write_atomic("demo/thesis.tex", b"years of work")
    with pytest.raises(UsageError, match=r"thesis\.tex.*name="):
        RunRecord.create(store, resolved())
    for name, kept in (
        ("datasets", "data sets are kept there"),
        ("tokenizers", "tokenizers are kept there"),
        ("mlflow.db", "MLflow's records are kept there"),
        ("mlflow-artifacts", "MLflow's files are kept there"),
    ):
        with pytest.raises(UsageError, match=kept):
            RunRecord.create(store, resolved(name=name))
        store.write_atomic(name if name == "mlflow.db" else f"{name}/some", b"")
        with pytest.raises(UsageError, match=kept):
            RunRecord.create(store, resolved(name=name))
    assert list_runs(store) == []
    assert store.list("demo") == ["thesis.tex"]


def test_opening_what_is_not_there_names_the_nearest(store: Store) -> None:
    RunRecord.create(store, resolved()).close()
    with pytest.raises(NotFound, match="Did you mean 'demo'"):
        RunRecord.open(store.uri, "dem")
    with pytest.raises(NotFound, match="runs ls"):
        RunRecord.open(store.uri, "completely-different")


def test_a_damaged_config_is_named(store: Store) -> None:
    RunRecord.create(store, resolved()).close()
    text = store.read_text("demo/run.yaml")
    store.write_atomic("demo/run.yaml", text[: text.index("optimizer:") + 5])
    with pytest.raises(Damaged, match=r"run\.yaml"):
        RunRecord.open(store.uri, "demo")


def test_metrics_come_back_with_their_attempt_also_those_json_lacks(store: Store) -> None:
    record = RunRecord.create(store, resolved())
    assert record.next_attempt() == 1
    record.metrics(1, {"loss": 2.5, "grad_norm": math.inf})
    record.metrics(2, {"loss": math.nan})
    assert record.next_attempt() == 2
    record.metrics(2, {"loss": 2.25})
    record.close()
    rows = RunRecord.open(store.uri, "demo").metrics_table()
    assert [(row["attempt"], row["step"]) for row in rows] == [(1, 1), (1, 2), (2, 2)]
    assert rows[0]["grad_norm"] == math.inf and math.isnan(rows[1]["loss"]) and rows[2]["loss"] == 2.25
    segments = store.list("demo/metrics")
    assert [name[:4] for name in segments] == ["0001", "0002"]
    for name in segments:  # strict JSON, for readers in other languages
        for line in store.read_text(f"demo/metrics/{name}").splitlines():
            json.loads(line, parse_constant=pytest.fail)


def test_each_rank_and_each_process_appends_to_files_of_its_own(store: Store) -> None:
    RunRecord.create(store, resolved()).close()
    ranks = [RunRecord.open(store.uri, "demo", rank=rank) for rank in (0, 1)]
    again = RunRecord.open(store.uri, "demo", rank=0)
    for index, record in enumerate([*ranks, again]):
        record.attempt = 1
        record.event("started", step=index)
        record.close()
    writers = {name.rpartition("-")[0] for name in store.list("demo/events")}
    assert writers == {"0000-launcher", "0001-rank-00000", "0001-rank-00001"}
    started = [event["step"] for event in ranks[0].events() if event["kind"] == "started"]
    assert sorted(started) == [0, 1, 2]


@given(cut=st.integers(0, 400))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_torn_file_loses_the_torn_line_alone(store: Store, cut: int) -> None:
    store.delete_dir("torn")
    lines = [json.dumps({"step": step, "attempt": 1}) + "\n" for step in range(12)]
    data = "".join(lines).encode()
    cut = min(cut, len(data))
    store.write_atomic("torn/0001-rank-00000-000001.jsonl", data[:cut])
    store.write_atomic("torn/0001-rank-00000-000002.jsonl", json.dumps({"step": 99, "attempt": 1}) + "\n")
    rows, _ = read_rows(store, "torn")
    whole = data[:cut].count(b"\n")
    assert [row["step"] for row in rows] == [*range(whole), 99]


@given(chunks=st.lists(st.integers(1, 60), min_size=1, max_size=20))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_reading_on_gives_each_row_once_however_the_file_grows(store: Store, chunks: list[int]) -> None:
    store.delete_dir("grown")
    data = "".join(json.dumps({"step": step}) + "\n" for step in range(40)).encode()
    seen, cursor, end = [], None, 0
    for size in chunks:
        end = min(end + size, len(data))
        first, second = data[: min(end, 300)], data[300:end]
        store.write_atomic("grown/0001-launcher-000001.jsonl", first[: first.rfind(b"\n") + 1] if second else first)
        if second:
            rest = data[first.rfind(b"\n") + 1 : end]
            store.write_atomic("grown/0001-launcher-000002.jsonl", rest)
        rows, cursor = read_rows(store, "grown", cursor)
        seen += [row["step"] for row in rows]
    assert seen == list(range(data[:end].count(b"\n")))


def test_rolled_back_steps_leave_the_curve_and_stay_in_the_table() -> None:
    def rows(attempt: int, first: int, last: int) -> list[dict[str, Any]]:
        return [{"attempt": attempt, "step": step, "time": 0.0, "loss": attempt} for step in range(first, last + 1)]

    table = rows(1, 1, 120) + rows(2, 101, 110) + rows(3, 51, 60)
    table.append({"attempt": 3, "step": 60, "time": 0.0, "validation/loss": 7.0})
    curve = history.stitched(table)
    assert [row["step"] for row in curve] == list(range(1, 61))  # attempt 3 went back to 50: 61..120 never happened
    assert [row["attempt"] for row in curve] == [1] * 50 + [3] * 10
    assert curve[-1]["validation/loss"] == 7.0 and curve[-1]["loss"] == 3


def test_a_rollback_within_an_attempt_is_stitched_like_a_new_one() -> None:
    def rows(*steps: int, loss: float) -> list[dict[str, Any]]:
        return [{"attempt": 1, "step": step, "time": 0.0, "loss": loss} for step in steps]

    evaluation = {"attempt": 1, "step": 4, "time": 0.0, "validation/loss": 7.0}
    rolled_back = [*rows(1, 2, 3, 4, loss=1), evaluation, *rows(5, 6, loss=1), *rows(4, 5, loss=2)]
    curve = history.stitched(rolled_back)
    assert [(row["step"], row["loss"]) for row in curve] == [(1, 1), (2, 1), (3, 1), (4, 2), (5, 2)]
    assert not any("validation/loss" in row for row in curve), "it was of weights that are gone"
    curve = history.stitched([*rolled_back, *rows(2, loss=3)])
    assert [(row["step"], row["loss"]) for row in curve] == [(1, 1), (2, 3)]


STATUSES = [
    (["created"], None, "queued"),
    (["created", "queued"], "live", "queued"),
    (["created", "queued"], "stale", "lost"),
    (["queued", "placed", "started"], "live", "running"),
    (["queued", "placed", "started", "checkpoint"], "stale", "lost"),
    (["queued", "placed", "started", "checkpoint"], None, "lost"),
    (["started", "failed"], "live", "running"),
    (["started", "failed", "restarted", "started", "sample"], "live", "running"),
    (["started", "failed"], "stale", "lost"),
    (["started", "failed"], None, "failed"),
    (["started", "finished"], None, "finished"),
    (["started", "stopped"], "live", "stopped"),
    (["started", "stopped", "queued", "placed"], "live", "running"),
]


@pytest.mark.parametrize(("kinds", "lease", "expected"), STATUSES)
def test_status_follows_from_events_and_lease(kinds: list[str], lease: Any, expected: str) -> None:
    assert history.status([{"kind": kind} for kind in kinds], lease=lease) == expected


def test_a_final_failure_is_one_even_while_the_launcher_lives() -> None:
    assert history.status([{"kind": "failed", "final": True}], lease="live") == "failed"


def test_attempts_say_when_they_began_and_how_they_ended(store: Store) -> None:
    record = RunRecord.create(store, resolved())
    for start, end in ((0, "failed"), (5, "finished")):
        record.next_attempt()
        record.event("started", step=start)
        record.event(end)
    record.close()
    assert [(row["attempt"], row["start_step"], row["outcome"]) for row in record.attempts()] == [
        (1, 0, "failed"),
        (2, 5, "finished"),
    ]


def test_a_stop_reaches_the_launcher_and_is_forgotten_by_the_next(store: Store) -> None:
    record = RunRecord.create(store, resolved())
    with record.acquire_lease():
        assert record.stop_requested() is None
        RunRecord.open(store.uri, "demo").request_stop("to make room")
        assert record.stop_requested() == "to make room"
        with pytest.raises(UsageError):
            record.acquire_lease()
        assert record.stop_requested(), "a refused launcher must not clear the request"
    with record.acquire_lease():
        assert record.stop_requested() is None


def test_only_a_launch_that_trains_leaves_its_lineage(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def lineages() -> list[str]:
        return [name for name in store.list("demo") if name.startswith("lineage")]

    first = RunRecord.create(store, resolved())
    with first.acquire_lease():
        first.next_attempt()
        refused = RunRecord.create(store, resolved())
        with pytest.raises(UsageError, match="already running"):
            refused.acquire_lease()
        first.next_attempt()  # a restart belongs to the same launch
    assert lineages() == ["lineage.json"]

    monkeypatch.setattr("sys.argv", ["shardyard", "runs", "resume", "demo"])
    later = RunRecord.create(store, resolved())
    with later.acquire_lease():
        assert [later.next_attempt(), later.next_attempt()] == [3, 4]
    assert lineages() == ["lineage-0003.json", "lineage.json"]
    assert json.loads(store.read_text("demo/lineage-0003.json"))["command"][1:] == ["runs", "resume", "demo"]
    assert later.lineage()["command"][1:] != ["runs", "resume", "demo"]


def test_a_run_begun_twice_at_once_with_other_configs_is_refused(store: Store) -> None:
    first = RunRecord.create(store, resolved())
    second = RunRecord(first.store, resolved(steps=99))
    with pytest.raises(UsageError, match="steps: 10 there, 99 here"):
        second.acquire_lease()
    first.acquire_lease().release()


def test_a_full_disk_neither_stops_training_nor_loses_rows(
    store: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    record = RunRecord.create(store, resolved())
    record.next_attempt()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("data_pipelines.segments.write_all", full)
        record.metrics(1, {"loss": 1.0})
        record.event("checkpoint", step=1)
        assert not record.flush()
        assert capsys.readouterr().err.count("disk is full") == 1
    record.metrics(2, {"loss": 2.0})
    record.close()
    assert [row["step"] for row in record.metrics_table()] == [1, 2]
    assert [event["kind"] for event in record.events()] == ["created", "checkpoint"]


def test_a_record_that_cannot_be_made_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ShardyardError, match="file"):
        RunRecord.create(Store(str(tmp_path / "file" / "runs")), resolved())


def test_events_of_two_threads_are_all_kept(store: Store) -> None:
    record = RunRecord.create(store, resolved())
    record.next_attempt()
    threads = [threading.Thread(target=lambda: [record.event("checkpoint") for _ in range(50)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    record.close()
    assert sum(event["kind"] == "checkpoint" for event in record.events()) == 200


def recording_cost_s(store: Store, points: int, points_a_step: int = 10) -> float:
    """Processor seconds that `points` metric points cost the thread that records them."""
    record = RunRecord.create(store, resolved())
    record.next_attempt()
    values = {f"metric_{index}": 0.1 * index for index in range(points_a_step)}
    started = time.thread_time()
    for step in range(points // points_a_step):
        record.metrics(step, values)
    cost_s = time.thread_time() - started
    record.close()
    return cost_s


def test_recording_leaves_encoding_and_writing_to_another_thread(store: Store, tmp_path: Path) -> None:
    cost_s = min(recording_cost_s(store, 10_000) for _ in range(3))
    assert len(RunRecord.open(store.uri, "demo").metrics_table()) == 3000

    row = {"time": 0.0, "attempt": 1, "step": 1, "values": {f"metric_{index}": 0.1 * index for index in range(10)}}
    started = time.thread_time()
    with open(tmp_path / "yardstick", "ab", buffering=0) as file:
        for _ in range(1000):
            file.write(json.dumps(row).encode())
    writing_s = time.thread_time() - started
    assert cost_s < writing_s / 2, f"{cost_s:.4f} s to record, {writing_s:.4f} s to encode and write"


SECRETS = [
    ({"data": {"name": "text", "path": "c", "api_key": "canary-key"}}, "data.api_key"),
    ({"data": {"name": "text", "path": "c", "password": 12345678}}, "data.password"),
    ({"data": {"name": "text", "path": "s3://user:canary-in-url@bucket/x"}}, "data.path"),
    ({"data": {"name": "text", "path": "c", "login": {"token": ["canary"]}}}, "data.login.token"),
    ({"tracking": {"mlflow": "https://me:canary-mlflow@host/"}}, "tracking.mlflow"),
]


@pytest.mark.parametrize(("changes", "key"), SECRETS)
def test_a_secret_in_the_config_is_refused_and_not_written(store: Store, changes: dict[str, Any], key: str) -> None:
    with pytest.raises(UsageError, match=r"environment") as refused:
        RunRecord.create(store, resolved(**changes))
    assert f"a secret in {key}." in str(refused.value)
    assert "canary" not in str(refused.value) and "12345678" not in str(refused.value)
    assert not Path(store.uri).exists()


def test_a_secret_variable_whose_value_the_config_needs_changes_nothing(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SERVICE_PASSWORD", "language")
    RunRecord.create(store, resolved()).close()
    assert RunRecord.open(store.uri, "demo").config.task.name == "language_modeling"
    RunRecord.create(store, resolved()).acquire_lease().release()


def test_secrets_of_the_command_and_of_events_stay_out_of_the_folder(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The uncommitted changes of a checkout are in the lineage, and may be tests that speak of canaries.
    monkeypatch.setattr("trainer.lineage.git_state", lambda _: {"commit": None})
    monkeypatch.setenv("SERVICE_TOKEN", "canary-from-environment")
    monkeypatch.setattr("sys.argv", ["shardyard", "train", "--password", "canary-argument", "canary-from-environment"])
    record = RunRecord.create(store, resolved())
    record.event("failed", error="401: Authorization: Bearer canary-bearer-token for canary-from-environment")
    record.close()
    written = b"".join(path.read_bytes() for path in Path(store.uri).rglob("*") if path.is_file())
    assert b"canary" not in written and written.count(b"[redacted]") >= 4


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        for points_a_step in (1, 10):
            cost_s = recording_cost_s(Store(f"{folder}/{points_a_step}"), 50_000, points_a_step)
            print(f"50,000 metric points, {points_a_step} a step, cost the training thread {cost_s:.3f} s")


# --- rows of ranks


@pytest.fixture
def remote() -> Iterator[Store]:
    """A store that behaves like an object store: fsspec's, in memory."""
    root = f"bucket-{uuid4().hex}"
    yield Store(f"memory://{root}/store")
    fsspec.filesystem("memory").rm(root, recursive=True)


def test_a_rank_tells_where_it_runs_and_then_how_it_fares(store: Store) -> None:
    RunRecord.create(store, resolved()).close()
    for attempt, size in ((1, 2), (2, 1)):  # a smaller one goes on
        for rank in range(size):
            record = RunRecord.open(store.uri, "demo", rank=rank)
            record.attempt = attempt
            record.begin_rank(rank, size, 4 * attempt, device="cpu")
            record.rank_row(4 * attempt + 1, {"step_s": math.inf})
            record.close()
    rows, _ = read_rows(store.child("demo"), "ranks")
    facts = [(row["attempt"], row["rank"], row["step"], row.get("place"), row["values"]) for row in rows]
    host = socket.gethostname()
    wanted = []
    for attempt, rank, size in ((1, 0, 2), (1, 1, 2), (2, 0, 1)):
        place = {"host": host, "world_size": size, "device": "cpu"}
        wanted += [
            (attempt, rank, 4 * attempt, place, {}),
            (attempt, rank, 4 * attempt + 1, None, {"step_s": "Infinity"}),
        ]
    assert facts == wanted
    store.delete("demo/run.yaml")  # as a run that is begun again: what is left in its folder is a run's
    RunRecord.create(store, resolved()).close()


def test_rows_of_ranks_are_few_objects_that_grow(remote: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record_rows, "_OBJECT_BYTES", 2000)
    writer = RowWriter(remote, "ranks", 1, "rank-00000", few_objects=True)
    cursor, found = None, []
    for number in range(300):
        writer.append({"number": number})
        if number % 3 == 0:
            writer.flush()
        if number % 7 == 0:
            rows, cursor = read_rows(remote, "ranks", cursor)
            found += rows
    writer.close()
    rows, _ = read_rows(remote, "ranks", cursor)
    assert [row["number"] for row in found + rows] == list(range(300))
    sizes = [remote.size(f"ranks/{name}") for name in remote.list("ranks")]
    assert len(sizes) == 3 and all(2000 <= size < 2100 for size in sizes[:-1])
    other = RowWriter(remote, "ranks", 1, "rank-00000", few_objects=True)  # overwrites nothing
    other.append({"number": 300})
    other.close()
    assert [row["number"] for row in read_rows(remote, "ranks")[0]] == list(range(301))


def test_rows_that_an_object_store_refuses_are_written_later(remote: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise Unreachable("not now")

    writer = RowWriter(remote, "ranks", 1, "rank-00000", few_objects=True)
    writer.append({"number": 0})
    writer.flush()
    with monkeypatch.context() as patched:
        patched.setattr(Store, "write_atomic", refuse)
        writer.append({"number": 1})
        with pytest.raises(Unreachable):
            writer.flush()
    writer.append({"number": 2})
    writer.close()
    assert [row["number"] for row in read_rows(remote, "ranks")[0]] == [0, 1, 2]


def test_rows_of_ranks_are_written_while_it_trains_and_more_rarely_by_many(
    store: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("trainer.record._LOCAL_FLUSH_EVERY_S", 0.01)
    monkeypatch.setattr("trainer.record._LOCAL_RANK_FLUSH_S", (0.01, 0.01))
    few, many = RunRecord.create(store, resolved()), RunRecord.create(store, resolved(name="many"))
    for record, size in ((few, 2), (many, 100_000)):
        record.next_attempt()
        record.begin_rank(0, size, 0)
        record.metrics(1, {"loss": 1.0})
        record.rank_row(1, {"step_s": 1.0})
    wait_until(lambda: len(read_rows(few.store, "ranks")[0]) == 2)
    wait_until(lambda: len(many.metrics_table()) == 1)
    assert read_rows(many.store, "ranks")[0] == []

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("data_pipelines.segments.write_all", full)
        few.rank_row(2, {"step_s": 1.0})
        wait_until(lambda: "disk is full" in capsys.readouterr().err)
    few.close()
    many.close()
    assert [row["step"] for row in read_rows(few.store, "ranks")[0]] == [0, 1, 2]
    assert [row["step"] for row in read_rows(many.store, "ranks")[0]] == [0, 1]


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize(
    ("steps", "every", "size", "expected"),
    [
        (100_000, 1, 8, 1),
        (100_000, 1, 16, 2),
        (100_000, 10, 100, 10),
        (1_000_000, 10, 1000, 1000),
        (10, 1, 10_000, 1),
        (1_000_000, 1, 1, 1),
    ],
)
def test_many_ranks_of_a_long_run_write_fewer_rows_each(steps: int, every: int, size: int, expected: int) -> None:
    assert rank_rows_every(steps, every, size) == expected
    assert size * (steps // rank_rows_every(steps, every, size)) <= 1_000_000
