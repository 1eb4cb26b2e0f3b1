"""Stochastic depth (Huang et al. 2016): training leaves out residual branches at random, for each example by itself."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class DropBranch(nn.Module):
    """Drops an example's whole branch with probability `rate`, and divides what is kept by 1 - rate.

    So evaluation uses every branch as it is. Drawn from torch's generator, as dropout is (trainer/rng.py).
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, branch: Tensor) -> Tensor:
        """(B, ...): (B, ...)."""
        if not self.training or self.rate == 0:
            return branch
        kept = torch.rand(len(branch), device=branch.device) >= self.rate
        scale = (kept / (1 - self.rate)).to(branch.dtype)
        return branch * scale.reshape(-1, *[1] * (branch.ndim - 1))


def rates(last: float, num_blocks: int) -> list[float]:
    """Of each block: a straight line from near 0 at the first to `last` at the last."""
    return [last * number / num_blocks for number in range(1, num_blocks + 1)]
