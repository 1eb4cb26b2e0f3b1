"""Two to eight runs beside each other: their curves, where their configs differ, and their loss at equal cost."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import FastAPI, Query

from cluster.dashboard.curves import Curve, reduced
from cluster.dashboard.run_view import Row, RunView
from cluster.dashboard.store_view import StoreView
from configs.errors import UsageError
from configs.schema import flatten

Axis = Literal["step", "tokens", "time", "compute"]
# Time counts from each run's start.
AXES = {"step": "Step", "tokens": "Tokens", "time": "Time", "compute": "Compute"}
UNITS = {"step": "", "tokens": "tokens", "time": "s", "compute": "FLOPs"}
FEWEST, MOST = 2, 8
AVERAGED = 20  # values, of which the table of equal cost shows the mean
_SHARES = (0.1, 0.25, 0.5, 0.75, 1.0)
_OWN = {"name", "store"}  # keys in which runs differ anyway
_ABSENT = "(absent)"


def add(app: FastAPI, store: StoreView) -> None:
    """Add the API behind the page."""

    @app.get("/api/compare", tags=["compare"])
    def api(
        runs: str,
        metric: str = "loss",
        x: Axis = "step",
        buckets: Annotated[int, Query(ge=1, le=5000)] = 600,
    ) -> dict[str, Any]:
        """A metric of runs (their names, with commas between) over an axis; time counts from each run's start.

        Of each bucket the last place, and the mean, smallest and largest value.
        """
        views = chosen(store, runs)
        return {
            "metric": metric,
            "x": x,
            "unit": UNITS[x],
            "runs": [{"run": view.name} | _drawn(view, metric, x, buckets) for view in views],
        }

    @app.get("/api/compare/table", tags=["compare"])
    def table(runs: str, metric: str = "loss") -> dict[str, Any]:
        """Where their configs differ, and the metric at equal steps, tokens, time and compute."""
        views = chosen(store, runs)
        return {"differences": differences(views), "equal": equal_cost(views, metric)}


def chosen(store: StoreView, names: str) -> list[RunView]:
    """The runs that a request names. Raises UsageError for too few or too many, NotFound."""
    wanted = list(dict.fromkeys(name for name in names.split(",") if name))
    if not FEWEST <= len(wanted) <= MOST:
        raise UsageError(f"Between {FEWEST} and {MOST} runs can be compared; these are {len(wanted)}.")
    return [store.run(name) for name in wanted]


def differences(views: list[RunView]) -> list[Row]:
    """The keys of their configs that are not the same in all: {key, values}."""
    flat = [flatten(view.record.config.model_dump(mode="json")) for view in views]
    keys = sorted({key for config in flat for key in config} - _OWN)
    found = [{"key": key, "values": [_shown(config.get(key, _ABSENT)) for config in flat]} for key in keys]
    return [row for row in found if len(set(row["values"])) > 1]


def metric_names(views: list[RunView]) -> list[str]:
    """Of all of them, in the order of their first appearance."""
    return list(dict.fromkeys(name for view in views for name in view.metric_names()))


def equal_cost(views: list[RunView], metric: str) -> list[Row]:
    """The metric at the same places of an axis: {axis, name, unit, rows: [{at, values, least}]}.

    An axis that one of them lacks is left out. Values are means over the last `AVERAGED` up to there, None before the
    first.
    """
    known = [curves(view, metric, AXES) for view in views]
    found = []
    for axis in AXES:
        smooth = [each[axis].smoothed(AVERAGED) for each in known if axis in each and len(each[axis].x)]
        if len(smooth) < len(views):
            continue
        end = min(float(each.x[-1]) for each in smooth)
        places = [share * end for share in _SHARES]
        if axis in {"step", "tokens"}:  # where whole numbers alone make sense
            places = [float(round(place)) for place in places]
        rows = [_row(place, smooth) for place in places]
        found.append({"axis": axis, "name": AXES[axis], "unit": UNITS[axis], "rows": rows})
    return found


def curves(view: RunView, metric: str, axes: Iterable[str]) -> dict[str, Curve]:
    """What survives of a metric, over each of the axes that is known for this run."""
    over_steps = view.curve(metric)
    tokens = view.tokens_per_step()
    a_step = {"step": 1.0, "tokens": tokens, "compute": flops_per_step(view)}
    found = {}
    for axis in axes:
        if axis == "time":
            over_time = view.curve(metric, "time")
            found[axis] = replace(over_time, x=over_time.x - over_time.x[:1])
        elif (factor := a_step[axis]) is not None:
            found[axis] = replace(over_steps, x=over_steps.x * factor)
    return found


def flops_per_step(view: RunView) -> float | None:
    """By the usual rule, 6 for each parameter and token; None where the parameters or the tokens are not known."""
    parameters = [
        event["parameters"] for event in view.events() if event["kind"] == "started" and "parameters" in event
    ]
    tokens = view.tokens_per_step()
    return 6.0 * parameters[-1] * tokens if parameters and tokens is not None else None


def _drawn(view: RunView, metric: str, axis: Axis, buckets: int) -> Row:
    found = curves(view, metric, [axis]).get(axis)
    if found is None:
        return {"x": [], "y": [], "low": [], "high": [], "missing": f"{AXES[axis]} is not known for this run."}
    small = reduced(found, buckets)
    return {
        "x": small.x.tolist(),
        "y": small.mean.tolist(),
        "low": small.smallest.tolist(),
        "high": small.largest.tolist(),
        "missing": None,
    }


def _row(place: float, curves: list[Curve]) -> Row:
    values = [_at(each, place) for each in curves]
    return {"at": place, "values": values, "least": min((each for each in values if each is not None), default=None)}


def _at(found: Curve, place: float) -> float | None:
    number = int(np.searchsorted(found.x, place * (1 + 1e-12), "right")) - 1
    return float(found.values[number]) if number >= 0 and np.isfinite(found.values[number]) else None


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
