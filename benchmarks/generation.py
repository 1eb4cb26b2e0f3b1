"""How good the images are that a finished run's model makes.

The judge is a classifier of real images: a perceptron with one hidden layer, by scikit-learn, fitted on the training
split with a fixed random state. It sees nothing of the held-out split and of what is generated. IMAGES_A_CLASS images
of each class are made from the newest checkpoint, as task.sampling_steps and task.guidance say. Figures:

    read_as_asked           share of them that the judge takes for the class that was asked for
    frechet_distance        between them and the held-out images, in the judge's hidden layer (Heusel et al. 2017;
                            theirs, with another network's features, are other numbers)
    read_as_asked_real      what the judge reads right of the held-out images: it is no better a reader than that
    frechet_distance_train  between training and held-out images: what remains between two real sets
"""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.neural_network import MLPClassifier

from data_pipelines.examples import Rows
from data_pipelines.shards import Dataset
from trainer.checkpoint_folder import find
from trainer.inference import load_module
from trainer.record import RunRecord
from trainer.tasks import image_generation

IMAGES_A_CLASS = 100
HIDDEN = 64


class Judge:
    """The classifier, and what it thinks of the real images."""

    def __init__(self, dataset: Dataset) -> None:
        images, labels = real(dataset, "train")
        self._held_out, held_out_labels = real(dataset, "validation")
        self._classifier = MLPClassifier((HIDDEN,), alpha=1e-2, max_iter=300, random_state=0).fit(flat(images), labels)
        self._real = {
            "read_as_asked_real": self._share_read(self._held_out, held_out_labels),
            "frechet_distance_train": frechet_distance(self._hidden(images), self._hidden(self._held_out)),
        }

    def figures(self, images: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """Of images uint8 (N, S, S, K), made to show these classes."""
        return {
            "read_as_asked": self._share_read(images, labels),
            "frechet_distance": frechet_distance(self._hidden(images), self._hidden(self._held_out)),
        } | self._real

    def _share_read(self, images: np.ndarray, labels: np.ndarray) -> float:
        return float(self._classifier.score(flat(images), labels))

    def _hidden(self, images: np.ndarray) -> np.ndarray:
        """(N, HIDDEN)"""
        weights, biases = self._classifier.coefs_[0], self._classifier.intercepts_[0]
        return np.maximum(flat(images) @ weights + biases, 0.0)


def figures(record: RunRecord, dataset: Dataset) -> dict[str, float]:
    """What the judge thinks of images of the run's newest checkpoint."""
    task = image_generation.Config(**record.config.task.settings)
    model = load_module(find(record.store.child("checkpoints")))
    labels = np.arange(task.num_classes).repeat(IMAGES_A_CLASS)
    return Judge(dataset).figures(generated(model, task, labels, record.config.seed), labels)


def generated(model: Any, task: image_generation.Config, labels: np.ndarray, seed: int) -> np.ndarray:
    """An image of each class, uint8 (N, S, S, K)."""
    import torch

    with torch.no_grad():
        return image_generation.generate(model, task, labels.tolist(), seed)


def real(dataset: Dataset, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 (N, S, S, K) of a split, and their classes (N,)."""
    rows = Rows(dataset.split(split), ("image", "label"), split)
    arrays = rows.gather(np.arange(len(rows)))
    return arrays["image"], arrays["label"]


def flat(images: np.ndarray) -> np.ndarray:
    """(N, S, S, K) uint8: (N, S S K) in [0, 1]."""
    return images.reshape(len(images), -1) / 255.0


def frechet_distance(first: np.ndarray, second: np.ndarray) -> float:
    """Between the normal distributions of two sets of features, (N, D) and (M, D): Dowson and Landau 1982.

    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1^1/2 C2 C1^1/2)^1/2)
    """
    means = first.mean(0) - second.mean(0)
    one, other = np.cov(first, rowvar=False), np.cov(second, rowvar=False)
    root = _root(one)
    return float(means @ means + np.trace(one) + np.trace(other) - 2 * np.trace(_root(root @ other @ root)))


def _root(matrix: np.ndarray) -> np.ndarray:
    """Of a symmetric matrix with no negative eigenvalue but for rounding."""
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
