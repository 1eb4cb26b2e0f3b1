"""Labels of examples: the numbers 0 to num_classes - 1, or IGNORED for one that does not count."""

from __future__ import annotations

import torch
from torch import Tensor

from configs.errors import UsageError
from trainer.cross_entropy import IGNORED


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
