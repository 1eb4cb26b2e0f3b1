"""Runs beside each other."""

from __future__ import annotations

from html import unescape
from pathlib import Path

import numpy as np
import pytest
from starlette.testclient import TestClient

from tests.cluster.dashboard import stores
from tests.cluster.dashboard.page_store import run


def test_runs_are_compared_at_equal_cost(client: TestClient, store: Path) -> None:
    run(store, "aa")
    run(store, "bb", "optimizer.lr=1e-3", "batch.global_batch_size=8", steps=160)
    table = client.get("/api/compare/table?runs=aa,bb").json()
    assert {row["key"]: row["values"] for row in table["differences"]} == {
        "batch.global_batch_size": ["4", "8"],
        "optimizer.lr": ["0.003", "0.001"],
        "steps": ["80", "160"],
    }
    parts = {part["axis"]: part for part in table["equal"]}
    assert set(parts) == {"step", "tokens", "time", "compute"}
    assert parts["step"]["rows"][-1]["at"] == 80
    assert parts["tokens"]["rows"][-1]["at"] == 80 * 4 * 256  # where the shorter one ends
    assert parts["compute"]["rows"][-1]["at"] == 6 * 1_234_567 * 80 * 4 * 256
    mean = np.mean([stores.metrics(step, 80, 2)["loss"] for step in range(61, 81)])
    assert parts["step"]["rows"][-1]["values"][0] == pytest.approx(mean)
    curves = client.get("/api/compare?runs=aa,bb&x=time").json()["runs"]
    assert [curve["x"][0] for curve in curves] == [0, 0] and all(np.diff(curves[0]["x"]) > 0)
    assert "optimizer.lr" in client.get("/compare?runs=aa,bb&x=tokens").text


@pytest.mark.parametrize("axis", ["step", "time", "tokens", "compute"])
def test_no_comparison_hides_a_spike(client: TestClient, store: Path, axis: str) -> None:
    run(store, "aa", steps=400, fails_at=220, saved_at=200, spike_at=150, spike=40.0)
    record = stores.create(store, "bb", "steps=40")  # reads every tenth step, and the extremes between
    record.next_attempt()
    record.event("started", step=0, world_size=2, parameters=10)
    for step in range(10, 50, 10):
        record.metrics(step, {"loss": 2.0, "loss_min": 1.0, "loss_max": 50.0 if step == 30 else 3.0})
    record.close()
    spiked, read = client.get(f"/api/compare?runs=aa,bb&x={axis}&buckets=20").json()["runs"]
    assert len(spiked["x"]) <= 20 and max(spiked["high"]) == 40.0 > max(spiked["y"])
    assert all(low <= mean <= high for low, mean, high in zip(spiked["low"], spiked["y"], spiked["high"], strict=True))
    assert (read["low"], read["y"], read["high"]) == ([1.0] * 4, [2.0] * 4, [3.0, 3.0, 50.0, 3.0])


@pytest.mark.parametrize(
    ("runs", "said"), [("one", "Between 2 and 8"), (",".join("abcdefghi"), "Between 2 and 8"), ("one,no", "no run")]
)
def test_what_cannot_be_compared_is_explained(client: TestClient, store: Path, runs: str, said: str) -> None:
    run(store, "one")
    assert said in unescape(client.get(f"/compare?runs={runs}").text)
    assert said in client.get(f"/api/compare?runs={runs}").json()["error"]


def test_ticks_of_a_form_become_an_address(client: TestClient, store: Path) -> None:
    answer = client.get("/compare?run=a&run=b", follow_redirects=False)
    assert (answer.status_code, answer.headers["location"]) == (303, "/compare?runs=a,b")


def test_runs_without_a_common_metric_have_no_table(client: TestClient, store: Path) -> None:
    run(store, "one")
    stores.create(store, "two").close()
    assert client.get("/api/compare/table?runs=one,two").json()["equal"] == []
    assert client.get("/compare?runs=one,two").status_code == 200
