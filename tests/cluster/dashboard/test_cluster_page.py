"""Targets, their nodes and queues, and where runs are."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.testclient import TestClient

from cluster.dashboard import resources
from cluster.dashboard.ask_target import ray_node, slurm_node
from cluster.targets.ray_dashboard import node_usage
from tests.cluster.dashboard import stores
from tests.cluster.dashboard.page_store import TAG, live_run, run


def test_a_store_alone_tells_where_runs_were(client: TestClient, store: Path) -> None:
    run(store, "one")
    record = stores.create(store, "alone")  # as by torchrun
    record.next_attempt()
    record.event("started", step=0, world_size=3)
    record.event("finished", step=1)
    record.close()
    found = {row["run"]: row for row in client.get("/api/cluster").json()["placements"]}
    assert found["one"]["nodes"] == {"n1": 1, "n2": 1} and found["one"]["target"] == "local"
    assert sum(found["alone"]["nodes"].values()) == 3 and "?" not in found["alone"]["nodes"]


def test_what_ray_tells_of_its_nodes() -> None:
    told = {
        "nodeLogicalResources": {
            "a": "3.5/8.0 CPU (3.0 used of 4.0 reserved)\n1.0/4.0 GPU\n0B/14GiB memory\n0.0/1.0 CPU_x",
            "b": "0B/14GiB memory",
        },
        "summary": [
            {"raylet": {"nodeId": "a"}, "mem": [100, 40, 60.0, 60]},
            {"raylet": {"nodeId": "c"}, "mem": []},
        ],
    }
    answer = SimpleNamespace(raise_for_status=lambda: None, json=lambda: {"data": told})
    usage = node_usage(SimpleNamespace(_do_request=lambda *_: answer))
    assert usage == {
        "a": {"CPU": 3.5, "GPU": 1.0, "memory_bytes": 100, "used_bytes": 60},
        "b": {"CPU": 0.0, "GPU": 0.0},
    }
    node = {"node_id": "a", "node_ip": "10.0.0.1", "state": "ALIVE", "resources_total": {"CPU": 8, "GPU": 4}}
    found = ray_node(node, usage["a"])
    assert (found["used_cpus"], found["cpus"], found["used_gpus"], found["gpus"]) == (3.5, 8, 1.0, 4)
    assert (found["used_bytes"], found["memory_bytes"]) == (60, 100)
    untold = ray_node(node | {"resources_total": {"CPU": 8, "memory": 50}}, {})
    assert untold["used_cpus"] is untold["used_gpus"] is untold["used_bytes"] is None and untold["memory_bytes"] == 50


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("lab: {type: ray, address: 'http://127.0.0.1:9'}", "No Ray dashboard answers"),
        ("lab: {type: rey}", "no type of target"),
    ],
)
def test_a_target_that_does_not_answer_shows_why(client: TestClient, text: str, said: str) -> None:
    Path("targets.yaml").write_text(text)
    deadline = time.monotonic() + 30
    while said not in (page := client.get("/cluster").text):
        assert time.monotonic() < deadline, page
        time.sleep(0.2)


def test_a_target_that_hangs_costs_the_page_three_seconds(
    client: TestClient, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("targets.yaml").write_text("lab: {type: ray, address: 'http://127.0.0.1:9'}\nhpc: {type: slurm}")
    released = []
    monkeypatch.setattr(resources, "PATIENCE_S", 0.3)
    monkeypatch.setattr(resources, "_question", _hangs(released))
    started = time.monotonic()
    page = client.get("/cluster").text
    assert time.monotonic() - started < 2 and page.count("It has not answered yet.") == 2
    client.get("/cluster")
    released.append(True)
    deadline = time.monotonic() + 10
    while "said at last" not in client.get("/cluster").text:
        assert time.monotonic() < deadline


def _hangs(released: list[bool]) -> Callable[[str], dict[str, Any]]:
    asked = []

    def question(name: str) -> dict[str, Any]:
        assert name not in asked or released, "a target that hangs is not asked again"
        asked.append(name)
        while not released:
            time.sleep(0.01)
        return {"answered_at": time.time(), "jobs": [], "nodes": None, "error": "said at last"}

    return question


def test_a_queue_is_shown_with_places_and_reasons(
    client: TestClient, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("targets.yaml").write_text("hpc: {type: slurm}")
    run(store, "one")
    job = {"job": "7", "run": "one", "user": "ada", "state": "waiting", "asks": "2 nodes", "why": f"busy {TAG}"}
    job |= {"position": 3, "priority": 5, "submitted_at": time.time() - 90, "may_start": time.time() + 3600}
    node = {"node": "n1", "state": "mix", "cpus": 64, "used_cpus": 32, "gpus": 8, "used_gpus": 2}
    node |= {"memory_bytes": 1 << 39, "used_bytes": 1 << 38}
    answer = {"answered_at": time.time(), "jobs": [job], "nodes": [node], "error": None}
    monkeypatch.setattr(resources, "_question", lambda name: answer)
    live_run(store, "two", [2.0] * 3)  # on n1 and n2
    page = client.get("/cluster").text
    assert 'href="/runs/two"' in page[page.index('data-key="n1"') :].partition("</tr>")[0]
    for text in ("2 nodes", "busy &lt;script&gt;", "in 59m", "256 GiB", "1m 30s ago", "/runs/one"):
        assert text in page


def test_nodes_of_slurm_are_read() -> None:
    cells = ["n1", "mix", "32/30/2/64", "512000", "N/A", "gpu:h100:8(S:0-1),shard:16", "gpu:h100:3(IDX:0-2),shard:0"]
    line = "".join(cell.ljust(width) for cell, width in zip(cells, (200, 30, 60, 30, 30, 200, 200), strict=True))
    node = slurm_node(line)
    assert (node["node"], node["used_cpus"], node["cpus"], node["used_gpus"], node["gpus"]) == ("n1", 32, 64, 3, 8)
    assert (node["memory_bytes"], node["used_bytes"]) == (512000 << 20, None)
