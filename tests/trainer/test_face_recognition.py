from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.errors import UsageError
from data_pipelines.columns import Column
from trainer.bound import BoundTask
from trainer.initialization import materialize
from trainer.models import cnn
from trainer.shapes import Embedding, Image
from trainer.tasks import face_recognition as faces

PHOTO, LABEL = Column("image", "uint8", (32, 24, 1)), Column("label", "int64")


def task(**settings: Any) -> BoundTask:
    config = {"num_people": 4, "height": 16, "width": 12, "embedding_size": 3} | settings
    return BoundTask(faces, faces.Config(**config))


class Given(nn.Module):
    """Gives what it is told to, whatever it sees."""

    def __init__(self, outputs: Tensor) -> None:
        super().__init__()
        self.outputs = nn.Parameter(outputs)

    def forward(self, image: Tensor) -> Tensor:
        assert len(image) == len(self.outputs)
        return self.outputs


# --- the loss


def test_the_margin_is_added_to_the_angle() -> None:
    cosine, label = torch.tensor([[0.3, -0.2, 0.9], [0.5, 0.1, -0.7]]), torch.tensor([2, 0])
    found = faces.with_margin(cosine, label, 0.4)
    expected = cosine.clone()
    expected[0, 2] = math.cos(math.acos(0.9) + 0.4)
    expected[1, 0] = math.cos(math.acos(0.5) + 0.4)
    torch.testing.assert_close(found, expected)


def test_a_larger_angle_never_costs_less() -> None:
    """Also where angle + margin passes pi."""
    angle = torch.linspace(0.0, math.pi, 500)
    found = faces.with_margin(torch.cos(angle).unsqueeze(1), torch.zeros(500, dtype=torch.int64), 0.5)
    assert (found.diff(dim=0) < 1e-6).all()
    assert found[-1].item() == pytest.approx(-1 - 0.5 * math.sin(0.5))


def test_without_a_margin_it_is_the_softmax_of_scaled_cosines_and_gradients_are_finite_at_the_ends() -> None:
    bound = task(margin=0.0, scale=10.0)
    outputs = torch.cat([torch.zeros(3, 3), torch.tensor([[1.0, 0, 0, -1], [0.5, 0.2, -0.1, 0], [1, -1, 0, 0]])], 1)
    batch = {"image": torch.zeros(3, 16, 12, 1, dtype=torch.uint8), "label": torch.tensor([0, 1, -100])}
    expected = F.cross_entropy(10 * outputs[:2, 3:], batch["label"][:2], reduction="sum")
    assert bound.loss(Given(outputs), batch).item() == pytest.approx(expected.item(), rel=1e-4)
    model = Given(outputs)
    task(margin=0.5).loss(model, batch).backward()
    assert model.outputs.grad is not None and model.outputs.grad.isfinite().all()
    assert not model.outputs.grad[2].any()


def test_a_model_that_learns_the_angle_tells_its_people_apart() -> None:
    """The gradient of the whole loss, through the network's end, points the right way."""
    bound = task(margin=0.3, scale=8.0)
    config = cnn.Config.model_validate({"blocks": (1,), "width": 4})
    input, output = bound.io()
    assert (input, output) == (Image(1, 16, 12), Embedding(3, 4))
    with torch.device("meta"):
        model = cnn.build(config, input, output)
    materialize(model, lambda *args: cnn.init_parameter(config, *args), seed=0)
    rng = torch.Generator().manual_seed(0)
    photos = torch.randint(0, 256, (8, 16, 12, 1), generator=rng, dtype=torch.uint8)
    batch = {"image": photos, "label": torch.arange(8) // 2}
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(60):
        optimizer.zero_grad()
        bound.loss(model, batch).backward()
        optimizer.step()
    with torch.no_grad():
        sums = bound.evaluate(model, batch)
    assert sums["correct"] == sums["photos"] == 8


# --- the network's end


def test_the_embedding_has_length_1_and_its_cosines_are_with_the_learned_directions() -> None:
    end = cnn.Directions(5, 3)
    nn.init.normal_(end.weight, generator=torch.Generator().manual_seed(0))
    x = 7 * torch.randn(4, 5, generator=torch.Generator().manual_seed(1))
    found = end(x)
    torch.testing.assert_close(found[:, :5].norm(dim=1), torch.ones(4))
    expected = F.cosine_similarity(x.unsqueeze(1), end.weight.unsqueeze(0), dim=2)
    torch.testing.assert_close(found[:, 5:], expected)


# --- what it is judged by


def brute_force_rank_1(cosine: np.ndarray, person: np.ndarray, known: list[int], probes: list[int]) -> float:
    hits = [person[max(known, key=lambda one: cosine[probe, one])] == person[probe] for probe in probes]
    return float(np.mean(hits))


def some_vectors() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    person = rng.permutation(np.repeat([7, 8, 9, 30], 6))
    vectors = rng.normal(size=(4, 5))[np.unique(person, return_inverse=True)[1]] + rng.normal(size=(24, 5))
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True), person


def test_rank_1_is_that_of_a_search_by_hand() -> None:
    vectors, person = some_vectors()
    cosine = vectors @ vectors.T
    photos = {one: [at for at in range(24) if person[at] == one] for one in set(person.tolist())}
    found = faces.recognition(vectors, person, gallery=2)
    known = [at for one in photos.values() for at in one[:2]]
    expected = brute_force_rank_1(cosine, person, known, [at for at in range(24) if at not in known])
    assert found["rank_1"] == pytest.approx(expected) and 0.3 < expected < 0.95
    singles = []
    for number in range(6):
        known = [one[number] for one in photos.values()]
        singles.append(brute_force_rank_1(cosine, person, known, [at for at in range(24) if at not in known]))
    assert found["rank_1_single"] == pytest.approx(np.mean(singles))


def test_the_equal_error_rate_is_that_of_a_search_over_thresholds() -> None:
    vectors, person = some_vectors()
    pairs = [(a, b) for a in range(24) for b in range(a)]
    score = np.array([vectors[a] @ vectors[b] for a, b in pairs])
    same = np.array([person[a] == person[b] for a, b in pairs])
    rates = [((score[~same] >= at).mean(), (score[same] < at).mean()) for at in np.sort(score)]
    accepted, rejected = min(rates, key=lambda pair: abs(pair[0] - pair[1]))
    low, high = sorted((accepted, rejected))
    assert low - 0.01 <= faces.recognition(vectors, person, 2)["eer"] <= high + 0.01


def test_the_equal_error_rate_at_its_ends() -> None:
    same = np.array([True, True, False, False])
    assert faces.equal_error_rate(same, np.array([0.9, 0.8, 0.2, 0.1])) == 0
    assert faces.equal_error_rate(same, np.array([0.1, 0.2, 0.8, 0.9])) == 1
    assert faces.equal_error_rate(same, np.zeros(4)) == 0.5


def test_figures_that_the_photos_do_not_allow_are_left_out() -> None:
    bound = task(gallery=5)
    assert bound.scores([]) == {}
    one = {"person": 3, "embedding": [1.0, 0.0, 0.0]}
    assert bound.scores([one]) == {}
    assert bound.scores([one, one]) == {"rank_1_single": 1.0}  # no second person to be taken for


def test_without_scikit_learn_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.metrics", None)
    with pytest.raises(UsageError, match=r'pip install "shardyard\[metrics\]"'):
        faces.equal_error_rate(np.array([True, False]), np.array([1.0, 0.0]))


def test_strangers_are_judged_by_their_directions_alone() -> None:
    bound = task()
    outputs = F.one_hot(torch.tensor([0, 1, 0, 1]), 7).float()
    batch = {"image": torch.zeros(4, 16, 12, 1, dtype=torch.uint8), "label": torch.tensor([20, 21, 20, -100])}
    sums = bound.evaluate(Given(outputs), batch)
    assert sums == {"nll_nats": 0.0, "photos": 0.0, "correct": 0.0}
    assert bound.metrics(sums, None) == {}
    assert [row["person"] for row in bound.predict(Given(outputs), batch, None)] == [20, 21, 20]


# --- the photos


def prepared(image: np.ndarray, seed: int = 0, training: bool = True, label: int = 1, **settings: Any) -> np.ndarray:
    prepare = task(**settings).preparation([PHOTO, LABEL], training=training)
    assert prepare is not None
    return prepare({"image": image, "label": np.int64(label)}, np.random.default_rng(seed))["image"]


def some_photo() -> np.ndarray:
    return np.random.default_rng(5).integers(0, 256, (32, 24, 1)).astype(np.uint8)


def test_scaling_takes_the_mean_of_what_a_pixel_covers() -> None:
    photo = some_photo()
    halves = photo.reshape(16, 2, 12, 2, 1).mean(axis=(1, 3))
    np.testing.assert_allclose(prepared(photo), halves, atol=0.51)
    often = photo.repeat(9, 0).repeat(16, 1)  # 288 x 384, of which 20 x 15 cover whole pixels only now and then
    blocks = often.reshape(18, 16, 16, 24, 1).mean(axis=(1, 3))
    np.testing.assert_allclose(prepared(photo, height=18, width=16), blocks, atol=0.51)


def test_half_are_mirrored_and_shifts_repeat_the_edge() -> None:
    photo = some_photo()
    plain = prepared(photo)
    found = [prepared(photo, seed, flip=True) for seed in range(60)]
    mirrored = sum(np.array_equal(each, plain[:, ::-1]) for each in found)
    assert mirrored + sum(np.array_equal(each, plain) for each in found) == 60 and 15 <= mirrored <= 45
    rows, across = np.arange(16), np.arange(12)
    possible = {
        plain[np.clip(rows + down, 0, 15)][:, np.clip(across + right, 0, 11)].tobytes(): (down, right)
        for down in range(-2, 3)
        for right in range(-2, 3)
    }
    shifts = {possible[prepared(photo, seed, shift_px=2).tobytes()] for seed in range(250)}
    assert len(shifts) == 25
    assert np.array_equal(prepared(photo, 3, training=False, flip=True, shift_px=2), plain)


def test_a_stranger_is_not_trained_on() -> None:
    assert prepared(some_photo(), training=False, label=4).shape == (16, 12, 1)
    with pytest.raises(UsageError, match=r"label 4, but task.num_people=4 allows 0 to 3"):
        prepared(some_photo(), label=4)


@pytest.mark.parametrize("stored", [Column("image", "binary"), Column("image", "uint8", (32, 24, 3))])
def test_other_images_are_refused(stored: Column) -> None:
    with pytest.raises(UsageError, match="the task wants uint8 of shape"):
        task().preparation([stored, LABEL], training=True)


def test_the_picture_frames_the_nearest_photo() -> None:
    """Person 0's probe finds person 0, person 1's probe finds person 0 too: green, red."""
    directions = torch.tensor([[1.0, 0, 0], [0, 1, 0], [1, 0, 0], [0.9, 0.1, 0]])
    batch = {"image": torch.full((4, 16, 12, 1), 50, dtype=torch.uint8), "label": torch.tensor([0, 1, 0, 1])}
    model = Given(torch.cat([directions, torch.zeros(4, 4)], 1))
    sheet = task(gallery=1).pictures(model, batch, None, 0)["nearest"]
    assert sheet[0, 14:26].tolist() == [list(faces.RIGHT)] * 12
    assert sheet[0, 42:54].tolist() == [list(faces.WRONG)] * 12
    assert task(gallery=2).pictures(model, batch, None, 0) == {}
