from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("sklearn", reason="the extra `metrics`")

from benchmarks import generation


def bars(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Images of three classes that anybody can tell: a bar on the left, in the middle, on the right."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 3
    images = rng.integers(0, 60, (count, 8, 8, 1))
    for image, label in zip(images, labels, strict=True):
        image[:, 1 + 2 * label : 3 + 2 * label] += rng.integers(100, 190)
    return images.astype(np.uint8), labels


@pytest.fixture(scope="module")
def judge() -> generation.Judge:
    splits = {"train": bars(300, 0), "validation": bars(150, 1)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generation, "real", lambda _, split: splits[split])
        return generation.Judge(dataset=None)


def test_new_images_of_the_same_kind_are_read_and_are_near(judge: generation.Judge) -> None:
    images, labels = bars(150, 2)
    found = judge.figures(images, labels)
    assert found["read_as_asked"] == found["read_as_asked_real"] == 1
    assert found["frechet_distance"] < 3 * found["frechet_distance_train"]


def test_images_of_other_classes_or_of_nothing_are_found_out(judge: generation.Judge) -> None:
    images, labels = bars(150, 2)
    assert judge.figures(images, (labels + 1) % 3)["read_as_asked"] == 0
    near = judge.figures(images, labels)["frechet_distance"]
    only_one = images[labels == 0].repeat(3, axis=0)
    noise = np.random.default_rng(3).integers(0, 256, images.shape).astype(np.uint8)
    assert min(judge.figures(each, labels)["frechet_distance"] for each in (only_one, noise)) > 20 * near


def test_the_frechet_distance_is_that_of_normal_distributions() -> None:
    rng = np.random.default_rng(0)
    first = rng.normal(1.0, 2.0, (200_000, 1)) * [1, 1] + rng.normal(0, 1, (200_000, 2))  # correlated
    turned = first @ np.array([[0.6, -0.8], [0.8, 0.6]]) + [3, 0]
    one, other = (np.array([[5.0, 4.0], [4.0, 5.0]]), np.array([[0.6, -0.8], [0.8, 0.6]]))
    other = other.T @ one @ other
    values = np.linalg.eigvals(one @ other)  # tr (C1 C2)^1/2, with no root of a matrix
    means = np.array([1.0, 1.0]) - (np.array([1.0, 1.0]) @ np.array([[0.6, -0.8], [0.8, 0.6]]) + [3, 0])
    wanted = means @ means + np.trace(one) + np.trace(other) - 2 * np.sqrt(values.real).sum()
    assert generation.frechet_distance(first, turned) == pytest.approx(wanted, rel=0.02)
    assert generation.frechet_distance(first, first) == pytest.approx(0, abs=1e-9)
