"""What the tests of every task cannot see of the classification of texts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from configs.errors import UsageError
from configs.plugins import find_plugin
from tests.contract.examples import built
from trainer.bound import BoundModel, BoundTask
from trainer.tasks import sentiment_analysis

TASK = BoundTask(sentiment_analysis, sentiment_analysis.Config(seq_len=4, num_classes=3))


class Says(nn.Module):
    """Gives these logits, and keeps what it was asked."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits
        self.asked: tuple[Tensor, ...] = ()

    def forward(self, *inputs: Tensor) -> Tensor:
        self.asked = inputs
        return self.logits


def batch(labels: list[int]) -> dict[str, Any]:
    tokens = torch.tensor([[0, 5, 6, 0, 0, 0], [0, 5, 6, 7, 8, 9], [0, 0, 0, 0, 0, 0]], dtype=torch.uint16)
    return {"tokens": tokens, "tokens_length": torch.tensor([3, 6, 1]), "label": torch.tensor(labels)}


def test_the_model_reads_the_beginning_and_knows_the_padding() -> None:
    says = Says(torch.zeros(3, 3))
    TASK.loss(says, batch([0, 1, 2]))
    tokens, document = says.asked
    assert tokens.tolist() == [[0, 5, 6, 0], [0, 5, 6, 7], [0, 0, 0, 0]]
    assert document.tolist() == [[0, 0, 0, 1], [0, 0, 0, 0], [0, 1, 1, 1]]


def test_accuracy_and_loss_are_by_definition_over_the_labels_that_count() -> None:
    logits = torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, 5.0, 0.0]])
    sums = TASK.evaluate(Says(logits), batch([0, 1, -100]))
    found = TASK.metrics(sums, None)
    wanted = -logits.log_softmax(-1)
    assert found["accuracy"] == 0.5
    assert found["loss"] == pytest.approx((wanted[0, 0] + wanted[1, 1]).item() / 2)
    assert TASK.metrics(TASK.evaluate(Says(logits), TASK.idle(batch([0, 1, 2]))), None) == {}


def test_longer_padding_changes_no_logit() -> None:
    module = find_plugin("trainer.models", "lstm")
    config = module.Config(num_layers=1, hidden_size=6, bidirectional=True)
    model = built(BoundModel(module, config, *TASK.io())).eval()
    short = {"tokens": batch([0])["tokens"][:1, :3], "tokens_length": torch.tensor([3]), "label": torch.tensor([1])}
    long = {**short, "tokens": batch([0])["tokens"][:1]}
    torch.testing.assert_close(TASK.loss(model, short), TASK.loss(model, long))


def test_a_label_that_is_no_class_is_told() -> None:
    TASK.check(
        batch([0, 2, -100]),
    )
    for wrong in (3, -1):
        with pytest.raises(UsageError, match=rf"label {wrong}, but task\.num_classes=3 .*Set task\.num_classes"):
            TASK.check(batch([0, wrong, 1]))
