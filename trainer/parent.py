"""Starting a run from another's checkpoint: what must be the same, and what may change."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ValidationError

from configs.errors import ShardyardError, UsageError
from configs.load import validate_plugin
from configs.plugins import find_plugin
from configs.schema import Plugin, RunConfig, flatten
from data_pipelines.index import TOKENIZER_FILE
from data_pipelines.storage import Store

if TYPE_CHECKING:
    from trainer.models import gpt

# What gives weights their shape and token ids their meaning; a branch also keeps what gives its position in the data
# and the optimizer's state a meaning.
SAME_FOR_WEIGHTS = ("model", "task.name", "task.tokenizer")
SAME_FOR_ALL = ("model", "task", "data", "seed", "optimizer.name")
# Settings that no weight, and no position in the data, depends on (of a mixture's changes those that are past count:
# see Schedule.check_history). What a tokenizer's file holds is compared, not where it lies: see
# trainer/session.py (for a branch it is part of the data set's fingerprint).
FREE = (
    *("model.dropout", "model.activation_checkpointing", "task.tokenizer.file", "data.changes"),
    *("data.damage", "data.retry_s", "data.stall_s", "data.cache_bytes", "data.cache_dir"),
)

State = Literal["weights", "all"]


def may_change(state: State) -> str:
    """What a run that starts from another's checkpoint is free to change, in a sentence."""
    same = SAME_FOR_WEIGHTS if state == "weights" else SAME_FOR_ALL
    return f"{', '.join(same)} must be as the parent has them (but for {', '.join(FREE)}); every other key may change."


def is_free(key: str, state: State) -> bool:
    """Whether a run that starts from another's checkpoint may have another value of a key."""
    same = SAME_FOR_WEIGHTS if state == "weights" else SAME_FOR_ALL
    return key in FREE or not _within(key, same)


def check_parent(config: RunConfig, manifest: Mapping[str, Any], state: State) -> None:
    """Refuse a checkpoint (its manifest) whose run differs where it must not.

    Raises:
        UsageError: names the keys that differ, with both values, and says which may change.
    """
    mine, theirs = _resolved(config.model_dump(mode="json")), _resolved(manifest["config"])
    differing = [
        f"{key} is {_shown(mine, key)} here and {_shown(theirs, key)} there"
        for key in dict.fromkeys([*mine, *theirs])
        if not is_free(key, state) and mine.get(key) != theirs.get(key)
    ]
    what = "the weights" if state == "weights" else "the whole state"
    source = f"{what} of {manifest['run']}@{manifest['step']}"
    if differing:
        weights_alone = "" if state == "weights" else " To change more, take the weights alone (without --branch)."
        raise UsageError(
            f"Run '{config.name}' cannot start from {source}: {'; '.join(differing)}. {may_change(state)}"
            f"{weights_alone}"
        )
    if state == "all" and config.steps <= manifest["step"]:
        raise UsageError(
            f"Run '{config.name}' cannot start from {source}: with steps={config.steps} nothing is left to train. A "
            f"branch goes on counting where its parent stood: set steps to more than {manifest['step']}."
        )


def tokenizer_of(source: str) -> str | None:
    """The tokenizer.json of a checkpoint, or of a Hugging Face folder, as text; None where it has none.

    Raises NotFound, Damaged for what cannot be read.
    """
    from trainer.checkpoint_files import MANIFEST, read_manifest

    store = Store(source)
    if store.exists(MANIFEST):
        text: str | None = read_manifest(store).get("tokenizer")
        return text
    return store.read_text(TOKENIZER_FILE) if store.exists(TOKENIZER_FILE) else None


def check_llama(config: RunConfig, folder: Path) -> None:
    """Refuse a Hugging Face folder whose model is not the config's.

    Raises:
        UsageError: names the settings that differ. NotFound, Damaged: the folder cannot be read.
    """
    from trainer.huggingface import llama_settings
    from trainer.models import gpt

    if config.model.name != "gpt":
        raise UsageError(f"{folder} is a Llama, which only the model gpt can take, not {config.model.name}.")
    mine, theirs = (_complete(gpt.Config(**settings)) for settings in (config.model.settings, llama_settings(folder)))
    wanted = [
        f"model.{key}={value}".lower()
        for key, value in theirs.items()
        if f"model.{key}" not in FREE and mine[key] != value
    ]
    if wanted:
        raise UsageError(
            f"Run '{config.name}' cannot start from the weights of {folder}, which are of another model. "
            f"Set what differs: {' '.join(wanted)}"
        )


def _complete(config: gpt.Config) -> dict[str, Any]:
    return config.model_dump() | {"num_kv_heads": config.kv_heads, "intermediate_size": config.mlp_size}


def _resolved(values: Mapping[str, Any]) -> dict[str, Any]:
    """Flat values of a config; the defaults of the files that its model, task and data name are filled in."""
    packages = {"model": "trainer.models", "task": "trainer.tasks", "data": "data_pipelines.sources"}
    filled = dict(values)
    for key, package in packages.items():
        if key not in values:
            continue
        try:
            plugin = Plugin.model_validate(values[key])
            settings, _ = validate_plugin(find_plugin(package, plugin.name).Config, plugin, key, {})
        except (ShardyardError, ValidationError):  # a file of another version: compare what was written
            continue
        if settings is not None:
            filled[key] = {"name": plugin.name, **settings.model_dump(mode="json")}
    return flatten(filled)


def _shown(values: Mapping[str, Any], key: str) -> Any:
    return repr(values[key]) if key in values else "unset"


def _within(key: str, sections: tuple[str, ...]) -> bool:
    return any(key == section or key.startswith(section + ".") for section in sections)
