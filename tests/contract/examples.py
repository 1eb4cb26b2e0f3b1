"""What the contract tests need of any model or task file, made from the file itself: no list to edit for a new one."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pydantic
import torch
from torch import Tensor

from configs.plugins import find_plugin, plugin_names
from configs.schema import Section
from data_pipelines.pack import PackedSequence
from trainer.bound import BoundModel, BoundTask
from trainer.initialization import materialize
from trainer.shapes import Logits, Tokens

MODELS = plugin_names("trainer.models")
TASKS = plugin_names("trainer.tasks")
SEQ_LEN, VOCAB_SIZE = 12, 300


def example_config(module: ModuleType, **settings: Any) -> Section:
    """The file's Config with the first example of each required field."""
    fields: dict[str, pydantic.fields.FieldInfo] = module.Config.model_fields
    required = {name: (field.examples or [None])[0] for name, field in fields.items() if field.is_required()}
    return module.Config(**(required | settings))


def example_shapes(kind: type) -> tuple[Any, Any]:
    """An input of this kind, and an output that suits it."""
    shapes = {Tokens: (Tokens(VOCAB_SIZE, SEQ_LEN), Logits(VOCAB_SIZE))}
    return shapes[kind]


def example_input(shape: Any, examples: int) -> Tensor:
    if isinstance(shape, Tokens):
        generator = torch.Generator().manual_seed(0)
        return torch.randint(0, shape.vocab_size, (examples, shape.seq_len), generator=generator)
    raise AssertionError(f"say here what a batch of {shape} looks like")


def example_models() -> list[tuple[str, type]]:
    """(model, kind of input) for every kind that each model accepts."""
    return [(name, kind) for name in MODELS for kind in find_plugin("trainer.models", name).ACCEPTS]


def bound_model(name: str, kind: type) -> BoundModel:
    module = find_plugin("trainer.models", name)
    return BoundModel(module, example_config(module), *example_shapes(kind))


def built(model: BoundModel, seed: int = 0) -> torch.nn.Module:
    with torch.device("meta"):
        module = model.build()
    materialize(module, model.init_parameter, seed=seed)
    return module


def bound_task(name: str) -> BoundTask:
    module = find_plugin("trainer.tasks", name)
    settings = {"seq_len": SEQ_LEN} if "seq_len" in module.Config.model_fields else {}
    return BoundTask(module, example_config(module, **settings))


def fitting_model(task: BoundTask) -> BoundModel:
    """The first model that accepts what the task gives."""
    given, wanted = task.io()
    for name in MODELS:
        module = find_plugin("trainer.models", name)
        if isinstance(given, module.ACCEPTS):
            return BoundModel(module, example_config(module), given, wanted)
    raise AssertionError(f"no model accepts {given}")


def example_rows(task: BoundTask, count: int) -> list[PackedSequence]:
    """Rows as a data set gives them: packed sequences, the last one padded."""
    seq_len = task.packing()
    assert seq_len is not None, "say here what a row of a task that does not pack looks like"
    rng = np.random.default_rng(0)
    rows = []
    for number in range(count):
        document = (np.arange(seq_len + 1) > seq_len // 2).astype(np.int32)
        position = np.where(document == 0, np.arange(seq_len + 1), np.arange(seq_len + 1) - seq_len // 2 - 1)
        rows.append(
            PackedSequence(
                tokens=rng.integers(1, task.io()[0].vocab_size, seq_len + 1).astype(np.int32),
                document=document,
                position=position.astype(np.int32),
                valid=seq_len if number + 1 < count else seq_len // 3,
            )
        )
    return rows


def batch_of(task: BoundTask, rows: list[PackedSequence]) -> dict[str, Tensor]:
    prepared = [task.prepare(row, np.random.default_rng((0, number))) for number, row in enumerate(rows)]
    return {name: torch.from_numpy(np.stack([example[name] for example in prepared])) for name in prepared[0]}
