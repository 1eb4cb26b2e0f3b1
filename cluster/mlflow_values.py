"""What MLflow is told of a run: parameters, tags and metrics, in the names and lengths that it takes."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from typing import Any

from configs.schema import flatten
from data_pipelines.storage import Store
from trainer.record import RunRecord
from trainer.redact import Redactor
from trainer.run_folder import SWEEPS

POSITION_FILE = "mlflow.json"  # in the folder of a run, or of a sweep
MAX_PARAM_CHARACTERS = 500  # servers before 2.10 refuse longer ones
MAX_TAG_CHARACTERS = 5000
_MAX_NAME_CHARACTERS = 250


def run_params(record: RunRecord) -> list[tuple[str, str]]:
    """The config as MLflow's flat parameters: (name, text), secrets redacted, long texts cut (run.yaml goes whole).

    Not the store: a run's folder may be moved, and MLflow lets no parameter change.
    """
    values = Redactor(os.environ).value(record.config.model_dump(mode="json", exclude={"store"}))
    return [(metric_name(key), cut(str(value), MAX_PARAM_CHARACTERS)) for key, value in flatten(values).items()]


def run_tags(record: RunRecord) -> dict[str, str]:
    """Where the run is, where it came from, and how often it was started."""
    lineage = record.lineage()
    git = lineage.get("git", {})
    events = record.events()
    fingerprints = [event["data_fingerprint"] for event in events if event.get("data_fingerprint")]
    tags = {
        "shardyard.folder": record.store.uri,
        "shardyard.status": record.status(),
        "shardyard.attempts": str(max((event["attempt"] for event in events), default=0)),
        "shardyard.data_fingerprint": lineage.get("data_fingerprint") or (fingerprints[-1] if fingerprints else None),
        "shardyard.parent": record.config.parent.checkpoint if record.config.parent else None,
        "mlflow.parentRunId": _sweep_run_id(record, lineage.get("sweep")),
        "mlflow.user": lineage.get("user"),
        "mlflow.source.type": "LOCAL",
        "mlflow.source.name": " ".join(lineage.get("command", [])),
        "mlflow.source.git.commit": git.get("commit"),
        "mlflow.source.git.branch": git.get("branch"),
        "mlflow.source.git.repoURL": git.get("remote"),
        "shardyard.git_dirty": str(bool(git["diff"])).lower() if git.get("diff") is not None else None,
    }
    redactor = Redactor(os.environ)
    return {key: cut(redactor.text(value), MAX_TAG_CHARACTERS) for key, value in tags.items() if value}


def _sweep_run_id(record: RunRecord, sweep: str | None) -> str | None:
    """MLflow's id of the sweep that the run is a trial of, under which MLflow shows it; None before it is known."""
    if sweep is None:
        return None
    folder = Store(record.config.store).child(SWEEPS, sweep)
    if not folder.exists(POSITION_FILE):
        return None
    run_id: str | None = json.loads(folder.read_text(POSITION_FILE))["run_id"]
    return run_id


def metrics_at(table: Sequence[dict[str, Any]], step: int) -> dict[str, tuple[float, int, float]]:
    """The metrics of the weights after `step` steps: name -> (value, its step, its time); the latest one up to `step`.

    Of a repeated step the first value counts, as in the run's curve in MLflow.
    """
    found: dict[str, tuple[float, int, float]] = {}
    for row in table:
        if row["step"] > step:
            continue
        for key, value in row.items():
            if key not in ("attempt", "step", "time") and (key not in found or row["step"] > found[key][1]):
                found[key] = (value, row["step"], row["time"])
    return found


def metric_name(key: str) -> str:
    """A name that MLflow takes: other characters become "_", an overlong one ends in a digest."""
    name = re.sub(r"[^\w\-. /]", "_", key)
    if len(name) > _MAX_NAME_CHARACTERS:
        digest = hashlib.sha256(key.encode()).hexdigest()[:16]
        name = f"{name[: _MAX_NAME_CHARACTERS - 17]}-{digest}"
    return name


def cut(text: str, limit: int) -> str:
    """At most `limit` characters of a text; "..." shows where it goes on."""
    return text if len(text) <= limit else text[: limit - 3] + "..."
