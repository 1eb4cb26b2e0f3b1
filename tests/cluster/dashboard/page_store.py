"""Stores for the tests of pages, and a client that asks for them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from cluster.dashboard.app import create_app
from cluster.dashboard.store_view import StoreView
from tests.cluster.dashboard import stores
from trainer.record import RunRecord

TAG = "<script>alert(1)</script>"


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def client(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TestClient]:
    monkeypatch.chdir(tmp_path)  # without a targets.yaml
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    with TestClient(create_app(StoreView(str(store), tmp_path / "cache"))) as client:
        yield client


def run(store: Path, name: str, *overrides: str, **settings: Any) -> RunRecord:
    """A short one, that has restarted once."""
    short = {"steps": 80, "fails_at": 44, "saved_at": 40, "spike_at": 30}
    return stores.write_run(store, name, **(short | settings), overrides=overrides)


def live_run(store: Path, name: str, losses: list[float], **fields: Any) -> RunRecord:
    """One that this process holds, whose last step was just now."""
    record = stores.create(store, name)
    record.acquire_lease()
    record.next_attempt()
    record.event("placed", workers=[{"node": "n1", "gpus": ["0"]}, {"node": "n2", "gpus": ["3"]}])
    record.event("started", step=0, world_size=2, parameters=10)
    for step, loss in enumerate(losses, 1):
        record.metrics(step, stores.metrics(step, 100) | {"loss": loss})
    for kind, values in fields.items():
        record.event(kind, **values)
    record.close()
    return record


def checkpoint(record: RunRecord, step: int, size: int = 100) -> Path:
    """A whole one, but for what is in its files."""
    folder = record.store.local_path(f"checkpoints/step-{step:08d}")
    assert folder is not None
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rank-00000-ab-000001.safetensors").write_bytes(bytes(size))
    files = [{"name": "rank-00000-ab-000001.safetensors", "size": size}]
    manifest = {"world_size": 2, "zero_stage": 1, "config": {"precision": "bf16"}, "files": files}
    (folder / "manifest.json").write_text(json.dumps(manifest | {"evaluation": {"loss": 2.5}}))
    return folder


def attention(client: TestClient) -> set[tuple[str, str]]:
    return {(each["run"], each["kind"]) for each in client.get("/api/overview").json()["attention"]}
