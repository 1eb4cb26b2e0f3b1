"""What the dashboard does to runs: stop, resume, verify and export; what the commands of the same names do.

All but the request to stop is done by such a command, in a process of its own: it may need torch, Ray or a target's
libraries, of which this server imports none, and a run that is resumed must live on when the server ends.
"""

from __future__ import annotations

import contextlib
import json
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from fastapi import FastAPI

from cluster.dashboard.json_response import Json
from cluster.dashboard.run_view import RunView
from cluster.dashboard.store_view import StoreView
from configs.errors import Damaged, NotFound, ShardyardError, TimedOut, Unreachable, UsageError
from configs.load import dump
from data_pipelines.storage import Store

JOBS = "jobs"  # folder of a store, for what processes print that were started for it
BEGIN_S = 2.0  # in which a run that is resumed is seen to fail at once
_STATUS = {UsageError: 409, Damaged: 409, Unreachable: 503, NotFound: 404, TimedOut: 504}
_COMMAND = [sys.executable, "-P", "-m", "cluster.cli"]  # -P: a folder of ours may be the name of one of theirs


def add(app: FastAPI, store: StoreView) -> Actions:
    """Add them to the API. Each answers {message}, or {error} with a status that says whose fault it is."""
    actions = Actions(store)

    @app.post("/api/runs/{name}/stop", tags=["actions"])
    def stop(name: str) -> Json:
        """Ask a run to save and stop; a job that waits at a target is taken back."""
        return _answer(lambda: actions.stop(name))

    @app.post("/api/runs/{name}/resume", tags=["actions"])
    def resume(name: str) -> Json:
        """Go on with a run: where it was submitted to, or else on this machine."""
        return _answer(lambda: actions.resume(name))

    @app.post("/api/runs/{name}/checkpoints/{step}/verify", tags=["actions"])
    def verify(name: str, step: int) -> Json:
        """Read every byte of a checkpoint; the run's events keep what was found."""
        return _answer(lambda: actions.verify(name, step))

    @app.post("/api/runs/{name}/checkpoints/{step}/export", tags=["actions"])
    def export(name: str, step: int) -> Json:
        """Write a checkpoint's weights as a Hugging Face folder, beside the checkpoints."""
        return _answer(lambda: actions.export(name, step))

    return actions


class Actions:
    """On the runs of a store. Methods return what was done, in words; safe for threads."""

    def __init__(self, store: StoreView) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._busy: set[str] = set()
        self._children: set[subprocess.Popen[str]] = set()  # that end with the server
        self._resumed: dict[str, subprocess.Popen[bytes]] = {}  # that do not

    def end(self) -> None:
        """End what was asked for and has not come to an end; runs that were resumed go on."""
        with self._lock:
            for child in self._children:
                child.terminate()

    def stop(self, name: str) -> str:
        """Ask a run to save and stop. Raises UsageError for one that neither runs nor waits."""
        view = self._store.run(name)
        if view.record.holder() is not None:
            view.record.request_stop("asked in the dashboard")
            return f"Asked '{name}' to save and stop."
        status = view.status()
        if status == "queued" and _target_of(view) is not None:
            with self._alone(f"stop {name}"):
                self.ask("runs", "stop", name)
            return f"Took back the job in which '{name}' waited."
        raise UsageError(f"'{name}' is not running, so it cannot be stopped: its status is {status}.")

    def resume(self, name: str) -> str:
        """Go on with a run. Raises UsageError for one that runs, waits or has finished."""
        view = self._store.run(name)
        with self._alone(f"resume {name}"):
            holder = view.record.holder()
            if holder is not None:
                raise UsageError(f"'{name}' runs already, on {holder.holder.host}.")
            if view.status() == "finished":
                raise UsageError(f"'{name}' has finished: there is nothing left to train.")
            target = _target_of(view)
            return self._resume_here(view) if target is None else self._submit_again(view, target)

    def verify(self, name: str, step: int) -> str:
        """Raises Damaged with what is, NotFound."""
        self._store.run(name)  # it is there
        with self._alone(f"verify {name}@{step}"):
            self.ask("ckpt", "verify", f"{name}@{step}")
        return f"The checkpoint of step {step:,} is good: every byte is as it was written."

    def export(self, name: str, step: int) -> str:
        """Raises UsageError where it has been exported, or where the store is remote."""
        view = self._store.run(name)
        folder = view.record.store.local_path(f"exports/step-{step:08d}")
        if folder is None:
            raise UsageError(
                f"An export is a folder of this machine, and the store is not: shardyard export {name}@{step} FOLDER "
                f"--store {self._store.store.uri}"
            )
        with self._alone(f"export {name}@{step}"):
            folder.parent.mkdir(exist_ok=True)
            self.ask("export", f"{name}@{step}", str(folder))
        return f"Wrote {folder}."

    # --- processes

    @contextlib.contextmanager
    def _alone(self, what: str) -> Any:
        """Refuse what is being done already."""
        with self._lock:
            if what in self._busy:
                raise UsageError(f"That is being done already ({what}).")
            self._busy.add(what)
        try:
            yield
        finally:
            with self._lock:
                self._busy.discard(what)

    def ask(self, *arguments: str, folder: Path | None = None, limit_s: float | None = None) -> Any:
        """What a command answers, that is run in a folder. Raises the error that it ended with, or TimedOut."""
        given = [*_COMMAND, *arguments, "--json"]
        if "--store" not in arguments and "train" not in arguments:
            given += ["--store", self._store.store.uri]
        with self._lock:
            child = subprocess.Popen(
                given,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                cwd=folder,
            )
            self._children.add(child)
        try:
            out, narration = child.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired as error:
            child.kill()
            child.communicate()
            raise TimedOut(f"`shardyard {shlex.join(arguments)}` took longer than {limit_s:.0f} s.") from error
        finally:
            with self._lock:
                self._children.discard(child)
        try:
            answer = json.loads(out)
        except ValueError as error:
            raise ShardyardError(narration.strip() or f"It ended with exit code {child.returncode}.") from error
        if child.returncode:
            kinds = {kind.__name__: kind for kind in _STATUS}
            told = narration.strip() if answer["kind"] == "Damaged" else answer["error"]
            raise kinds.get(answer["kind"], ShardyardError)(told)
        return answer

    def _resume_here(self, view: RunView) -> str:
        before = self._resumed.get(view.name)
        if before is not None and before.poll() is None:
            raise UsageError(f"'{view.name}' is being started already, as process {before.pid}.")
        output = _output_file(self._store.store, self._store.cache, view.name)
        with output.open("wb") as file:
            process = subprocess.Popen(
                [*_COMMAND, "runs", "resume", view.name, "--store", self._store.store.uri],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                cwd=launch_folder(view),
                start_new_session=True,  # Ctrl-C is for the server
            )
        self._resumed[view.name] = process
        with contextlib.suppress(subprocess.TimeoutExpired):
            if process.wait(BEGIN_S):
                lines = output.read_text(errors="replace").strip().splitlines()
                raise ShardyardError("\n".join(lines[-5:]) or f"It ended with exit code {process.returncode}.")
        return f"Started '{view.name}' on this machine as process {process.pid}; what it prints is in {output}."

    def _submit_again(self, view: RunView, target: str) -> str:
        with tempfile.TemporaryDirectory() as folder:
            recipe = Path(folder, "run.yaml")
            recipe.write_text(dump(view.record.resolved))
            where = [f"name={view.name}", f"store={self._store.store.uri}"]
            sent = self.ask("train", str(recipe), *where, "--on", target, "--detach")
        return f"Sent '{view.name}' to {target} again, as job {sent['job']}."


def _answer(act: Any) -> Json:
    try:
        return Json({"message": act()})
    except ShardyardError as error:
        return Json(
            {"error": str(error)}, next((code for kind, code in _STATUS.items() if isinstance(error, kind)), 500)
        )


def _target_of(view: RunView) -> str | None:
    """Where the run was sent to last; None where it never was."""
    sent = [event["target"] for event in view.events() if event["kind"] == "submitted"]
    return sent[-1] if sent else None


def _output_file(store: Store, cache: Path, name: str) -> Path:
    folder = store.local_path(JOBS) or cache / JOBS
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{name}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}.log"


def launch_folder(view: RunView) -> Path | None:
    """Where it was launched first: a recipe's own files and its relative paths are looked for there."""
    try:
        folder = Path(view.record.lineage()["folder"])
    except (ShardyardError, ValueError, KeyError, TypeError):
        return None
    return folder if folder.is_dir() else None
