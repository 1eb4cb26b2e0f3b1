"""Disease prediction: its metrics against scikit-learn's, and what is wrong with a table."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from sklearn.metrics import accuracy_score, log_loss, r2_score, roc_auc_score
from torch import Tensor, nn

from configs.errors import UsageError
from trainer.tasks import disease_prediction as task
from trainer.tasks.disease_prediction import Config

FEATURES = 3


def linear(outputs: int) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(FEATURES, outputs)


def table(rows: int = 40, classes: int | None = None) -> dict[str, Tensor]:
    rng = np.random.default_rng(0)
    features = torch.from_numpy((5 + 2 * rng.standard_normal((rows, FEATURES))).astype(np.float32))
    if classes is None:
        return {"features": features, "target": 3 * features.sum(1) + torch.randn(rows)}
    return {"features": features, "label": torch.from_numpy(rng.integers(0, classes, rows))}


def summed(config: Config, model: nn.Module, batch: dict[str, Tensor], pieces: int) -> dict[str, float]:
    """The sums of a batch that is evaluated in pieces."""
    sums: dict[str, float] = {}
    for part in zip(*(tensor.chunk(pieces) for tensor in batch.values()), strict=True):
        for name, value in task.evaluate(model, dict(zip(batch, part, strict=True)), config).items():
            sums[name] = sums.get(name, 0.0) + value
    return sums


@pytest.mark.parametrize("pieces", [1, 7])
@torch.no_grad()
def test_a_number_is_measured_as_scikit_learn_does(pieces: int) -> None:
    config = Config(num_features=FEATURES, mean=(5, 5, 5), std=(2, 2, 2), target_mean=45.0, target_std=10.0)
    batch, model = table(), linear(1)
    told = (model((batch["features"] - 5) / 2).squeeze(-1) * 10 + 45).detach().numpy()
    found = task.metrics(summed(config, model, batch, pieces), config, None)
    truth = batch["target"].numpy()
    assert found["r2"] == pytest.approx(r2_score(truth, told), abs=1e-5)
    assert found["rmse"] == pytest.approx(np.sqrt(np.mean((truth - told) ** 2)), rel=1e-5)
    assert task.predict(model, batch, config, None) == []


@pytest.mark.parametrize("classes", [2, 4])
def test_a_class_is_measured_as_scikit_learn_does(classes: int) -> None:
    config = Config(num_features=FEATURES, num_classes=classes)
    batch, model = table(classes=classes), linear(classes)
    p = model(batch["features"]).softmax(-1).detach().numpy()
    truth = batch["label"].numpy()
    found = task.metrics(summed(config, model, batch, 3), config, None)
    assert found["accuracy"] == pytest.approx(accuracy_score(truth, p.argmax(1)))
    assert found["loss"] == pytest.approx(log_loss(truth, p), rel=1e-5)
    area = task.scores(task.predict(model, batch, config, None), config)["roc_auc"]
    expected = roc_auc_score(truth, p[:, 1]) if classes == 2 else roc_auc_score(truth, p, multi_class="ovr")
    assert area == pytest.approx(expected)


def test_who_does_not_count_is_in_no_sum_and_in_no_prediction() -> None:
    for config, model in (
        (Config(num_features=FEATURES), linear(1)),
        (Config(num_features=3, num_classes=2), linear(2)),
    ):
        batch = table(classes=config.num_classes)
        nobody = task.idle(batch)
        assert task.num_items(nobody) == 0 and task.metrics(task.evaluate(model, nobody, config), config, None) == {}
        assert task.scores(task.predict(model, nobody, config, None), config) == {}
        mixed = {name: torch.cat([batch[name], nobody[name]]) for name in batch}
        assert task.loss(model, mixed, config).item() == pytest.approx(task.loss(model, batch, config).item(), rel=1e-6)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"mean": (1.0,)}, "mean has 1 values for num_features=3; give one for each feature"),
        ({"std": (1.0, 0.0, 1.0)}, "std has a value that is not above 0"),
    ],
)
def test_wrong_settings_are_told(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(said)):
        Config(num_features=FEATURES, **settings)


def test_wrong_data_is_told() -> None:
    with pytest.raises(UsageError, match=r"has 3 features a row, but task\.num_features=4"):
        task.check(table(), Config(num_features=4))
    with pytest.raises(UsageError, match=r"label 3, but task\.num_classes=2 allows 0 to 1"):
        task.check(table(classes=4) | {"label": torch.tensor([0, 3])}, Config(num_features=3, num_classes=2))
