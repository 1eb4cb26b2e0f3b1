"""A mixture of Gaussians for each class, over principal components of its pixels, from which images are drawn.

As many components as explain 95 % of the variance, COMPONENTS full-covariance Gaussians a class, by scikit-learn.
Judged as the images of a run are (benchmarks/generation.py).
"""

from __future__ import annotations

import numpy as np
from generation import IMAGES_A_CLASS, Judge, flat, real
from sklearn.decomposition import PCA
from sklearn.mixture import GaussianMixture

from configs.schema import RunConfig
from data_pipelines.shards import Dataset

COMPONENTS = 3


def baseline(dataset: Dataset, config: RunConfig) -> dict[str, float]:
    """The judge's figures."""
    images, labels = real(dataset, "train")
    classes = np.unique(labels)
    drawn = np.concatenate([draw(images[labels == number]) for number in classes])
    return Judge(dataset).figures(drawn, classes.repeat(IMAGES_A_CLASS))


def draw(images: np.ndarray) -> np.ndarray:
    """IMAGES_A_CLASS new images like these, uint8 (N, S, S, K)."""
    components = PCA(0.95, svd_solver="full")
    places = components.fit_transform(flat(images))
    mixture = GaussianMixture(COMPONENTS, reg_covar=1e-3, random_state=0).fit(places)
    new, _ = mixture.sample(IMAGES_A_CLASS)
    values = components.inverse_transform(new).clip(0, 1) * 255
    return values.round().astype(np.uint8).reshape(-1, *images.shape[1:])
