"""What each rank records of itself, in whole runs, and what the dashboard makes of it."""

from __future__ import annotations

import socket
import statistics
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from cluster.dashboard.app import create_app
from cluster.dashboard.store_view import StoreView
from tests.pool import run_workers
from tests.tiny import tiny_config
from tests.trainer.attempts import launched
from trainer.distributed import World
from trainer.progress import Progress
from trainer.record import RunRecord
from trainer.record_rows import read_rows

pytestmark = pytest.mark.distributed

SLOW_S = 0.2  # far above what a busy machine adds
COPY_S = 2.0  # longer than the first forward and backward


def work_with_a_slow_rank(world: World, store: str, run: str, attempt: int, slow: int | None) -> None:
    from trainer import loop, session

    record = RunRecord.open(store, run, rank=world.rank)
    record.attempt = attempt
    with session.open_session(record, world, Progress()) as opened:
        if world.rank == slow:
            opened.engine.module.register_forward_pre_hook(lambda *_: time.sleep(SLOW_S))
        loop.train(opened, threading.Event())
    record.close()


def run_of(config: dict[str, Any], world_size: int, slow: int | None) -> RunRecord:
    record = launched(config)
    run_workers(work_with_a_slow_rank, world_size, config["store"], config["name"], record.next_attempt(), slow)
    record.close()
    return record


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_dashboard_names_the_rank_that_holds_the_others_up(tmp_path: Path, stage: int) -> None:
    config = tiny_config(tmp_path, steps=8, zero={"stage": stage}, checkpoint={"every": 5})
    record = run_of(config, 2, slow=1)
    store = StoreView(config["store"], tmp_path / "cache")
    (straggler,) = store.run("tiny").stragglers()
    assert straggler["rank"] == 1
    client = TestClient(create_app(store), base_url="http://127.0.0.1")

    found = client.get("/api/runs/tiny/ranks", params={"metric": "own_s"}).json()
    assert found["ranks"] == [0, 1]
    assert found["x"] == [*range(1, 9)]
    assert found["slowest"][0]["rank"] == 1
    assert found["slowest"][0]["own_s"] >= 2 * SLOW_S, "two micro-batches a rank"
    assert found["slowest"][0]["factor"] > 1.3
    assert found["nodes"] == [socket.gethostname()] * 2
    waits = client.get("/api/runs/tiny/ranks", params={"metric": "collective_s"}).json()
    first, second = (statistics.median(each) for each in waits["mean"])
    assert first > second + SLOW_S / 2, "the other one waits"
    steps = client.get("/api/runs/tiny/ranks", params={"metric": "step_s"}).json()
    first, second = (statistics.median(each) for each in steps["mean"])
    assert abs(first - second) < SLOW_S, "they end a step together, so step_s tells nothing"
    rows, _ = read_rows(record.store, "ranks")
    for row in rows:
        if "place" not in row:
            values = row["values"]
            parts = [value for name, value in values.items() if name.endswith("_s") and name != "step_s"]
            assert all(part >= 0 for part in parts)
            assert sum(parts) <= values["step_s"] + 1e-6

    spent = client.get("/api/runs/tiny/performance").json()
    assert spent["x"] == [*range(1, 9)]
    assert spent["totals"]["collective"] > 8 * SLOW_S
    assert spent["totals"]["evaluation"] > 0 and spent["totals"]["checkpoint"] > 0
    evaluated = [x for x, seconds in zip(spent["x"], spent["parts"]["evaluation"], strict=True) if seconds > 0]
    assert evaluated == [4, 8]
    step_s = [row["step_s"] for row in record.stitched()]
    inside = ("data", "forward", "backward", "collective", "optimizer", "other")
    for place, whole in enumerate(step_s):
        assert sum(spent["parts"][part][place] for part in inside) == pytest.approx(whole, abs=2e-3)
    memory = client.get("/api/runs/tiny/memory").json()
    assert [each["rank"] for each in memory] == [0, 1]
    assert all(1e6 < each["used"] < each["free"] + each["used"] for each in memory)
    assert client.get("/api/runs/tiny/ranks", params={"metric": "nonsense"}).status_code == 400


def work_while_a_copy_is_made(world: World, store: str, run: str, attempt: int) -> None:
    from trainer import loop, session

    record = RunRecord.open(store, run, rank=world.rank)
    record.attempt = attempt
    with session.open_session(record, world, Progress()) as opened:
        opened.engine.reading.begin()
        threading.Timer(COPY_S, opened.engine.reading.end).start()
        loop.train(opened, threading.Event())
    record.close()


def test_a_step_that_waits_for_the_copy_of_a_checkpoint_says_so(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, steps=2, evaluation={"every": None, "sample_tokens": 0}, checkpoint={"every": 5})
    record = launched(config)
    run_workers(work_while_a_copy_is_made, 1, config["store"], config["name"], record.next_attempt())
    record.close()
    first, second = record.stitched()
    assert first["checkpoint_s"] > COPY_S / 2 and second["checkpoint_s"] == 0
    assert first["optimizer_s"] < first["step_s"] - first["checkpoint_s"]
