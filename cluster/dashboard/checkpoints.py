"""The checkpoints of all runs: how large, how long they took, how they were written, and whether they are whole.

Their manifests are read as JSON: trainer/checkpoint_files.py, which reads what they list, needs torch. So "whole" is
that the manifest can be read and each file has its size; that every byte is right, a verification says.
"""

from __future__ import annotations

import json
import shlex
import threading
from typing import Any

from fastapi import FastAPI

from cluster.commands.output import run_arguments
from cluster.dashboard.run_view import Row, RunView
from cluster.dashboard.store_view import StoreView
from configs.errors import Damaged, NotFound, ShardyardError
from data_pipelines.storage import FileFacts, Store

_MANIFEST = "manifest.json"


def add(app: FastAPI, store: StoreView, manifests: Manifests) -> None:
    """Add the API behind the page."""

    @app.get("/api/checkpoints", tags=["checkpoints"])
    def api(run: str | None = None) -> list[dict[str, Any]]:
        """The checkpoints of a run, or of all, the newest first."""
        return checkpoints(store, manifests, run)


def checkpoints(store: StoreView, manifests: Manifests, run: str | None) -> list[Row]:
    """{run, step, state, damage, size_bytes, stall_s, write_s, saved_at, verified_at, world_size, zero_stage,
    precision, evaluation, command}, the newest first.

    state: verified, whole, unfinished or damaged; damage: why the latter. command: what goes on from it.
    Raises NotFound: there is no such run.
    """
    found = []
    for name in store.names() if run is None else [run]:
        try:
            found += _of_run(store.run(name), manifests, store.store.uri)
        except NotFound:
            raise
        except ShardyardError:
            continue  # the overview says that it is damaged
    return sorted(found, key=lambda row: (row["saved_at"] or 0.0, row["step"]), reverse=True)


class Manifests:
    """What manifests say, each read once. Safe for threads."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[FileFacts, Row]] = {}
        self._lock = threading.Lock()

    def read(self, folder: Store) -> Row | None:
        """{world_size, zero_stage, precision, evaluation, files: {name: bytes}}; None where there is none.

        Raises Damaged.
        """
        facts = folder.info(_MANIFEST)
        if facts is None:
            return None
        with self._lock:
            known = self._known.get(folder.uri)
        if known is not None and known[0] == facts:
            return known[1]
        try:
            manifest = json.loads(folder.read_bytes(_MANIFEST))
            said = {
                "world_size": int(manifest["world_size"]),
                "zero_stage": int(manifest["zero_stage"]),
                "precision": manifest.get("config", {}).get("precision"),
                "evaluation": dict(manifest.get("evaluation", {})),
                "files": {str(file["name"]): int(file["size"]) for file in manifest["files"]},
            }
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise Damaged(f"{_MANIFEST} is not readable ({type(error).__name__}: {error}).") from error
        with self._lock:
            self._known[folder.uri] = (facts, said)
        return said


def _of_run(view: RunView, manifests: Manifests, uri: str) -> list[Row]:
    folders = view.record.store.child("checkpoints")
    steps = [int(name.removeprefix("step-")) for name in folders.list_dirs() if name.removeprefix("step-").isdigit()]
    saved = {event.get("step"): event for event in view.events() if event["kind"] == "checkpoint"}
    found = []
    for step in steps:
        event, folder = saved.get(step, {}), folders.child(f"step-{step:08d}")
        row = {
            "run": view.name,
            "step": step,
            "saved_at": event.get("time"),
            "stall_s": event.get("stall_s"),
            "write_s": event.get("write_s"),
            "command": _go_on(view, uri, step, newest=step == max(steps)),
        }
        # One that was saved anew at the same step is another one.
        since = [each for each in view.events() if each["time"] > event.get("time", 0.0)]
        found.append(row | _condition(folder, manifests, since, step))
    return found


def _condition(folder: Store, manifests: Manifests, events: list[Row], step: int) -> Row:
    """What it is like, by its manifest, the sizes of its files, and what has happened since it was saved."""
    unknown = dict.fromkeys(("size_bytes", "world_size", "zero_stage", "precision", "verified_at")) | {"evaluation": {}}
    try:
        said = manifests.read(folder)
    except Damaged as error:
        return unknown | {"state": "damaged", "damage": str(error)}
    if said is None:
        text = "It has no manifest: it is being saved, or was cut off."
        return unknown | {"state": "unfinished", "damage": text}
    damage, verified_at = _differing(folder, said["files"]), None
    for event in events:
        kind, is_its = event["kind"], event.get("step") == step
        if is_its and kind == "checkpoint_verified":
            damage += [str(each) for each in event.get("damage") or []]
            verified_at = event["time"]
        elif is_its and kind == "started":  # what goes on from it has read every byte, and compared
            verified_at = event["time"]
        elif kind == "checkpoint_damaged" and f"step-{step:08d} " in str(event.get("error")):
            damage.append(str(event["error"]))
    known = {key: said[key] for key in ("world_size", "zero_stage", "precision", "evaluation")}
    return known | {
        "size_bytes": sum(said["files"].values()),
        "verified_at": verified_at,
        "state": "damaged" if damage else "verified" if verified_at is not None else "whole",
        "damage": " ".join(dict.fromkeys(damage)),
    }


def _go_on(view: RunView, uri: str, step: int, *, newest: bool) -> str:
    """A run goes on from its newest checkpoint; from another one goes a branch of it, a run of its own."""
    if newest:
        return f"shardyard runs resume {run_arguments(view.name, uri)}"
    recipe = view.record.store.path("run.yaml")
    given = [recipe, f"name={view.name}-from-{step}", f"store={uri}", "--from", f"{view.name}@{step}", "--branch"]
    return f"shardyard train {shlex.join(given)}"


def _differing(folder: Store, files: Row) -> list[str]:
    """What has not the size that the manifest says."""
    found = []
    for name, size in files.items():
        facts = folder.info(name) if "/" not in name else None
        if facts is None or facts.size != size:
            found.append(f"{name} {'is missing' if facts is None else f'has not its {size:,} bytes'}.")
    return found
