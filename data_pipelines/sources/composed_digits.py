"""Composed from real digits: MNIST digits pasted on empty canvases, with exact boxes. For trying object detection.

From: the 5,000 digits of data_pipelines/sources/mnist_5k.py (there: provenance, licence). The canvases are composed
here from (seed, number), so they are the same on every machine.
image: grey, CANVAS x CANVAS. boxes: (n, 4) left, top, right, bottom around a digit's ink, in pixels, right and bottom
not included; boxes do not overlap. labels: the digits. A digit is pasted at its own size or twice as large. The
canvases held out are composed of digits that those of the training part do not use.
It does not show: photographs. There is no background, no occlusion, nothing but digits; figures are far above those on
natural images.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from pydantic import Field

from data_pipelines.sources import Bad, Column, Partition, Row, SourceConfig, mnist_5k

NEAR_DUPLICATES_SHARE_A_SPLIT = False  # no text

CANVAS = 96
_PARTITION_IMAGES = 2000
_PLACES_TRIED = 20  # for a digit; then it is left out


class Config(SourceConfig):
    """How many canvases, and what is on them."""

    validation_fraction: float = Field(
        default=0.1, ge=0.0, lt=1.0, description="Share of the digits, and of the canvases, held out for validation."
    )
    num_images: int = Field(default=4000, ge=2, description="How many canvases are composed.")
    max_digits: int = Field(default=5, ge=1, le=9, description="Most digits on a canvas; at least one is.")
    seed: int = Field(default=0, ge=0, description="Seed of the composition.")


def schema(config: Config) -> tuple[Column, ...]:  # noqa: ARG001 - the signature of every source
    """A canvas and its digits."""
    boxes = Column("boxes", "float32", (None, 4))
    return Column("image", "uint8", (CANVAS, CANVAS, 1)), boxes, Column("labels", "int64", (None,))


def partitions(config: Config) -> list[Partition]:
    """Ranges of canvases."""
    starts = range(0, config.num_images, _PARTITION_IMAGES)
    stops = [min(start + _PARTITION_IMAGES, config.num_images) for start in starts]
    return [Partition(f"{start} to {stop}", (), start, stop) for start, stop in zip(starts, stops, strict=True)]


def read(config: Config, partition: Partition) -> Iterator[Row | Bad]:
    """The canvases of the range; of all, the last validation_fraction is held out. Raises as `packages.fetch` does."""
    digits = [(ink(image), label) for image, label in mnist_5k.images()]
    order = np.random.default_rng(config.seed).permutation(len(digits))
    num_digits = len(digits) - round(len(digits) * config.validation_fraction)
    num_images = config.num_images - round(config.num_images * config.validation_fraction)
    for number in range(partition.start or 0, partition.stop or config.num_images):
        split, chosen = ("train", order[:num_digits]) if number < num_images else ("validation", order[num_digits:])
        image, boxes, labels = compose(digits, chosen, config.max_digits, np.random.default_rng((config.seed, number)))
        yield Row(f"{number:06d}", {"image": image, "boxes": boxes, "labels": labels}, split=split)


def ink(image: np.ndarray) -> np.ndarray:
    """The part (h, w) of an image (H, W, 1) that is not empty."""
    rows, columns = np.flatnonzero(image.any(axis=(1, 2))), np.flatnonzero(image.any(axis=(0, 2)))
    return image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1, 0]


def compose(
    digits: list[tuple[np.ndarray, int]], chosen: np.ndarray, max_digits: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A canvas (CANVAS, CANVAS, 1), its boxes (n, 4) and labels (n,), of digits whose numbers are in `chosen`."""
    canvas = np.zeros((CANVAS, CANVAS, 1), np.uint8)
    boxes: list[tuple[int, int, int, int]] = []
    labels: list[int] = []
    for number in rng.choice(chosen, size=rng.integers(1, max_digits, endpoint=True)):
        digit, label = digits[number]
        digit = np.kron(digit, np.ones((rng.integers(1, 2, endpoint=True),) * 2, np.uint8))
        height, width = digit.shape
        for _ in range(_PLACES_TRIED):
            top, left = int(rng.integers(0, CANVAS - height + 1)), int(rng.integers(0, CANVAS - width + 1))
            box = (left, top, left + width, top + height)
            if not any(_overlap(box, other) for other in boxes):
                canvas[top : top + height, left : left + width, 0] = digit
                boxes.append(box)
                labels.append(label)
                break
    return canvas, np.array(boxes, np.float32), np.array(labels, np.int64)


def _overlap(one: tuple[int, int, int, int], other: tuple[int, int, int, int]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def identity(config: Config) -> list[str]:  # noqa: ARG001 - the signature of every source
    """The digits' package; what is composed of them is in the settings."""
    return mnist_5k.PACKAGE.identity
