"""The pages on more than one run, each with the JSON that it is made of under /api."""

from __future__ import annotations

from typing import Any, Protocol
from urllib.parse import urlencode

from fastapi import FastAPI, Query, Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response

from cluster.dashboard import checkpoints, compare, data_sets, overview, resources, sweeps
from cluster.dashboard.run_view import Row
from cluster.dashboard.store_view import StoreView
from configs.errors import NotFound, ShardyardError, UsageError

NAVIGATION = [
    ("/", "Runs"),
    ("/compare", "Compare"),
    ("/cluster", "Cluster"),
    ("/checkpoints", "Checkpoints"),
    ("/datasets", "Data sets"),
    ("/sweeps", "Sweeps"),
]
_MOST_ROWS = 300  # of checkpoints on one page
_MOST_RUNS = 200  # likewise, where the reader does not want all
_FIRST_UP = {"run", "status", "where"}  # columns that are sorted upwards first
_PLAIN = {"status": "", "search": "", "sort": "started_at", "order": "down", "all": ""}


class Page(Protocol):
    """Renders a template."""

    def __call__(self, request: Request, template: str, /, **values: Any) -> HTMLResponse:
        """Of the template of this name."""


def add(app: FastAPI, store: StoreView, page: Page) -> None:
    """Add them to the application."""
    targets = resources.Targets()
    manifests = checkpoints.Manifests()
    opened = data_sets.Datasets(store)
    last = sweeps.LastValues()
    overview.add(app, store)
    compare.add(app, store)
    resources.add(app, store, targets)
    checkpoints.add(app, store, manifests)
    data_sets.add(app, opened)
    sweeps.add(app, store, last)

    @app.get("/", include_in_schema=False)
    def overview_page(
        request: Request,
        status: str = "",
        search: str = "",
        sort: str = "started_at",
        order: str = "down",
        all: str = "",
    ) -> HTMLResponse:
        chosen = {"status": status, "search": search, "sort": sort, "order": order}

        def link(**changes: str) -> str:
            query = {key: value for key, value in (chosen | {"all": all} | changes).items() if value != _PLAIN[key]}
            return f"/?{urlencode(query)}" if query else "/"

        return page(
            request,
            "overview.html",
            **overview.overview(store, **chosen),
            **chosen,
            most=None if all else _MOST_RUNS,
            columns=overview.COLUMNS,
            statuses=overview.STATUSES,
            link=link,
            first_order=lambda key: "up" if key in _FIRST_UP else "down",
        )

    @app.get("/compare", include_in_schema=False)
    def compare_page(
        request: Request,
        runs: str = "",
        run: list[str] = Query(default=[]),  # noqa: B008
        metric: str = "loss",
        x: compare.Axis = "step",
        log: str = "",
        calm: str = "",
    ) -> Response:
        if run:  # as a form sends its ticks
            return RedirectResponse(f"/compare?{urlencode({'runs': ','.join(run)}, safe=',')}", 303)
        views, error = [], None
        try:
            views = compare.chosen(store, runs) if runs else []
        except (NotFound, UsageError) as refused:
            error = str(refused)
        return page(
            request,
            "compare.html",
            names=store.names(),
            chosen=runs.split(","),
            runs=runs,
            views=views,
            running=any(view.status() == "running" for view in views),
            error=error,
            metric=metric,
            metrics=compare.metric_names(views),
            axes=compare.AXES,
            x=x,
            log=log,
            calm=calm,
            averaged=compare.AVERAGED,
            equal=compare.equal_cost(views, metric) if views else [],
            differences=compare.differences(views) if views else [],
        )

    @app.get("/cluster", include_in_schema=False)
    def cluster_page(request: Request) -> HTMLResponse:
        shown = resources.cluster(store, targets)
        return page(request, "cluster.html", **shown, on_node=_on_node(shown["placements"]), known=set(store.names()))

    @app.get("/checkpoints", include_in_schema=False)
    def checkpoints_page(request: Request, run: str = "") -> HTMLResponse:
        rows = checkpoints.checkpoints(store, manifests, run or None)
        return page(request, "checkpoints.html", rows=rows, run=run, names=store.names(), most=_MOST_ROWS)

    @app.get("/datasets", include_in_schema=False)
    def data_sets_page(request: Request) -> HTMLResponse:
        return page(request, "datasets.html", datasets=opened.summaries())

    @app.get("/datasets/{name}", include_in_schema=False)
    def data_set_page(request: Request, name: str, split: str = "", first: int = 0) -> HTMLResponse:
        summary = opened.summary(name)
        split = split or next(iter(summary["splits"]))
        if split not in summary["splits"]:
            raise NotFound(f"The data set '{name}' has no split '{split}'.")
        facts = summary["splits"][split]
        first = min(max(first, 0), max(facts["rows"] - 1, 0))
        examples: list[Row] = []
        error = None
        try:
            examples = opened.examples(name, split, first, data_sets.ON_A_PAGE)
        except ShardyardError as damage:  # what the index says can be shown all the same
            error = str(damage)
        shown = {key: summary[key] for key in ("name", "built_at", "fingerprint", "source", "columns", "splits")}
        return page(
            request,
            "dataset.html",
            **shown,
            split=split,
            facts=facts,
            first=first,
            on_a_page=data_sets.ON_A_PAGE,
            examples=examples,
            error=error,
        )

    @app.get("/sweeps", include_in_schema=False)
    def sweeps_page(request: Request) -> HTMLResponse:
        return page(request, "sweeps.html", sweeps=sweeps.sweeps(store, last))

    @app.get("/sweeps/{name}", include_in_schema=False)
    def sweep_page(request: Request, name: str) -> HTMLResponse:
        found = sweeps.sweep(store, last, name)
        return page(request, "sweep.html", **found, columns=found["keys"], resume=found["command"])


def _on_node(placements: list[Row]) -> dict[str, list[str]]:
    """Live runs by node, under its name and under its address: targets call it by one or the other."""
    found: dict[str, list[str]] = {}
    for row in placements:
        for node in [*row["nodes"], *row["addresses"]] if row["status"] == "running" else []:
            found.setdefault(node, []).append(row["run"])
    return found
