"""Disease prediction, or any other reading of a table: a class, or a number, from measurements of a patient.

A stored row has `features`, float32 (F,), as they were measured, and `label`, the number of the patient's class; where
`num_classes` is unset there is `target` in its place, float32, a number to be told (a score of the disease, say).
Features and target are standardised by `mean` and `std`, which must come from the training part alone.

A batch, B = examples: features (B, F) float32; label (B,) int64, -100 where it does not count, or target (B,) float32,
NaN where it does not count.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from configs.errors import UsageError
from configs.schema import Section
from trainer.parts.cross_entropy import IGNORED, summed_cross_entropy
from trainer.parts.labels import check_labels
from trainer.shapes import ClassLogits, Values, Vector


class Config(Section):
    """What is measured, and what is told from it."""

    num_features: int = Field(ge=1, description="Measurements of a patient.", examples=[4])
    num_classes: int | None = Field(
        default=None, ge=2, description="Classes; labels are 0 to num_classes - 1. null: a number, `target`, is told."
    )
    mean: tuple[float, ...] | None = Field(
        default=None, description="Taken from each feature: its mean over the training part. null is 0."
    )
    std: tuple[float, ...] | None = Field(
        default=None, description="What is left is divided by it: the standard deviation there. null is 1."
    )
    target_mean: float = Field(default=0.0, description="Mean of the target over the training part.")
    target_std: float = Field(default=1.0, gt=0, description="Standard deviation of the target there.")

    @model_validator(mode="after")
    def _as_many_as_features(self) -> Config:
        for name, values in (("mean", self.mean), ("std", self.std)):
            if values is not None and len(values) != self.num_features:
                raise ValueError(
                    f"{name} has {len(values)} values for num_features={self.num_features}; give one for each feature"
                )
        if self.std is not None and min(self.std) <= 0:
            raise ValueError("std has a value that is not above 0; leave out a feature that never changes, or give 1")
        return self


def columns(config: Config) -> tuple[str, ...]:
    """What it reads of a stored row."""
    return ("features", "target" if config.num_classes is None else "label")


def example(config: Config, rng: np.random.Generator) -> dict[str, Any]:
    """Noise, with any class or target."""
    row: dict[str, Any] = {"features": rng.standard_normal(config.num_features).astype(np.float32)}
    if config.num_classes is None:
        return row | {"target": np.float32(rng.standard_normal())}
    return row | {"label": np.int64(rng.integers(config.num_classes))}


def packing(config: Config) -> None:  # noqa: ARG001
    """Examples are rows."""
    return


def io(config: Config) -> tuple[Vector, ClassLogits | Values]:
    """The features in; one logit a class, or one number, out."""
    told = Values(1) if config.num_classes is None else ClassLogits(config.num_classes)
    return Vector(config.num_features), told


def check(batch: Mapping[str, Tensor], config: Config) -> None:
    """Raises UsageError for features of another number, and for a label that is none of the classes."""
    if batch["features"].shape[1] != config.num_features:
        raise UsageError(
            f"The data set has {batch['features'].shape[1]} features a row, but task.num_features="
            f"{config.num_features}. Set task.num_features to the former."
        )
    if config.num_classes is None:
        return
    check_labels("A row", batch["label"], config.num_classes)


def num_items(batch: Mapping[str, Tensor]) -> int:
    """Patients that count."""
    if "label" in batch:
        return int((batch["label"] != IGNORED).sum())
    return int(batch["target"].isfinite().sum())


def idle(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The batch with nobody who counts: its loss is zero, and so is every gradient."""
    name, nothing = ("label", IGNORED) if "label" in batch else ("target", torch.nan)
    return {**batch, name: torch.full_like(batch[name], nothing)}


def loss(model: nn.Module, batch: Mapping[str, Tensor], config: Config) -> Tensor:
    """Sum of -log p(label) in nats, or of squared errors of the standardised target: an fp32 scalar."""
    told = _told(model, batch, config)
    if config.num_classes is not None:
        return summed_cross_entropy(told, batch["label"].to(torch.int64))
    return _standardised_errors(told, batch, config).square().sum()


def evaluate(model: nn.Module, batch: Mapping[str, Tensor], config: Config) -> dict[str, float]:
    """Sums over the patients that count.

    nll_nats, patients and correct (those whose class was the likeliest); of a target patients, squared (errors) and the
    target's own sums total and squares.
    """
    told = _told(model, batch, config)
    patients = float(num_items(batch))
    if config.num_classes is not None:
        labels = batch["label"].to(torch.int64)
        nll = float(summed_cross_entropy(told, labels))
        return {"nll_nats": nll, "patients": patients, "correct": float((told.argmax(-1) == labels).sum())}
    errors = _standardised_errors(told, batch, config).double() * config.target_std
    target = batch["target"].double()
    target = target[target.isfinite()]
    return {
        "patients": patients,
        "squared": float(errors.square().sum()),
        "total": float(target.sum()),
        "squares": float(target.square().sum()),
    }


def metrics(sums: Mapping[str, float], config: Config, split: Any) -> dict[str, float]:  # noqa: ARG001
    """loss (nats a patient) and accuracy; or rmse and r2, the share of the target's variance that is told.

    Nothing where nobody counted; no r2 of a target that does not vary.
    """
    patients = sums.get("patients", 0.0)
    if not patients:
        return {}
    if config.num_classes is not None:
        return {"loss": sums["nll_nats"] / patients, "accuracy": sums["correct"] / patients}
    variance = sums["squares"] - sums["total"] ** 2 / patients
    found = {"rmse": (sums["squared"] / patients) ** 0.5}
    return found | {"r2": 1 - sums["squared"] / variance} if variance > 0 else found


def predict(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    config: Config,
    tokenizer: Any,  # noqa: ARG001
) -> list[dict[str, Any]]:
    """Of each patient that counts, label and p, the probability of each class; of a target nothing."""
    if config.num_classes is None:
        return []
    probabilities = _told(model, batch, config).float().softmax(-1)
    pairs = zip(probabilities.tolist(), batch["label"].tolist(), strict=True)
    return [{"p": p, "label": label} for p, label in pairs if label != IGNORED]


def scores(predictions: Sequence[Mapping[str, Any]], config: Config) -> dict[str, float]:
    """roc_auc: area under the ROC curve, of several classes the mean of one against the rest (scikit-learn).

    Nothing where a class has nobody. Raises UsageError where scikit-learn is not installed.
    """
    labels = [each["label"] for each in predictions]
    if config.num_classes is None or len(set(labels)) < config.num_classes:
        return {}
    try:
        from sklearn.metrics import roc_auc_score
    except ImportError as error:
        raise UsageError('The ROC AUC needs scikit-learn. Run pip install "shardyard[metrics]".') from error
    p = np.array([each["p"] for each in predictions])
    area = roc_auc_score(labels, p[:, 1]) if config.num_classes == 2 else roc_auc_score(labels, p, multi_class="ovr")
    return {"roc_auc": float(area)}


def _told(model: nn.Module, batch: Mapping[str, Tensor], config: Config) -> Tensor:
    """(B, num_classes) or (B, 1)."""
    features = batch["features"].float()
    if config.mean is not None:
        features = features - features.new_tensor(config.mean)
    if config.std is not None:
        features = features / features.new_tensor(config.std)
    return model(features.to(next(model.parameters()).dtype))


def _standardised_errors(told: Tensor, batch: Mapping[str, Tensor], config: Config) -> Tensor:
    """(B,) fp32; 0 where a target does not count."""
    counts = batch["target"].isfinite()
    target = (torch.where(counts, batch["target"], 0).float() - config.target_mean) / config.target_std
    return torch.where(counts, told.squeeze(-1).float() - target, 0)
