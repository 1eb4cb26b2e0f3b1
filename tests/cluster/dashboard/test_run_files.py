"""A run's configuration and pictures, over HTTP."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from cluster.dashboard import run_files
from cluster.dashboard.app import create_app
from cluster.dashboard.store_view import StoreView
from tests.cluster.dashboard.stores import TAGS, write_run
from trainer.record import RunRecord


@pytest.fixture
def record(tmp_path: Path) -> RunRecord:
    return write_run(tmp_path / "runs", steps=80, fails_at=44, saved_at=40, spike_at=50)


@pytest.fixture
def client(tmp_path: Path) -> TestClient:
    return TestClient(create_app(StoreView(str(tmp_path / "runs"), tmp_path / "cache")))


def test_every_value_with_where_it_came_from(record: RunRecord, client: TestClient) -> None:
    found = client.get("/api/runs/restarted/config").json()
    values = {each["key"]: each for each in found["values"]}
    assert values.keys() == record.resolved.origins.keys()
    assert {key: each["origin"] for key, each in values.items()} == record.resolved.origins
    assert values["steps"] == {"key": "steps", "value": "80", "origin": "command line"}
    assert json.loads(values["tracking.experiment"]["value"]) == TAGS
    assert found["parent"] is None
    assert [launch["attempt"] for launch in found["lineage"]] == [1]
    assert found["lineage"][0]["python"] == record.lineage()["python"]


def test_what_differs_from_its_parent(tmp_path: Path, record: RunRecord, client: TestClient) -> None:
    checkpoint = record.store.path("checkpoints/step-00000040")
    given = ("optimizer.lr=0.5", f"parent.checkpoint={checkpoint}")
    write_run(tmp_path / "runs", "child", steps=80, fails_at=44, saved_at=40, spike_at=50, overrides=given)
    parent = client.get("/api/runs/child/config").json()["parent"]
    assert (parent["run"], parent["state"], parent["checkpoint"]) == ("restarted", "weights", checkpoint)
    assert parent["differences"] == [{"key": "optimizer.lr", "here": "0.5", "there": "0.003"}]


def of_a_parent(tmp_path: Path, client: TestClient, checkpoint: str, *overrides: str) -> dict[str, Any]:
    given = (f"parent.checkpoint={json.dumps(checkpoint)}", *overrides)
    write_run(tmp_path / "runs", "child", steps=80, fails_at=44, saved_at=40, spike_at=50, overrides=given)
    found: dict[str, Any] = client.get("/api/runs/child/config").json()["parent"]
    return found


def test_what_differs_from_a_parent_in_another_store(tmp_path: Path, record: RunRecord, client: TestClient) -> None:
    other = write_run(tmp_path / "others", "restarted", steps=80, fails_at=44, saved_at=40, overrides=("seed=5",))
    checkpoint = other.store.path("checkpoints/step-00000040")
    parent = of_a_parent(tmp_path, client, checkpoint, "optimizer.lr=0.5")
    assert (parent["run"], parent["problem"]) == (None, None)  # one of this store has its name
    wanted = [{"key": "optimizer.lr", "here": "0.5", "there": "0.003"}, {"key": "seed", "here": "1337", "there": "5"}]
    assert sorted(parent["differences"], key=lambda each: each["key"]) == wanted


@pytest.mark.parametrize(
    ("elsewhere", "problem"),
    [
        ("/other/runs/restarted/checkpoints/step-00000040", "There is no run 'restarted' in /other/runs."),
        ("hf://someone/a-model", "It is no checkpoint of a run"),
        ("hf://someone/restarted/checkpoints/step-00000040", "cannot be read: "),
        ("runs/gone/checkpoints/step-00000040", "There is no run 'gone'"),
    ],
)
def test_a_parent_that_cannot_be_read(
    tmp_path: Path, record: RunRecord, client: TestClient, elsewhere: str, problem: str
) -> None:
    checkpoint = elsewhere.replace("runs/gone", f"{tmp_path}/runs/gone")
    parent = of_a_parent(tmp_path, client, checkpoint)
    assert (parent["run"], parent["differences"], parent["checkpoint"]) == (None, [], checkpoint)
    assert problem in parent["problem"]


def test_a_parents_store_that_does_not_answer(
    tmp_path: Path, record: RunRecord, client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = RunRecord.open
    monkeypatch.setattr(run_files, "PARENT_S", 0.1)
    monkeypatch.setattr(
        RunRecord, "open", lambda uri, name: time.sleep(5) if uri.startswith("/silent") else opened(uri, name)
    )
    parent = of_a_parent(tmp_path, client, "/silent/restarted/checkpoints/step-00000040")
    assert "nothing came for 0.1 s" in parent["problem"]


def test_a_damaged_lineage_hides_nothing_else(record: RunRecord, client: TestClient) -> None:
    record.store.write_atomic("lineage.json", "{")
    found = client.get("/api/runs/restarted/config").json()
    assert found["lineage"] == [] and found["values"]


def test_pictures_are_those_that_the_run_told_of(tmp_path: Path, record: RunRecord, client: TestClient) -> None:
    base = "/api/runs/restarted/pictures"
    answer = client.get(f"{base}/step-00000040/digits.png")
    assert answer.status_code == 200 and answer.headers["content-type"] == "image/png"
    assert answer.content == record.store.read_bytes("pictures/step-00000040/digits.png")
    assert answer.headers["x-content-type-options"] == "nosniff"

    (tmp_path / "secret.png").write_bytes(b"\x89PNG\r\n\x1a\nsecret")
    record.store.write_atomic("pictures/step-00000040/untold.png", b"\x89PNG\r\n\x1a\n")
    for path in (
        "step-00000040/untold.png",
        "..%2F..%2F..%2Fsecret.png",
        "step-00000040/../../../../secret.png",
        "step-00000040/..%2F..%2Frun.yaml",
        "%2Fetc%2Fpasswd",
        "step-00000040/digits.png%00",
    ):
        assert client.get(f"{base}/{path}").status_code == 404, path


@pytest.mark.parametrize("harm", ["link", "gone", "html"])
def test_a_picture_that_is_none_is_not_shown(tmp_path: Path, record: RunRecord, client: TestClient, harm: str) -> None:
    path = record.store.local_path("pictures/step-00000040/digits.png")
    assert path is not None
    path.unlink()
    if harm == "link":
        (tmp_path / "secret.png").write_bytes(b"\x89PNG\r\n\x1a\nsecret")
        path.symlink_to(tmp_path / "secret.png")
    if harm == "html":
        path.write_text("<script>alert(1)</script>")
    assert client.get("/api/runs/restarted/pictures/step-00000040/digits.png").status_code == 404
