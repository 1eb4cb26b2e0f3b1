from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from configs.errors import RunFailed, UsageError
from data_pipelines.columns import Column
from trainer.bound import BoundTask
from trainer.shapes import ClassLogits, Image
from trainer.tasks import image_classification

PIXELS = Column("image", "uint8", (8, 8, 3))
FILES = Column("image", "binary")
LABEL = Column("label", "int64")


def task(**settings: Any) -> BoundTask:
    config = {"num_classes": 4, "image_size": 8} | settings
    return BoundTask(image_classification, image_classification.Config(**config))


def prepared(image: np.ndarray, seed: int = 0, **settings: Any) -> np.ndarray:
    prepare = task(**settings).preparation([PIXELS, LABEL], training=True)
    assert prepare is not None
    return prepare({"image": image, "label": np.int64(1)}, np.random.default_rng(seed))["image"]


def some_image() -> np.ndarray:
    return np.random.default_rng(5).integers(1, 256, (8, 8, 3)).astype(np.uint8)


def test_stored_pixels_without_augmentation_need_no_python() -> None:
    assert task().preparation([PIXELS, LABEL], training=True) is None
    assert task(flip=True).preparation([PIXELS, LABEL], training=False) is None
    assert task().io() == (Image(3, 8, 8), ClassLogits(4))


def test_half_of_the_images_are_mirrored() -> None:
    image = some_image()
    found = [prepared(image, seed, flip=True) for seed in range(60)]
    mirrored = sum(np.array_equal(each, image[:, ::-1]) for each in found)
    assert mirrored + sum(np.array_equal(each, image) for each in found) == 60
    assert 15 <= mirrored <= 45


def test_shifts_go_every_way_and_bare_black() -> None:
    image = some_image()
    places = set()
    for seed in range(200):
        shifted = prepared(image, seed, shift_px=2)
        rows, columns = np.nonzero(shifted.any(axis=(1, 2)))[0], np.nonzero(shifted.any(axis=(0, 2)))[0]
        # What is left was not changed: found again in the image, at the other side of the shift.
        down = rows[0] if rows[0] else rows[-1] - 7
        right = columns[0] if columns[0] else columns[-1] - 7
        expected = np.roll(image, (down, right), (0, 1))[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        assert np.array_equal(shifted[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1], expected)
        places.add((int(down), int(right)))
    assert places == {(down, right) for down in range(-2, 3) for right in range(-2, 3)}


def encoded(image: np.ndarray) -> bytes:
    from PIL import Image as Pillow

    file = io.BytesIO()
    Pillow.fromarray(image).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("as_array", [True, False])
def test_files_are_decoded_and_cut_to_the_middle_square(as_array: bool) -> None:
    """16 x 8: the 8 x 8 in the middle, as it is."""
    image = np.random.default_rng(0).integers(0, 256, (8, 16, 3)).astype(np.uint8)
    raw = encoded(image)
    stored = np.frombuffer(raw, np.uint8) if as_array else raw
    prepare = task().preparation([FILES, LABEL], training=False)
    assert prepare is not None
    found = prepare({"image": stored, "label": np.int64(2)}, np.random.default_rng(0))
    assert np.array_equal(found["image"], image[:, 4:12])
    assert found["label"] == 2
    grey = task(channels=1, image_size=16).preparation([FILES, LABEL], training=False)
    assert grey is not None
    assert grey({"image": stored, "label": np.int64(2)}, np.random.default_rng(0))["image"].shape == (16, 16, 1)


def test_a_file_that_is_no_image_is_refused() -> None:
    prepare = task().preparation([FILES, LABEL], training=True)
    assert prepare is not None
    with pytest.raises(RunFailed, match="An image of the data is no image"):
        prepare({"image": b"no image", "label": np.int64(0)}, np.random.default_rng(0))


@pytest.mark.parametrize(
    ("stored", "settings", "message"),
    [
        (PIXELS, {"image_size": 16}, r"uint8 of shape \(8, 8, 3\); the task wants uint8 of shape \(16, 16, 3\)"),
        (PIXELS, {"channels": 1}, r"wants uint8 of shape \(8, 8, 1\)"),
        (Column("image", "float32", (8, 8, 3)), {}, "images are float32"),
        (FILES, {"channels": 2}, "decoded to 1, 3 or 4 values a pixel"),
    ],
)
def test_images_of_another_kind_are_refused(stored: Column, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        task(**settings).preparation([stored, LABEL], training=True)


class Constant(nn.Module):
    """Says class 1, always as surely; keeps what it was shown."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.tensor([0.0, 2.0, 0.0, 0.0]))

    def forward(self, image: Tensor) -> Tensor:
        self.shown = image
        return self.bias.expand(len(image), 4)


def test_values_are_normalised_and_channels_come_first() -> None:
    image = torch.zeros(2, 8, 8, 3, dtype=torch.uint8)
    image[..., 1] = 255
    model = Constant()
    task(mean=0.5, std=0.25).loss(model, {"image": image, "label": torch.tensor([1, 2])})
    assert model.shown.shape == (2, 3, 8, 8)
    assert model.shown[:, 0].unique().tolist() == [-2.0]
    assert model.shown[:, 1].unique().tolist() == [2.0]


def test_loss_and_metrics_over_what_counts() -> None:
    batch = {"image": torch.zeros(4, 8, 8, 3, dtype=torch.uint8), "label": torch.tensor([1, 1, 2, -100])}
    surely = -torch.log_softmax(Constant().bias, 0)
    expected = 2 * surely[1].item() + surely[2].item()
    assert task().num_items(batch) == 3
    assert task().loss(Constant(), batch).item() == pytest.approx(expected)
    sums = task().evaluate(Constant(), batch)
    assert task().metrics(sums, None) == pytest.approx({"loss": expected / 3, "accuracy": 2 / 3})
    assert task().metrics({}, None) == {}


def test_a_label_beyond_the_classes_is_named() -> None:
    """On the host, where an error has words."""
    task().check({"label": torch.tensor([0, 3, -100], dtype=torch.int32)})
    for label in (4, -1):
        with pytest.raises(UsageError, match=rf"label {label}, but task\.num_classes=4 allows 0 to 3"):
            task().check({"label": torch.tensor([1, -100, label])})


def test_noise_has_its_size_and_is_for_training_alone() -> None:
    grey = np.full((8, 8, 3), 128, np.uint8)
    noisy = np.stack([prepared(grey, seed, noise=0.1) for seed in range(100)]).astype(float)
    assert noisy.mean() == pytest.approx(128, abs=0.5)
    assert noisy.std() == pytest.approx(25.5, rel=0.03)
    assert np.array_equal(prepared(grey, 3, noise=0.1), prepared(grey, 3, noise=0.1))
    white = prepared(np.full((8, 8, 3), 255, np.uint8), noise=0.1)
    assert white.min() > 100, "what is brighter than white is white, not black"
    assert task(noise=0.1).preparation([PIXELS, LABEL], training=False) is None


def test_smoothed_labels_are_torchs_and_are_for_training_alone() -> None:
    class Scores(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.logits = nn.Parameter(torch.randn(3, 4, generator=torch.Generator().manual_seed(0)))

        def forward(self, image: Tensor) -> Tensor:
            return self.logits

    model, label = Scores(), torch.tensor([2, -100, 0])
    batch = {"image": torch.zeros(3, 8, 8, 3, dtype=torch.uint8), "label": label}
    smoothed = task(label_smoothing=0.2)
    expected = nn.functional.cross_entropy(model.logits, label, label_smoothing=0.2, reduction="sum")
    (gradient,) = torch.autograd.grad(expected, model.logits)
    loss = smoothed.loss(model, batch)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, model.logits)[0], gradient)
    plain = task()
    with torch.no_grad():
        assert smoothed.evaluate(model, batch) == plain.evaluate(model, batch)
    assert float(loss) != pytest.approx(float(plain.loss(model, batch)))
