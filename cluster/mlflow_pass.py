"""One pass of the copy from a run's record into MLflow: what is new since the last pass, and where it stopped.

What was sent is noted in the run's folder (`mlflow.json`) after every call that MLflow answered, and everything may be
sent twice without harm: MLflow ignores a point it has (same name, step, time and value), and the run and the entries
of checkpoints are looked up before they are made. So a pass may be cut off anywhere; the next one goes on, in whatever
process.
"""

from __future__ import annotations

import json
import os
import tempfile
import uuid
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from cluster.mlflow_values import MAX_TAG_CHARACTERS, POSITION_FILE, cut, metric_name, metrics_at, run_params, run_tags
from configs.errors import ShardyardError
from trainer.record import RunRecord
from trainer.record_rows import Cursor, decode_value, read_rows
from trainer.redact import Redactor

ARTIFACT_FOLDER = "mlflow-artifacts"  # beside a sqlite file: MLflow's own default is the current folder
_METRICS_A_CALL = 1000  # the limits of MLflow's REST API
_PARAMS_A_CALL = 100
_RUN_STATUS = {
    "queued": "SCHEDULED",
    "running": "RUNNING",
    "finished": "FINISHED",
    "stopped": "KILLED",
    "failed": "FAILED",
    "lost": "FAILED",
}
_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "ERROR",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # the next pass is the retry
    "GIT_PYTHON_REFRESH": "quiet",
}


class CopyPass:
    """The state of one run's copy. Imports mlflow when made: seconds, so only in the thread that copies.

    Raises whatever MLflow raises; nothing is lost by it.
    """

    def __init__(self, record: RunRecord, uri: str, experiment: str) -> None:
        self._record = record
        self._uri = uri
        self._experiment = experiment
        self._position = _read_position(record, Redactor(os.environ).text(uri))
        self._client = connect(uri)

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the run, None before MLflow was first reached."""
        run_id: str | None = self._position["run_id"]
        return run_id

    def copy(self) -> None:
        """Send all that is new."""
        self._ensure_run()
        self._copy_metrics()
        events, cursor = read_rows(self._record.store, "events", self._position["events"])
        self._copy_tags_and_status()
        self._copy_checkpoints(events)
        # Artifacts come last: the place they go to may be out of reach where MLflow itself is not.
        self._copy_texts(events)
        self._position["events"] = cursor
        self._save()

    def _save(self) -> None:
        self._record.store.write_atomic(POSITION_FILE, json.dumps(self._position))

    def _ensure_run(self) -> None:
        from mlflow.entities import Param

        position = self._position
        if position["run_id"] is None:
            self._save()  # its key first: a run made just before a crash is found again by it
            experiment_id = find_experiment(self._client, self._uri, self._experiment)
            found = self._client.search_runs([experiment_id], f"tags.`shardyard.key` = '{position['key']}'")
            run = found[0] if found else self._create_run(experiment_id)
            position["experiment_id"], position["run_id"] = experiment_id, run.info.run_id
            self._save()
        if not position["params_sent"]:
            params = [Param(key, value) for key, value in run_params(self._record)]
            for batch in _batches(params, _PARAMS_A_CALL):
                self._client.log_batch(position["run_id"], params=batch)
            position["params_sent"] = True
            self._save()

    def _create_run(self, experiment_id: str) -> Any:
        created_at = next((event["time"] for event in self._record.events()), None)
        return self._client.create_run(
            experiment_id,
            start_time=None if created_at is None else int(created_at * 1000),
            run_name=self._record.name,
            tags={"shardyard.key": self._position["key"]},
        )

    def _copy_metrics(self) -> None:
        """A step that was repeated after a rollback is not sent again: the first value stays."""
        from mlflow.entities import Metric

        position = self._position
        last_step: dict[str, int] = position["last_step"]
        rows, cursor = read_rows(self._record.store, "metrics", position["metrics"])
        points = ((row, key, value) for row in rows for key, value in row["values"].items())
        for batch in _batches(points, _METRICS_A_CALL):
            metrics, sent = [], dict(last_step)
            for row, key, value in batch:
                if row["step"] > sent.get(key, -1):
                    sent[key] = row["step"]
                    metrics.append(Metric(metric_name(key), decode_value(value), _ms(row["time"]), row["step"]))
            if metrics:
                self._client.log_batch(position["run_id"], metrics=metrics)
                last_step.update(sent)
                self._save()
        position["metrics"] = cursor
        self._save()

    def _copy_tags_and_status(self) -> None:
        from mlflow.entities import RunTag

        position, run_id = self._position, self._position["run_id"]
        tags = run_tags(self._record)
        changed = [RunTag(key, value) for key, value in tags.items() if position["tags"].get(key) != value]
        if changed:
            self._client.log_batch(run_id, tags=changed)
            position["tags"] = tags
        status = _RUN_STATUS[self._record.status()]
        if status != position["status"]:
            if status in ("RUNNING", "SCHEDULED"):
                self._client.update_run(run_id, status=status)
            else:
                ended_at = self._record.events()[-1]["time"]
                self._client.set_terminated(run_id, status, _ms(ended_at))
            position["status"] = status
        self._save()

    def _copy_checkpoints(self, events: Sequence[dict[str, Any]]) -> None:
        """Link each checkpoint as an external model, and mark those that were deleted since."""
        models: dict[str, dict[str, Any]] = self._position["models"]
        new = {event["step"]: event for event in events if event["kind"] == "checkpoint"}
        unlinked = {step: event for step, event in new.items() if str(step) not in models}
        if not new:
            return
        table = self._record.metrics_table()
        for step, event in sorted(unlinked.items()):
            models[str(step)] = {"id": self._link_checkpoint(event, table), "deleted": False}
            self._save()
        kept = {str(checkpoint["step"]) for checkpoint in self._record.checkpoints()}
        for step_text, model in models.items():
            deleted = step_text not in kept
            if deleted != model["deleted"]:
                self._client.set_logged_model_tags(model["id"], {"shardyard.deleted": str(deleted).lower()})
                model["deleted"] = deleted

    def _link_checkpoint(self, event: dict[str, Any], table: list[dict[str, Any]]) -> str:
        """What `mlflow.create_external_model` does, without its process-wide tracking URI; returns the model's id."""
        from mlflow.entities import LoggedModelOutput, Metric
        from mlflow.utils.mlflow_tags import MLFLOW_MODEL_IS_EXTERNAL

        run_id, experiment_id, step = self._position["run_id"], self._position["experiment_id"], event["step"]
        name = f"{self._record.name.replace('.', '-')}-step-{step:08d}"
        query = f"name = '{name}' AND source_run_id = '{run_id}'"
        found = self._client.search_logged_models([experiment_id], filter_string=query)
        model = next(iter(found), None) or self._client.create_logged_model(
            experiment_id,
            name=name,
            source_run_id=run_id,
            tags={
                MLFLOW_MODEL_IS_EXTERNAL: "true",
                "shardyard.checkpoint": cut(str(event.get("path", "")), MAX_TAG_CHARACTERS),
                "shardyard.step": str(step),
            },
            model_type="checkpoint",
        )
        model_id: str = model.model_id
        self._client.finalize_logged_model(model_id, "READY")
        outputs = self._client.get_run(run_id).outputs
        if model_id not in [output.model_id for output in (outputs.model_outputs if outputs else [])]:
            self._client.log_outputs(run_id, [LoggedModelOutput(model_id, step)])  # it refuses a second one
        metrics = [
            Metric(metric_name(key), value, _ms(time), at, model_id=model_id)
            for key, (value, at, time) in metrics_at(table, step).items()
        ]
        for batch in _batches(metrics, _METRICS_A_CALL):
            self._client.log_batch(run_id, metrics=batch)
        return model_id

    def _copy_texts(self, events: Sequence[dict[str, Any]]) -> None:
        run_id, store = self._position["run_id"], self._record.store
        if not self._position["texts_sent"]:
            for name in ("run.yaml", "lineage.json"):
                if store.exists(name):
                    self._client.log_text(run_id, store.read_text(name), name)
            self._position["texts_sent"] = True
        for event in events:
            if event["kind"] == "sample":
                self._client.log_text(run_id, event["text"], f"samples/step-{event['step']:08d}.txt")
            if event["kind"] == "picture" and store.exists(event["path"]):
                self._copy_picture(event)

    def _copy_picture(self, event: dict[str, Any]) -> None:
        """Under a name that stays the same, so that it may be sent twice; MLflow's run page shows PNG files."""
        path = Path(event["path"])
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / path.name
            file.write_bytes(self._record.store.read_bytes(event["path"]))
            self._client.log_artifact(self._position["run_id"], str(file), path.parent.as_posix())


def connect(uri: str) -> Any:
    """A client of MLflow that is quiet and gives up soon. Imports mlflow: seconds."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from mlflow.tracking import MlflowClient

    return MlflowClient(uri)


def find_experiment(client: Any, uri: str, name: str) -> str:
    """The id of an experiment, made if it is not there. Raises ShardyardError for a deleted one."""
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        try:
            created: str = client.create_experiment(name, _artifact_location(uri))
            return created
        except MlflowException:  # another run may have made it since
            experiment = client.get_experiment_by_name(name)
            if experiment is None:
                raise
    if experiment.lifecycle_stage != "active":
        raise ShardyardError(
            f"The MLflow experiment '{name}' was deleted. Restore it (mlflow experiments restore -x "
            f"{experiment.experiment_id}), or set tracking.experiment to another."
        )
    found: str = experiment.experiment_id
    return found


def sqlite_file(uri: str) -> Path | None:
    """The file of a sqlite URI; None for other URIs."""
    return Path(uri.removeprefix("sqlite:///")).absolute() if uri.startswith("sqlite:///") else None


def _artifact_location(uri: str) -> str | None:
    file = sqlite_file(uri)
    return None if file is None else str(file.parent / ARTIFACT_FOLDER)


def _read_position(record: RunRecord, shown_uri: str) -> dict[str, Any]:
    """Where the last pass stopped. At another address all is sent anew, under the key by which the run is known there
    already if only the address is new: a server's, or that of a sqlite file that was moved together with its store.
    """
    key = uuid.uuid4().hex
    if record.store.exists(POSITION_FILE):
        position: dict[str, Any] = json.loads(record.store.read_text(POSITION_FILE))
        if position["uri"] == shown_uri:
            return position
        key = position["key"]
    nothing: Cursor = {}
    return {
        "uri": shown_uri,
        "key": key,
        "experiment_id": None,
        "run_id": None,
        "status": "RUNNING",  # what MLflow gives a new run
        "params_sent": False,
        "texts_sent": False,
        "metrics": nothing,
        "events": nothing,
        "last_step": {},
        "tags": {},
        "models": {},
    }


def _batches(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


def _ms(seconds: float) -> int:
    return int(seconds * 1000)
