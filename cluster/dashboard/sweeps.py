"""Sweeps: their trials with what each was given, and how each does by the sweep's metric."""

from __future__ import annotations

import math
from typing import Any

from fastapi import FastAPI

from cluster.commands.output import run_arguments
from cluster.dashboard.run_view import Row, RunView
from cluster.dashboard.store_view import StoreView
from cluster.sweep_folder import SweepFolder, Trial
from configs.errors import NotFound, ShardyardError
from data_pipelines.storage import FileFacts
from trainer.lease import current_claim
from trainer.run_folder import SWEEPS


def add(app: FastAPI, store: StoreView, last: LastValues) -> None:
    """Add the API behind the pages."""

    @app.get("/api/sweeps", tags=["sweeps"])
    def api() -> list[dict[str, Any]]:
        """All sweeps of the store, each with its best trial."""
        return sweeps(store, last)

    @app.get("/api/sweeps/{name}", tags=["sweeps"])
    def one(name: str) -> dict[str, Any]:
        """A sweep's trials, the best first."""
        return sweep(store, last, name)


def sweeps(store: StoreView, last: LastValues) -> list[Row]:
    """{sweep, algorithm, metric, goal, trials, counts, best, running, error} of each."""
    found = []
    for name in store.store.list_dirs(SWEEPS) if store.store.exists(SWEEPS) else []:
        try:
            row = sweep(store, last, name)
        except ShardyardError as error:
            found.append({"sweep": name, "error": str(error)})
            continue
        found.append(row | {"trials": len(row["trials"])})
    return found


def sweep(store: StoreView, last: LastValues, name: str) -> Row:
    """A sweep and its trials, the best first: {sweep, algorithm, space, metric, goal, keys, trials, best, counts,
    running, command, error}; of a trial {trial, run, begun, status, step, value, values, error}.

    value: the metric at its last evaluation that survives, None before the first and where it is no number.
    Raises NotFound, Damaged.
    """
    if not store.store.exists(SWEEPS) or name not in store.store.list_dirs(SWEEPS):
        raise NotFound(f"There is no sweep '{name}' in {store.store.uri}.")
    folder = SweepFolder.open(store.store, name)
    spec = folder.spec
    trials = [_trial(store, last, folder, trial) for trial in folder.trials()]
    sign = 1 if spec.goal == "min" else -1
    trials.sort(key=lambda row: (row["value"] is None, sign * (row["value"] or 0.0), row["trial"]))
    counts: dict[str, int] = {}
    for row in trials:
        counts[row["status"]] = counts.get(row["status"], 0) + 1
    claim = current_claim(folder.store)
    return {
        "sweep": name,
        "algorithm": spec.algorithm,
        "space": spec.space,
        "metric": spec.metric,
        "goal": spec.goal,
        "keys": list(dict.fromkeys(key for row in trials for key in row["values"])),
        "trials": trials,
        "best": trials[0] if trials and trials[0]["value"] is not None else None,
        "counts": counts,
        "running": claim is not None and claim.is_live(),
        "command": f"shardyard sweep --resume {run_arguments(name, store.store.uri)}",
        "error": None,
    }


def _trial(store: StoreView, last: LastValues, folder: SweepFolder, trial: Trial) -> Row:
    error = folder.failure(trial.number)
    row: Row = {
        "trial": trial.number,
        "run": trial.run,
        "status": "waiting",
        "step": None,
        "value": None,
        "values": trial.values,
        "begun": False,
        "error": error,
    }
    try:
        view = store.run(trial.run)
        status = view.status()
        step, value = last.of(view, folder.spec.metric)
        row |= {"begun": True}
    except NotFound:
        return row | ({"status": "failed"} if error else {})
    except ShardyardError as damage:
        return row | {"status": "damaged", "error": str(damage)}
    given_up = trial.stopped_at is not None and status != "finished"
    return row | {"status": "failed" if error else "given up" if given_up else status, "step": step, "value": value}


class LastValues:
    """The last evaluations of runs, each read anew only when its run has recorded more. Safe for threads."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, str], tuple[FileFacts | None, tuple[int | None, float | None]]] = {}

    def of(self, view: RunView, metric: str) -> tuple[int | None, float | None]:
        """(step, value) of the last row that has a metric and survives; the value None where it is no number."""
        store = view.record.store
        names = store.list("metrics")
        facts = store.info(f"metrics/{names[-1]}") if names else None
        known = self._known.get((store.uri, metric))
        if known is None or known[0] != facts:
            found = view.curve(metric)
            last = (int(found.x[-1]), float(found.values[-1])) if len(found.x) else (None, None)
            known = facts, (last[0], last[1] if last[1] is not None and math.isfinite(last[1]) else None)
            self._known[store.uri, metric] = known
        return known[1]
