"""Who runs where: the devices of this machine and of live runs, the targets' nodes, and their queues.

What a target says is asked for by a process of its own (ask_target.py): some need libraries that take hundreds of
megabytes, and one that hangs must not hang a page. Its answer is kept for some seconds.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import FastAPI

from cluster.dashboard.run_view import Row, RunView
from cluster.dashboard.store_view import StoreView
from configs.errors import ShardyardError
from configs.targets import TYPES, LocalTarget, Target, load_targets, target_file
from trainer.record import attempt_folder

PATIENCE_S = 2.5  # of a page, for all targets together
KEPT_S = 8.0  # an answer, before the target is asked again
_LONGEST_S = 30.0  # of a question, which goes on after the page is shown
_GPUS = Path("/proc/driver/nvidia/gpus")


def add(app: FastAPI, store: StoreView, targets: Targets) -> None:
    """Add the API behind the page."""

    @app.get("/api/cluster", tags=["cluster"])
    def api() -> dict[str, Any]:
        """Nodes and queues of all targets, this machine, and where each run of the store is or was."""
        return cluster(store, targets)


def cluster(store: StoreView, targets: Targets) -> dict[str, Any]:
    """All that the page shows."""
    return {"machine": machine(), "targets": targets.answers(), "placements": placements(store)}


# --- of the store


def machine() -> Row:
    """This machine: {node, cpus, gpus, memory_bytes, free_bytes, load}. load: of its CPUs, over the last minute."""
    import psutil

    memory = psutil.virtual_memory()
    return {
        "node": socket.gethostname(),
        "cpus": os.cpu_count() or 1,
        "gpus": _num_gpus(),
        "memory_bytes": memory.total,
        "free_bytes": memory.available,
        "load": os.getloadavg()[0],
    }


def workers(view: RunView) -> list[Row]:
    """Where the workers of its latest attempt are or were: {rank, node, address, gpus}; [] where nothing says."""
    newest = {event["kind"]: event for event in view.events()}
    placed = newest.get("placed", {}).get("workers")
    if isinstance(placed, list):
        return [
            {
                "rank": rank,
                "node": str(each.get("node", "?")),
                "address": each.get("address"),
                "gpus": [str(gpu) for gpu in each.get("gpus", [])],
            }
            for rank, each in enumerate(placed)
            if isinstance(each, dict)
        ]
    if "started" not in newest:
        return []
    # Started without a cluster, as by torchrun: rank 0's note of its attempt says where that is.
    node = _host_of(view, newest["started"]["attempt"])
    ranks = range(int(newest["started"].get("world_size") or 1))
    return [{"rank": rank, "node": node, "address": None, "gpus": []} for rank in ranks]


def _host_of(view: RunView, attempt: int) -> str:
    try:
        return str(json.loads(view.record.store.read_text(f"{attempt_folder(attempt)}/attempt.json"))["host"])
    except (ShardyardError, OSError, ValueError, KeyError, TypeError):
        return "?"


def devices(store: StoreView, live: list[str]) -> Row:
    """Devices in use by live runs, of all that are known of: {kind: GPU or CPU, used, total}.

    Known are those of this machine, and those that live runs have elsewhere.
    """
    here, gpus = socket.gethostname(), _num_gpus()
    used_gpus: set[tuple[str, str]] = set()
    cpus_here = cpus_elsewhere = 0
    for name in live:
        view = store.run(name)
        resources = view.record.config.resources
        for worker in workers(view):
            used_gpus |= {(worker["node"], gpu) for gpu in worker["gpus"]}
            if not resources.gpus_per_worker:
                cpus_here += resources.threads * (worker["node"] == here)
                cpus_elsewhere += resources.threads * (worker["node"] != here)
    if gpus or used_gpus:
        total = gpus + sum(node != here for node, _ in used_gpus)
        return {"kind": "GPU", "used": len(used_gpus), "total": max(total, len(used_gpus))}
    return {"kind": "CPU", "used": cpus_here + cpus_elsewhere, "total": (os.cpu_count() or 1) + cpus_elsewhere}


def placements(store: StoreView) -> list[Row]:
    """Where each run is, or was last, the live ones first.

    {run, status, target, nodes: {name: workers}, addresses (of the nodes), gpus, since}
    """
    found = []
    for name in store.names():
        try:
            view = store.run(name)
            events, status, placed = view.events(), view.status(), workers(view)
        except ShardyardError:
            continue  # the overview says that it is damaged
        nodes: dict[str, int] = {}
        for worker in placed:
            nodes[worker["node"]] = nodes.get(worker["node"], 0) + 1
        submitted = [str(event.get("target")) for event in events if event["kind"] == "submitted"]
        found.append(
            {
                "run": name,
                "status": status,
                "target": submitted[-1] if submitted else None,
                "nodes": nodes,
                "addresses": sorted({worker["address"] for worker in placed if worker["address"]}),
                "gpus": sum(len(worker["gpus"]) for worker in placed),
                "since": events[-1]["time"] if events else None,
            }
        )
    return sorted(found, key=lambda row: (row["status"] == "running", row["since"] or 0.0), reverse=True)


def _num_gpus() -> int:
    return len(list(_GPUS.iterdir())) if _GPUS.is_dir() else 0


# --- of the targets


@dataclass
class _Asked:
    """What a target was asked, and has answered last."""

    question: Future[Row]
    at: float
    answer: Row | None = None


class Targets:
    """What the targets of targets.yaml say, never more than `PATIENCE_S` late. Safe for threads."""

    def __init__(self) -> None:
        self._asked: dict[str, _Asked] = {}
        self._lock = threading.Lock()

    def answers(self) -> list[Row]:
        """Each target: {target, type, answered_at, jobs, nodes, error}; None is what it has not answered."""
        try:
            file = target_file()
            found = {} if file is None else load_targets(file)
        except ShardyardError as error:
            return [{"target": "targets.yaml", "type": None} | _nothing(str(error))]
        remote = {name: settings for name, settings in found.items() if not isinstance(settings, LocalTarget)}
        with self._lock:
            asked = {name: self._ask(name) for name in remote}
        wait([each.question for each in asked.values()], PATIENCE_S)
        return [
            {"target": name, "type": _type_of(settings), **_answer_of(asked[name])} for name, settings in remote.items()
        ]

    def _ask(self, name: str) -> _Asked:
        """Ask anew where the last answer is too old."""
        known = self._asked.get(name)
        if known is not None and (not known.question.done() or time.monotonic() - known.at < KEPT_S):
            return known
        before = None if known is None else known.question.result()
        asked = self._asked[name] = _Asked(Future(), time.monotonic(), before)
        # Not of a pool: the server's end would wait for its threads.
        threading.Thread(target=lambda: asked.question.set_result(_question(name)), daemon=True).start()
        return asked


def _answer_of(asked: _Asked) -> Row:
    if asked.question.done():
        return asked.question.result()
    return asked.answer or _nothing("It has not answered yet.")


def _question(name: str) -> Row:
    """What ask_target.py says; never raises."""
    try:
        asked = subprocess.run(
            [sys.executable, "-P", "-m", "cluster.dashboard.ask_target", name],
            capture_output=True,
            timeout=_LONGEST_S,
            check=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},  # the same code as here
        )
        answer = json.loads(asked.stdout)
        return _nothing(None) | {"answered_at": None if "error" in answer else time.time()} | answer
    except subprocess.TimeoutExpired:
        return _nothing(f"It has not answered within {_LONGEST_S:.0f} s.")
    except subprocess.CalledProcessError as error:
        lines = error.stderr.decode(errors="replace").strip().splitlines()
        return _nothing(lines[-1] if lines else f"Asking it ended with exit code {error.returncode}.")
    except (OSError, ValueError) as error:
        return _nothing(str(error))


def _nothing(error: str | None) -> Row:
    return {"answered_at": None, "jobs": None, "nodes": None, "error": error}


def _type_of(settings: Target) -> str:
    return next(name for name, schema in TYPES.items() if type(settings) is schema)
