"""Face recognition: photos become directions that lie near each other where they show the same person.

The model learns to tell `num_people` people apart, by the loss ArcFace (Deng et al. 2019), and is judged by people whom
it has never seen: what it learned of their faces is nothing but the embedding.

A stored row has `image`, uint8 (H, W, C) of any size, and `label`, the number of the person: below `num_people` in what
is trained on, any number in what is held out (data_pipelines/sources/orl_faces.py holds out whole people). Photos are
scaled to `height` x `width`; in training one may be shifted and mirrored, seeded by its place in the order of the data.

How it is judged, on the photos of an evaluation in their order:
rank_1: the first `gallery` photos of each person are known, the others (probes) are asked for: the share of them whose
  nearest known photo, by cosine, shows the same person.
rank_1_single: the same with one known photo a person: with their first ones, then with their second ones, and so on;
  the mean of all.
eer: of all pairs of photos, told to be of one person where their cosine passes a threshold: the error rate where as
  many pairs of one person are rejected as pairs of two people accepted.

A batch, B = examples, H, W = height and width, C = channels: image (B, H, W, C) uint8; label (B,) int64, -100 where it
does not count. P = people.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from configs.errors import UsageError
from configs.schema import Section
from trainer.parts.cross_entropy import IGNORED, summed_cross_entropy
from trainer.pictures import coloured, grid, outline
from trainer.shapes import Embedding, Image

if TYPE_CHECKING:
    from data_pipelines.columns import Column

SHOWN = 12  # probes in the picture
RIGHT, WRONG = (0, 200, 0), (220, 0, 0)


class Config(Section):
    """What photos look like to the model, what it learns from them, and how it is judged."""

    num_people: int = Field(ge=2, description="People trained on; their labels are 0 to num_people - 1.", examples=[5])
    height: int = Field(ge=8, description="Pixels that the model sees, from top to bottom.", examples=[16])
    width: int = Field(ge=8, description="And from left to right.", examples=[16])
    channels: int = Field(default=1, ge=1, description="Values a pixel: 3 for colour, 1 for grey.")
    embedding_size: int = Field(ge=2, description="Values of a photo's direction.", examples=[8])
    margin: float = Field(
        default=0.5, ge=0, lt=math.pi / 2, description="Radians by which a person's own direction has to be nearer."
    )
    scale: float = Field(default=32.0, gt=0, description="What cosines are multiplied with, to be logits.")
    gallery: int = Field(default=5, ge=1, description="Photos of each held-out person that are known.")
    flip: bool = Field(default=False, description="Mirror a training photo left to right with probability 1/2.")
    shift_px: int = Field(
        default=0, ge=0, description="Shift a training photo by up to so many pixels each way; its edge is repeated."
    )


def columns(config: Config) -> tuple[str, ...]:  # noqa: ARG001 - the signature of every task
    """What it reads of a stored row."""
    return ("image", "label")


def example(config: Config, rng: np.random.Generator) -> dict[str, Any]:
    """Noise, a little larger than what the model sees, and anyone."""
    shape = (config.height + 4, config.width + 2, config.channels)
    image = rng.integers(0, 256, shape).astype(np.uint8)
    return {"image": image, "label": np.int64(rng.integers(config.num_people))}


def packing(config: Config) -> None:  # noqa: ARG001
    """Examples are rows."""
    return


def io(config: Config) -> tuple[Image, Embedding]:
    """A photo in; its direction, and how near each person's is, out."""
    return Image(config.channels, config.height, config.width), Embedding(config.embedding_size, config.num_people)


def preparation(
    config: Config, stored: Sequence[Column], *, training: bool
) -> Callable[[Mapping[str, Any], np.random.Generator], dict[str, np.ndarray]]:
    """What is done to each row.

    Raises:
        UsageError: the stored images are not arrays of pixels of one size.
    """
    image = next(column for column in stored if column.name == "image")
    sizes = [size for size in image.shape if size is not None]
    if image.dtype != "uint8" or len(sizes) != 3 or len(image.shape) != 3 or sizes[2] != config.channels:
        raise UsageError(
            f"The data set's images are {image.dtype} of shape {tuple(image.shape)}; the task wants uint8 of shape "
            f"(height, width, {config.channels}). Set task.channels to what is stored, or use a source of pixels."
        )
    scaling = _averages(sizes[0], config.height), _averages(sizes[1], config.width)
    return partial(_prepare, config=config, scaling=scaling, training=training)


def _prepare(
    row: Mapping[str, Any],
    rng: np.random.Generator,
    *,
    config: Config,
    scaling: tuple[np.ndarray, np.ndarray],
    training: bool,
) -> dict[str, np.ndarray]:
    label = int(row["label"])
    if training and not 0 <= label < config.num_people:
        raise UsageError(
            f"A photo to train on has the label {label}, but task.num_people={config.num_people} allows 0 to "
            f"{config.num_people - 1}. Set task.num_people to the number of people in the training data."
        )
    down, right = scaling
    image = np.einsum("ih,hwc,jw->ijc", down, row["image"].astype(np.float32), right, optimize=True)
    image = np.rint(image).astype(np.uint8)
    if training and config.shift_px:
        reach = config.shift_px
        padded = np.pad(image, ((reach, reach), (reach, reach), (0, 0)), mode="edge")
        top, left = rng.integers(0, 2 * reach + 1, 2).tolist()
        image = padded[top : top + config.height, left : left + config.width]
    if training and config.flip and rng.random() < 0.5:
        image = image[:, ::-1]
    return {"image": np.ascontiguousarray(image), "label": np.asarray(label)}


def _averages(old: int, new: int) -> np.ndarray:
    """Weights (new, old) that scale an axis: each new pixel is the mean of the old ones that it covers, or parts."""
    edge = np.arange(new + 1) * (old / new)
    first, last = edge[:-1, None], edge[1:, None]  # (new, 1), in old pixels
    pixel = np.arange(old)
    covered = np.clip(np.minimum(last, pixel + 1) - np.maximum(first, pixel), 0, None)
    return (covered / covered.sum(1, keepdims=True)).astype(np.float32)


def num_items(batch: Mapping[str, Tensor]) -> int:
    """Photos that count."""
    return int((batch["label"] != IGNORED).sum())


def idle(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The batch with no label that counts: its loss is zero, and so is every gradient."""
    return {**batch, "label": torch.full_like(batch["label"], IGNORED)}


def loss(model: nn.Module, batch: Mapping[str, Tensor], config: Config) -> Tensor:
    """Sum of ArcFace's -log p(person) in nats: an fp32 scalar."""
    label = batch["label"].to(torch.int64)
    _, cosine = _embedded(model, batch, config)
    return summed_cross_entropy(config.scale * with_margin(cosine, label, config.margin), label)


def with_margin(cosine: Tensor, label: Tensor, margin: float) -> Tensor:
    """cosine (B, P), label (B,): the same with cos(angle + margin) at the label.

    Where angle + margin passes pi, and the cosine would rise again, it goes on downwards: cos(angle) - margin *
    sin(margin), as in the authors' code.
    """
    place = label.clamp(min=0).unsqueeze(1)
    own = cosine.gather(1, place)  # (B, 1)
    sine = (1 - own.square()).clamp(min=1e-6).sqrt()
    moved = own * math.cos(margin) - sine * math.sin(margin)
    beyond = own < -math.cos(margin)
    return cosine.scatter(1, place, torch.where(beyond, own - margin * math.sin(margin), moved))


def evaluate(model: nn.Module, batch: Mapping[str, Tensor], config: Config) -> dict[str, float]:
    """Sums over the photos of people whom it knows: nll_nats without the margin, photos, and correct.

    A stranger is none of them, and does not count here.
    """
    label = batch["label"].to(torch.int64)
    label = torch.where(label < config.num_people, label, IGNORED)
    _, cosine = _embedded(model, batch, config)
    return {
        "nll_nats": float(summed_cross_entropy(config.scale * cosine, label)),
        "photos": float((label != IGNORED).sum()),
        "correct": float((cosine.argmax(1) == label).sum()),
    }


def metrics(sums: Mapping[str, float], config: Config, split: Any) -> dict[str, float]:  # noqa: ARG001
    """loss (nats a photo) and accuracy among the people trained on; nothing where all were strangers."""
    if not sums.get("photos"):
        return {}
    return {"loss": sums["nll_nats"] / sums["photos"], "accuracy": sums["correct"] / sums["photos"]}


def predict(model: nn.Module, batch: Mapping[str, Tensor], config: Config, tokenizer: Any) -> list[dict[str, Any]]:  # noqa: ARG001
    """Of each photo that counts its person and its direction."""
    embedding, _ = _embedded(model, batch, config)
    pairs = zip(batch["label"].tolist(), embedding.tolist(), strict=True)
    return [{"person": person, "embedding": values} for person, values in pairs if person != IGNORED]


def scores(predictions: Sequence[Mapping[str, Any]], config: Config) -> dict[str, float]:
    """rank_1, rank_1_single and eer, as told above; without what these photos do not allow.

    Raises:
        UsageError: scikit-learn is not installed.
    """
    if not predictions:
        return {}
    embedding = np.array([each["embedding"] for each in predictions], np.float64)
    return recognition(embedding, np.array([each["person"] for each in predictions]), config.gallery)


def recognition(embedding: np.ndarray, person: np.ndarray, gallery: int) -> dict[str, float]:
    """The figures of `scores` from vectors of length 1 (N, size) and who each is of (N,)."""
    cosine = embedding @ embedding.T  # (N, N)
    number = _photo_number(person)
    found = {}
    if (hits := _hits(cosine, person, number < gallery)).size:
        found["rank_1"] = float(hits.mean())
    singles = np.concatenate([_hits(cosine, person, number == each) for each in range(int(number.max()) + 1)])
    if singles.size:
        found["rank_1_single"] = float(singles.mean())
    first, second = np.triu_indices(len(person), 1)
    same = person[first] == person[second]
    if same.any() and not same.all():
        found["eer"] = equal_error_rate(same, cosine[first, second])
    return found


def _photo_number(person: np.ndarray) -> np.ndarray:
    """(N,): which of its person's photos each is, from 0."""
    before = person[:, None] == person[None, :]
    return np.tril(before, -1).sum(1)


def _hits(cosine: np.ndarray, person: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Of each photo that is not known, but whose person is: whether the nearest known photo shows the same person."""
    probes = ~known & np.isin(person, person[known])
    if not probes.any():
        return np.zeros(0, bool)
    nearest = cosine[probes][:, known].argmax(1)
    return person[known][nearest] == person[probes]


def equal_error_rate(same: np.ndarray, score: np.ndarray) -> float:
    """The error rate at the threshold where both kinds of errors are as frequent, between two thresholds by a line.

    Raises:
        UsageError: scikit-learn is not installed.
    """
    try:
        from sklearn.metrics import roc_curve  # type: ignore[import-untyped]
    except ImportError as error:
        raise UsageError(
            "The equal error rate is computed by scikit-learn, which is not installed. "
            'Run pip install "shardyard[metrics]".'
        ) from error
    accepted, found, _ = roc_curve(same, score)  # of pairs of two people, of pairs of one
    excess = accepted - (1 - found)  # rises from -1 to 1
    after = int(np.argmax(excess >= 0))
    share = -excess[after - 1] / (excess[after] - excess[after - 1])
    return float(accepted[after - 1] + share * (accepted[after] - accepted[after - 1]))


def pictures(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    config: Config,
    tokenizer: Any,  # noqa: ARG001
    seed: int,  # noqa: ARG001
) -> dict[str, np.ndarray]:
    """Probes, and right of each the nearest known photo, framed green where it shows the same person, else red."""
    embedding, _ = _embedded(model, batch, config)
    person, images = batch["label"].numpy(force=True), batch["image"].numpy(force=True)
    if config.channels not in (1, 3):
        return {}
    cosine = (embedding @ embedding.T).numpy(force=True)
    known = _photo_number(person) < config.gallery
    probes = np.nonzero(~known)[0][:SHOWN]
    sheet = []
    for probe in probes.tolist():
        nearest = np.nonzero(known)[0][cosine[probe, known].argmax()]
        answer = coloured(images[nearest])
        colour = RIGHT if person[nearest] == person[probe] else WRONG
        outline(answer, (0, 0, config.width, config.height), colour)
        sheet += [coloured(images[probe]), answer]
    return {"nearest": grid(sheet, columns=6)} if sheet else {}


def _embedded(model: nn.Module, batch: Mapping[str, Tensor], config: Config) -> tuple[Tensor, Tensor]:
    """Directions (B, embedding_size) and cosines (B, P), fp32."""
    values = (batch["image"].permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.25
    outputs = model(values.contiguous().to(next(model.parameters()).dtype)).float()
    embedding, cosine = outputs.split([config.embedding_size, config.num_people], dim=1)
    return embedding, cosine
