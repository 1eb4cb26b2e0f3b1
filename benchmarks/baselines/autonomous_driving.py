"""Random forests on the present scan and its change since the one before, as nearness; one for each thing predicted.

Of the inputs tried on the last quarter of the training moments (the scan; all eight; the scan and its change) these
gave the best area under the curve.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.ensemble import RandomForestClassifier, RandomForestRegressor

from configs.schema import RunConfig
from data_pipelines.shards import Dataset
from trainer.tasks import autonomous_driving


def baseline(dataset: Dataset, config: RunConfig) -> dict[str, float]:
    """The task's scores, and the mean absolute errors of a step."""
    (inputs, steps, _), (held_out, wanted, poses) = (_table(dataset, part) for part in ("train", "validation"))
    settings: dict[str, Any] = {"n_estimators": 300, "min_samples_leaf": 3, "random_state": 0}
    task = autonomous_driving.Config(**config.task.settings)
    turns, wanted_turns = (np.abs(table[:, 0]) >= task.min_turn_rad for table in (steps, wanted))
    way = RandomForestClassifier(**settings).fit(inputs[turns], steps[turns, 0] > 0)
    step = RandomForestRegressor(**settings, max_features="sqrt").fit(inputs, steps)
    left, predicted = way.predict_proba(held_out)[:, 1], step.predict(held_out)
    rows = [
        dict(zip(("pose", "step", "predicted", "left"), row, strict=True))
        for row in zip(poses, wanted, predicted, left, strict=True)
    ]
    turn_error, forward_error = np.abs(predicted - wanted).mean(0).tolist()
    return autonomous_driving.scores(rows, task) | {
        "accuracy": float(((left > 0.5) == (wanted[:, 0] > 0))[wanted_turns].mean()),
        "turn_error_rad": turn_error,
        "forward_error_m": forward_error,
    }


def _table(dataset: Dataset, part: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Inputs (n, 360), steps (n, 2), poses (n, 3)."""
    rows = list(dataset.rows(part))
    near = 2 / (1 + np.clip(np.stack([row["scan"] for row in rows]), 0, 50))  # (n, T, 180)
    inputs = np.concatenate([near[:, -1], near[:, -1] - near[:, -2]], axis=1)
    return inputs, np.array([[row["turn"], row["forward"]] for row in rows]), np.stack([row["pose"] for row in rows])
