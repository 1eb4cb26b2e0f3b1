"""Image classification: which of `num_classes` an image shows.

A stored row has `image`, either a file as it was found (binary) or its pixels, uint8 (H, W, C), and `label`, the number
of its class. Files are decoded, scaled and cut to `image_size`; pixels are taken as they are and must have that size.
In training an image may be shifted, mirrored and overlaid with noise at random, seeded by its place in the order of the
data.

A batch, B = examples, S = image_size, C = channels: image (B, S, S, C) uint8; label (B,) int64, -100 where it does not
count.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from configs.errors import RunFailed, UsageError
from data_pipelines.images import pixels_of
from trainer.parts.cross_entropy import IGNORED, summed_cross_entropy
from trainer.parts.labels import Classes, check_labels, total_weight, weights_of  # noqa: F401 - parts of the task
from trainer.parts.pixels import check_pixels
from trainer.shapes import ClassLogits, Image

if TYPE_CHECKING:
    from data_pipelines.columns import Column


class Config(Classes):
    """What images look like to the model, and how many classes there are."""

    image_size: int = Field(ge=8, description="Height and width that the model sees, in pixels.", examples=[32])
    channels: int = Field(default=3, ge=1, description="Values a pixel: 3 for colour, 1 for grey.")
    mean: float = Field(default=0.5, description="Taken from each value, which is between 0 and 1.")
    std: float = Field(default=0.25, gt=0, description="What is left is divided by it.")
    flip: bool = Field(default=False, description="Mirror a training image left to right with probability 1/2.")
    shift_px: int = Field(
        default=0, ge=0, description="Shift a training image by up to so many pixels each way; what is bared is black."
    )
    noise: float = Field(
        default=0.0, ge=0, description="Standard deviation of what is added to the values of a training image, 0 to 1."
    )
    label_smoothing: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Share of a label's probability spread over all classes, in training alone (Szegedy et al. 2016).",
    )


def columns(config: Config) -> tuple[str, ...]:  # noqa: ARG001 - the signature of every task
    """What it reads of a stored row."""
    return ("image", "label")


def example(config: Config, rng: np.random.Generator) -> dict[str, Any]:
    """Noise, and any class."""
    shape = (config.image_size, config.image_size, config.channels)
    image = rng.integers(0, 256, shape).astype(np.uint8)
    return {"image": image, "label": np.int64(rng.integers(config.num_classes))}


def packing(config: Config) -> None:  # noqa: ARG001
    """Examples are rows."""
    return


def io(config: Config) -> tuple[Image, ClassLogits]:
    """An image in, one logit a class out."""
    return Image(config.channels, config.image_size, config.image_size), ClassLogits(config.num_classes)


def preparation(
    config: Config, stored: Sequence[Column], *, training: bool
) -> Callable[[Mapping[str, Any], np.random.Generator], dict[str, np.ndarray]] | None:
    """What is done to each row; None where the stored columns are a batch already.

    Raises:
        UsageError: the stored images are not of the configured size, or cannot be decoded to it.
    """
    image = next(column for column in stored if column.name == "image")
    encoded = image.dtype == "binary"
    if encoded and config.channels not in (1, 3, 4):
        raise UsageError(f"task.channels={config.channels}: image files are decoded to 1, 3 or 4 values a pixel.")
    if not encoded:
        check_pixels(image, config.image_size, config.channels)
    if encoded or (training and (config.flip or config.shift_px or config.noise)):
        return partial(_prepare, config=config, encoded=encoded, training=training)
    return None


def _prepare(
    row: Mapping[str, Any], rng: np.random.Generator, *, config: Config, encoded: bool, training: bool
) -> dict[str, np.ndarray]:
    image = _decode(row["image"], config) if encoded else np.asarray(row["image"])
    if training and config.shift_px:
        down, right = rng.integers(-config.shift_px, config.shift_px + 1, 2).tolist()
        image = _shift(image, down, right)
    if training and config.flip and rng.random() < 0.5:
        image = image[:, ::-1]
    if training and config.noise:
        noisy = image + rng.normal(0.0, 255 * config.noise, image.shape)
        image = noisy.round().clip(0, 255).astype(np.uint8)
    return {"image": np.ascontiguousarray(image), "label": np.asarray(row["label"])}


def _decode(encoded: Any, config: Config) -> np.ndarray:
    """Pixels of an image file, (S, S, C) uint8."""
    try:
        return pixels_of(bytes(encoded), config.image_size, config.channels)
    except ValueError as error:
        raise RunFailed(
            f"An image of the data {error}. Take it out, or let the build find such images: set data.check=true."
        ) from error


def _shift(image: np.ndarray, down: int, right: int) -> np.ndarray:
    """The image moved by so many pixels."""
    shifted = np.zeros_like(image)
    height, width = image.shape[:2]
    into = slice(max(down, 0), height + min(down, 0)), slice(max(right, 0), width + min(right, 0))
    out_of = slice(max(-down, 0), height + min(-down, 0)), slice(max(-right, 0), width + min(-right, 0))
    shifted[into] = image[out_of]
    return shifted


def check(batch: Mapping[str, Tensor], config: Config) -> None:
    """Raises UsageError for a label that is none of the classes."""
    check_labels("An example", batch["label"], config.num_classes)


def num_items(batch: Mapping[str, Tensor]) -> int:
    """Images that count."""
    return int((batch["label"] != IGNORED).sum())


def idle(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The batch with no label that counts: its loss is zero, and so is every gradient."""
    return {**batch, "label": torch.full_like(batch["label"], IGNORED)}


def loss(model: nn.Module, batch: Mapping[str, Tensor], config: Config) -> Tensor:
    """Sum of -log p(label) in nats, the label smoothed and weighted: an fp32 scalar."""
    logits, labels = _logits(model, batch["image"], config), batch["label"].to(torch.int64)
    return summed_cross_entropy(logits, labels, config.label_smoothing, weights_of(labels, config.class_weights))


def evaluate(model: nn.Module, batch: Mapping[str, Tensor], config: Config) -> dict[str, float]:
    """Sums over the images that count: nll_nats, images, and correct (those whose class was the likeliest)."""
    labels = batch["label"].to(torch.int64)
    logits = _logits(model, batch["image"], config)  # (B, N)
    correct = (logits.argmax(-1) == labels).sum()
    return {
        "nll_nats": float(summed_cross_entropy(logits, labels)),
        "images": float((labels != IGNORED).sum()),
        "correct": float(correct),
    }


def metrics(sums: Mapping[str, float], config: Config, split: Any) -> dict[str, float]:  # noqa: ARG001
    """loss (nats an image) and accuracy; nothing where no image counted."""
    if not sums.get("images"):
        return {}
    return {"loss": sums["nll_nats"] / sums["images"], "accuracy": sums["correct"] / sums["images"]}


def _logits(model: nn.Module, image: Tensor, config: Config) -> Tensor:
    """(B, S, S, C) uint8: (B, N)."""
    values = (image.permute(0, 3, 1, 2).float() / 255 - config.mean) / config.std
    return model(values.contiguous().to(next(model.parameters()).dtype))
