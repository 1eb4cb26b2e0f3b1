"""AdamW, Adam and SGD as torch has them, of single operations that IEEE 754 rounds correctly.

torch's own kernels fuse a multiplication with an addition where the processor's vectors do, and not in what a tensor
has left over at its end. So an element's last bit shows where in its tensor it lies, which ZeRO decides. Here it does
not (trainer/exact.py). A piece at a time stays in the cache: the many passes cost little.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

PIECE = 2**15  # elements


class AdamW(torch.optim.AdamW):
    """Loshchilov and Hutter 2019; see torch.optim.AdamW."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        assert closure is None
        _adam_step(self, decoupled=True)


class Adam(torch.optim.Adam):
    """Kingma and Ba 2015; see torch.optim.Adam."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        assert closure is None
        _adam_step(self, decoupled=False)


class SGD(torch.optim.SGD):
    """With momentum (Polyak 1964), or Nesterov's; see torch.optim.SGD."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        assert closure is None
        for group, parameter, state in _each(self):
            momentum = group["momentum"]
            first = momentum and state.get("momentum_buffer") is None
            if first:
                state["momentum_buffer"] = torch.zeros_like(parameter, requires_grad=False)
            buffers = [state["momentum_buffer"]] if momentum else []
            for weights, gradient, *buffer in _pieces(parameter, parameter.grad, *buffers):
                move = _with_decay(gradient, weights, group["weight_decay"])
                if momentum:
                    (velocity,) = buffer
                    velocity.copy_(move) if first else velocity.mul_(momentum).add_(move)
                    move = move + velocity * momentum if group["nesterov"] else velocity
                weights.sub_(move * group["lr"])


def _adam_step(optimizer: torch.optim.Optimizer, *, decoupled: bool) -> None:
    for group, parameter, state in _each(optimizer):
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(parameter, requires_grad=False)
        state["step"] += 1
        steps, (first, second), lr, decay = state["step"].item(), group["betas"], group["lr"], group["weight_decay"]
        rate, root = lr / (1 - first**steps), 1 / math.sqrt(1 - second**steps)
        tensors = parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"]
        for weights, gradient, mean, square in _pieces(*tensors):
            if decoupled:
                weights.mul_(1 - lr * decay)
            else:
                gradient = _with_decay(gradient, weights, decay)
            mean.mul_(first).add_(gradient * (1 - first))
            square.mul_(second).add_((gradient * gradient).mul_(1 - second))
            weights.sub_((mean / square.sqrt().mul_(root).add_(group["eps"])).mul_(rate))


def _each(optimizer: torch.optim.Optimizer) -> Iterator[tuple[dict[str, Any], Tensor, dict[str, Any]]]:
    """(its group, a parameter that has a gradient, its state)."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                yield group, parameter, optimizer.state[parameter]


def _pieces(*tensors: Tensor | None) -> Iterator[tuple[Tensor, ...]]:
    """The same pieces of tensors of one shape, as views."""
    flats = [tensor.view(-1) for tensor in tensors if tensor is not None]
    yield from zip(*(flat.split(PIECE) for flat in flats), strict=True)


def _with_decay(gradient: Tensor, weights: Tensor, decay: float) -> Tensor:
    return gradient + weights * decay if decay else gradient
