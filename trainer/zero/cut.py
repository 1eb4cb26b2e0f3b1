"""How a worker's share of the state is cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trainer.storages import Storages


@dataclass(frozen=True)
class Cut:
    """How the state is cut and kept.

    groups: parameters as the optimizer groups them. size: workers. bucket: elements of a communication buffer.
    dtype: of the weights. offload: optimizer state and gradients' share on the host. overlap: two buckets.
    as_touched: a buffer takes memory as it is filled, since on a CPU the system gives pages when they are written.
    """

    groups: Sequence[Sequence[nn.Parameter]]
    size: int
    bucket: int
    dtype: torch.dtype
    offload: bool
    overlap: bool
    as_touched: bool

    def share(self, group: Sequence[nn.Parameter]) -> int:
        """Elements of a group that a worker owns, padding included: flattened, aligned to 2 w, cut in w."""
        numel = sum(parameter.numel() for parameter in group)
        return -(-numel // (2 * self.size)) * 2


def joined(storages: Storages, cut: Cut) -> list[Tensor]:
    """The weights of each group in one block, of which parameters are views from now on."""
    blocks = []
    for group in cut.groups:
        with storages.part("weights"):
            blocks.append(torch.empty(cut.share(group) * cut.size, dtype=cut.dtype))
        for parameter in group:
            storages.assign("weights", parameter, size=0)
    return blocks


def masters(storages: Storages, cut: Cut) -> list[list[nn.Parameter]]:
    """A worker's fp32 share of each group."""
    with storages.part("optimizer", host=cut.offload):
        return [[nn.Parameter(torch.empty(cut.share(group)))] for group in cut.groups]
