"""A support vector machine with an RBF kernel on the pixels, and logistic regression on the same.

C is 10 and gamma "scale" for every data set; neither was searched for.
"""

from __future__ import annotations

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.svm import SVC

from configs.schema import RunConfig
from data_pipelines.examples import Rows
from data_pipelines.shards import Dataset


def baseline(dataset: Dataset, config: RunConfig) -> dict[str, float]:
    """accuracy: the machine's. logistic_accuracy and loss (nats an image): the regression's."""
    seen, labels = _pixels(dataset, "train")
    held_out, truth = _pixels(dataset, "validation")
    machine = SVC(C=10.0, gamma="scale").fit(seen, labels)
    regression = LogisticRegression(max_iter=1000).fit(seen, labels)
    return {
        "accuracy": float(machine.score(held_out, truth)),
        "logistic_accuracy": float(regression.score(held_out, truth)),
        "loss": float(log_loss(truth, regression.predict_proba(held_out), labels=regression.classes_)),
    }


def _pixels(dataset: Dataset, name: str) -> tuple[np.ndarray, np.ndarray]:
    """(N, values), each between 0 and 1, and labels (N,)."""
    split = dataset.split(name)
    rows = Rows(split, ("image", "label"), name).gather(np.arange(len(split)))
    return rows["image"].reshape(len(split), -1) / 255.0, rows["label"]
