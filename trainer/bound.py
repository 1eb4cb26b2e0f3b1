"""A task file and a model file, each bound to its config: what the engine, the loop and the session call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

from configs.schema import Section

if TYPE_CHECKING:
    import numpy as np
    import pyarrow
    import torch
    from torch import Tensor, nn


@dataclass(frozen=True)
class BoundTask:
    """A file of trainer/tasks and its config. A batch is a mapping of tensors whose first axis is the example."""

    module: ModuleType
    config: Section

    def schema(self) -> pyarrow.Schema:
        """Arrow schema of one example."""
        return self.module.schema()

    def packing(self) -> int | None:
        """Length to which documents are packed; None where examples stay as they are."""
        return self.module.packing(self.config)

    def io(self) -> tuple[Any, Any]:
        """Shapes (trainer/shapes.py) that a model must take and give."""
        return self.module.io(self.config)

    def prepare(self, row: Mapping[str, Any], rng: np.random.Generator) -> dict[str, np.ndarray]:
        """One example as the arrays that the loader stacks to a batch; `rng` is the example's own."""
        return self.module.prepare(row, rng, self.config)

    def num_items(self, batch: Mapping[str, Tensor]) -> int:
        """The loss's denominator: how many terms `loss` sums."""
        return self.module.num_items(batch)

    def num_tokens(self, batch: Mapping[str, Tensor]) -> int:
        """How many tokens the model reads in this batch: the measure of speed."""
        return self.module.num_tokens(batch)

    def idle(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same batch with nothing to learn from: its loss and gradients are exactly zero."""
        return self.module.idle(batch)

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Sum (not mean) of the loss over the batch's items: an fp32 scalar."""
        return self.module.loss(model, batch, self.config)

    def evaluate(self, model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, float]:
        """Sums over one batch, to be added over batches and ranks."""
        return self.module.evaluate(model, batch, self.config)

    def metrics(self, sums: Mapping[str, float], split: Any) -> dict[str, float]:
        """Metrics from the sums of `evaluate` over examples of `split`."""
        return self.module.metrics(sums, self.config, split)

    def sample(self, model: nn.Module, tokenizer: Any, length: int, seed: int) -> str:
        """Something that the model makes by itself, as text, for people to look at."""
        return self.module.sample(model, tokenizer, length, seed)


@dataclass(frozen=True)
class BoundModel:
    """A file of trainer/models, its validated config, and the shapes that its task gives and wants."""

    module: ModuleType
    config: Section
    input: Any
    output: Any

    def build(self) -> nn.Module:
        """The module with values of no meaning; under `torch.device("meta")` it takes no memory."""
        return self.module.build(self.config, self.input, self.output)

    def init_parameter(self, name: str, tensor: Tensor, generator: torch.Generator) -> None:
        """Fill one full parameter in place with its initial values."""
        self.module.init_parameter(self.config, name, tensor, generator)

    def num_parameters(self) -> int:
        """Trainable values, tied ones counted once; by formula, so that it costs nothing at any size."""
        return self.module.num_parameters(self.config, self.input, self.output)

    def flops_per_example(self) -> float:
        """Floating-point operations of matrix products, forward and backward, for one example; by formula."""
        return self.module.flops_per_example(self.config, self.input, self.output)
