"""Which rank holds the others up, by the newest rows that each has written of its own times (`ranks/`).

In a step all ranks wait for the slowest one. So their steps take equally long, and what tells them apart is what is
left of a step without the waits for others.
"""

from __future__ import annotations

import json
import statistics
from typing import Any

from data_pipelines.storage import Store
from trainer.record_rows import decode_value

SLOWER = 1.5  # times the others' median
_TAIL_BYTES = 8 << 10
_FEWEST_ROWS = 5
_MOST_RANKS = 64  # a tail of each is read at every look


def straggler(run: Store, attempt: int) -> dict[str, Any] | None:
    """{rank, own_s, others_s, time}: seconds a step without waits; None where no rank stands out."""
    if not run.is_local:
        return None  # each tail would be a request, at every look
    newest = {name.rpartition("-")[0]: name for name in run.list("ranks") if name.startswith(f"{attempt:04d}-rank-")}
    if not 2 <= len(newest) <= _MOST_RANKS:
        return None
    found = [rank for name in newest.values() if (rank := _own_time(run, f"ranks/{name}")) is not None]
    if len(found) < len(newest):
        return None
    slowest = max(found, key=lambda rank: float(rank["own_s"]))
    others_s = statistics.median(rank["own_s"] for rank in found if rank is not slowest)
    return slowest | {"others_s": others_s} if slowest["own_s"] > SLOWER * others_s > 0 else None


def _own_time(run: Store, path: str) -> dict[str, Any] | None:
    """Of one rank, the median over its newest rows."""
    with run.open_input(path) as file:
        file.seek(max(0, file.seek(0, 2) - _TAIL_BYTES))
        lines = file.read().splitlines()
    times, newest = [], {}
    for line in lines:
        try:
            row = json.loads(line)
            values = row["values"]
            times.append(decode_value(values["step_s"]) - decode_value(values["collective_s"]))
            newest = {"rank": int(row["rank"]), "time": float(row["time"])}
        except (ValueError, KeyError, TypeError):  # cut, or the row of where it runs
            continue
    return newest | {"own_s": statistics.median(times)} if len(times) >= _FEWEST_ROWS else None
