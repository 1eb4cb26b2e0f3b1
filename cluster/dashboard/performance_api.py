"""What the Speed part of a run's page asks for."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import FastAPI, Query

from cluster.dashboard import performance
from cluster.dashboard.rank_rows import METRICS
from cluster.dashboard.run_view import Row
from cluster.dashboard.store_view import StoreView
from configs.errors import UsageError

MOST_BUCKETS = 2000
SHOWN_RANKS = 10


def add(app: FastAPI, store: StoreView) -> None:
    """Add what the page of a run's performance asks for."""

    @app.get("/api/runs/{name}/performance", tags=["performance"])
    def performance_of_run(
        name: str,
        start: float | None = None,
        stop: float | None = None,
        buckets: Annotated[int, Query(ge=1, le=MOST_BUCKETS)] = 300,
    ) -> dict[str, Any]:
        """Seconds a step of each part, stacked from the first of `order` on, in buckets of steps, by rank 0's clock.

        {order: [part], x: [last step of each bucket], steps: [steps in it], parts: {part: [seconds a step]},
        totals: {part: seconds}}. Between steps start and stop, both included.

        data: waited for examples. collective: waited for other ranks, as far as the host sees it (see
        trainer/stopwatch.py). checkpoint: waited for saves, within steps and between them. evaluation: between steps.
        """
        view = store.run(name)
        found = view.split(start, stop, buckets)
        return {
            "order": performance.SPLIT,
            "x": found.x.tolist(),
            "steps": found.steps.tolist(),
            "parts": {part: values.tolist() for part, values in found.parts.items()},
            "totals": found.totals(),
        }

    @app.get("/api/runs/{name}/ranks", tags=["performance"])
    def ranks(
        name: str,
        metric: str = "step_s",
        start: float | None = None,
        stop: float | None = None,
        buckets: Annotated[int, Query(ge=1, le=MOST_BUCKETS)] = 100,
    ) -> dict[str, Any]:
        """A metric of all ranks, for a heat map: a row a rank, a column a bucket of steps.

        {metric, metrics: [all that may be asked for], x: [last step of each bucket], ranks: [number], nodes: [host or
        null], mean: [[..]], max: [[..]], median_own_s, slowest: [{rank, node, own_s, factor}]}, null where a rank has
        no reading. slowest: at most 10 ranks by own_s, their time a step without waits for others; factor: over the
        median rank's.
        """
        if metric not in METRICS:
            raise UsageError(f"Ranks record no '{metric}'. They do: {', '.join(METRICS)}.")
        view = store.run(name)
        table, places = view.ranks()
        found = performance.matrix(table, metric, start=start, stop=stop, buckets=buckets)
        own_s = performance.own_medians(table, start, stop)
        return {
            "metric": metric,
            "metrics": METRICS,
            "x": found.x.tolist(),
            "ranks": found.ranks.tolist(),
            "nodes": [_node(places, rank) for rank in found.ranks.tolist()],
            "mean": found.mean.tolist(),
            "max": found.largest.tolist(),
            "median_own_s": statistics.median_low(own_s.values()) if own_s else None,
            "slowest": [
                {"rank": rank, "node": _node(places, rank), "own_s": own_s[rank], "factor": factor}
                for rank, factor in performance.slower_than_median(own_s)[:SHOWN_RANKS]
            ],
        }

    @app.get("/api/runs/{name}/memory", tags=["performance"])
    def memory_of_ranks(name: str) -> list[dict[str, Any]]:
        """Bytes by rank: {rank, node, device, used, reserved, free, most_used, most_reserved, least_free}.

        used: by the process. reserved: by torch, of a GPU. free: on the device (a CPU's host) for anybody.
        """
        table, places = store.run(name).ranks()
        return [
            {"rank": rank, "node": _node(places, rank), "device": places.get(rank, {}).get("device")} | found
            for rank, found in performance.memory(table).items()
        ]


def _node(places: Mapping[int, Row], rank: int) -> str | None:
    host = places.get(rank, {}).get("host")
    return None if host is None else str(host)
