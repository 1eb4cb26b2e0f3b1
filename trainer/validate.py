"""Import the files that a config names, check their sections and that they fit: the last step before anything is spent."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

from configs.load import Resolved, validate_plugin
from configs.plugins import find_plugin, plugin_names
from configs.problems import ConfigError, Problem
from configs.schema import RunConfig, Section
from trainer.bound import BoundModel, BoundTask


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
    source_config: Section
    num_parameters: int
    examples_seen: int
    accumulation_steps: int
    idle_share: float

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


def validate(resolved: Resolved) -> Plan:
    """Check the task, model and data sections with the files they name, then that model and task fit.

    Raises:
        ConfigError: every problem found, with its line.
        UsageError: a name that no file has; the message lists those that there are.
    """
    config = resolved.config
    task_module = find_plugin("trainer.tasks", config.task.name)
    model_module = find_plugin("trainer.models", config.model.name)
    source = find_plugin("data_pipelines.sources", config.data.name)

    task_config, problems = validate_plugin(task_module.Config, config.task, "task", resolved.origins)
    model_config, model_problems = validate_plugin(model_module.Config, config.model, "model", resolved.origins)
    source_config, source_problems = validate_plugin(source.Config, config.data, "data", resolved.origins)
    problems = [*problems, *model_problems, *source_problems]
    if problems or task_config is None or model_config is None or source_config is None:
        raise ConfigError(tuple(problems))

    given, wanted = task_module.io(task_config)
    if not isinstance(given, model_module.ACCEPTS):
        where = resolved.origins.get("model.name", "default")
        raise ConfigError((Problem(where, "model.name", _misfit(config, model_module, given)),))
    model = BoundModel(model_module, model_config, given, wanted)
    workers = config.resources.workers
    slots = workers * config.accumulation(workers)
    return Plan(
        config=config,
        task=BoundTask(task_module, task_config),
        model=model,
        source=source,
        source_config=source_config,
        num_parameters=model.num_parameters(),
        examples_seen=config.steps * config.batch.global_batch_size,
        accumulation_steps=config.accumulation(workers),
        idle_share=1 - config.num_micro_batches / slots,
    )


def _misfit(config: RunConfig, model_module: ModuleType, given: object) -> str:
    accepts = ", ".join(kind.__name__ for kind in model_module.ACCEPTS)
    fitting = [
        name
        for name in plugin_names("trainer.models")
        if isinstance(given, find_plugin("trainer.models", name).ACCEPTS)
    ]
    return (
        f"model '{config.model.name}' accepts {accepts}; task '{config.task.name}' gives {given}. "
        f"Models that accept {type(given).__name__}: {', '.join(fitting) or 'none'}"
    )
