"""Logistic regression, or ridge regression, on standardised features; regularised as scikit-learn does by default."""

from __future__ import annotations

import numpy as np
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import log_loss, roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from configs.schema import RunConfig
from data_pipelines.examples import Rows
from data_pipelines.shards import Dataset


def baseline(dataset: Dataset, config: RunConfig) -> dict[str, float]:
    """roc_auc, accuracy and loss; or r2 and rmse."""
    answer = "label" if "num_classes" in config.task.model_dump() else "target"
    seen, known = _rows(dataset, "train", answer)
    held_out, truth = _rows(dataset, "validation", answer)
    if answer == "target":
        ridge = make_pipeline(StandardScaler(), Ridge()).fit(seen, known)
        rmse = float(np.sqrt(np.mean((ridge.predict(held_out) - truth) ** 2)))
        return {"r2": float(ridge.score(held_out, truth)), "rmse": rmse}
    logistic = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(seen, known)
    p = logistic.predict_proba(held_out)
    return {
        "roc_auc": float(roc_auc_score(truth, p[:, 1])),
        "accuracy": float(logistic.score(held_out, truth)),
        "loss": float(log_loss(truth, p)),
    }


def _rows(dataset: Dataset, name: str, answer: str) -> tuple[np.ndarray, np.ndarray]:
    """Features (N, F) and what is to be told (N,)."""
    split = dataset.split(name)
    rows = Rows(split, ("features", answer), name).gather(np.arange(len(split)))
    return rows["features"], rows[answer]
