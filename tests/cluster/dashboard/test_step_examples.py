"""The examples of a step: by a process of its own, within limits, and what is said where they cannot be told."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from cluster.dashboard import actions, step_examples
from tests.cluster.dashboard.page_store import TAG
from tests.cluster.dashboard.records import new_run, train
from tests.tiny import tiny_config
from tests.trainer.attempts import launched
from trainer.record import RunRecord
from trainer.step_examples import step_examples as told

ROOT = Path(__file__).parents[3]
PICTURES: dict[str, Any] = {
    "task": {"name": "image_classification", "image_size": 8, "num_classes": 10, "channels": 1},
    "model": {"name": "cnn", "blocks": [1], "width": 8},
    "data": {"name": "digits"},
}


@pytest.fixture(autouse=True)
def from_any_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process runs where its run was launched."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def at_step(store: Path, step: int, **changes: Any) -> RunRecord:
    """A run that has recorded its steps up to one, and whose data is there."""
    record = launched(tiny_config(store.parent, store=str(store), **changes))
    record.next_attempt()
    record.event("started", step=0, world_size=2)
    train(record, 1, step)
    return record


def command(monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """What runs in place of `shardyard`."""
    monkeypatch.setattr(actions, "_COMMAND", [sys.executable, "-c", script])


def test_text_as_the_trainer_had_it(client: TestClient, store: Path) -> None:
    texts = ("one " * 40, TAG * 3, "three " * 60)
    store.parent.joinpath("text.txt").write_text("\n\n".join(texts))
    record = at_step(store, 6)
    found = client.get("/api/runs/tiny/steps/6/examples?limit=3").json()
    wanted = told(record, 6, 3)
    assert found == {"run": "tiny"} | wanted and (len(found["examples"]), found["total"]) == (3, 5)
    for query in ("steps/7", "steps/0", "steps/-1"):
        answer = client.get(f"/api/runs/tiny/{query}/examples")
        assert answer.status_code == 404 and "has recorded the steps up to 6" in answer.json()["error"]
    assert client.get("/api/runs/tiny/steps/2/examples?limit=100000").status_code == 422
    record.event("diverged", step=7, what="loss", value=1.0, loss=1.0, grad_norm=None)
    (folder,) = (store / "datasets").iterdir()
    folder.rename(store / "gone")
    answer = client.get("/api/runs/tiny/steps/7/examples")  # of which nothing but that it diverged is recorded
    assert answer.status_code == 404 and folder.name in answer.json()["error"]


def test_pictures_by_address(client: TestClient, store: Path) -> None:
    record = at_step(store, 2, **PICTURES)
    wanted = told(record, 2, 100)["examples"]
    found = client.get("/api/runs/tiny/steps/2/examples").json()["examples"]
    assert [each["rows"] for each in found] == [each["rows"] for each in wanted]
    assert [each["values"]["label"] for each in found] == [each["values"]["label"] for each in wanted]
    for each in found:
        address = each["values"]["image"]["picture"]
        assert f"number={each['rows'][0]}&" in address
        assert client.get(address).content.startswith(b"\x89PNG")


def test_what_takes_too_long_is_ended(client: TestClient, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(new_run(store), 1, 3)
    monkeypatch.setattr(step_examples, "LIMIT_S", 0.5)
    command(monkeypatch, "import time; time.sleep(60)")
    began = time.monotonic()
    answer = client.get("/api/runs/run/steps/3/examples")
    assert answer.status_code == 500 and time.monotonic() - began < 20
    assert "`shardyard replay run --step 3 --data-only --top 32` took longer" in answer.json()["error"]
    command(monkeypatch, f"print({json.dumps(json.dumps({'examples': [], 'total': 0}))})")
    for _ in range(step_examples.AT_ONCE + 1):  # what has ended makes room
        assert client.get("/api/runs/run/steps/3/examples").json() == {"examples": [], "total": 0}
