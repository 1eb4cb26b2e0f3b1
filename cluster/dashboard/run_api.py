"""What the page of a run asks for, but for its speed (performance_api.py) and what is done to it (actions.py)."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import FastAPI, Query
from fastapi.responses import Response

from cluster.dashboard import logs, run_files
from cluster.dashboard.run_view import Axis, RunView
from cluster.dashboard.store_view import StoreView

MOST_BUCKETS = 5000
Number = Annotated[int, Query(ge=0, lt=1 << 62)]


def add(app: FastAPI, store: StoreView) -> None:
    """Add it to the application."""

    @app.get("/api/runs", tags=["runs"])
    def runs() -> list[dict[str, Any]]:
        """One row a run, the newest first, with what needs attention."""
        return store.summaries()

    @app.get("/api/runs/{name}", tags=["runs"])
    def run(name: str) -> dict[str, Any]:
        """A run's summary, and the names of its metrics."""
        view = store.run(name)
        return view.summary() | {"metrics": view.metric_names(), "tokens_per_step": view.tokens_per_step()}

    @app.get("/api/runs/{name}/events", tags=["runs"])
    def events(name: str) -> list[dict[str, Any]]:
        """Everything that happened to a run, in order."""
        return store.run(name).events()

    @app.get("/api/runs/{name}/sparkline", tags=["runs"])
    def sparkline(name: str) -> list[float]:
        """Its loss in at most 60 numbers."""
        return store.run(name).sparkline()

    @app.get("/api/runs/{name}/series", tags=["runs"])
    def series(
        name: str,
        metric: str,
        x: Axis = "step",
        start: float | None = None,
        stop: float | None = None,
        buckets: Annotated[int, Query(ge=1, le=MOST_BUCKETS)] = 600,
        smooth: Annotated[int, Query(ge=1, le=1 << 40)] = 1,
    ) -> dict[str, Any]:
        """A metric over steps, time (epoch seconds) or tokens, in buckets of which each tells its extremes.

        x: of the last value of each bucket. last: the metric's newest value. min, max, bad: also of the steps between
        two readings; bad: how many of them have no finite value. superseded: points of what was rolled back. restarts:
        where attempts begin. smooth: steps to take means over, for a line of its own.
        """
        return drawn(store.run(name), metric, x, start, stop, buckets, smooth)

    @app.get("/api/runs/{name}/logs/index", tags=["logs"])
    def logs_index(name: str) -> dict[str, Any]:
        """Which logs there are, and of each attempt that failed, its first failure."""
        view = store.run(name)
        return logs.index(view.record.store, view.events())

    @app.get("/api/runs/{name}/logs", tags=["logs"])
    def log(
        name: str,
        attempt: Number,
        rank: Number,
        offset: Number | None = None,
        before: Number | None = None,
        limit: Annotated[int, Query(ge=1, le=logs.MOST_BYTES)] = 65536,
    ) -> dict[str, Any]:
        """Lines of a rank's log in one attempt, by bytes: from `offset` on, or those `before`; else the last ones."""
        run = store.run(name).record.store
        return logs.piece(run, attempt, rank, start=offset, stop=before, limit=limit)

    @app.get("/api/runs/{name}/logs/search", tags=["logs"])
    def search_log(
        name: str, attempt: Number, rank: Number, text: Annotated[str, Query(min_length=1)], offset: Number = 0
    ) -> dict[str, Any]:
        """Lines of a rank's log that hold a text, from a byte on; `next` says where to go on."""
        return logs.search(store.run(name).record.store, attempt, rank, text, start=offset)

    @app.get("/api/runs/{name}/config", tags=["runs"])
    def config(name: str) -> dict[str, Any]:
        """Its configuration with where each value came from, what differs from its parent, and its launches."""
        return run_files.configuration(store, store.run(name))

    @app.get("/api/runs/{name}/pictures/{path:path}", tags=["runs"])
    def picture(name: str, path: str) -> Response:
        """A picture that it has recorded."""
        return Response(run_files.picture(store.run(name), path), media_type="image/png")


def drawn(
    view: RunView, metric: str, x: Axis, start: float | None, stop: float | None, buckets: int, smooth: int
) -> dict[str, Any]:
    """What the API tells of a metric."""
    found = view.series(metric, axis=x, start=start, stop=stop, buckets=buckets, smooth=smooth)
    curve = found.curve
    return {
        "metric": metric,
        "x": curve.x.tolist(),
        "min": curve.smallest.tolist(),
        "max": curve.largest.tolist(),
        "mean": curve.mean.tolist(),
        "count": curve.count.tolist(),
        "bad": curve.bad.tolist(),
        "last": found.last,
        "smooth": None if found.smooth is None else {"x": found.smooth.x.tolist(), "y": found.smooth.values.tolist()},
        "superseded": found.superseded,
        "restarts": found.restarts,
    }
