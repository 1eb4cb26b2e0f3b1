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
from trainer.parts.diffusion import denoise, signal_shares, with_noise
from trainer.tasks import image_generation as task

CONFIG = task.Config(num_classes=3, image_size=8, channels=1, noise_steps=40, sampling_steps=5)
STORED = [Column("image", "uint8", (8, 8, 1)), Column("label", "int64")]


def config(**settings: Any) -> task.Config:
    return task.Config(**(CONFIG.model_dump() | settings))


class NormalImages(nn.Module):
    """The best there is to say of the noise where values of kind k are normal: mean means[k], deviation `spread`."""

    def __init__(self, shares: Tensor, means: Tensor, spread: float) -> None:
        super().__init__()
        self.shares, self.spread = shares, spread
        self.means = nn.Parameter(means, requires_grad=False)

    def forward(self, x: Tensor, step: Tensor, kind: Tensor) -> Tensor:
        share, mean = self.shares[step].view(-1, 1, 1, 1), self.means[kind].view(-1, 1, 1, 1)
        return (1 - share).sqrt() * (x - share.sqrt() * mean) / (share * self.spread**2 + 1 - share)


def test_the_linear_schedule_is_the_papers() -> None:
    wanted = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    np.testing.assert_allclose(signal_shares("linear", 1000).numpy(), wanted, rtol=1e-5)


def test_the_cosine_schedule_is_the_papers() -> None:
    times = np.arange(1, 1000) / 1000  # the last but one: then the bound on beta is not met yet
    start = np.cos(0.008 / 1.008 * np.pi / 2) ** 2
    wanted = np.cos((times + 0.008) / 1.008 * np.pi / 2) ** 2 / start
    shares = signal_shares("cosine", 1000).numpy()
    np.testing.assert_allclose(shares[:-2], wanted[:-1], rtol=1e-4)
    assert 0 < shares[-1] < 1e-6
    assert (np.diff(shares) < 0).all()


def test_noise_keeps_the_variance() -> None:
    image, noise = (torch.randn(50, 1, 20, 20, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    for share in (0.05, 0.5, 0.95):
        noisy = with_noise(image, noise, torch.full((50,), share))
        assert noisy.var().item() == pytest.approx(1, abs=0.03)
        assert (noisy * image).mean().item() == pytest.approx(share**0.5, abs=0.03)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_way_back_ends_in_the_distribution_of_the_images(schedule: Any) -> None:
    shares = signal_shares(schedule, 1000)
    model = NormalImages(shares, torch.tensor([-0.3, 0.4, 0.0]), spread=0.1)
    noise = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    kind = torch.tensor([0, 1, 0, 1])
    made = denoise(model, noise, kind, shares, any_kind=2, guidance=1.0, steps=500)
    wanted = model.means[kind].view(-1, 1, 1, 1) + 0.1 * noise  # the flow's exact end
    assert (made - wanted).abs().max() < 0.02
    rough = denoise(model, noise, kind, shares, any_kind=2, guidance=1.0, steps=10)
    assert (rough - wanted).abs().max() > (made - wanted).abs().max()


def test_guidance_goes_on_from_any_kind_to_this_one() -> None:
    shares = signal_shares("cosine", 100)
    means = torch.tensor([0.2, 0.1])  # kind 1 is any
    model = NormalImages(shares, means, spread=0.01)
    noise = torch.zeros(1, 1, 8, 8)
    ends = [
        denoise(model, noise, torch.tensor([0]), shares, any_kind=1, guidance=guidance, steps=50).mean().item()
        for guidance in (0.0, 1.0, 3.0)
    ]
    assert ends == pytest.approx([0.1, 0.2, 0.4], abs=0.01)


def test_the_loss_is_the_squared_error_of_the_noise() -> None:
    shares = signal_shares("cosine", 40)
    model = NormalImages(shares, torch.tensor([0.1, 0.2, 0.3, 0.0]), spread=0.5)
    generator = torch.Generator().manual_seed(0)
    batch = {
        "image": torch.randint(0, 256, (3, 8, 8, 1), generator=generator).to(torch.uint8),
        "noise": torch.randn(3, 8, 8, 1, generator=generator),
        "step": torch.tensor([0, 20, 39], dtype=torch.int32),
        "kind": torch.tensor([2, 3, IGNORED], dtype=torch.int32),
    }
    wanted = 0.0
    for number in range(2):
        share, noise = shares[int(batch["step"][number])], batch["noise"][number]
        noisy = share.sqrt() * (batch["image"][number] / 127.5 - 1) + (1 - share).sqrt() * noise
        told = model(noisy[None], batch["step"][number : number + 1].long(), batch["kind"][number : number + 1].long())
        wanted += float(((told[0] - noise) ** 2).sum())
    assert float(task.loss(model, batch, CONFIG)) == pytest.approx(wanted, rel=1e-5)
    assert task.num_items(batch) == 2 * 64
    found = task.metrics(task.evaluate(model, batch, CONFIG), CONFIG, None)
    assert found["loss"] == pytest.approx(wanted / 128, rel=1e-5)


def test_rows_are_made_ready_with_steps_of_all_strengths_and_some_without_their_class() -> None:
    row = {"image": np.zeros((8, 8, 1), np.uint8), "label": np.int64(1)}
    prepare = task.preparation(config(untold=0.25), STORED, training=True)
    made = [prepare(row, np.random.default_rng(seed)) for seed in range(1000)]
    kinds = np.array([each["kind"] for each in made])
    assert set(kinds) == {1, 3}
    assert (kinds == 3).mean() == pytest.approx(0.25, abs=0.05)
    assert {int(each["step"]) for each in made} == set(range(40))
    assert np.std([each["noise"] for each in made]) == pytest.approx(1, abs=0.02)


def test_in_evaluation_noise_belongs_to_the_image_and_the_class_is_told() -> None:
    prepare = task.preparation(config(untold=0.9), STORED, training=False)
    images = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 1)).astype(np.uint8)
    made = [prepare({"image": image, "label": np.int64(2)}, np.random.default_rng(0)) for image in images]
    assert all(each["kind"] == 2 for each in made)
    assert len({each["noise"].tobytes() for each in made}) == 20
    assert len({int(each["step"]) for each in made}) > 5


def test_the_same_seed_makes_the_same_images() -> None:
    model = NormalImages(signal_shares("cosine", 40), torch.tensor([-0.3, 0.4, 0.1, 0.0]), spread=0.1)
    with torch.no_grad():
        made = [task.generate(model, CONFIG, [0, 1, 3], seed) for seed in (5, 5, 6)]
        shown = task.pictures(model, {}, CONFIG, None, 5)["samples"]
    assert made[0].shape == (3, 8, 8, 1) and made[0].dtype == np.uint8
    np.testing.assert_array_equal(made[0], made[1])
    assert (made[0] != made[2]).any()
    assert shown.shape == (3 * 32 + 2 * 2, 8 * 32 + 7 * 2)


def test_errors_name_cause_and_remedy() -> None:
    with pytest.raises(UsageError, match=r"shape \(8, 8, 1\); the task wants uint8 of shape \(9, 9, 1\)"):
        task.preparation(config(image_size=9), STORED, training=True)
    with pytest.raises(UsageError, match=r"the label 4, but task\.num_classes=3 allows 0 to 2"):
        task.check({"kind": torch.tensor([0, 3, 4, IGNORED])}, CONFIG)
    with pytest.raises(ValidationError, match="sampling_steps=50 is more than noise_steps=40"):
        config(sampling_steps=50)
    with pytest.raises(ValidationError, match="which untold=0 never trains"):
        config(untold=0.0)
