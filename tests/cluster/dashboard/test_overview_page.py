"""The page of all runs."""

from __future__ import annotations

import math
import re
import time
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from cluster.dashboard import overview, store_pages
from tests.cluster.dashboard import stores
from tests.cluster.dashboard.page_store import attention, checkpoint, live_run, run
from trainer.record_rows import RowWriter


def test_the_table_sorts_filters_and_searches(client: TestClient, store: Path) -> None:
    run(store, "aa")
    run(store, "bb", "optimizer.lr=1e-3", steps=160)
    stores.create(store, "cc").close()

    def names(query: str) -> list[str]:
        return [row["run"] for row in client.get(f"/api/overview?{query}").json()["runs"]]

    assert names("sort=run&order=up") == ["aa", "bb", "cc"]
    assert names("sort=run&order=down") == ["cc", "bb", "aa"]
    assert names("sort=step&order=down")[:2] == ["bb", "aa"]
    assert names("sort=loss&order=up")[-1] == "cc" and names("sort=loss&order=down")[-1] == "cc"  # it has none
    assert names("status=queued") == ["cc"]
    assert names("search=BB") == ["bb"] and names("search=bb+finished") == ["bb"] and names("search=bb+queued") == []
    assert len(names("sort=no-such-column")) == 3


def test_counts_and_devices_are_of_all_runs(client: TestClient, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(store, "one")
    live_run(store, "two", [2.0] * 5)
    found = client.get("/api/overview?status=finished").json()
    assert found["counts"] == {"running": 1, "finished": 1} and found["total"] == 2 and len(found["runs"]) == 1
    assert found["devices"]["kind"] == "GPU" and found["devices"]["used"] == 2
    assert 0 <= found["goodput"] <= 1


def test_of_very_many_runs_the_first_are_shown(
    client: TestClient, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_pages, "_MOST_RUNS", 3)
    for number in range(5):
        stores.create(store, f"run{number}", f"steps={100 + number}").close()

    def shown(query: str) -> list[str]:
        return re.findall(r'<tr data-key="(.*?)">', client.get(f"/?{query}").text)

    up = "sort=run&order=up"
    assert shown(up) == ["run0", "run1", "run2"] and len(client.get("/api/overview").json()["runs"]) == 5
    assert shown("sort=run&order=down") == ["run4", "run3", "run2"] and shown("search=run4") == ["run4"]
    page = client.get(f"/?{up}").text
    assert "and 2 more" in page and 'href="/?sort=run&amp;order=up&amp;all=1">Show all 5<' in page
    everything = client.get(f"/?{up}&all=1").text
    assert shown(f"{up}&all=1") == [f"run{number}" for number in range(5)] and "Show all" not in everything
    assert "all=1" in everything.partition("<thead>")[2].partition("</thead>")[0]  # another order is of all too


@pytest.mark.parametrize(
    ("kind", "losses", "events"),
    [
        ("nan", [2.0] * 20 + [math.nan], {}),
        ("spike", [2.0] * 20 + [9.0, 2.0], {}),
        (
            "diverged",
            [2.0],
            {"diverged": {"step": 1, "what": "loss", "value": math.nan, "limit": None, "policy": "skip"}},
        ),
        ("diverged", [2.0], {"diverged": {"step": None, "value": "x"}}),  # as from another version
        ("node", [2.0], {"resized": {"workers_before": 2, "workers": 1}}),
        ("checkpoint", [2.0], {"checkpoint_failed": {"step": 1, "error": "full"}}),
        ("checkpoint", [2.0], {"checkpoint_damaged": {"error": "bits"}}),
        ("restarted", [2.0], {"failed": {"error": "gone", "final": False}}),
        ("data", [2.0], {"data_skipped": {"step": 1, "blocks": [["train", 3]]}}),
    ],
)
def test_what_needs_attention(
    client: TestClient, store: Path, kind: str, losses: list[float], events: dict[str, Any]
) -> None:
    live_run(store, "one", losses, **events)
    assert attention(client) == {("one", kind)}
    assert f'data-kind="{kind}"' in client.get("/").text


def test_what_the_status_says_is_not_said_again_beside_it(client: TestClient, store: Path) -> None:
    record = live_run(store, "one", [2.0], failed={"error": "gone", "final": True})
    assert record.status() == "failed" and attention(client) == {("one", "failed")}
    assert 'class="flag"' not in client.get("/").text


def test_a_run_that_fares_well_needs_none(client: TestClient, store: Path) -> None:
    live_run(store, "one", [8.0 * 0.99**step for step in range(60)])
    record = run(store, "two")
    record.event("checkpoint_verified", step=80, damage=[])
    record.close()
    assert attention(client) == set()


def test_one_line_for_all_runs_that_ended_with_a_checkpoint_that_nobody_verified(
    client: TestClient, store: Path
) -> None:
    def told() -> list[str]:
        return [each["text"] for each in client.get("/api/overview").json()["attention"]]

    checkpoint(live_run(store, "running", [2.0] * 5, checkpoint={"step": 5}), 5)
    records = [run(store, f"run{number}") for number in range(8)]
    records.pop().store.delete_dir("checkpoints/step-00000080")
    (text,) = told()
    assert "of 7 runs that have ended" in text and "and 2 more" in text and "running" not in text
    assert "and 2 more" in client.get("/").text
    for record in (*records[2:5], records[6]):
        record.event("checkpoint_verified", step=80, damage=[])
    records[5].event("started", step=80)
    records[5].event("stopped", step=80)
    records[0].event("checkpoint_verified", step=70, damage=[])  # of an older one
    (text,) = told()
    assert "of 2 runs that have ended" in text and "run0" in text and "run1" in text
    records[1].event("checkpoint_verified", step=80, damage=[])
    assert "a run that has ended was never verified (run0)" in told()[0]
    records[1].event("checkpoint", step=80)  # saved anew
    assert "of 2 runs" in told()[0]
    for record in records:
        record.close()


def test_a_silent_run_is_stalled(client: TestClient, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with stores.clock(time.time() - 300):
        live_run(store, "one", [2.0] * 5)
    assert attention(client) == {("one", "stalled")}


def test_a_rank_that_holds_the_others_up_is_named(client: TestClient, store: Path) -> None:
    record = live_run(store, "one", [2.0] * 5)
    for rank in range(3):
        writer = RowWriter(record.store, "ranks", 1, f"rank-{rank:05d}")
        for step in range(10):
            own_s = 0.9 if rank == 1 else 0.5
            values = {"step_s": 1.0, "collective_s": 1.0 - own_s}
            writer.append({"time": time.time(), "attempt": 1, "rank": rank, "step": step, "values": values})
        writer.close()
    assert attention(client) == {("one", "straggler")}
    assert "rank 1 on" in client.get("/").text


def test_a_full_disk_is_told(client: TestClient, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(store, "one")
    monkeypatch.setattr(overview, "LOW_DISK", 1.1)
    assert (None, "disk") in attention(client)
