"""What the contract tests need of any model or task file, made from the file itself: no list to edit for a new one."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pydantic
import torch
from torch import Tensor

from configs.plugins import find_plugin, plugin_names
from configs.schema import Section
from trainer import shapes
from trainer.bound import BoundModel, BoundTask
from trainer.initialization import materialize

MODELS = plugin_names("trainer.models")
TASKS = plugin_names("trainer.tasks")
SEQ_LEN, VOCAB_SIZE, IMAGE_PX, NUM_CLASSES = 12, 300, 16, 5

INPUTS = (
    shapes.Tokens(VOCAB_SIZE, SEQ_LEN),
    shapes.TokenPair(VOCAB_SIZE, SEQ_LEN),
    shapes.Frames(4, SEQ_LEN),
    shapes.Vector(6),
    shapes.Image(3, IMAGE_PX, IMAGE_PX),
    shapes.NoisyImage(3, IMAGE_PX, IMAGE_PX, 10, NUM_CLASSES),
)
OUTPUTS = (
    shapes.Logits(VOCAB_SIZE),
    shapes.MaskedLogits(VOCAB_SIZE),
    shapes.ClassLogits(NUM_CLASSES),
    shapes.Values(2),
    shapes.Embedding(8, NUM_CLASSES),
    shapes.PixelLogits(4),
    shapes.Pixels(3),
    shapes.Boxes(2),
)


def example_config(module: ModuleType, **settings: Any) -> Section:
    """The file's Config with the first example of each required field."""
    fields: dict[str, pydantic.fields.FieldInfo] = module.Config.model_fields
    required = {name: (field.examples or [None])[0] for name, field in fields.items() if field.is_required()}
    return module.Config(**(required | settings))


# --- models


def example_model(module: ModuleType, input: Any, output: Any) -> Section | None:
    """A small config of a model file for this input and output; None where the file has none."""
    make = getattr(module, "example", None)
    config: Section | None = example_config(module) if make is None else make(input, output)
    return config


@dataclass(frozen=True)
class Case:
    """A model file with an input that it accepts and an output that it gives; setting: one beside the example's."""

    name: str
    input: Any
    output: Any
    setting: tuple[str, Any] | None = None

    def __str__(self) -> str:
        setting = "" if self.setting is None else "-{}={}".format(*self.setting)
        return f"{self.name}-{type(self.input).__name__}-{type(self.output).__name__}{setting}"


def example_models() -> list[Case]:
    """Every pair of input and output of every model; once more with each example of a setting that has a default."""
    cases = []
    for name in MODELS:
        module = find_plugin("trainer.models", name)
        given = [shape for shape in INPUTS if isinstance(shape, module.ACCEPTS)]
        wanted = [shape for shape in OUTPUTS if isinstance(shape, module.GIVES)]
        settings = [
            (key, value)
            for key, field in module.Config.model_fields.items()
            if not field.is_required()
            for value in field.examples or ()
        ]
        cases += [
            Case(name, input, output, setting)
            for input in given
            for output in wanted
            if example_model(module, input, output) is not None
            for setting in (None, *settings)
        ]
    return cases


def example_inputs(shape: Any, examples: int) -> tuple[Tensor, ...]:
    """A batch as the shape says that a model is called with; the first example is the longest."""
    generator = torch.Generator().manual_seed(0)

    def ids(below: int, *size: int) -> Tensor:
        return torch.randint(0, below, size, generator=generator)

    lengths = SEQ_LEN - torch.arange(examples) % 3
    match shape:
        case shapes.Tokens():
            return (ids(shape.vocab_size, examples, shape.seq_len),)
        case shapes.TokenPair():
            source, target = (ids(shape.vocab_size, examples, shape.seq_len) for _ in range(2))
            return source, lengths, target
        case shapes.Frames():
            return torch.randn(examples, shape.length, shape.channels, generator=generator), lengths
        case shapes.Vector():
            return (torch.randn(examples, shape.size, generator=generator),)
        case shapes.Image():
            return (torch.randn(examples, shape.channels, shape.height, shape.width, generator=generator),)
        case shapes.NoisyImage():
            image = torch.randn(examples, shape.channels, shape.height, shape.width, generator=generator)
            return image, ids(shape.steps, examples), ids(shape.classes + 1, examples)
    raise AssertionError(f"say here what a batch of {shape} looks like")


def has_shape(output: Tensor, shape: Any, input: Any) -> bool:
    """Whether a model's output is what trainer/shapes.py says of it."""
    size = tuple(output.shape[1:])
    match shape:
        case shapes.Logits() | shapes.MaskedLogits():
            return len(size) == 2 and size[1] == shape.size
        case shapes.ClassLogits() | shapes.Values():
            return size == (shape.size,)
        case shapes.Embedding():
            return size == (shape.size + shape.classes,)
        case shapes.PixelLogits():
            return size == (shape.size, input.height, input.width)
        case shapes.Pixels():
            return size == (shape.channels, input.height, input.width)
        case shapes.Boxes():
            return len(size) == 3 and size[2] == shape.classes + 5
    raise AssertionError(f"say here what {shape} looks like")


def bound_model(case: Case) -> BoundModel:
    module = find_plugin("trainer.models", case.name)
    config = example_model(module, case.input, case.output)
    assert config is not None
    if case.setting is not None:
        config = module.Config(**(config.model_dump() | dict([case.setting])))
    return BoundModel(module, config, case.input, case.output)


def built(model: BoundModel, seed: int = 0) -> torch.nn.Module:
    with torch.device("meta"):
        module = model.build()
    materialize(module, model.init_parameter, seed=seed)
    return module


# --- tasks


def bound_task(name: str, **settings: Any) -> BoundTask:
    module = find_plugin("trainer.tasks", name)
    small = {"seq_len": SEQ_LEN, "image_size": IMAGE_PX, "num_classes": NUM_CLASSES}
    own = {key: value for key, value in small.items() if key in module.Config.model_fields}
    return BoundTask(module, example_config(module, **own, **settings))


def fitting_model(task: BoundTask) -> BoundModel:
    """The first model that fits the task."""
    given, wanted = task.io()
    for name in MODELS:
        module = find_plugin("trainer.models", name)
        fits = isinstance(given, module.ACCEPTS) and isinstance(wanted, module.GIVES)
        if fits and (config := example_model(module, given, wanted)) is not None:
            return BoundModel(module, config, given, wanted)
    raise AssertionError(f"no model accepts {given} and gives {wanted}")
