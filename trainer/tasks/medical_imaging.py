"""Medical imaging: which tissue each pixel of a slice shows (semantic segmentation).

A stored row has `image`, the slice's pixels, uint8 (H, W, K), and `mask`, uint8 (H, W): the number of each pixel's
class, in the order of `classes`; 255 where nobody says. In training a slice may be mirrored, shifted, and its grey
values stretched and lifted at random, seeded by its place in the order of the data.

A batch, B = examples, H = height, W = width, K = channels, N = classes: image (B, H, W, K) uint8; mask (B, H, W) int16,
-100 where a pixel does not count.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from configs.errors import UsageError
from configs.schema import Section
from trainer.parts.cross_entropy import IGNORED
from trainer.parts.labels import ClassWeights, check_class_weights, weights_of
from trainer.pictures import coloured, grid
from trainer.shapes import Image, PixelLogits

if TYPE_CHECKING:
    from data_pipelines.columns import Column

UNKNOWN = 255  # a stored pixel of which nobody says what it is
SHOWN = 6  # slices in a picture
COLOURS = ((214, 69, 65), (65, 131, 215), (244, 208, 63), (38, 166, 91), (155, 89, 182), (230, 126, 34))


class Config(Section):
    """What slices look like to the model, and what their pixels may be."""

    classes: tuple[str, ...] = Field(
        min_length=2,
        description="Names of what a pixel may be, in the order of the mask's numbers; the first is no tissue.",
        examples=[("other", "grey", "white")],
    )
    height: int = Field(ge=8, description="Height of a slice, in pixels.", examples=[16])
    width: int = Field(ge=8, description="Width of a slice, in pixels.", examples=[12])
    channels: int = Field(default=1, ge=1, description="Values a pixel.")
    mean: float = Field(default=0.5, description="Taken from each value, which is between 0 and 1.")
    std: float = Field(default=0.25, gt=0, description="What is left is divided by it.")
    class_weights: ClassWeights | None = Field(
        default=None,
        description="How often a pixel of each class counts in the loss, a mean by these weights; null is once.",
    )
    flip: bool = Field(default=False, description="Mirror a training slice left to right with probability 1/2.")
    shift_px: int = Field(
        default=0, ge=0, description="Shift a training slice by up to so many pixels each way; what is bared is black."
    )
    intensity_jitter: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Stretch a training slice's values by up to this share, and lift them by up to half of it.",
    )

    @model_validator(mode="after")
    def _weights_fit(self) -> Config:
        check_class_weights(self.class_weights, len(self.classes))
        if len(set(self.classes)) < len(self.classes):
            raise ValueError(f"classes={list(self.classes)} names one twice, and metrics carry the names")
        return self


def columns(config: Config) -> tuple[str, ...]:  # noqa: ARG001 - the signature of every task
    """What it reads of a stored row."""
    return ("image", "mask")


def example(config: Config, rng: np.random.Generator) -> dict[str, Any]:
    """Noise, and any class anywhere."""
    plane = config.height, config.width
    return {
        "image": rng.integers(0, 256, (*plane, config.channels)).astype(np.uint8),
        "mask": rng.integers(0, len(config.classes), plane).astype(np.uint8),
    }


def packing(config: Config) -> None:  # noqa: ARG001
    """Examples are rows."""
    return


def io(config: Config) -> tuple[Image, PixelLogits]:
    """A slice in, one logit a class out for each of its pixels."""
    return Image(config.channels, config.height, config.width), PixelLogits(len(config.classes))


def preparation(
    config: Config, stored: Sequence[Column], *, training: bool
) -> Callable[[Mapping[str, Any], np.random.Generator], dict[str, np.ndarray]]:
    """What is done to each row.

    Raises:
        UsageError: the stored slices are not of the configured size.
    """
    plane = config.height, config.width
    for column in stored:
        wanted = {"image": (*plane, config.channels), "mask": plane}.get(column.name)
        if wanted is not None and (column.dtype != "uint8" or tuple(column.shape) != wanted):
            raise UsageError(
                f"The data set's column '{column.name}' is {column.dtype} of shape {tuple(column.shape)}; the task "
                f"wants uint8 of shape {wanted}. Set task.height, task.width and task.channels to what is stored."
            )
    return partial(_prepare, config=config, training=training)


def _prepare(
    row: Mapping[str, Any], rng: np.random.Generator, *, config: Config, training: bool
) -> dict[str, np.ndarray]:
    image, mask = np.asarray(row["image"]), np.asarray(row["mask"]).astype(np.int16)
    mask[mask == UNKNOWN] = IGNORED
    if training and config.flip and rng.random() < 0.5:
        image, mask = image[:, ::-1], mask[:, ::-1]
    if training and config.shift_px:
        down, right = rng.integers(-config.shift_px, config.shift_px + 1, 2).tolist()
        image, mask = _shift(image, down, right), _shift(mask, down, right)
    if training and config.intensity_jitter:
        stretch, lift = config.intensity_jitter * rng.uniform(-1, 1, 2)
        values = image * (1 + stretch) + 255 * lift / 2
        image = np.where(image == 0, 0, values.clip(0, 255).round()).astype(np.uint8)  # outside the head it stays dark
    return {"image": np.ascontiguousarray(image), "mask": np.ascontiguousarray(mask)}


def _shift(plane: np.ndarray, down: int, right: int) -> np.ndarray:
    """The plane moved by so many pixels; what is bared is 0: black, and no tissue."""
    shifted = np.zeros_like(plane)
    height, width = plane.shape[:2]
    into = slice(max(down, 0), height + min(down, 0)), slice(max(right, 0), width + min(right, 0))
    out_of = slice(max(-down, 0), height + min(-down, 0)), slice(max(-right, 0), width + min(-right, 0))
    shifted[into] = plane[out_of]
    return shifted


def check(batch: Mapping[str, Tensor], config: Config) -> None:
    """Raises UsageError for a pixel that is none of the classes."""
    mask = batch["mask"]
    wrong = mask[(mask != IGNORED) & ((mask < 0) | (mask >= len(config.classes)))]
    if len(wrong):
        raise UsageError(
            f"A pixel has the class {int(wrong[0])}, but task.classes names {len(config.classes)}: "
            f"0 to {len(config.classes) - 1}, and {UNKNOWN} for a pixel that does not count. Name every class there."
        )


def num_items(batch: Mapping[str, Tensor]) -> int:
    """Pixels that count."""
    return int((batch["mask"] != IGNORED).sum())


def total_weight(batch: Mapping[str, Tensor], config: Config) -> float:
    """Pixels that count, each by the weight of its class."""
    weights = weights_of(batch["mask"].to(torch.int64), config.class_weights)
    return float(num_items(batch)) if weights is None else float(weights.double().sum())


def idle(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The batch with no pixel that counts: its loss is zero, and so is every gradient."""
    return {**batch, "mask": torch.full_like(batch["mask"], IGNORED)}


def loss(model: nn.Module, batch: Mapping[str, Tensor], config: Config) -> Tensor:
    """Sum of -log p(class) in nats, each pixel's times the weight of its class: an fp32 scalar."""
    return _summed(_logits(model, batch["image"], config), batch["mask"].to(torch.int64), config)


def evaluate(model: nn.Module, batch: Mapping[str, Tensor], config: Config) -> dict[str, float]:
    """Sums over the pixels that count.

    weighted_nll_nats, pixels, correct; and of each class how many it has, how many it is said of, and how many of both.
    """
    mask = batch["mask"].to(torch.int64)
    logits = _logits(model, batch["image"], config)
    counts = mask != IGNORED
    said = logits.argmax(1)
    sums = {
        "weighted_nll_nats": float(_summed(logits, mask, config)),
        "pixels": float(counts.sum()),
        "correct": float((said == mask).sum()),
    }
    for number, name in enumerate(config.classes):
        sums[f"true/{name}"] = float((mask == number).sum())
        sums[f"said/{name}"] = float(((said == number) & counts).sum())
        sums[f"both/{name}"] = float(((said == number) & (mask == number)).sum())
    return sums


def metrics(sums: Mapping[str, float], config: Config, split: Any) -> dict[str, float]:  # noqa: ARG001
    """loss (nats a pixel, weighted), accuracy, the Dice coefficient of each tissue, and their mean, `dice`.

    A tissue's is 2 |A and B| / (|A| + |B|) (Dice 1945), where A are all its pixels in the split and B all that are said
    to be: one of the whole volume, and no mean over slices. One that is neither there nor said has none.
    """
    if not sums.get("pixels"):
        return {}
    found = {"loss": sums["weighted_nll_nats"] / sums["pixels"], "accuracy": sums["correct"] / sums["pixels"]}
    dice = {}
    for name in config.classes[1:]:
        if size := sums[f"true/{name}"] + sums[f"said/{name}"]:
            dice[f"dice_{name}"] = 2 * sums[f"both/{name}"] / size
    return found | dice | ({"dice": sum(dice.values()) / len(dice)} if dice else {})


def pictures(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    config: Config,
    tokenizer: Any,  # noqa: ARG001
    seed: int,  # noqa: ARG001
) -> dict[str, np.ndarray]:
    """A row of three for each slice: itself, its tissues as they are, and as the model says."""
    said = _logits(model, batch["image"], config).argmax(1).cpu().numpy()
    shown = []
    for image, mask, guess in zip(batch["image"].cpu().numpy(), batch["mask"].cpu().numpy(), said, strict=True):
        grey = coloured(image if config.channels in (1, 3) else image[..., :1])
        shown += [grey, _painted(grey, mask), _painted(grey, guess)]
    return {"segmentation": grid(shown[: 3 * SHOWN], columns=3)}


def _painted(slice_: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """The slice (H, W, 3) with each tissue's pixels half in its colour."""
    painted = slice_.copy()
    for number in range(1, int(classes.max(initial=0)) + 1):
        there = classes == number
        painted[there] = (painted[there] // 2) + np.array(COLOURS[(number - 1) % len(COLOURS)], np.uint8) // 2
    return painted


def _summed(logits: Tensor, mask: Tensor, config: Config) -> Tensor:
    """logits (B, N, H, W), mask (B, H, W) int64."""
    values = logits.float()
    weight = None if config.class_weights is None else values.new_tensor(config.class_weights)
    return F.cross_entropy(values, mask, weight, ignore_index=IGNORED, reduction="sum")


def _logits(model: nn.Module, image: Tensor, config: Config) -> Tensor:
    """(B, H, W, K) uint8: (B, N, H, W)."""
    values = (image.permute(0, 3, 1, 2).float() / 255 - config.mean) / config.std
    return model(values.contiguous().to(next(model.parameters()).dtype))
