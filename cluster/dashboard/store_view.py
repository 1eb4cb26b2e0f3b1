"""The runs of a store, each followed from when it is first asked for."""

from __future__ import annotations

import threading
import time
from pathlib import Path

from cluster.dashboard.run_view import Row, RunView
from configs.errors import NotFound, ShardyardError
from data_pipelines.storage import FileFacts, Store
from trainer.record import RunRecord

MOST_AWAKE, AWAKE_S, REST_EVERY_S = 4, 60.0, 2.0  # runs whose newest rows stay in memory: up to 5 MB each
_LONGEST_NAME = 255  # bytes, of a file


class StoreView:
    """All runs of a store. `cache` is a folder for what is computed of them, and may be deleted at any time."""

    def __init__(self, uri: str, cache: Path) -> None:
        self.store = Store(uri)
        self.cache = cache
        self._runs: dict[str, RunView] = {}
        self._rested_at = 0.0  # time.monotonic()
        self._lock = threading.Lock()

    def names(self) -> list[str]:
        """Of the runs; [] where the store is not there yet."""
        return [name for name in self.store.list_dirs() if self._run_file(name) is not None]

    def run(self, name: str) -> RunView:
        """One of them. Raises NotFound."""
        changed = self._run_file(name)
        if changed is None:
            raise NotFound(f"There is no run {name!r} in {self.store.uri}.")
        self._let_rest()
        with self._lock:
            view = self._runs.get(name)
            if view is None or view.identity != changed:
                view = RunView(RunRecord.open(self.store.uri, name), self.cache, changed)
                self._runs[name] = view
            return view

    def _run_file(self, name: str) -> FileFacts | None:
        """Of its run.yaml; None where there is none. A name comes from outside: it must not lead out of the store."""
        if name in {"", ".", ".."} or set(name) & set("/\\\0") or len(name.encode(errors="replace")) > _LONGEST_NAME:
            return None
        folder, root = self.store.local_path(name), self.store.local_path()
        if folder and root and folder.is_symlink() and root.resolve() not in folder.resolve().parents:
            return None
        found = self.store.child(name).info("run.yaml")
        return None if found is None or found.is_folder else found

    def _let_rest(self) -> None:
        """Keep in memory the curves of those runs alone that are looked at."""
        with self._lock:
            if time.monotonic() - self._rested_at < REST_EVERY_S:
                return
            self._rested_at = time.monotonic()
            awake = [view for view in self._runs.values() if view.unused_s is not None]
        awake.sort(key=lambda view: view.unused_s or 0.0)
        for number, view in enumerate(awake):
            if number >= MOST_AWAKE or (view.unused_s or 0.0) > AWAKE_S:
                view.rest()

    def summaries(self) -> list[Row]:
        """One row a run, the newest first; a run that cannot be read says so and hides no other."""
        rows = []
        for name in self.names():
            try:
                rows.append(self.run(name).summary())
            except ShardyardError as error:
                rows.append({"run": name, "status": "damaged", "error": str(error), "attention": []})
        return sorted(rows, key=lambda row: row.get("started_at") or 0.0, reverse=True)
