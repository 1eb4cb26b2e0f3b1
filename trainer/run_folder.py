"""The folder of a run in a store: what may lie there, and whether a run may begin or go on in it."""

from __future__ import annotations

from configs.errors import Damaged, ShardyardError, UsageError
from configs.load import Resolved, load_resolved
from configs.schema import RunConfig, flatten
from data_pipelines.storage import Store
from trainer.redact import Redactor

CONFIG, LINEAGE, STOP, DATASETS = "run.yaml", "lineage.json", "stop.json", "datasets.json"
_OWN_NAMES = {CONFIG, LINEAGE, STOP, DATASETS, "mlflow.json"}
_OWN_NAMES |= {"events", "metrics", "columns", "ranks", "attempts", "lease", "checkpoints", "pictures"}
SWEEPS = "sweeps"  # folder of sweeps in a store: see cluster/sweep_folder.py
_RESERVED_NAMES = {  # beside runs, in a store
    SWEEPS: "sweeps",
    "datasets": "data sets",
    "tokenizers": "tokenizers",
    "mlflow.db": "MLflow's records",
    "mlflow-artifacts": "MLflow's files",
    "jobs": "logs of jobs",
}


def read_config(folder: Store) -> Resolved:
    """Of a run. Raises Damaged."""
    text = folder.read_text(CONFIG)
    try:
        return load_resolved(text)
    except (ShardyardError, ValueError, KeyError, TypeError) as error:
        raise Damaged(
            f"{folder.path(CONFIG)} cannot be read: {error}. Restore it, or start again under another name."
        ) from error


def refuse_secrets(config: RunConfig) -> None:
    """Raises UsageError: workers read the config from the run's folder, where no secret may stand.

    By names and shapes alone: the value of a secret variable may well be a word that the config needs.
    """
    given = flatten(config.model_dump(exclude={"name"}))
    kept = flatten(Redactor({}).value(config.model_dump(exclude={"name"})))
    secret = [key for key, value in given.items() if kept[key] != value]
    if secret:
        raise UsageError(
            f"The config holds what looks like a secret in {', '.join(secret)}. The config is written to the run's "
            "folder, where workers and other people read it, and secrets are not. Take it out of the config and put it "
            "in the environment, where the library that needs it reads it (AWS_SECRET_ACCESS_KEY for s3://, "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD for MLflow)."
        )


def refuse_other_config(folder: Store, config: RunConfig) -> None:
    """Raises UsageError, with the keys, where the folder is that of a run with another config.

    Not by the store, nor the name: they are where it was found, and the folder may have been moved.
    """
    stored = flatten(read_config(folder).config.model_dump(exclude={"store", "name"}))
    given = flatten(config.model_dump(exclude={"store", "name"}))
    differing = [key for key in {**stored, **given} if stored.get(key) != given.get(key)]
    if differing:
        shown = ", ".join(f"{key}: {stored.get(key)!r} there, {given.get(key)!r} here" for key in differing[:8])
        more = f" and {len(differing) - 8} more" if len(differing) > 8 else ""
        raise UsageError(
            f"The name '{config.name}' belongs to a run with another config ({shown}{more}), in {folder.uri}. "
            f"Use another name (name=...), or start a new run from this one's checkpoint: "
            f"`shardyard train RECIPE --from {config.name} name=...`."
        )


def refuse_foreign_folder(folder: Store) -> None:
    """Raises UsageError where something lies there, or belongs there, that is no run's."""
    name = folder.uri.partition("?")[0].rstrip("/").rpartition("/")[2]
    if name in _RESERVED_NAMES:  # perhaps of a file
        held = f"{_RESERVED_NAMES[name]} are kept there"
    else:
        names = {*folder.list(), *folder.list_dirs()}
        foreign = sorted(entry for entry in names - _OWN_NAMES if not entry.startswith("lineage-"))
        held = f"it holds {foreign[0]}" if foreign else ""
    if held:
        raise UsageError(
            f"The folder {folder.uri} is not a run's: {held}. Use another name (name=...) or another store (store=...)."
        )
