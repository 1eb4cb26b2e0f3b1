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
from data_pipelines.columns import Column
from data_pipelines.tokenizer import EOS_ID
from trainer.bound import BoundModel, BoundTask
from trainer.initialization import materialize
from trainer.shapes import ClassLogits, Image, Logits, Tokens

MODELS = plugin_names("trainer.models")
TASKS = plugin_names("trainer.tasks")
SEQ_LEN, VOCAB_SIZE, IMAGE_PX, NUM_CLASSES = 12, 300, 16, 5


def example_config(module: ModuleType, **settings: Any) -> Section:
    """The file's Config with the first example of each required field."""
    fields: dict[str, pydantic.fields.FieldInfo] = module.Config.model_fields
    required = {name: (field.examples or [None])[0] for name, field in fields.items() if field.is_required()}
    return module.Config(**(required | settings))


def example_shapes(kind: type) -> tuple[Any, Any]:
    """An input of this kind, and an output that suits it."""
    shapes = {
        Tokens: (Tokens(VOCAB_SIZE, SEQ_LEN), Logits(VOCAB_SIZE)),
        Image: (Image(3, IMAGE_PX, IMAGE_PX), ClassLogits(NUM_CLASSES)),
    }
    return shapes[kind]


def example_input(shape: Any, examples: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    if isinstance(shape, Tokens):
        return torch.randint(0, shape.vocab_size, (examples, shape.seq_len), generator=generator)
    if isinstance(shape, Image):
        return torch.randn(examples, shape.channels, shape.height, shape.width, generator=generator)
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


def bound_task(name: str, **settings: Any) -> BoundTask:
    module = find_plugin("trainer.tasks", name)
    small = {"seq_len": SEQ_LEN, "image_size": IMAGE_PX, "num_classes": NUM_CLASSES}
    own = {key: value for key, value in small.items() if key in module.Config.model_fields}
    return BoundTask(module, example_config(module, **own, **settings))


def fitting_model(task: BoundTask) -> BoundModel:
    """The first model that accepts what the task gives."""
    given, wanted = task.io()
    for name in MODELS:
        module = find_plugin("trainer.models", name)
        if isinstance(given, module.ACCEPTS):
            return BoundModel(module, example_config(module), given, wanted)
    raise AssertionError(f"no model accepts {given}")


def stored_columns(task: BoundTask) -> list[Column]:
    """What a data set for this task holds, as far as it reads it."""
    given, _ = task.io()
    kinds = {"tokens": ("uint16", (None,)), "label": ("int64", ())}
    if isinstance(given, Image):
        kinds["image"] = ("uint8", (given.height, given.width, given.channels))
    return [Column(name, *kinds[name]) for name in task.columns()]


def example_rows(task: BoundTask, count: int) -> list[dict[str, np.ndarray]]:
    """Examples as a loader reads them: packed sequences, the last one padded; or stored rows."""
    rng = np.random.default_rng(0)
    given, wanted = task.io()
    if (seq_len := task.packing()) is None:
        shapes = {column.name: column.shape for column in stored_columns(task)}
        values = {"image": lambda: rng.integers(0, 256, shapes["image"]).astype(np.uint8)}
        values["label"] = lambda: np.int64(rng.integers(0, wanted.size))
        return [{name: values[name]() for name in task.columns()} for _ in range(count)]
    rows = []
    for number in range(count):
        tokens = rng.integers(1, given.vocab_size, seq_len + 1).astype(np.uint16)
        tokens[[0, seq_len // 2]] = EOS_ID  # two documents
        valid = seq_len if number + 1 < count else seq_len // 3
        tokens[valid + 1 :] = EOS_ID
        rows.append({"tokens": tokens, "valid": np.int32(valid)})
    return rows


def batch_of(task: BoundTask, rows: list[dict[str, np.ndarray]], *, training: bool = True) -> dict[str, Tensor]:
    """The batch that a loader makes of these rows."""
    prepare = task.preparation(stored_columns(task), training=training)
    if prepare is not None:
        rows = [dict(prepare(row, np.random.default_rng((0, number)))) for number, row in enumerate(rows)]
    return {name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in rows[0]}
