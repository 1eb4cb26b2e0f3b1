"""Adam and AdamW, fused, with bits that do not show where a tensor is cut: for exact mode (docs/exact.md).

torch's fused kernels take a vector of elements at a time, and what is left at a tensor's end one by one, whose last bit
may then differ. ZeRO decides where tensors end. So here the ends of all tensors are put together and filled up to whole
vectors.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

VECTOR = 64  # elements: a multiple of every processor's vectors, and of what a thread is given of a tensor


class AdamW(torch.optim.AdamW):
    """torch.optim.AdamW (Loshchilov and Hutter, arXiv:1711.05101); the same state and results but for last bits."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        assert closure is None
        _step(self, torch._fused_adamw_)


class Adam(torch.optim.Adam):
    """torch.optim.Adam (Kingma and Ba, arXiv:1412.6980); the same state and results but for last bits."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        assert closure is None
        _step(self, torch._fused_adam_)


def _step(optimizer: torch.optim.Adam, fused: Callable[..., None]) -> None:
    """fused: torch's kernel. Private API of the pinned torch, as is what makes an optimizer's state."""
    for group in optimizer.param_groups:
        parameters: list[Tensor] = []
        gradients: list[Tensor] = []
        averages: list[Tensor] = []
        squares: list[Tensor] = []
        steps: list[Tensor] = []
        optimizer._init_group(group, parameters, gradients, averages, squares, [], steps)
        if not parameters:
            continue
        beta1, beta2 = group["betas"]
        settings = {"lr": group["lr"], "beta1": beta1, "beta2": beta2, "eps": group["eps"]}
        settings |= {"weight_decay": group["weight_decay"], "amsgrad": False, "maximize": False}
        columns = [[each.view(-1) for each in column] for column in (parameters, averages, squares)]
        columns.insert(1, [each.reshape(-1) for each in gradients])
        torch._foreach_add_(steps, 1)
        bodies = [[each[: len(each) // VECTOR * VECTOR] for each in column] for column in columns]
        fused(*bodies, [], steps, **settings)
        ends = [_joined(column) for column in columns]
        fused(*([end] for end in ends), [], steps[:1], **settings)
        for column, end in zip(columns, ends, strict=True):
            _put_back(end, column)


def _joined(tensors: list[Tensor]) -> Tensor:
    """The ends of all tensors (1-D), and zeros up to a multiple of VECTOR."""
    ends = torch.cat([each[len(each) // VECTOR * VECTOR :] for each in tensors])
    return torch.nn.functional.pad(ends, (0, -len(ends) % VECTOR))


def _put_back(ends: Tensor, tensors: list[Tensor]) -> None:
    start = 0
    for each in tensors:
        length = len(each) % VECTOR
        each[len(each) - length :] = ends[start : start + length]
        start += length
