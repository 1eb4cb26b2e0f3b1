"""Object detection: boxes around the objects of a picture, and the class of each.

A stored row has `image`, uint8 (S, S, C); `boxes`, float32 (n, 4): left, top, right, bottom in pixels, right and bottom
not included; and `labels`, int64 (n,), the class of each. In training a picture may be shifted (as far as no box is
cut), mirrored and turned at random, its boxes with it.

A batch, B = examples, S = image_size, C = channels, M = most boxes of a picture: image (B, S, S, C) uint8; boxes
(B, M, 4) and labels (B, M), padded; boxes_length (B,) int32, how many there are, -1 for a picture that does not count.

The model says for each cell of its grid (trainer/shapes.py, Boxes) what it finds. A cell's truth follows Tian et al.
2019 (FCOS): the smallest of the boxes whose middle it is near. The loss sums, over cells: the focal loss of the classes
(Lin et al. 2017); where there is a box, 1 - generalised IoU, and the binary cross-entropy of how central the cell is.
An item is a true box, so the mean is per box.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from configs.errors import UsageError
from configs.schema import Section
from trainer.parts.average_precision import MOST_FOUND, mean_average_precision
from trainer.parts.boxes import generalized_iou, suppress
from trainer.pictures import coloured, enlarged, grid, outline
from trainer.shapes import Boxes, Image

if TYPE_CHECKING:
    from data_pipelines.columns import Column

RAGGED = {"boxes": 1, "labels": 1}
NOT_COUNTED = -1
MIDDLE = 1.5  # cells from a box's middle, in both directions, within which cells are to find it
ALPHA, GAMMA = 0.25, 2.0  # of the focal loss: weight of what is there, and how little the easy cells count
MIN_SCORE, CANDIDATES = 0.05, 300  # what suppression looks at, a picture
SHOWN_SCORE, SHOWN_PICTURES, SMALL_PX = 0.5, 16, 128
TRUE_COLOUR, FOUND_COLOUR = (0, 220, 0), (255, 40, 40)


class Config(Section):
    """What pictures look like to the model, and what is to be found in them."""

    num_classes: int = Field(ge=1, description="Classes; labels are 0 to num_classes - 1.", examples=[10])
    image_size: int = Field(ge=8, description="Height and width of the pictures, in pixels.", examples=[32])
    channels: int = Field(default=3, ge=1, description="Values a pixel: 3 for colour, 1 for grey.")
    mean: float = Field(default=0.5, description="Taken from each value, which is between 0 and 1.")
    std: float = Field(default=0.25, gt=0, description="What is left is divided by it.")
    shift_px: int = Field(
        default=0, ge=0, description="Shift a training picture by up to so many pixels each way, cutting no box."
    )
    flip: bool = Field(default=False, description="Mirror a training picture left to right with probability 1/2.")
    turn: bool = Field(
        default=False, description="Turn a training picture by 0 to 3 right angles: for what is seen from above."
    )
    max_iou: float = Field(
        default=0.5, gt=0, le=1, description="Of two finds of a class that overlap by more, the likelier one is kept."
    )


def columns(config: Config) -> tuple[str, ...]:  # noqa: ARG001 - the signature of every task
    """What it reads of a stored row."""
    return ("image", "boxes", "labels")


def example(config: Config, rng: np.random.Generator) -> dict[str, Any]:
    """Noise with one to three boxes anywhere, of any class."""
    size, count = config.image_size, int(rng.integers(1, 4))
    low = rng.integers(0, size - 4, (count, 2))
    high = np.minimum(low + rng.integers(3, size // 2, (count, 2)), size)
    return {
        "image": rng.integers(0, 256, (size, size, config.channels)).astype(np.uint8),
        "boxes": np.concatenate([low, high], axis=1).astype(np.float32),
        "labels": rng.integers(config.num_classes, size=count),
    }


def packing(config: Config) -> None:  # noqa: ARG001
    """Examples are rows."""
    return


def io(config: Config) -> tuple[Image, Boxes]:
    """A picture in, a grid of finds out."""
    return Image(config.channels, config.image_size, config.image_size), Boxes(config.num_classes)


def preparation(
    config: Config, stored: Sequence[Column], *, training: bool
) -> Callable[[Mapping[str, Any], np.random.Generator], dict[str, np.ndarray]] | None:
    """What is done to each row; None where the stored columns are a batch already.

    Raises:
        UsageError: the stored pictures are not of the configured size.
    """
    image = next(column for column in stored if column.name == "image")
    wanted = (config.image_size, config.image_size, config.channels)
    if image.dtype != "uint8" or tuple(image.shape) != wanted:
        raise UsageError(
            f"The data set's pictures are {image.dtype} of shape {tuple(image.shape)}; the task wants uint8 of shape "
            f"{wanted}. Set task.image_size and task.channels to what is stored, or use a source of that size."
        )
    if training and (config.shift_px or config.flip or config.turn):
        return partial(_prepare, config=config)
    return None


def _prepare(row: Mapping[str, Any], rng: np.random.Generator, *, config: Config) -> dict[str, np.ndarray]:
    image, boxes, size = np.asarray(row["image"]), np.asarray(row["boxes"]), config.image_size
    if config.shift_px and len(boxes):
        low, high = np.floor(boxes[:, :2].min(0)), np.floor(size - boxes[:, 2:].max(0))  # (2,) right and down
        right, down = (
            int(rng.integers(-min(config.shift_px, int(least)), min(config.shift_px, int(most)), endpoint=True))
            for least, most in zip(low, high, strict=True)
        )
        padded = np.pad(image, ((max(down, 0), max(-down, 0)), (max(right, 0), max(-right, 0)), (0, 0)))
        image = padded[max(-down, 0) :, max(-right, 0) :][:size, :size]
        boxes = boxes + np.array([right, down, right, down], np.float32)
    if config.flip and rng.random() < 0.5:
        image = image[:, ::-1]
        boxes = np.stack([size - boxes[:, 2], boxes[:, 1], size - boxes[:, 0], boxes[:, 3]], axis=1)
    if config.turn:
        quarters = int(rng.integers(4))
        image = np.rot90(image, quarters)  # anticlockwise
        for _ in range(quarters):
            boxes = np.stack([boxes[:, 1], size - boxes[:, 2], boxes[:, 3], size - boxes[:, 0]], axis=1)
    return {"image": np.ascontiguousarray(image), "boxes": boxes, "labels": np.asarray(row["labels"])}


def check(batch: Mapping[str, Tensor], config: Config) -> None:
    """Raises UsageError for a label that is none of the classes, and for a box without an inside."""
    there = torch.arange(batch["labels"].shape[1]) < batch["boxes_length"].unsqueeze(1)
    labels, boxes = batch["labels"][there], batch["boxes"][there]
    wrong = labels[(labels < 0) | (labels >= config.num_classes)]
    if len(wrong):
        raise UsageError(
            f"A box has the label {int(wrong[0])}, but task.num_classes={config.num_classes} allows 0 to "
            f"{config.num_classes - 1}. Set task.num_classes to the number of classes in the data."
        )
    hollow = boxes[~(boxes[:, 2:] > boxes[:, :2]).all(1)]
    if len(hollow):
        raise UsageError(
            f"A box is {hollow[0].tolist()} (left, top, right, bottom): its right has to be beyond its left, and its "
            "bottom below its top. Mend it or take it out of the data."
        )


def num_items(batch: Mapping[str, Tensor]) -> int:
    """True boxes of the pictures that count."""
    return int(batch["boxes_length"].clamp(min=0).sum())


def idle(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The batch with no picture that counts: its loss is zero, and so is every gradient."""
    return {**batch, "boxes_length": torch.full_like(batch["boxes_length"], NOT_COUNTED)}


def loss(model: nn.Module, batch: Mapping[str, Tensor], config: Config) -> Tensor:
    """Sum over the cells of the pictures that count: an fp32 scalar."""
    counts = batch["boxes_length"] >= 0
    output = _output(model, batch["image"], config)[counts].flatten(1, 2)  # (B, cells, N + 5)
    logits, sides, centre_logits = output.split([config.num_classes, 4, 1], dim=2)
    boxes = batch["boxes"][counts].float()
    centres = _centres(output.shape[1], config, output.device)
    owner = assign(centres, boxes, batch["boxes_length"][counts])  # (B, cells)
    picture, cell = (owner >= 0).nonzero(as_tuple=True)  # (P,): the cells with a box
    box = owner[picture, cell]

    classes = torch.zeros_like(logits)
    classes[picture, cell, batch["labels"][counts][picture, box].to(torch.int64)] = 1.0
    truth = boxes[picture, box]  # (P, 4)
    found = _corners(centres[cell], sides[picture, cell])
    central = F.binary_cross_entropy_with_logits(
        centre_logits[picture, cell].squeeze(1), centrality(centres[cell], truth), reduction="sum"
    )
    return focal_loss(logits, classes) + (1 - generalized_iou(found, truth)).sum() + central


def assign(centres: Tensor, boxes: Tensor, lengths: Tensor) -> Tensor:
    """The number of the box that each cell is to find, or -1: (B, cells) int64.

    centres (cells, 2), of a square grid; boxes (B, M, 4), of which the first lengths (B,) are there. A cell may find
    the boxes that its centre lies in, no further than MIDDLE cells from their middle, and those whose middle lies in
    it, which no narrow box escapes; of several the smallest.
    """
    pictures, most = boxes.shape[:2]
    if not most:
        return torch.full((pictures, len(centres)), -1, device=boxes.device)
    pitch = 2 * centres[0, 0]  # pixels a cell
    low, high = boxes[:, None, :, :2], boxes[:, None, :, 2:]  # (B, 1, M, 2)
    inside = ((low < centres[:, None]) & (centres[:, None] < high)).all(-1)  # (B, cells, M)
    away = ((low + high) / 2 - centres[:, None]) / pitch  # in cells
    near = inside & (away.abs() <= MIDDLE).all(-1)
    holds = ((away >= -0.5) & (away < 0.5)).all(-1)
    there = torch.arange(most, device=boxes.device) < lengths[:, None, None]
    areas = (high - low).prod(-1).masked_fill(~((near | holds) & there), torch.inf)  # (B, cells, M)
    smallest, owner = areas.min(-1)
    return owner.masked_fill(smallest.isinf(), -1)


def centrality(centres: Tensor, boxes: Tensor) -> Tensor:
    """How central (P, 2) points are in their boxes (P, 4): 1 in the middle, 0 at the edge and beyond; (P,)."""
    before, after = (centres - boxes[:, :2]).clamp(min=0), (boxes[:, 2:] - centres).clamp(min=0)
    return (torch.minimum(before, after) / torch.maximum(before, after)).prod(-1).sqrt()


def focal_loss(logits: Tensor, truth: Tensor) -> Tensor:
    """Sum of the binary cross-entropies of logits with 0 or 1, those that are small already made smaller."""
    surprise = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    probability = logits.sigmoid()
    wrong = truth * (1 - probability) + (1 - truth) * probability
    weight = truth * ALPHA + (1 - truth) * (1 - ALPHA)
    return (weight * wrong**GAMMA * surprise).sum()


def evaluate(model: nn.Module, batch: Mapping[str, Tensor], config: Config) -> dict[str, float]:
    """Sums over the pictures that count: loss, and boxes, how many true ones there are."""
    return {"loss": float(loss(model, batch, config)), "boxes": float(num_items(batch))}


def metrics(sums: Mapping[str, float], config: Config, split: Any) -> dict[str, float]:  # noqa: ARG001
    """loss, a box; nothing where there was none."""
    return {"loss": sums["loss"] / sums["boxes"]} if sums.get("boxes") else {}


def predict(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    config: Config,
    tokenizer: Any,  # noqa: ARG001
) -> list[dict[str, Any]]:
    """Of each picture that counts: found, [left, top, right, bottom, label, score] each; truth, the same less score."""
    rows = []
    for output, boxes, labels, length in zip(
        _output(model, batch["image"], config), batch["boxes"], batch["labels"], batch["boxes_length"], strict=True
    ):
        if length >= 0:
            truth = [[*box, label] for box, label in zip(boxes[:length].tolist(), labels.tolist(), strict=False)]
            rows.append({"found": finds(output, config), "truth": truth})
    return rows


def finds(output: Tensor, config: Config) -> list[list[float]]:
    """What a picture's output (R, R, N + 5) says is there, the likeliest first: left, top, right, bottom, label, score.

    A score is the geometric mean of the class's probability and the centrality.
    """
    logits, sides, centre_logits = output.flatten(0, 1).split([config.num_classes, 4, 1], dim=1)
    scores = (logits.sigmoid() * centre_logits.sigmoid()).sqrt().flatten()  # (cells * N,)
    scores, order = scores.topk(min(CANDIDATES, len(scores)))
    order = order[scores > MIN_SCORE]
    scores, cells, labels = scores[: len(order)], order // config.num_classes, order % config.num_classes
    centres = _centres(len(logits), config, output.device)
    boxes = _corners(centres[cells], sides[cells]).clamp(0, config.image_size)  # (k, 4)
    kept = suppress(boxes, scores, labels, config.max_iou)[:MOST_FOUND]
    rows = zip(boxes[kept].tolist(), labels[kept].tolist(), scores[kept].tolist(), strict=True)
    return [[*box, label, score] for box, label, score in rows]


def scores(predictions: Sequence[Mapping[str, Any]], config: Config) -> dict[str, float]:  # noqa: ARG001
    """map_50 and map_50_95, as trainer/parts/average_precision.py says; nothing where there is no true box."""
    return mean_average_precision([row["truth"] for row in predictions], [row["found"] for row in predictions])


def pictures(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    config: Config,
    tokenizer: Any,  # noqa: ARG001
    seed: int,  # noqa: ARG001
) -> dict[str, np.ndarray]:
    """detections: the first pictures of the batch, with true boxes in green, and in red what the model finds."""
    few = {name: tensor[:SHOWN_PICTURES] for name, tensor in batch.items()}
    times = max(1, SMALL_PX // config.image_size)
    sheet = []
    for image, output, boxes, length in zip(
        few["image"], _output(model, few["image"], config), few["boxes"], few["boxes_length"], strict=True
    ):
        picture = enlarged(coloured(image.cpu().numpy()), times)
        for box in boxes[: max(length, 0)].tolist():
            outline(picture, [side * times for side in box], TRUE_COLOUR)
        for *box, _, score in finds(output, config):
            if score >= SHOWN_SCORE:
                outline(picture, [side * times for side in box], FOUND_COLOUR)
        sheet.append(picture)
    return {"detections": grid(sheet, columns=4)}


def _output(model: nn.Module, image: Tensor, config: Config) -> Tensor:
    """(B, S, S, C) uint8: (B, R, R, N + 5) fp32."""
    values = (image.permute(0, 3, 1, 2).float() / 255 - config.mean) / config.std
    return model(values.contiguous().to(next(model.parameters()).dtype)).float()


def _centres(cells: int, config: Config, device: torch.device) -> Tensor:
    """Of the cells of a square grid, row after row: (cells, 2) pixels to the right and down."""
    rows = round(cells**0.5)
    places = (torch.arange(rows, device=device) + 0.5) * (config.image_size / rows)
    down, right = torch.meshgrid(places, places, indexing="ij")
    return torch.stack([right, down], dim=-1).flatten(0, 1)


def _corners(centres: Tensor, sides: Tensor) -> Tensor:
    """Boxes (P, 4) from points (P, 2) and the distances of the sides from them (P, 4)."""
    return torch.cat([centres - sides[:, :2], centres + sides[:, 2:]], dim=1)
