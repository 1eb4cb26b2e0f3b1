"""A sweep's run in MLflow, under which MLflow shows the runs of its trials.

The trials' own copies (cluster/mlflow_pass.py) read its id in the sweep's folder, and tag their runs with it as soon as
it stands there. MLflow out of reach stops no sweep: what it missed is sent when the same sweep is called again.
"""

from __future__ import annotations

import json
import os
import threading
import uuid
from typing import Any

from cluster.mlflow_copy import sync, tracking_uri
from cluster.mlflow_pass import connect, find_experiment
from cluster.mlflow_values import MAX_PARAM_CHARACTERS, POSITION_FILE, cut
from cluster.sweep_folder import SweepFolder
from trainer.record import RunRecord
from trainer.redact import Redactor

RETRY_EVERY_S = 30.0
FIRST_TIMEOUT_S = 30.0


class SweepInMlflow:
    """Makes the sweep's run in a thread, and tries again until MLflow answers. Nothing here raises into the sweep.

    The runs of its trials have to be there already.
    """

    def __init__(self, folder: SweepFolder) -> None:
        self._folder = folder
        self._uri = tracking_uri(RunRecord.open(folder.root.uri, folder.runs()[0]))  # where the trials' copies go
        self._tried = threading.Event()
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._keep_trying, name="sweep-mlflow", daemon=True)

    def start(self) -> None:
        """Begin; does nothing where `tracking.mlflow` is null."""
        if self._uri is not None:
            self._thread.start()

    def wait_for_first_try(self) -> None:
        """Wait until MLflow's tables are made, which several trials must not do at once; or until it did not answer."""
        if self._uri is not None:
            self._tried.wait(FIRST_TIMEOUT_S)

    def finish(self, status: str, best: tuple[str, float] | None) -> bool:
        """Say how the sweep ended, and send what its trials' copies lack; False if MLflow did not take all of it."""
        if self._uri is None:
            return True
        self._ending.set()
        self._thread.join(FIRST_TIMEOUT_S)
        try:
            client, run_id = self._ensure_run()
            if best is not None:
                name, value = best
                client.set_tag(run_id, "shardyard.best_run", name)
                client.log_metric(run_id, f"best/{self._folder.spec.metric}", value)
            client.set_terminated(run_id, status)
            for run in self._folder.runs():
                sync(RunRecord.open(self._folder.root.uri, run))
        except Exception:  # whatever MLflow raises
            return False
        return True

    def _keep_trying(self) -> None:
        while not self._try():
            self._tried.set()
            if self._ending.wait(RETRY_EVERY_S):
                return
        self._tried.set()

    def _try(self) -> bool:
        try:
            client, run_id = self._ensure_run()
            client.update_run(run_id, status="RUNNING")
        except Exception:  # whatever MLflow raises, the sweep goes on
            return False
        return True

    def _ensure_run(self) -> tuple[Any, str]:
        """A run that was made just before a kill is found again by its key, which is written first."""
        assert self._uri is not None
        store, shown = self._folder.store, Redactor(os.environ).text(self._uri)
        note = json.loads(store.read_text(POSITION_FILE)) if store.exists(POSITION_FILE) else None
        client = connect(self._uri)
        if note is None or note["uri"] != shown:
            note = {"uri": shown, "key": uuid.uuid4().hex if note is None else note["key"], "run_id": None}
            store.write_atomic(POSITION_FILE, json.dumps(note))
        if note["run_id"] is None:
            experiment = find_experiment(client, self._uri, self._folder.base.config.tracking.experiment)
            found = client.search_runs([experiment], f"tags.`shardyard.key` = '{note['key']}'")
            note["run_id"] = found[0].info.run_id if found else self._create_run(client, experiment, note["key"])
            store.write_atomic(POSITION_FILE, json.dumps(note))
        return client, note["run_id"]

    def _create_run(self, client: Any, experiment: str, key: str) -> str:
        spec = self._folder.spec
        tags = {"shardyard.key": key, "shardyard.folder": self._folder.store.uri, "mlflow.source.type": "LOCAL"}
        run_id: str = client.create_run(experiment, run_name=self._folder.name, tags=tags).info.run_id
        client.log_param(run_id, "algorithm", spec.algorithm)
        client.log_param(run_id, "metric", f"{spec.goal} {spec.metric}")
        client.log_param(run_id, "space", cut(" ".join(spec.space), MAX_PARAM_CHARACTERS))
        return run_id
