"""The optimizers under which each worker keeps the gradients of all parameters: stage 0, and stage 1 in bf16."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors

from trainer.storages import Storages
from trainer.zero.cut import Cut, joined, masters

ALLREDUCE_ELEMENTS = 500_000_000  # flattened for one all-reduce: runtime/engine.py, MEMORY_OPT_ALLREDUCE_SIZE


class Replicated:
    """Stage 0: torch's optimizer over the parameters themselves (runtime/engine.py)."""

    def __init__(self, storages: Storages, cut: Cut) -> None:
        self._storages = storages
        self._cut = cut
        self.flats: list[list[nn.Parameter]] = [list(group) for group in cut.groups]

    def gradient(self, parameter: nn.Parameter, *, last: bool) -> None:  # noqa: ARG002
        """What is done when a parameter's gradient of one micro-batch is complete; last: of the step's last one."""
        assert parameter.grad is not None
        self._storages.assign("gradients", parameter.grad)

    def after_backward(self, *, last: bool) -> None:
        """What is done when all are."""
        if last and self._cut.size > 1:
            gradients = [each.grad for group in self._cut.groups for each in group if each.grad is not None]
            all_reduce(self._storages, gradients)

    def update(self, step: Any) -> None:
        """The optimizer's step (`step(n)` does that of group n), and what it needs around it."""
        step(None)
        for group in self._cut.groups:
            for parameter in group:
                parameter.grad = None


class BF16Optimizer:
    """Stage 1 in bf16 (runtime/bf16_optimizer.py): fp32 gradients of all parameters, beside bf16 ones that stay."""

    def __init__(self, storages: Storages, cut: Cut) -> None:
        self._storages, self._cut = storages, cut
        self._weights = joined(storages, cut)
        self.flats = masters(storages, cut)
        with storages.part("gradients"):
            self._sums = [torch.zeros(cut.share(group) * cut.size) for group in cut.groups]

    def gradient(self, parameter: nn.Parameter, *, last: bool) -> None:  # noqa: ARG002
        """It stays, and is zeroed later (clear_lp_grads)."""
        assert parameter.grad is not None
        self._storages.assign("gradients", parameter.grad)

    def after_backward(self, *, last: bool) -> None:
        """update_hp_grads: one parameter's gradient at a time in fp32; then the all-reduce."""
        with self._storages.part("buffers"):
            for group in self._cut.groups:
                for parameter in group:
                    if parameter.grad is not None:
                        parameter.grad.float()
        if last and self._cut.size > 1:
            all_reduce(self._storages, self._sums)

    def update(self, step: Any) -> None:
        """The fp32 gradients' own share is what the optimizer steps with."""
        for (flat,), total in zip(self.flats, self._sums, strict=True):
            flat.grad = total[: flat.numel()]
        step(None)


def all_reduce(storages: Storages, gradients: Sequence[Tensor]) -> None:
    """buffered_allreduce_fallback: flattened together, up to ALLREDUCE_ELEMENTS at a time, reduced, copied back."""
    small: list[Tensor] = []
    with storages.part("buffers"):
        for gradient in gradients:
            small.append(gradient)
            if sum(each.numel() for each in small) > ALLREDUCE_ELEMENTS:
                _flatten_dense_tensors(small)
                small = []
        if small:
            _flatten_dense_tensors(small)
