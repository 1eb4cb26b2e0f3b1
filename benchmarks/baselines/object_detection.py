"""Classical detectors, by the same measure (the task's `scores`) and from the same held-out pictures.

composed_digits: each connected component of the ink is a find. A support vector machine (RBF kernel, C = 10), fitted to
the true boxes of the training pictures scaled to 20 x 20, names the digit; how far its best class leads is the score.
tree_boxes: a logistic regression on a pixel's colours, smoothed to several scales, says how likely it is in the middle
of a tree; each local maximum is the middle of a box of the training trees' median size, and its height is the score.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy import ndimage
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

from configs.schema import RunConfig
from data_pipelines.shards import Dataset
from trainer.tasks import object_detection

GLYPH_PX = 20
LEAST_INK_PX = 12  # of a component: less is a speck
SCALES_PX = (2, 5, 10, 20)  # to which colours are smoothed
EACH_PX = 8  # of the training pictures, every eighth pixel each way is enough


def baseline(dataset: Dataset, config: RunConfig) -> dict[str, float]:
    """map_50 and map_50_95 on the held-out pictures."""
    find = _digit_finder(dataset) if config.data.name == "composed_digits" else _tree_finder(dataset)
    predictions = []
    for row in dataset.rows("validation"):
        truth = [[*box, label] for box, label in zip(row["boxes"].tolist(), row["labels"].tolist(), strict=True)]
        predictions.append({"found": find(row["image"]), "truth": truth})
    return object_detection.scores(predictions, object_detection.Config(**config.task.settings))


def _digit_finder(dataset: Dataset) -> Any:
    glyphs, labels = [], []
    for row in dataset.rows("train"):
        for (left, top, right, bottom), label in zip(row["boxes"].astype(int), row["labels"], strict=True):
            glyphs.append(_glyph(row["image"][top:bottom, left:right, 0]))
            labels.append(label)
    machine = SVC(C=10.0, gamma="scale").fit(np.stack(glyphs), labels)

    def find(image: np.ndarray) -> list[list[float]]:
        ink = image[:, :, 0]
        components, _ = ndimage.label(ink, structure=np.ones((3, 3)))
        found = []
        for place in ndimage.find_objects(components):
            if np.count_nonzero(ink[place]) >= LEAST_INK_PX:
                votes = np.sort(machine.decision_function(_glyph(ink[place])[None])[0])
                label = machine.predict(_glyph(ink[place])[None])[0]
                down, right = place
                found.append([right.start, down.start, right.stop, down.stop, int(label), float(votes[-1] - votes[-2])])
        return found

    return find


def _glyph(ink: np.ndarray) -> np.ndarray:
    """(h, w) of any size, its longer side scaled to GLYPH_PX and in the middle of a square: (GLYPH_PX^2,), 0 to 1."""
    scaled = ndimage.zoom(ink / 255.0, GLYPH_PX / max(ink.shape), order=1)[:GLYPH_PX, :GLYPH_PX]
    height, width = scaled.shape
    glyph = np.zeros((GLYPH_PX, GLYPH_PX))
    top, left = (GLYPH_PX - height) // 2, (GLYPH_PX - width) // 2
    glyph[top : top + height, left : left + width] = scaled
    return glyph.ravel()


def _tree_finder(dataset: Dataset) -> Any:
    colours, in_middle, sizes = [], [], []
    for row in dataset.rows("train"):
        colours.append(_colours(row["image"])[::EACH_PX, ::EACH_PX].reshape(-1, 3 * len(SCALES_PX)))
        in_middle.append(_middles(row["boxes"], row["image"].shape)[::EACH_PX, ::EACH_PX].ravel())
        sizes.append(row["boxes"][:, 2:] - row["boxes"][:, :2])
    width, height = np.median(np.concatenate(sizes), axis=0)
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    model.fit(np.concatenate(colours), np.concatenate(in_middle))

    def find(image: np.ndarray) -> list[list[float]]:
        pixels = _colours(image).reshape(-1, 3 * len(SCALES_PX))
        likely = ndimage.gaussian_filter(model.predict_proba(pixels)[:, 1].reshape(image.shape[:2]), 4)
        found = []
        for down, right in np.argwhere(likely == ndimage.maximum_filter(likely, int(min(width, height) / 2))).tolist():
            corners = np.array([right - width / 2, down - height / 2, right + width / 2, down + height / 2])
            box = corners.clip(0, [image.shape[1], image.shape[0]] * 2).tolist()
            found.append([*box, 0, float(likely[down, right])])
        return found

    return find


def _colours(image: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8: (H, W, 3 * scales)."""
    pixels = image.astype(np.float32) / 255
    return np.concatenate([ndimage.gaussian_filter(pixels, (scale, scale, 0)) for scale in SCALES_PX], axis=2)


def _middles(boxes: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """(H, W): whether a pixel is in the inner half of a box, by width and height."""
    mask = np.zeros(shape[:2], bool)
    for left, top, right, bottom in boxes.tolist():
        wide, high = (right - left) / 4, (bottom - top) / 4
        mask[int(top + high) : int(bottom - high) + 1, int(left + wide) : int(right - wide) + 1] = True
    return mask
