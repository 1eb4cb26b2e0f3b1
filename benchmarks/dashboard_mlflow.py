"""MLflow's UI beside ours on the same runs, in the same browser: a part of benchmarks/dashboard.py."""

from __future__ import annotations

import contextlib
import json
import shutil
import sqlite3
import sys
import time
from pathlib import Path

import numpy as np

from benchmarks.dashboard_browser import in_browser
from benchmarks.dashboard_server import Figures, Server, dashboard, free_port
from benchmarks.dashboard_store import metric_names, metric_values, spike_of, write_run
from data_pipelines.storage import Store

PEER_RUNS, PEER_METRICS, PEER_STEPS = 10, 4, 20_000


def peer(work: Path) -> Figures:
    """Both UIs on the same runs."""
    store, folder = work / "peer", work / "mlflow"
    spikes = np.random.default_rng(1).integers(1000, PEER_STEPS, PEER_RUNS).tolist()
    standing_out = [spike_of(PEER_METRICS, PEER_STEPS, spike) for spike in spikes]
    if not store.exists():
        for number, spike in enumerate(spikes):
            write_run(Store(store), f"run-{number}", PEER_METRICS, PEER_STEPS, spike)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    experiment, ids = fill_mlflow(folder / "mlflow.db", spikes)
    shutil.rmtree(work / "peer-cache", ignore_errors=True)
    has_text = "document.body?.innerText.includes('run-9')"
    found: Figures = {}
    with dashboard(store, work / "peer-cache") as server:
        base = f"http://127.0.0.1:{server.port}"
        kept = [json.loads(server.get(f"/api/runs/run-{n}/series?metric=loss")[0]) for n in range(PEER_RUNS)]
        found["shardyard ui"] = {
            "start_s": server.start_s,
            "overview": in_browser(f"{base}/", has_text),
            "run": in_browser(f"{base}/runs/run-3", "document.querySelector('.uplot canvas')"),
            "spikes_kept": sum(spike in each["max"] for spike, each in zip(standing_out, kept, strict=True)),
            **server.memory_mb(),
        }
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{folder}/mlflow.db"]
    command += ["--artifacts-destination", str(folder), "--port", str(port), "--workers", "1"]
    server = Server(command, port)
    try:
        base = f"http://127.0.0.1:{server.port}/#/experiments/{experiment}"
        sampled = "/ajax-api/2.0/mlflow/metrics/get-history-bulk-interval?metric_key=loss&max_results=320&run_ids="
        kept = [json.loads(server.get(sampled + each)[0])["metrics"] for each in ids]
        found["MLflow"] = {
            "start_s": server.start_s,
            "overview": in_browser(f"{base}/runs", has_text),
            "run": in_browser(
                f"{base}/runs/{ids[3]}/model-metrics", "document.querySelector('.js-plotly-plot .main-svg')"
            ),
            "spikes_kept": sum(
                spike in [row["value"] for row in each] for spike, each in zip(standing_out, kept, strict=True)
            ),
            "values_of_a_chart": len(kept[0]),
            **server.memory_mb(),
        }
    finally:
        server.close()
    return found | {"runs": PEER_RUNS, "metrics": PEER_METRICS, "steps": PEER_STEPS}


def fill_mlflow(file: Path, spikes: list[int]) -> tuple[str, list[str]]:
    """Runs by its API; their values straight into its table, which is what the API would write. Ids."""
    from mlflow import MlflowClient
    from mlflow.entities import Metric

    client = MlflowClient(f"sqlite:///{file}")
    experiment = client.create_experiment("runs")
    names, ids, now = metric_names(PEER_METRICS), [], int(time.time() * 1000)
    for number, spike in enumerate(spikes):
        run = client.create_run(experiment, run_name=f"run-{number}").info.run_id
        values = metric_values(PEER_METRICS, PEER_STEPS, spike).tolist()
        rows = [
            (name, value, now + 100 * step, run, step, False)
            for step, row in enumerate(values[:-1], start=1)
            for name, value in zip(names, row, strict=True)
        ]
        with contextlib.closing(sqlite3.connect(file)) as base, base:
            base.executemany(
                "INSERT INTO metrics (key, value, timestamp, run_uuid, step, is_nan) VALUES (?, ?, ?, ?, ?, ?)", rows
            )
        last = [
            Metric(name, value, now + 100 * PEER_STEPS, PEER_STEPS)
            for name, value in zip(names, values[-1], strict=True)
        ]
        client.log_batch(run, metrics=last)  # which makes them the latest
        client.set_terminated(run)
        ids.append(run)
    return experiment, ids
