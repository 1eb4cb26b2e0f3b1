"""The same bits at any ZeRO stage and world size: gradients whose sums do not depend on their order.

Floating-point sums depend on the order of their terms, and a cluster decides that order: which rank adds which
micro-batches, how a collective adds ranks, where ZeRO cuts a parameter. Here each gradient of each micro-batch is
rounded, before anything adds it, to a multiple of a power of two that all of them share, its parameter's *quantum*.
Sums of such numbers are exact as long as they fit fp32's 24 bits, and exact sums have no order.

Let K be the micro-batches of a step over all ranks, and M the largest absolute value of a parameter's gradient in any
of them. No partial sum exceeds K M, so all are exact if K M <= 2^22 quanta. (Two bits are left for stage 3, which
multiplies by the world size w and divides again: w M <= 4 K M as long as w <= 4 K.) A step in which K M turns out
larger is repeated with a larger quantum. K and M are alike on any cluster, and so are the quanta that the next step
begins with: some bits above what this one needed. They are part of the checkpoint.

A gradient of one micro-batch must not depend on the cluster either. Stage 3 puts nodes of its own around each module,
and with them autograd adds the gradients of a tensor that is used in several places in another order. So the same
nodes stand there at every stage.

The global norm is the same thing once more: squares in fp64, rounded to a multiple of a common power of two.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

SUM_BITS = 22  # a partial sum has at most 2^22 quanta
SPARE_BITS = 3  # a gradient may grow eightfold from one step to the next before the step is repeated
NORM_CHUNK = 2**16  # elements: in fp64 they stay in a core's cache
UNKNOWN = -140  # the exponent of a quantum below all that fp32 holds


class _Same(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:  # noqa: ARG004
        return tensor.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # noqa: ARG004
        return gradient


def add_nodes(module: nn.Module) -> None:
    """Put a node around the inputs and the outputs of each of its modules, as DeepSpeed's stage 3 does (0.19)."""
    for each in module.modules():
        each.register_forward_pre_hook(lambda _, inputs: _each_tensor(inputs))
        each.register_forward_hook(lambda _, __, output: _each_tensor(output))


def _each_tensor(value: Any) -> Any:
    if isinstance(value, Tensor):
        return _Same.apply(value)
    if isinstance(value, list | tuple):
        return type(value)(_each_tensor(each) for each in value)
    if isinstance(value, dict):
        return {key: _each_tensor(each) for key, each in value.items()}
    return value


class ExactGradients:
    """Rounds the gradients of a module as they are computed, and says whether their sums were exact.

    exponents: of each trained parameter's quantum, by name. repeats: steps that had to be repeated.
    """

    def __init__(self, module: nn.Module, num_micro_batches: int, world_size: int) -> None:
        named = [(name, each) for name, each in module.named_parameters() if each.requires_grad]
        self.exponents = dict.fromkeys((name for name, _ in named), UNKNOWN)
        self.repeats = 0
        self._world_size = world_size
        self._log_terms = math.log2(num_micro_batches)
        self._peaks: dict[str, Tensor] = {}  # largest absolute value of a gradient on this rank
        for name, parameter in named:
            parameter.register_hook(lambda gradient, name=name: self._rounded(name, gradient))

    def _rounded(self, name: str, gradient: Tensor) -> Tensor:
        low, high = torch.aminmax(gradient)  # on a CPU an eighth of the time of vector_norm
        peak = torch.maximum(-low, high).float()
        before = self._peaks.get(name)
        self._peaks[name] = peak if before is None else torch.maximum(before, peak)
        # Adding a number of 23 bits above the quantum leaves no place for what lies below it.
        magic = 1.5 * 2.0 ** (SUM_BITS + 1 + self.exponents[name])
        return gradient.float().add(magic).sub_(magic).to(gradient.dtype)

    def settle(self) -> bool:
        """After the backward passes of a step: whether all sums were exact. Every rank calls it.

        If not, the step must be repeated. Either way quanta are now those for the next one.
        """
        names = list(self.exponents)
        none = torch.zeros(())
        peaks = torch.stack([self._peaks.get(name, none).cpu() for name in names])
        self._peaks.clear()
        if self._world_size > 1:
            dist.all_reduce(peaks, dist.ReduceOp.MAX)
        exact = True
        for name, peak in zip(names, peaks.tolist(), strict=True):
            if peak == 0 or not math.isfinite(peak):  # what is no number is not to be saved by a quantum
                continue
            needed = math.ceil(math.log2(peak) + self._log_terms) - SUM_BITS
            exact = exact and needed <= self.exponents[name]
            self.exponents[name] = max(needed + SPARE_BITS, self.exponents[name] - 1)
        self.repeats += not exact
        return exact

    def norm(self, gradients: Iterable[Tensor], num_elements: int, *, replicated: bool) -> float:
        """The norm of all reduced gradients. Every rank calls it.

        gradients: what this rank holds of them, fp32. num_elements: of all of them. replicated: each rank holds all.
        """
        largest = max(self.exponents.values()) + SUM_BITS  # no element exceeds 2^largest
        exponent = 2 * largest - (51 - math.ceil(math.log2(max(num_elements, 2))))
        magic = 1.5 * 2.0 ** (52 + exponent)
        total = torch.zeros((), dtype=torch.float64)
        for gradient in gradients:
            for part in gradient.detach().reshape(-1).split(NORM_CHUNK):
                squares = part.double()
                squares.mul_(squares).add_(magic).sub_(magic)
                total += squares.sum().cpu()
        if self._world_size > 1 and not replicated:
            dist.all_reduce(total)
        return math.sqrt(total.item())
