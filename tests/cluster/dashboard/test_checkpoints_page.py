"""Checkpoints of all runs."""

from __future__ import annotations

from pathlib import Path

from starlette.testclient import TestClient

from tests.cluster.dashboard import stores
from tests.cluster.dashboard.page_store import checkpoint


def test_checkpoints_tell_how_they_were_written_and_whether_they_are_whole(client: TestClient, store: Path) -> None:
    record = stores.create(store, "one", "name=one")
    record.next_attempt()
    for step in (10, 20, 30, 40, 50):
        checkpoint(record, step)
        record.event("checkpoint", step=step, size_bytes=100, stall_s=0.01, write_s=0.5)
    (checkpoint(record, 10) / "rank-00000-ab-000001.safetensors").write_bytes(b"cut")
    (checkpoint(record, 20) / "manifest.json").write_text("{")
    (checkpoint(record, 30) / "manifest.json").unlink()
    (checkpoint(record, 40) / "manifest.json").write_text(
        (checkpoint(record, 40) / "manifest.json").read_text().replace("rank-00000", "../../run.yaml/rank")
    )
    record.close()
    rows = {row["step"]: row for row in client.get("/api/checkpoints?run=one").json()}
    assert {step: row["state"] for step, row in rows.items()} == {
        10: "damaged", 20: "damaged", 30: "unfinished", 40: "damaged", 50: "whole",
    }  # fmt: skip
    whole = rows[50]
    assert (whole["world_size"], whole["zero_stage"], whole["precision"], whole["size_bytes"]) == (2, 1, "bf16", 100)
    assert (whole["stall_s"], whole["write_s"], whole["evaluation"]) == (0.01, 0.5, {"loss": 2.5})
    assert whole["command"] == f"shardyard runs resume one --store {store}"
    assert "--from one@10 --branch" in rows[10]["command"]
    page = client.get("/checkpoints?run=one").text
    assert "/api/runs/one/checkpoints/50/verify" in page and "/api/runs/one/checkpoints/50/export" in page
    assert client.get("/checkpoints?run=none").status_code == 404


def test_what_goes_on_from_a_checkpoint_has_verified_it(client: TestClient, store: Path) -> None:
    record = stores.create(store, "one")
    record.next_attempt()
    for step in (10, 20, 30):
        checkpoint(record, step)
        record.event("checkpoint", step=step)
    record.event("started", step=20)
    record.event(
        "checkpoint_damaged", error=f"Checkpoint {record.store.path('checkpoints/step-00000030')} is skipped: bits"
    )

    def states() -> dict[int, str]:
        return {row["step"]: row["state"] for row in client.get("/api/checkpoints").json()}

    assert states() == {10: "whole", 20: "verified", 30: "damaged"}
    record.event("checkpoint_verified", step=10, damage=[])
    record.event("checkpoint_verified", step=20, damage=["a block fails its digest"])
    record.event("checkpoint", step=30)  # saved anew
    record.close()
    assert states() == {10: "verified", 20: "damaged", 30: "whole"}
