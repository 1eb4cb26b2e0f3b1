"""The examples of a step, for the page of a run: by `shardyard replay --data-only`, since to know a run's order takes
torch, which this server does not import.
"""

from __future__ import annotations

import threading
from typing import Annotated, Any
from urllib.parse import urlencode

from fastapi import FastAPI, Query

from cluster.dashboard.actions import Actions, launch_folder
from cluster.dashboard.run_view import Row, RunView
from cluster.dashboard.store_view import StoreView
from configs.errors import NotFound, TimedOut

MOST = 128  # examples of an answer
LIMIT_S = 60.0
AT_ONCE = 2  # processes, of some hundred MB each


def add(app: FastAPI, store: StoreView, actions: Actions) -> None:
    """Add the API behind the page."""
    free = threading.BoundedSemaphore(AT_ONCE)

    @app.get("/api/runs/{name}/steps/{step}/examples", tags=["runs"])
    def examples(name: str, step: int, limit: Annotated[int, Query(ge=1, le=MOST)] = 32) -> dict[str, Any]:
        """The first examples of a step's global batch, in its order, as the data sets have them; `total`: of all.

        rows: their numbers in the training split of `dataset`. A picture is the address of one. Takes seconds.
        """
        view = store.run(name)
        _check_step(view, step)
        if not free.acquire(timeout=LIMIT_S):
            raise TimedOut(f"{AT_ONCE} other steps are being looked at, which takes long. Ask again later.")
        try:
            asked = ("replay", name, "--step", str(step), "--data-only", "--top", str(limit))
            found: Row = actions.ask(*asked, folder=launch_folder(view), limit_s=LIMIT_S)
        finally:
            free.release()
        for example in found["examples"]:
            for column, value in example["values"].items():
                if isinstance(value, dict) and "picture" in value:  # coloured letters, for a terminal
                    value["picture"] = _address(example, column)
        return found


def _check_step(view: RunView, step: int) -> None:
    """Raises NotFound for one that the run has not come to, as far as it is recorded; one that diverged counts."""
    diverged = [event["step"] for event in view.events() if event["kind"] == "diverged"]
    newest = max([view.latest().get("step", 0), *diverged])
    if not 1 <= step <= newest:
        there = f"has recorded the steps up to {newest:,}" if newest else "has recorded no step yet"
        raise NotFound(f"Run '{view.name}' {there}; they are counted from 1. This is {step:,}.")


def _address(example: Row, column: str) -> str:
    query = urlencode({"split": "train", "number": example["rows"][0], "column": column})
    return f"/api/datasets/{example['dataset']}/picture?{query}"
