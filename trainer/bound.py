"""A task file and a model file, each bound to its config: what the engine, the loop and the session call."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

from configs.schema import Section

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor, nn

    from data_pipelines.columns import Column

    Prepare = Callable[[Mapping[str, Any], np.random.Generator], Mapping[str, np.ndarray]]


@dataclass(frozen=True)
class BoundTask:
    """A file of trainer/tasks and its config. A batch is a mapping of tensors whose first axis is the example."""

    module: ModuleType
    config: Section

    def columns(self) -> tuple[str, ...]:
        """The columns of a stored row that it reads."""
        return self.module.columns(self.config)

    def example(self, rng: np.random.Generator) -> dict[str, Any]:
        """A stored row made up at random, as arrays, str or bytes; lists differ in length from call to call.

        With it a task, and every recipe of it, is tried without its data.
        """
        return self.module.example(self.config, rng)

    def packing(self) -> int | None:
        """Length to which documents are packed; None where examples are rows as they are stored."""
        return self.module.packing(self.config)

    def packing_kind(self) -> str:
        """How documents are packed: "concat" or "best_fit" (data_pipelines/pack.py)."""
        kind: str = getattr(self.config, "packing", "concat")
        return kind

    def length_column(self) -> str | None:
        """The stored column by whose lengths rows are put into buckets (data_pipelines/buckets.py); None: none are."""
        column = getattr(self.module, "length_column", None)
        return None if column is None else column(self.config)

    def io(self) -> tuple[Any, Any]:
        """Shapes (trainer/shapes.py) that a model must take and give."""
        return self.module.io(self.config)

    def preparation(self, stored: Sequence[Column], *, training: bool) -> Prepare | None:
        """What the loader does to each row of these columns, in Python, with a generator of the example's own.

        None where the stored columns are a batch already: then no Python runs for an example. Augmentation is for
        training alone.

        Raises:
            UsageError: the columns are not what the task's settings say.
        """
        make = getattr(self.module, "preparation", None)
        return None if make is None else make(self.config, stored, training=training)

    @property
    def pad(self) -> float:
        """What fills arrays that are shorter than the longest of their batch."""
        value: float = getattr(self.module, "PAD", 0)
        return value

    def check(self, batch: Mapping[str, Tensor]) -> None:
        """Look at a batch on the host, before it is copied to a GPU, which reports what is wrong without words.

        Raises:
            UsageError: the data is not what the task's settings say.
        """
        if hasattr(self.module, "check"):
            self.module.check(batch, self.config)

    @property
    def ragged(self) -> Mapping[str, int]:
        """Of the arrays that its preparation gives, by name: how many of their first axes may differ."""
        axes: Mapping[str, int] = getattr(self.module, "RAGGED", {})
        return axes

    def num_items(self, batch: Mapping[str, Tensor]) -> int:
        """How many terms `loss` sums."""
        return self.module.num_items(batch)

    def items_and_weight(self, batch: Mapping[str, Tensor]) -> tuple[int, float]:
        """num_items, and the loss's denominator: the same, or the sum of the items' weights where the task has such."""
        items = self.num_items(batch)
        weigh = getattr(self.module, "total_weight", None)
        return items, float(items) if weigh is None else weigh(batch, self.config)

    def num_tokens(self, batch: Mapping[str, Tensor]) -> int:
        """How many tokens the model reads in this batch, the measure of its speed; 0 for a task that has none."""
        count = getattr(self.module, "num_tokens", None)
        return 0 if count is None else count(batch)

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

    @property
    def has_predictions(self) -> bool:
        """Whether it has metrics that are no sums over examples: a BLEU, an area under a curve."""
        return hasattr(self.module, "predict")

    def predict(self, model: nn.Module, batch: Mapping[str, Tensor], tokenizer: Any) -> list[dict[str, Any]]:
        """What the model says of each example that counts, and what is so: plain JSON values, for `scores`."""
        return self.module.predict(model, batch, self.config, tokenizer)

    def scores(self, predictions: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Metrics of all predictions of an evaluation, whichever rank made them; nothing where there are none."""
        return self.module.scores(predictions, self.config)

    @property
    def has_samples(self) -> bool:
        """Whether its models make something that people can look at."""
        return hasattr(self.module, "sample")

    def sample(self, model: nn.Module, tokenizer: Any, length: int, seed: int) -> str:
        """Something that the model makes by itself, as text, for people to look at."""
        return self.module.sample(model, tokenizer, length, seed)

    @property
    def has_pictures(self) -> bool:
        """Whether it can show what its models do."""
        return hasattr(self.module, "pictures")

    def pictures(
        self, model: nn.Module, batch: Mapping[str, Tensor], tokenizer: Any, seed: int
    ) -> dict[str, np.ndarray]:
        """What the model makes of a batch, to look at: by name, uint8 (H, W) or (H, W, 3)."""
        return self.module.pictures(model, batch, self.config, tokenizer, seed)


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
