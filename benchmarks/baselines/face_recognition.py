"""Eigenfaces (Turk and Pentland 1991) and Fisherfaces (Belhumeur et al. 1997), fitted to the people trained on.

Both look for the nearest photo by cosine, and are judged as the networks are: by the same photos of the same strangers.
Photos are seen whole, at half of their resolution. 80 principal components for both; that was chosen on people trained
on, 10 of them held out from the rest.
"""

from __future__ import annotations

import numpy as np
from sklearn.decomposition import PCA
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from configs.schema import RunConfig
from data_pipelines.examples import Rows
from data_pipelines.shards import Dataset
from trainer.tasks.face_recognition import Config, recognition

COMPONENTS = 80


def baseline(dataset: Dataset, config: RunConfig) -> dict[str, float]:
    """rank_1, rank_1_single and eer of Fisherfaces; the same of eigenfaces, led by `eigenfaces_`."""
    gallery = Config(**config.task.settings).gallery
    seen, people = _pixels(dataset, "train")
    held_out, strangers = _pixels(dataset, "validation")
    components = PCA(COMPONENTS, whiten=True, random_state=0).fit(seen)
    discriminant = LinearDiscriminantAnalysis().fit(components.transform(seen), people)
    eigenfaces = components.transform(held_out)
    simple = recognition(_unit(eigenfaces), strangers, gallery)
    return recognition(_unit(discriminant.transform(eigenfaces)), strangers, gallery) | {
        f"eigenfaces_{name}": value for name, value in simple.items()
    }


def _pixels(dataset: Dataset, name: str) -> tuple[np.ndarray, np.ndarray]:
    """(N, values), each between 0 and 1, and who they show (N,)."""
    split = dataset.split(name)
    rows = Rows(split, ("image", "label"), name).gather(np.arange(len(split)))
    return rows["image"][:, ::2, ::2].reshape(len(split), -1) / 255.0, rows["label"]


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
