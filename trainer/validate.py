"""Import the files that a config names, check their sections and that they fit: the last step before work begins."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import ValidationError

from configs.errors import ShardyardError, UsageError
from configs.load import Resolved, load, validate_plugin
from configs.plugins import find_plugin, plugin_names
from configs.problems import ConfigError, Problem, where
from configs.schema import Plugin, RunConfig, WarmStartConfig
from data_pipelines import pretrained
from data_pipelines.columns import Column, tokenized
from data_pipelines.sources import SourceConfig
from data_pipelines.tokenizer import TokenizerConfig
from data_pipelines.tokenizer_file import read_tokenizer
from trainer.bound import BoundModel, BoundTask
from trainer.warm_start import warm

_PACKAGES = {"task": "trainer.tasks", "model": "trainer.models", "data": "data_pipelines.sources"}

# What each kind of file has to define.
_NEEDED = {
    "task": ("Config", "columns", "io", "packing", "num_items", "idle", "loss", "evaluate", "metrics"),
    "model": ("Config", "ACCEPTS", "GIVES", "build", "init_parameter", "num_parameters", "flops_per_example"),
    "data": ("Config", "schema", "partitions", "read", "identity"),
}


@dataclass(frozen=True)
class Plan:
    """A config whose named files are imported and fit together, and what a run of it will do.

    num_parameters: of the whole model. examples_seen: by the end of the run.
    idle_share: part of the micro-batch slots of a step that re-run an example for nothing, because
    the workers do not divide the global micro-batches.
    """

    config: RunConfig
    task: BoundTask
    model: BoundModel
    source: ModuleType
    source_config: SourceConfig
    num_parameters: int
    examples_seen: int
    accumulation_steps: int
    idle_share: float

    @property
    def tokenizer(self) -> TokenizerConfig | None:
        """How the task turns text into tokens; None for a task that reads no text."""
        tokenizer: TokenizerConfig | None = getattr(self.task.config, "tokenizer", None)
        return tokenizer

    @property
    def seq_lens(self) -> tuple[int, ...]:
        """Lengths of best-fit sequences that a build has to count."""
        length = self.task.packing()
        return (length,) if length is not None and self.task.packing_kind() == "best_fit" else ()

    def describe(self) -> dict[str, Any]:
        """The plan as plain values, for `check` and for the head of `train`."""
        batch = self.config.batch
        return {
            "run": self.config.name,
            "model": self.config.model.name,
            "task": self.config.task.name,
            "data": self.config.data.name,
            "parameters": self.num_parameters,
            "steps": self.config.steps,
            "workers": self.config.resources.workers,
            "zero_stage": self.config.zero.stage,
            "precision": self.config.precision,
            "global_batch_size": batch.global_batch_size,
            "micro_batch_size": batch.micro_batch_size,
            "gradient_accumulation_steps": self.accumulation_steps,
            "idle_share": round(self.idle_share, 4),
            "examples": self.examples_seen,
        }

    def headline(self) -> str:
        """The run in two lines, before it begins."""
        config, batch = self.config, self.config.batch
        workers = config.resources.workers
        return (
            f"Run '{config.name}': {config.model.name} of {self.num_parameters:,} parameters on {config.data.name}, "
            f"{workers} worker{'s' * (workers > 1)}, ZeRO-{config.zero.stage}, {config.precision}.\n"
            f"{config.steps:,} steps of {batch.global_batch_size:,} examples: micro-batches of "
            f"{batch.micro_batch_size:,}, {self.accumulation_steps:,} a worker."
        )

    def warnings(self) -> list[str]:
        """What is right but costs more than it has to, each with its remedy."""
        if self.idle_share == 0:
            return []
        slots = self.config.resources.workers * self.accumulation_steps
        return [
            f"{self.idle_share:.0%} of the work of each step is idle: {self.config.num_micro_batches} micro-batches on "
            f"{self.config.resources.workers} workers fill {slots} slots. Choose batch.global_batch_size and "
            "batch.micro_batch_size so that their quotient is a multiple of the workers."
        ]


def load_recipe(recipe: str | Path | Mapping[str, Any] | RunConfig, overrides: Sequence[str] = ()) -> Resolved:
    """`configs.load.load`, whose errors also tell what is wrong with the task, model and data sections.

    Raises:
        ConfigError: every problem found, whichever file checks it.
    """
    try:
        return load(recipe, overrides)
    except ConfigError as error:
        problems = list(error.problems)
        for key, package in _PACKAGES.items():
            with contextlib.suppress(ValidationError):  # not a name and settings: told already
                plugin = Plugin.model_validate(error.values.get(key))
                _plugin(package, plugin, key, error.origins, problems)
        raise ConfigError(problems) from None


def validate(resolved: Resolved, *, sees_inputs: bool = True) -> Plan:
    """Check the task, model and data sections with the files they name, then that model and task fit.

    sees_inputs: look at the source and the tokenizer's file too, which a worker's node need not see.

    Raises:
        ConfigError: every problem found, with its line; for a name that no file has it lists those that there are.
    """
    config, problems = resolved.config, list[Problem]()
    task_module, task_config = _plugin(_PACKAGES["task"], config.task, "task", resolved.origins, problems)
    model_module, model_config = _plugin(_PACKAGES["model"], config.model, "model", resolved.origins, problems)
    source, source_config = _plugin(_PACKAGES["data"], config.data, "data", resolved.origins, problems)
    if sees_inputs:
        problems += _tokenizer_problems(task_module, task_config, resolved)
    if problems:
        raise ConfigError(problems)

    given, wanted = task_module.io(task_config)
    if not _fits(model_module, given, wanted):
        place = where("model.name", resolved.origins, "default")
        raise ConfigError((Problem(place, "model.name", _misfit(config, model_module, given, wanted)),))
    if sees_inputs and hasattr(model_module, "misfit"):
        reason = model_module.misfit(model_config, given, wanted)
        if reason is not None:
            raise ConfigError((Problem(where("model.name", resolved.origins, "default"), "model", reason),))
    task = BoundTask(task_module, task_config)
    if sees_inputs and (misfit := _data_misfit(config, task, source, source_config)) is not None:
        key = _setting_to_change(misfit, source_config)
        raise ConfigError((Problem(where(key, resolved.origins, "default"), key, misfit),))
    model = BoundModel(model_module, model_config, given, wanted)
    if sees_inputs and config.warm_start is not None:
        _check_warm_start(model, config.warm_start, resolved)
    workers = config.resources.workers
    slots = workers * config.accumulation(workers)
    return Plan(
        config=config,
        task=task,
        model=model,
        source=source,
        source_config=source_config,
        num_parameters=model.num_parameters(),
        examples_seen=config.steps * config.batch.global_batch_size,
        accumulation_steps=config.accumulation(workers),
        idle_share=1 - config.num_micro_batches / slots,
    )


def _plugin(
    package: str, plugin: Plugin, key: str, origins: Mapping[str, str], problems: list[Problem]
) -> tuple[Any, Any]:
    """The file that a plug-in names and its settings as the file's Config; what is wrong is added to `problems`."""
    place = where(f"{key}.name", origins, "default")
    try:
        module = find_plugin(package, plugin.name)
    except UsageError as error:
        problems.append(Problem(place, f"{key}.name", str(error)))
        return None, None
    missing = [name for name in _NEEDED[key] if not hasattr(module, name)]
    if missing:
        message = f"{module.__file__} lacks {', '.join(missing)}; a {key} file has {', '.join(_NEEDED[key])}"
        problems.append(Problem(place, f"{key}.name", message))
        return None, None
    config, found = validate_plugin(module.Config, plugin, key, origins)
    problems += found
    return module, config


def _tokenizer_problems(task_module: Any, task_config: Any, resolved: Resolved) -> list[Problem]:
    """What is wrong with a tokenizer's file, told before anything is launched."""
    key, tokenizer = "task.tokenizer.file", getattr(task_config, "tokenizer", None)
    if tokenizer is None or tokenizer.file is None:
        return []
    if tokenizer.name == "wordpiece" and task_module.packing(task_config) is not None:
        message = (
            f"task '{resolved.config.task.name}' packs documents, and those of wordpiece have no end mark to tell them "
            "apart by. Use bpe or bytes, or a task that reads each text by itself."
        )
        key = "task.tokenizer.name"
        return [Problem(where(key, resolved.origins, "default"), key, message)]
    try:
        if tokenizer.file.startswith(pretrained.SCHEME):
            pretrained.find(tokenizer.file)  # the launch fetches it
        else:
            read_tokenizer(tokenizer)
    except ShardyardError as error:
        return [Problem(where(key, resolved.origins, "default"), key, str(error))]
    return []


def _check_warm_start(model: BoundModel, wanted: WarmStartConfig, resolved: Resolved) -> None:
    """Raises ConfigError where a folder's weights do not fit the model; a package's are fetched by the workers."""
    try:
        if wanted.weights.startswith(pretrained.SCHEME):
            pretrained.find(wanted.weights)
        else:
            warm(model, wanted)
    except ShardyardError as error:
        key = "warm_start.weights"
        raise ConfigError((Problem(where(key, resolved.origins, "default"), key, str(error)),)) from error


def columns_misfit(config: RunConfig, task: BoundTask, columns: Sequence[Column]) -> str | None:
    """Why the task cannot read data of these columns; None if it can."""
    named = {column.name: column for column in columns}
    missing = [name for name in task.columns() if name not in named]
    if missing:
        return (
            f"data '{config.data.name}' has the columns {', '.join(name for name in named if name != 'key')}; task "
            f"'{config.task.name}' reads {', '.join(task.columns())}. Use a source that has {', '.join(missing)}, or "
            "another task."
        )
    by = task.length_column()
    if by is None:
        return None
    if task.packing() is not None:
        return f"task '{config.task.name}' packs its rows, so there are none to be put side by side by '{by}'"
    if by not in named or not named[by].has_length:
        what = f"{named[by].dtype}{list(named[by].shape)}" if by in named else "not there"
        return (
            f"task '{config.task.name}' puts rows of like '{by}' side by side, and in data '{config.data.name}' that "
            f"column is {what}. It has to be a list, text, bytes, or a number of the type int32 or smaller. Use a "
            "source that has it, or another task."
        )
    return None


def _data_misfit(config: RunConfig, task: BoundTask, source: ModuleType, settings: SourceConfig) -> str | None:
    """Why the task cannot read what the source gives, told before anything is built."""
    try:
        columns: tuple[Column, ...] = source.schema(settings)
    except UsageError as error:
        return str(error)
    except ShardyardError:
        return None  # it cannot be looked at from here, or not yet: the build will tell
    if getattr(task.config, "tokenizer", None) is not None:  # text becomes tokens in the build
        columns = tokenized(columns, "uint16")
    misfit = columns_misfit(config, task, columns)
    if misfit is None:
        try:
            task.preparation(columns, training=True)
        except UsageError as error:
            return str(error)
    return misfit


def _setting_to_change(message: str, settings: SourceConfig) -> str:
    """The key that a message about the data points to: what it says to set; else the columns, where they are chosen."""
    known = type(settings).model_fields
    told = next((name for name in re.findall(r"\b(?:Set|Check) data\.(\w+)", message) if name in known), None)
    return f"data.{told or ('columns' if 'columns' in known else 'name')}"


def _fits(model_module: ModuleType, given: object, wanted: object) -> bool:
    return isinstance(given, model_module.ACCEPTS) and isinstance(wanted, model_module.GIVES)


def _misfit(config: RunConfig, model_module: ModuleType, given: object, wanted: object) -> str:
    accepts, gives = (
        ", ".join(kind.__name__ for kind in kinds) for kinds in (model_module.ACCEPTS, model_module.GIVES)
    )
    fitting = [
        name for name in plugin_names("trainer.models") if _fits(find_plugin("trainer.models", name), given, wanted)
    ]
    return (
        f"model '{config.model.name}' accepts {accepts} and gives {gives}; task '{config.task.name}' gives {given} and "
        f"wants {wanted}. Models that fit: {', '.join(fitting) or 'none'}"
    )
