from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from configs.errors import UsageError
from data_pipelines.columns import Column
from trainer.parts.cross_entropy import IGNORED
from trainer.tasks import medical_imaging as task

CONFIG = task.Config(classes=("other", "grey", "white"), height=8, width=10)


class Fixed(nn.Module):
    """Gives the same logits whatever it sees."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits, requires_grad=False)

    def forward(self, image: Tensor) -> Tensor:
        return self.logits[: len(image)] + 0 * image.sum()


def batch_of(examples: int, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.randint(0, 3, (examples, 8, 10), generator=generator).to(torch.int16)
    mask[:, 0] = IGNORED
    image = torch.randint(0, 256, (examples, 8, 10, 1), generator=generator).to(torch.uint8)
    return {"image": image, "mask": mask}


def config(**settings: Any) -> task.Config:
    return task.Config(**(CONFIG.model_dump() | settings))


def test_dice_is_of_the_whole_volume() -> None:
    model = Fixed(torch.randn(4, 3, 8, 10, generator=torch.Generator().manual_seed(1)))
    batch = batch_of(4)
    found = task.metrics(task.evaluate(model, batch, CONFIG), CONFIG, None)
    counts = batch["mask"] != IGNORED
    truth, said = batch["mask"][counts].numpy(), model.logits.argmax(1)[counts].numpy()
    dice = []
    for number in (1, 2):
        there, guessed = set(np.flatnonzero(truth == number)), set(np.flatnonzero(said == number))
        dice.append(2 * len(there & guessed) / (len(there) + len(guessed)))
    assert [found["dice_grey"], found["dice_white"]] == pytest.approx(dice)
    assert found["dice"] == pytest.approx(np.mean(dice))
    assert found["accuracy"] == pytest.approx((truth == said).mean())


def test_a_perfect_model_has_a_dice_of_one_and_a_tissue_that_is_nowhere_none() -> None:
    batch = batch_of(2)
    batch["mask"][batch["mask"] == 2] = 0
    right = nn.functional.one_hot(batch["mask"].clamp(min=0).long(), 3).permute(0, 3, 1, 2) * 50.0
    found = task.metrics(task.evaluate(Fixed(right), batch, CONFIG), CONFIG, None)
    assert found["dice_grey"] == found["dice"] == found["accuracy"] == 1
    assert "dice_white" not in found


def test_class_weights_weigh_pixels() -> None:
    weights = (0.5, 2.0, 3.0)
    model = Fixed(torch.randn(2, 3, 8, 10, generator=torch.Generator().manual_seed(2)))
    batch = batch_of(2)
    nll = -model.logits.log_softmax(1)
    wanted = total = 0.0
    for number, weight in enumerate(weights):
        there = batch["mask"] == number
        wanted += weight * float(nll[:, number][there].detach().sum())
        total += weight * float(there.sum())
    assert task.total_weight(batch, config(class_weights=weights)) == total
    assert task.total_weight(batch, CONFIG) == task.num_items(batch)
    assert float(task.loss(model, batch, config(class_weights=weights))) == pytest.approx(wanted, rel=1e-5)
    assert float(task.loss(model, batch, config(class_weights=(1.0, 1.0, 1.0)))) == pytest.approx(
        float(task.loss(model, batch, CONFIG)), rel=1e-6
    )


def test_image_and_mask_move_together() -> None:
    moving = config(flip=True, shift_px=3, intensity_jitter=0.2)
    plane = np.random.default_rng(0).integers(1, 3, (8, 10)).astype(np.uint8)
    row = {"image": plane[:, :, None] * 60, "mask": plane}
    stored = [Column("image", "uint8", (8, 10, 1)), Column("mask", "uint8", (8, 10))]
    prepare = task.preparation(moving, stored, training=True)
    seen = set()
    for seed in range(8):
        made = prepare(row, np.random.default_rng(seed))
        values = made["image"][..., 0]
        seen.add(values.tobytes())
        assert {tuple(np.unique(made["mask"][values == value])) for value in np.unique(values)} <= {(0,), (1,), (2,)}
        assert (made["mask"] == 0).sum() == (values == 0).sum()
    assert len(seen) == 8
    untouched = task.preparation(moving, stored, training=False)(row, np.random.default_rng(0))
    np.testing.assert_array_equal(untouched["image"], row["image"])


def test_unknown_pixels_do_not_count() -> None:
    mask = np.full((8, 10), task.UNKNOWN, np.uint8)
    mask[0, :3] = 1
    row = {"image": np.zeros((8, 10, 1), np.uint8), "mask": mask}
    made = task.preparation(CONFIG, [], training=False)(row, np.random.default_rng(0))
    assert task.num_items({"mask": torch.from_numpy(made["mask"])[None]}) == 3
    task.check({"mask": torch.from_numpy(made["mask"])[None]}, CONFIG)


def test_pictures_show_truth_beside_what_is_said() -> None:
    batch = batch_of(2)
    right = nn.functional.one_hot(batch["mask"].clamp(min=0).long(), 3).permute(0, 3, 1, 2) * 50.0
    sheet = task.pictures(Fixed(right.float()), batch, CONFIG, None, 0)["segmentation"]
    assert sheet.shape == (2 * 8 + 2, 3 * 10 + 4, 3)
    truth, said = sheet[1:8, 12:22], sheet[1:8, 24:34]
    np.testing.assert_array_equal(truth, said)  # but for the row that does not count
    assert (sheet[1:8, :10] != truth).any()


def test_errors_name_cause_and_remedy() -> None:
    with pytest.raises(UsageError, match=r"shape \(8, 9, 1\).*wants uint8 of shape \(8, 10, 1\).*Set task.height"):
        task.preparation(CONFIG, [Column("image", "uint8", (8, 9, 1))], training=True)
    batch = batch_of(1)
    batch["mask"][0, 3, 3] = 7
    with pytest.raises(UsageError, match=r"class 7, but task\.classes names 3"):
        task.check(batch, CONFIG)
    with pytest.raises(ValidationError, match="class_weights has 2 numbers for 3 classes"):
        config(class_weights=(1.0, 2.0))
    with pytest.raises(ValidationError, match="names one twice"):
        config(classes=("a", "b", "b"))
