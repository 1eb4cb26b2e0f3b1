from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from trainer.parts.boxes import generalized_iou, iou, suppress


def some_boxes(count: int, seed: int) -> Tensor:
    """Whole numbers from 0 to 30, so that pixels can be counted."""
    rng = np.random.default_rng(seed)
    low = rng.integers(0, 20, (count, 2))
    return torch.from_numpy(np.concatenate([low, low + rng.integers(1, 11, (count, 2))], axis=1)).float()


def pixels(box: Tensor) -> np.ndarray:
    left, top, right, bottom = box.int().tolist()
    canvas = np.zeros((32, 32), bool)
    canvas[top:bottom, left:right] = True
    return canvas


def test_overlaps_are_those_of_counted_pixels() -> None:
    one, other = some_boxes(40, 0), some_boxes(40, 1)
    found, generalized = iou(one, other), generalized_iou(one, other)
    for number in range(40):
        first, second = pixels(one[number]), pixels(other[number])
        union = (first | second).sum()
        around = torch.cat([torch.minimum(one, other)[number, :2], torch.maximum(one, other)[number, 2:]])
        expected = (first & second).sum() / union
        assert found[number].item() == pytest.approx(expected)
        empty = 1 - union / pixels(around).sum()
        assert generalized[number].item() == pytest.approx(expected - empty, abs=1e-6)
    assert (found > 0).any() and (found == 0).any()


def test_boxes_apart_are_drawn_together() -> None:
    """Where IoU has no slope, the generalised one has."""
    box = torch.tensor([[0.0, 0.0, 4.0, 4.0]], requires_grad=True)
    generalized_iou(box, torch.tensor([[10.0, 0.0, 14.0, 4.0]])).sum().backward()
    assert box.grad is not None and box.grad[0, 2] > 0


def suppressed_by_definition(boxes: Tensor, scores: Tensor, labels: Tensor, max_iou: float) -> list[int]:
    kept: list[int] = []
    for number in sorted(range(len(boxes)), key=lambda each: -scores[each].item()):
        rivals = [other for other in kept if labels[other] == labels[number]]
        if all(iou(boxes[number], boxes[other]).item() <= max_iou for other in rivals):
            kept.append(number)
    return kept


@pytest.mark.parametrize("seed", range(5))
def test_suppression_by_definition(seed: int) -> None:
    rng = np.random.default_rng(seed)
    boxes = some_boxes(60, seed)
    scores = torch.from_numpy(rng.integers(0, 20, 60) / 20)  # some are equal
    labels = torch.from_numpy(rng.integers(0, 2, 60))
    for max_iou in (0.0, 0.3141, 0.6123):  # no quotient of small numbers, where rounding decides
        expected = suppressed_by_definition(boxes, scores, labels, max_iou)
        assert suppress(boxes, scores, labels, max_iou).tolist() == expected
        assert max_iou or len(expected) < 60
    none = suppress(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0), 0.5)
    assert none.shape == (0,)
