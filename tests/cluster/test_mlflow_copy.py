from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cluster import mlflow_pass
from cluster.mlflow_copy import MlflowCopy, sync, tracking_uri, ui_command
from cluster.mlflow_values import metric_name
from configs.errors import Unreachable, UsageError
from configs.load import load
from data_pipelines.storage import Store
from trainer.pictures import encode_png
from trainer.record import RunRecord

RECIPE: dict[str, Any] = {
    "name": "demo.1",
    "steps": 10,
    "task": {"name": "language_modeling", "seq_len": 8, "tokenizer": {"name": "bytes"}},
    "model": {"name": "gpt", "num_layers": 1, "hidden_size": 8, "num_heads": 1},
    "data": {"name": "text", "path": "x" * 3000, "note": "not for canary-from-environment"},
    "batch": {"global_batch_size": 2, "micro_batch_size": 1},
    "optimizer": {"lr": 0.001},
}


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sqlite file with MLflow's tables, which take seconds to make."""
    for name, value in mlflow_pass._ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from mlflow.tracking import MlflowClient

    file = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(f"sqlite:///{file}").search_experiments()
    return file


@pytest.fixture
def record(tmp_path: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch) -> RunRecord:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("SERVICE_TOKEN", "canary-from-environment")
    store = Store(str(tmp_path / "runs"))
    made = RunRecord.create(store, load(RECIPE))
    shutil.copy(empty_database, tmp_path / "runs" / "mlflow.db")
    made.next_attempt()
    return made


def mlflow_client(record: RunRecord) -> Any:
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri(record))


def history_of(record: RunRecord, run_id: str, key: str) -> list[tuple[int, float]]:
    points = mlflow_client(record).get_metric_history(run_id, key)
    return sorted((point.step, point.value) for point in points)


def save_checkpoint(record: RunRecord, step: int) -> None:
    record.store.write_atomic(f"checkpoints/step-{step:08d}/manifest.json", b"{}")
    record.event("checkpoint", step=step, path=record.store.path(f"checkpoints/step-{step:08d}"))


def test_config_lineage_metrics_samples_and_status_arrive(record: RunRecord, tmp_path: Path) -> None:
    record.event("started", step=0, data_fingerprint="f" * 16)
    for step in range(1, 1501):
        record.metrics(step, {"loss": 1.0 / step, "lr": 0.5})
    record.sample(1500, "Once upon a time")
    record.picture(1500, "slices", encode_png(np.zeros((2, 3), np.uint8)))
    record.event("finished")
    record.close()
    copy = MlflowCopy(record)
    copy.start()
    assert copy.drain(120), copy.last_error
    run_id = sync(record)
    run = mlflow_client(record).get_run(run_id)
    assert run.info.run_name == "demo.1" and run.info.status == "FINISHED"
    assert run.data.params["optimizer.lr"] == "0.001" and run.data.params["model.num_layers"] == "1"
    assert len(run.data.params["data.path"]) == 500
    assert run.data.params["data.note"] == "not for [redacted]" and "canary" not in str(run.data.params)
    assert run.data.tags["shardyard.data_fingerprint"] == "f" * 16
    assert run.data.tags["shardyard.folder"] == record.store.uri
    assert history_of(record, run_id, "loss") == [(step, 1.0 / step) for step in range(1, 1501)]
    artifacts = tmp_path / "runs" / mlflow_pass.ARTIFACT_FOLDER
    assert [path.read_text() for path in artifacts.rglob("step-*.txt")] == ["Once upon a time"]
    assert "demo.1" in next(artifacts.rglob("run.yaml")).read_text()
    (picture,) = [each for each in mlflow_client(record).list_artifacts(run_id, "pictures/step-00001500")]
    assert picture.path == "pictures/step-00001500/slices.png"
    assert Image.open(next(artifacts.rglob("slices.png"))).size == (3, 2)


def test_a_repeated_step_keeps_its_first_value_and_a_resumed_run_goes_on(record: RunRecord, tmp_path: Path) -> None:
    for step in range(1, 13):
        record.metrics(step, {"loss": 1.0})
    record.flush()
    run_id = sync(record)
    assert record.next_attempt() == 2  # went back to step 10
    for step in range(11, 16):
        record.metrics(step, {"loss": 2.0, "validation/loss": 3.0})
    record.close()
    assert sync(RunRecord.open(str(tmp_path / "runs"), "demo.1")) == run_id
    assert history_of(record, run_id, "loss") == [(step, 1.0 if step <= 12 else 2.0) for step in range(1, 16)]
    assert history_of(record, run_id, "validation/loss") == [(step, 3.0) for step in range(11, 16)]
    assert len(mlflow_client(record).search_runs([mlflow_client(record).get_run(run_id).info.experiment_id])) == 1


def test_a_pass_that_is_cut_off_anywhere_goes_on_without_doubles(
    record: RunRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.tracking import MlflowClient

    for step in range(1, 1201):
        record.metrics(step, {"loss": 1.0, "lr": float(step)})
    record.flush()
    save_checkpoint(record, 1200)
    record.event("finished")
    cut = 0
    done: set[str] = set()

    def cut_off_once(name: str, real: Any) -> Any:
        def call(*arguments: Any, **keywords: Any) -> Any:
            nonlocal cut
            answer = real(*arguments, **keywords)
            what = f"{name} {keywords} {arguments[1:] if name != 'create_run' else ''}"
            if what not in done:
                done.add(what)
                cut += 1
                raise ConnectionError("MLflow did it, but its answer was lost on the way")
            return answer

        return call

    for name in ("create_run", "log_batch", "create_logged_model", "log_outputs", "log_text", "set_terminated"):
        monkeypatch.setattr(MlflowClient, name, cut_off_once(name, getattr(MlflowClient, name)))
    while True:
        try:
            run_id = sync(record)
            break
        except Unreachable as error:
            assert "answer was lost" in str(error)
    assert cut >= 10
    assert [step for step, _ in history_of(record, run_id, "lr")] == list(range(1, 1201))
    experiment = mlflow_client(record).get_run(run_id).info.experiment_id
    assert len(mlflow_client(record).search_runs([experiment])) == 1
    assert len(mlflow_client(record).search_logged_models([experiment])) == 1


def test_checkpoints_are_linked_with_their_metrics_and_without_their_weights(record: RunRecord) -> None:
    for step in range(1, 5):
        record.metrics(step, {"loss": 10.0 - step})
    record.metrics(2, {"validation/loss": 5.0})
    record.flush()
    save_checkpoint(record, 2)
    save_checkpoint(record, 4)
    run_id = sync(record)
    client = mlflow_client(record)
    experiment = client.get_run(run_id).info.experiment_id
    models = {model.name: model for model in client.search_logged_models([experiment])}
    assert sorted(models) == ["demo-1-step-00000002", "demo-1-step-00000004"]
    second, fourth = (models[name] for name in sorted(models))
    assert str(second.status) == "READY" and second.source_run_id == run_id
    assert second.tags["mlflow.model.isExternal"].lower() == "true"
    assert second.tags["shardyard.checkpoint"].endswith("checkpoints/step-00000002")
    assert {metric.key: (metric.value, metric.step) for metric in second.metrics} == {
        "loss": (8.0, 2),
        "validation/loss": (5.0, 2),
    }
    assert {metric.key: metric.step for metric in fourth.metrics} == {"loss": 4, "validation/loss": 2}
    assert history_of(record, run_id, "loss") == [(step, 10.0 - step) for step in range(1, 5)]
    outputs = client.get_run(run_id).outputs.model_outputs
    assert sorted(output.step for output in outputs) == [2, 4]

    record.store.delete_dir("checkpoints/step-00000002")
    save_checkpoint(record, 5)
    sync(record)
    assert client.get_logged_model(second.model_id).tags["shardyard.deleted"] == "true"
    assert len(client.search_logged_models([experiment])) == 3


def test_an_outage_neither_raises_nor_loses_anything(
    record: RunRecord, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mlflow.tracking import MlflowClient

    def unreachable(*_: Any, **__: Any) -> None:
        raise ConnectionError("connection refused")

    copy = MlflowCopy(record, poll_every_s=0.01)
    record.metrics(1, {"loss": 1.0})
    record.flush()
    copy.start()
    wait_until(lambda: metrics_seen(copy) == 1)
    with monkeypatch.context() as outage:
        outage.setattr(MlflowClient, "log_batch", unreachable)
        record.metrics(2, {"loss": 2.0})
        record.flush()
        wait_until(lambda: copy.last_error is not None)
    wait_until(lambda: copy.last_error is None and metrics_seen(copy) == 2)
    record.metrics(3, {"loss": 3.0})
    record.event("finished")
    record.close()
    assert copy.drain(60)
    assert history_of(record, sync(record), "loss") == [(1, 1.0), (2, 2.0), (3, 3.0)]
    told = capsys.readouterr().err
    assert told.count("does not answer") == 1 and told.count("answers again") == 1


def test_a_closed_port_is_said_once_and_the_rest_is_left_for_later(
    record: RunRecord, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    record.metrics(1, {"loss": 1.0})
    record.close()
    copy = MlflowCopy(record, poll_every_s=0.01)
    copy.start()
    wait_until(lambda: copy.last_error is not None)
    assert not copy.drain(60)
    assert capsys.readouterr().err.count("Training goes on") == 1
    with pytest.raises(Unreachable, match=r"127\.0\.0\.1.*sync"):
        sync(record)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert history_of(record, sync(record), "loss") == [(1, 1.0)]


def test_off_means_off(tmp_path: Path) -> None:
    off = RunRecord.create(Store(str(tmp_path)), load(RECIPE | {"tracking": {"mlflow": None}}))
    copy = MlflowCopy(off)
    copy.start()
    assert copy.drain() and not off.store.exists("mlflow.json") and ui_command(off) is None
    with pytest.raises(UsageError):
        sync(off)


def test_the_copy_imports_mlflow_in_its_thread_only() -> None:
    code = "import sys, cluster.mlflow_copy; sys.exit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0


def test_metric_names_that_mlflow_refuses_are_changed_but_stay_apart() -> None:
    assert metric_name("validation/bits_per_byte") == "validation/bits_per_byte"
    assert metric_name("a@b:c") == "a_b_c"
    first, second = (metric_name("x" * 300 + end) for end in "ab")
    assert first != second and len(first) <= 250


@pytest.mark.slow
def test_a_server_that_dies_is_caught_up_with_when_it_is_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    uri = f"http://127.0.0.1:{port}"
    record = RunRecord.create(Store(str(tmp_path / "runs")), load(RECIPE | {"tracking": {"mlflow": uri}}))
    record.next_attempt()
    copy = MlflowCopy(record, poll_every_s=0.1)
    with mlflow_server(tmp_path, port):
        copy.start()
        record.metrics(1, {"loss": 1.0})
        record.flush()
        save_checkpoint(record, 1)
        wait_until(lambda: metrics_seen(copy) == 1)
    wait_until(lambda: copy.last_error is not None)
    record.metrics(2, {"loss": 2.0})
    record.sample(2, "text")
    record.event("finished")
    record.close()
    assert not copy.drain(60)
    with mlflow_server(tmp_path, port):
        run_id = sync(record)
        assert history_of(record, run_id, "loss") == [(1, 1.0), (2, 2.0)]
        run = mlflow_client(record).get_run(run_id)
        assert run.info.status == "FINISHED"
        models = mlflow_client(record).search_logged_models([run.info.experiment_id])
        assert [[metric.value for metric in model.metrics] for model in models] == [[1.0]]
        with urllib.request.urlopen(ui_page_of(record), timeout=10) as answer:
            assert answer.status == 200


@pytest.mark.slow
def test_the_command_for_the_pages_works(record: RunRecord, tmp_path: Path) -> None:
    record.metrics(1, {"loss": 1.0})
    record.close()
    sync(record)
    command = ui_command(record)
    assert command is not None and f"sqlite:///{tmp_path}/runs/mlflow.db" in command
    port = int(command.rpartition(" ")[2])
    with server(["bash", "-c", f"exec env {command}"], port, tmp_path):
        pass


def ui_page_of(record: RunRecord) -> str:
    command = ui_command(record)
    assert command is not None and command.startswith("python -m webbrowser ")
    return command.removeprefix("python -m webbrowser ").strip("'")


def metrics_seen(copy: MlflowCopy) -> int:
    return copy._copier._position["last_step"].get("loss", 0) if copy._copier else 0


@contextmanager
def mlflow_server(folder: Path, port: int) -> Iterator[None]:
    command = [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder}/server.db", "--artifacts-destination", f"{folder}/server"]
    with server(command, port, folder):
        yield


@contextmanager
def server(command: list[str], port: int, folder: Path) -> Iterator[None]:
    environment = os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with open(folder / "server.log", "ab") as log:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
    try:
        wait_until(lambda: answers(port) or process.poll() is not None, 120)
        assert process.poll() is None, (folder / "server.log").read_text()
        yield
    finally:
        end_with_children(process)


def end_with_children(process: subprocess.Popen[bytes]) -> None:
    import psutil

    children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    for member in [process, *children]:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            continue
    process.wait()
    psutil.wait_procs(children, timeout=10)


def answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until(condition: Any, timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_an_outage_of_days_is_survived(record: RunRecord, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = MlflowCopy(record, poll_every_s=5.0)
    pauses_s: list[float] = []

    def fail() -> bool:
        if len(pauses_s) == 1100:
            copy._draining.set()
        return False

    monkeypatch.setattr(copy, "_copy_once", fail)
    monkeypatch.setattr(copy._draining, "wait", pauses_s.append)
    copy._follow()
    assert pauses_s[:3] == [10.0, 20.0, 40.0] and set(pauses_s[3:]) == {60.0}


def test_a_password_in_the_address_is_not_said(
    record: RunRecord, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:canary-42@127.0.0.1:{free_port()}")
    record.close()
    copy = MlflowCopy(record, poll_every_s=0.01)
    copy.start()
    wait_until(lambda: copy.last_error is not None)
    copy.drain(60)
    with pytest.raises(Unreachable) as refused:
        sync(record)
    told = f"{capsys.readouterr().err} {refused.value} {copy.last_error} {ui_command(record)}"
    assert "127.0.0.1" in told and "canary-42" not in told


def test_a_store_that_was_moved_keeps_its_mlflow_run(record: RunRecord, tmp_path: Path) -> None:
    record.metrics(1, {"loss": 1.0})
    record.close()
    run_id = sync(record)
    (tmp_path / "runs").rename(tmp_path / "moved")
    moved = RunRecord.open(str(tmp_path / "moved"), record.name)
    assert sync(moved) == run_id
    assert history_of(moved, run_id, "loss") == [(1, 1.0)]
