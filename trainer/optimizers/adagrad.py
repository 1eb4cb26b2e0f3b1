"""Adagrad (Duchi et al. 2011): each element's step shrinks with the sum of its squared gradients."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch


class Adagrad(torch.optim.Optimizer):
    """torch.optim.Adagrad whose state is made at the first step, as other rules make theirs.

    ZeRO puts flat tensors in the place of the parameters, and torch's own makes its state before that. DeepSpeed (0.19)
    rebuilds torch's for them, without the groups: weight decay would reach norms and biases.
    """

    def __init__(self, params: Iterable[Any], *, lr: float, eps: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                gradient = parameter.grad
                if group["weight_decay"]:
                    gradient = gradient.add(parameter, alpha=group["weight_decay"])
                state = self.state[parameter]
                if "sum" not in state:
                    state["sum"] = torch.zeros_like(parameter, requires_grad=False)
                state["sum"].addcmul_(gradient, gradient)
                parameter.addcdiv_(gradient, state["sum"].sqrt().add_(group["eps"]), value=-group["lr"])
