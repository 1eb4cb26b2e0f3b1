"""Boxes in pictures: left, top, right, bottom in pixels, along the last axis; how they overlap, and which to keep."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def iou(one: Tensor, other: Tensor) -> Tensor:
    """Intersection over union of boxes (..., 4), whose other axes are broadcast: (...)."""
    intersection, union = _intersection_and_union(one, other)
    return intersection / union.clamp(min=torch.finfo(union.dtype).tiny)


def generalized_iou(one: Tensor, other: Tensor) -> Tensor:
    """The same, less the empty share of the smallest box around both (Rezatofighi et al. 2019): -1 to 1.

    It has a slope also where boxes do not meet.
    """
    intersection, union = _intersection_and_union(one, other)
    low, high = torch.minimum(one[..., :2], other[..., :2]), torch.maximum(one[..., 2:], other[..., 2:])
    around = _area(low, high)
    tiny = torch.finfo(union.dtype).tiny
    return intersection / union.clamp(min=tiny) - (around - union) / around.clamp(min=tiny)


def suppress(boxes: Tensor, scores: Tensor, labels: Tensor, max_iou: float) -> Tensor:
    """Non-maximum suppression: the numbers of the boxes that stay, the best first, (k,) int64.

    boxes (n, 4), scores and labels (n,). A box goes where one that stays has its label and a better score (of equal
    ones the earlier is the better), and their IoU is above `max_iou`.
    """
    rivals = ((iou(boxes[:, None], boxes) > max_iou) & (labels[:, None] == labels)).cpu().numpy()  # (n, n)
    free, kept = np.ones(len(boxes), bool), []
    for number in scores.argsort(descending=True, stable=True).tolist():
        if free[number]:
            kept.append(number)
            free &= ~rivals[number]
    return torch.tensor(kept, dtype=torch.int64, device=boxes.device)


def _intersection_and_union(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    low, high = torch.maximum(one[..., :2], other[..., :2]), torch.minimum(one[..., 2:], other[..., 2:])
    intersection = _area(low, high)
    return intersection, _area(one[..., :2], one[..., 2:]) + _area(other[..., :2], other[..., 2:]) - intersection


def _area(low: Tensor, high: Tensor) -> Tensor:
    """Of boxes from corner to corner, (..., 2) each; 0 where there is none."""
    return (high - low).clamp(min=0).prod(dim=-1)
