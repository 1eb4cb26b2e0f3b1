"""Labels of examples: the numbers 0 to num_classes - 1, or IGNORED for one that does not count."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import torch
from pydantic import Field, model_validator
from torch import Tensor

from configs.errors import UsageError
from configs.schema import Section
from trainer.parts.cross_entropy import IGNORED

ClassWeights = tuple[Annotated[float, Field(ge=0)], ...]


class Classes(Section):
    """What a task's config says of classes of which each example has one, `label` in a batch."""

    num_classes: int = Field(ge=2, description="Classes; labels are 0 to num_classes - 1.", examples=[10])
    class_weights: ClassWeights | None = Field(
        default=None,
        description="How often an example of each class counts in the loss, a mean by these weights; null is once.",
    )

    @model_validator(mode="after")
    def _one_weight_a_class(self) -> Classes:
        check_class_weights(self.class_weights, self.num_classes)
        return self


def total_weight(batch: Mapping[str, Tensor], config: Classes) -> float:
    """Examples that count, each by the weight of its class."""
    labels = batch["label"].to(torch.int64)
    weights = weights_of(labels, config.class_weights)
    return float((labels != IGNORED).sum() if weights is None else weights.double().sum())


def check_class_weights(weights: ClassWeights | None, num_classes: int) -> None:
    """Raises ValueError where there is not one for each class, or no class counts."""
    if weights is None:
        return
    if len(weights) != num_classes:
        raise ValueError(f"class_weights has {len(weights)} numbers for {num_classes} classes: give one for each")
    if not any(weights):
        raise ValueError("class_weights are all 0, so nothing would count")


def weights_of(labels: Tensor, weights: ClassWeights | None) -> Tensor | None:
    """How often each label counts, fp32 of the same shape, 0 where it is IGNORED; None where all count once."""
    if weights is None:
        return None
    each = torch.tensor(weights, dtype=torch.float32, device=labels.device)
    return each[labels.clamp(min=0)].masked_fill(labels == IGNORED, 0.0)


def check_labels(what: str, labels: Tensor, num_classes: int) -> None:
    """Raises UsageError for a label of any shape that is none of the classes; `what` has it: "A text"."""
    labels = labels.to(torch.int64)
    if not labels.numel():
        return
    least, greatest = labels.aminmax()
    if least >= 0 and greatest < num_classes:  # nearly always
        return
    wrong = labels[(labels != IGNORED) & ((labels < 0) | (labels >= num_classes))]
    if len(wrong):
        raise UsageError(
            f"{what} has the label {int(wrong[0])}, but task.num_classes={num_classes} allows 0 to {num_classes - 1}. "
            "Set task.num_classes to the number of classes in the data."
        )
