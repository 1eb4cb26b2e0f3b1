"""Sweeps and their trials."""

from __future__ import annotations

import math
from pathlib import Path

from starlette.testclient import TestClient

from cluster.sweep_folder import Spec, SweepFolder
from configs.load import load
from data_pipelines.storage import Store
from tests.cluster.dashboard import stores
from tests.cluster.dashboard.page_store import TAG


def test_a_sweep_tells_its_trials_the_best_first(client: TestClient, store: Path) -> None:
    base = load(stores.RECIPE, [f"store={store}", "name=base", "steps=100", "tracking.mlflow=null"])
    trials = [{"optimizer.lr": lr} for lr in (1e-3, 2e-3, 3e-3, 4e-3)]
    spec = Spec("grid", ["optimizer.lr=1e-3,2e-3,3e-3,4e-3"], "validation/loss", "min", 0, trials)
    folder = SweepFolder.create(Store(store), "lr", spec, base)
    for number, values in ((1, [3.0, 2.5]), (2, [3.0, 2.0]), (3, [1.0, math.nan])):
        record = folder.create_run(folder.trial(number))
        record.next_attempt()
        for step, value in enumerate(values, 1):
            record.metrics(step, {"validation/loss": value})
        record.event("finished", step=2)
        record.close()
    folder.fail_trial(4, TAG)
    (store / "sweeps" / "bad").mkdir()
    (store / "sweeps" / "bad" / "sweep.json").write_text("{")
    found = client.get("/api/sweeps/lr").json()
    assert [(row["trial"], row["value"]) for row in found["trials"]] == [(2, 2.0), (1, 2.5), (3, None), (4, None)]
    assert found["best"]["run"] == "lr-0002" and found["counts"] == {"finished": 3, "failed": 1}
    page = client.get("/sweeps/lr").text
    assert "lr-0002" in page and TAG not in page and "shardyard sweep --resume lr" in page
    assert "bad" in client.get("/sweeps").text


def test_a_sweep_whose_trials_have_finished_has_nothing_to_go_on_with(client: TestClient, store: Path) -> None:
    base = load(stores.RECIPE, [f"store={store}", "name=base", "steps=100", "tracking.mlflow=null"])
    spec = Spec("grid", ["optimizer.lr=1e-3"], "validation/loss", "min", 0, [{"optimizer.lr": 1e-3}])
    folder = SweepFolder.create(Store(store), "lr", spec, base)
    record = folder.create_run(folder.trial(1))
    record.next_attempt()
    assert "--resume lr" in client.get("/sweeps/lr").text
    record.event("finished", step=1)
    record.close()
    assert "--resume lr" not in client.get("/sweeps/lr").text
