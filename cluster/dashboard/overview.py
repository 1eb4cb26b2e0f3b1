"""The overview: all runs in a table, what they use of the machines, and what a person should look at."""

from __future__ import annotations

import math
import shutil
import time
from collections import Counter
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Query

from cluster.dashboard.resources import devices
from cluster.dashboard.run_view import Row
from cluster.dashboard.store_view import StoreView

LOW_DISK = 0.05  # of the store's disk
NAMED = 5  # runs with a checkpoint that was never verified
Order = Literal["up", "down"]

# Of the table: what can be sorted by, and what stands above it. The keys are those of RunView.summary.
COLUMNS = {
    "run": "Run",
    "status": "Status",
    "where": "Where",
    "step": "Step",
    "loss": "Loss",
    "tokens_per_s": "Tokens/s",
    "mfu": "MFU",
    "eta_s": "ETA",
    "restarts": "Restarts",
    "started_at": "Age",
}
STATUSES = ("running", "queued", "finished", "stopped", "failed", "lost", "damaged")
# Of a run that cannot be read nothing of this is known.
_UNKNOWN = ("where", "step", "steps", "loss", "tokens_per_s", "mfu", "eta_s", "started_at", "updated_at", "error")


def add(app: FastAPI, store: StoreView) -> None:
    """Add the API behind the page."""

    @app.get("/api/overview", tags=["runs"])
    def api(
        status: str = "", search: str = "", sort: str = "started_at", order: Annotated[Order, Query()] = "down"
    ) -> dict[str, Any]:
        """The runs that were chosen, in the order asked for; counts, devices and what needs attention, of all."""
        return overview(store, status, search, sort, order)


def overview(store: StoreView, status: str, search: str, sort: str, order: str) -> dict[str, Any]:
    """All that the page shows."""
    rows: list[Row] = [dict.fromkeys(_UNKNOWN) | {"restarts": 0} | row for row in store.summaries()]
    live = [row for row in rows if row["status"] == "running"]
    counts = Counter(row["status"] for row in rows)
    return {
        "runs": chosen(rows, status, search, sort, order),
        "total": len(rows),
        "counts": {each: counts[each] for each in STATUSES if counts[each]},
        "devices": devices(store, [row["run"] for row in live]),
        "goodput": _mean_goodput(live),
        "attention": [*_disk(store), *_of_runs(rows), *_unverified(rows)],
    }


def chosen(rows: list[Row], status: str, search: str, sort: str, order: str) -> list[Row]:
    """Rows of a status whose name or place holds all words of `search`, sorted; what is not known comes last."""
    words = search.lower().split()
    found = [
        row
        for row in rows
        if (not status or row["status"] == status)
        and all(word in f"{row['run']} {row['where'] or ''} {row['status']}".lower() for word in words)
    ]
    key = sort if sort in COLUMNS else "started_at"
    known = [row for row in found if _is_known(row[key])]
    known.sort(key=lambda row: row[key], reverse=order == "down")
    return [*known, *(row for row in found if not _is_known(row[key]))]


def _is_known(value: Any) -> bool:
    return value is not None and not (isinstance(value, float) and math.isnan(value))


def _mean_goodput(live: list[Row]) -> float | None:
    """Of the runs at work, each by its workers."""
    known = [(row["goodput"], row["workers"]) for row in live if row["goodput"] is not None]
    return sum(share * workers for share, workers in known) / sum(workers for _, workers in known) if known else None


def _of_runs(rows: list[Row]) -> list[Row]:
    """What needs attention in any run, the newest first: {run, kind, text, time}."""
    found = [{"run": row["run"]} | each for row in rows for each in row["attention"]]
    found += [
        {"run": row["run"], "kind": "damaged", "text": row["error"], "time": None} for row in rows if row["error"]
    ]
    return sorted(found, key=lambda each: each["time"] or 0.0, reverse=True)


def _unverified(rows: list[Row]) -> list[Row]:
    """One line for all runs that have ended with a checkpoint that nobody has verified: it is no alarm of each."""
    names = [row["run"] for row in rows if row.get("unverified") is not None]
    if not names:
        return []
    named = ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED:,} more" if len(names) > NAMED else "")
    what = "a run that has ended" if len(names) == 1 else f"{len(names):,} runs that have ended"
    text = f"the newest checkpoint of {what} was never verified ({named}); the page Checkpoints does it"
    return [{"run": None, "kind": "unverified", "text": text, "time": None}]


def _disk(store: StoreView) -> list[Row]:
    """Whether the store's disk is nearly full."""
    path = store.store.local_path()
    try:
        usage = None if path is None else shutil.disk_usage(path)
    except OSError:  # there is no store yet
        usage = None
    if usage is None or usage.free >= LOW_DISK * usage.total:
        return []
    text = f"{usage.free / 1e9:.1f} GB of {usage.total / 1e9:.0f} GB are free on the store's disk"
    return [{"run": None, "kind": "disk", "text": text, "time": time.time()}]
