"""A Gaussian a class (quadratic discriminant analysis) for each pixel by itself: what it shows, and where it lies.

Its features are the pixel's value, the means of the 3 x 3 and 9 x 9 pixels around it, and its distances from the
picture's middle, up and sideways (a head is nearly symmetric, so the side is left out). scikit-learn 1.9.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from sklearn.discriminant_analysis import QuadraticDiscriminantAnalysis

from configs.plugins import find_plugin
from configs.schema import RunConfig
from data_pipelines.examples import Rows
from data_pipelines.shards import Dataset

SLICES = 8  # at a time
FITTED = 7  # every so many pixels of the training slices are fitted: a Gaussian needs no more


def baseline(dataset: Dataset, config: RunConfig) -> dict[str, float]:
    """The task's own metrics, but for the loss."""
    task = find_plugin("trainer.tasks", config.task.name)
    settings = task.Config(**config.task.settings)
    samples = [(features(image)[::FITTED], mask.ravel()[::FITTED]) for image, mask in slices(dataset, "train")]
    gaussians = QuadraticDiscriminantAnalysis()
    gaussians.fit(*(np.concatenate(each) for each in zip(*samples, strict=True)))
    sums: dict[str, float] = {}
    for image, mask in slices(dataset, "validation"):
        said = torch.from_numpy(gaussians.predict(features(image)).astype(np.int64)).view(mask.shape)
        one_hot = torch.nn.functional.one_hot(said, len(settings.classes)).permute(2, 0, 1)[None].float()
        batch = {"image": torch.from_numpy(image[None]), "mask": torch.from_numpy(mask[None])}
        for name, value in task.evaluate(Said(one_hot), batch, settings).items():
            sums[name] = sums.get(name, 0.0) + value
    return {name: value for name, value in task.metrics(sums, settings, None).items() if name != "loss"}


class Said(torch.nn.Module):
    """A model that has its answer already."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = torch.nn.Parameter(logits, requires_grad=False)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.logits


def slices(dataset: Dataset, split: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Each slice (H, W, 1) and its mask (H, W)."""
    rows = Rows(dataset.split(split), ("image", "mask"), split)
    for start in range(0, len(rows), SLICES):
        arrays = rows.gather(np.arange(start, min(start + SLICES, len(rows))))
        yield from zip(arrays["image"], arrays["mask"], strict=True)


def features(image: np.ndarray) -> np.ndarray:
    """(H, W, 1): (H W, 5)."""
    plane = image[..., 0].astype(np.float64)
    height, width = plane.shape
    down, right = np.mgrid[:height, :width]
    planes = [plane, mean_around(plane, 1), mean_around(plane, 4), down - height / 2, abs(right - width / 2)]
    return np.stack(planes, axis=-1).reshape(-1, len(planes))


def mean_around(plane: np.ndarray, reach: int) -> np.ndarray:
    """The mean of the square of 2 reach + 1 pixels around each pixel."""
    side = 2 * reach + 1
    filled = np.pad(plane, reach, mode="edge")
    return np.lib.stride_tricks.sliding_window_view(filled, (side, side)).mean(axis=(2, 3))
