"""What of a run a person should look at: {kind, text, time}, of each kind the newest."""

from __future__ import annotations

import math
import statistics
import time
from typing import Any

from cluster.commands.output import age
from configs.schema import RunConfig
from data_pipelines.storage import Store

Row = dict[str, Any]

# A run counts as stalled when its newest row is older than this many of its own intervals, but not before a minute.
STALLED_INTERVALS, STALLED_S = 10.0, 60.0
# A loss counts as a spike above this many medians of those before it, as far as they stand in the record's last bytes.
SPIKE, SPIKE_FEWEST, SPIKE_SHOWN = 3.0, 16, 16
RECENT_S = 3600.0  # what a running run has recovered from is shown for so long


def attention(config: RunConfig, events: list[Row], status: str, latest: Row, stragglers: list[Row]) -> list[Row]:
    """By a run's config, its events in order, its status, its newest row, and who is slow (see RunView)."""
    found: list[Row] = []
    recently = time.time() - RECENT_S
    if status == "running":
        found += _of_nodes(config, events)
        if latest:
            found += _of_steps(config, events, latest)
            found += [{"kind": "straggler", "time": latest["time"]} | each for each in stragglers[:1]]
    if status == "lost" and events:
        found.append({"kind": "lost", "text": "its launcher is gone without a word", "time": events[-1]["time"]})
    attempt = max((event["attempt"] for event in events), default=0)
    for event in events:
        kind, when = event["kind"], event["time"]
        if kind == "failed" and status == "failed":
            found.append({"kind": "failed", "text": _failure(event), "time": when})
        elif kind == "failed" and status == "running" and when > recently:
            found.append({"kind": "restarted", "text": _failure(event), "time": when})
        elif kind == "checkpoint_verified" and event.get("damage"):
            text = f"the checkpoint of step {_told(event.get('step'))} is damaged"
            found.append({"kind": "checkpoint", "text": text, "time": when})
        if event["attempt"] != attempt or status in {"finished", "stopped"}:
            continue
        if kind == "diverged" and status == "running" and when > recently:
            found.append({"kind": "diverged", "text": _divergence(event), "time": when})
        elif kind in {"checkpoint_damaged", "checkpoint_failed"}:
            found.append({"kind": "checkpoint", "text": str(event.get("error", "")), "time": when})
        elif kind == "data_skipped":
            found.append({"kind": "data", "text": "damaged blocks of its data are left out", "time": when})
    return list({each["kind"]: each for each in found}.values())


def unverified(store: Store, events: list[Row], status: str) -> int | None:
    """The step of the newest checkpoint of a run that has ended, where nothing says that its bytes were ever read.

    None for a run that goes on: it saves the next one soon, and reads every byte of what it begins from.
    """
    saved = [event for event in events if event["kind"] == "checkpoint"]
    if status not in {"finished", "stopped"} or not saved:
        return None
    step, when = saved[-1].get("step"), saved[-1]["time"]
    later = [event["kind"] for event in events if event["time"] > when and event.get("step") == step]
    if not isinstance(step, int) or {"checkpoint_verified", "started"} & set(later):
        return None
    return step if store.exists(f"checkpoints/step-{step:08d}/manifest.json") else None  # it may have been deleted


def _of_steps(config: RunConfig, events: list[Row], latest: Row) -> list[Row]:
    """What the newest steps of a running run show."""
    found: list[Row] = []
    values = latest["values"]
    silent = time.time() - max(latest["time"], events[-1]["time"])
    if silent > max(STALLED_S, STALLED_INTERVALS * (config.tracking.every or 1) * values.get("step_s", 0.0)):
        found.append({"kind": "stalled", "text": f"nothing new for {age(silent)}", "time": latest["time"]})
    if not math.isfinite(values["loss"]):
        text = f"the loss is {values['loss']} after step {latest['step']:,}"
        found.append({"kind": "nan", "text": text, "time": latest["time"]})
    usual = [row["values"]["loss"] for row in latest["before"] if math.isfinite(row["values"]["loss"])]
    median = statistics.median(usual) if len(usual) >= SPIKE_FEWEST else 0.0
    newest = [*latest["before"][-SPIKE_SHOWN:], latest]
    spikes = [row for row in newest if median > 0 and row["values"]["loss"] > SPIKE * median]
    if spikes:
        worst = max(spikes, key=lambda row: float(row["values"]["loss"]))
        text = f"loss {worst['values']['loss']:.4g} after step {worst['step']:,}, where {median:.4g} is usual"
        found.append({"kind": "spike", "text": text, "time": worst["time"]})
    return found


def _of_nodes(config: RunConfig, events: list[Row]) -> list[Row]:
    """Whether it goes on with fewer workers than were asked for."""
    resized = [event for event in events if event["kind"] == "resized" and isinstance(event.get("workers"), int)]
    if not resized or resized[-1]["workers"] >= config.resources.workers:
        return []
    text = f"it goes on with {resized[-1]['workers']} of {config.resources.workers} workers: a node is gone"
    return [{"kind": "node", "text": text, "time": resized[-1]["time"]}]


def _failure(event: Row) -> str:
    return str(event.get("summary") or event.get("error") or "failed")


def _divergence(event: Row) -> str:
    """What trainer/session.py records of a step that diverged."""
    limit = event.get("limit")
    above = "" if limit is None else f", above its limit of {_told(limit)}"
    where = f"{event.get('what', 'loss')} {_told(event.get('value'))} at step {_told(event.get('step'))}"
    return f"{where}{above}; recovery.divergence is {event.get('policy')}"


def _told(value: Any) -> str:
    return f"{value:,.6g}" if isinstance(value, int | float) else str(value)
