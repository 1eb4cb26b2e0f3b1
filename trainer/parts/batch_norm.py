"""Batch normalisation that does not depend on how micro-batches are spread over workers (Ioffe and Szegedy 2015).

Each global micro-batch is normalised by its own mean and variance. The running statistics, which evaluation uses, are
moved at the end of a step: by all of its micro-batches, in their order, the same on every rank. Ordinary BatchNorm
moves them in each forward pass: then every rank has others, and a repeated (idle) micro-batch counts twice.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


class BatchNorm2d(nn.Module):
    """Normalises (B, C, H, W) over B, H and W, then scales and shifts each channel; statistics are fp32.

    batch_mean, batch_var: of the latest forward pass in training; RunningStatistics takes them from there. So a module
    may be called once in a forward pass (again by recomputed activations, which gives the same).
    """

    running_mean: Tensor
    running_var: Tensor
    batch_mean: Tensor
    batch_var: Tensor

    def __init__(self, channels: int, momentum: float = 0.1, eps: float = 1e-5) -> None:
        super().__init__()
        self.momentum = momentum
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(channels))
        self.bias = nn.Parameter(torch.empty(channels))
        for name in ("running_mean", "running_var"):
            self.register_buffer(name, torch.empty(channels))
        for name in ("batch_mean", "batch_var"):
            self.register_buffer(name, torch.empty(channels), persistent=False)
        self.reset_buffers()

    def reset_buffers(self) -> None:
        """Statistics of nothing yet, where they are."""
        for mean, variance in ((self.running_mean, self.running_var), (self.batch_mean, self.batch_var)):
            mean.zero_()
            variance.fill_(1.0)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W): the same shape and dtype."""
        weight, bias, values = self.weight.float(), self.bias.float(), x.float()
        if not self.training:
            y = F.batch_norm(values, self.running_mean, self.running_var, weight, bias, False, 0.0, self.eps)
            return y.to(x.dtype)
        assert values.numel() > values.shape[1], "one value a channel has no variance"
        # With momentum 1 the kernel leaves the batch's own statistics there, without a pass of our own over the values.
        # It adds 0 times what was there, which must be a number.
        self.batch_mean.zero_()
        self.batch_var.zero_()
        y = F.batch_norm(values, self.batch_mean, self.batch_var, weight, bias, True, 1.0, self.eps)
        return y.to(x.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Move with the module, but stay fp32 where it is converted: `.bfloat16()` would round the statistics."""
        kept = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            assert buffer is not None
            moved = self._buffers[name]
            assert moved is not None
            if moved.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(moved.device)
        return self


class RunningStatistics:
    """The running statistics of all BatchNorm2d of a module, moved once a step. Cheap where there are none."""

    def __init__(self, module: nn.Module) -> None:
        self._norms = [each for each in module.modules() if isinstance(each, BatchNorm2d)]
        self._channels = sum(len(norm.running_mean) for norm in self._norms)
        self._seen: dict[int, Tensor] = {}

    def add(self, index: int) -> None:
        """Keep what the forward pass of global micro-batch `index` has just left; not to be called for an idle one."""
        if self._norms:
            means = [norm.batch_mean for norm in self._norms]
            self._seen[index] = torch.cat([*means, *(norm.batch_var for norm in self._norms)])  # (2 C,)

    def forget(self) -> None:
        """Leave the running statistics as they are: the step made no update."""
        self._seen.clear()

    def fold(self, num_micro_batches: int) -> None:
        """Move the running statistics by the step's micro-batches, in their order. Every rank calls it."""
        if not self._norms:
            return
        device = self._norms[0].running_mean.device
        rows = torch.zeros(num_micro_batches, 2 * self._channels + 1, device=device)  # the last column: it is there
        for index, statistics in self._seen.items():
            rows[index, :-1] = statistics
            rows[index, -1] = 1.0
        self._seen.clear()
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(rows)  # each row has one summand, so the sum is exact
        for row in rows[rows[:, -1] > 0]:
            self._move(row)

    def _move(self, row: Tensor) -> None:
        start = 0
        for norm in self._norms:
            stop = start + len(norm.running_mean)
            for running, first in ((norm.running_mean, start), (norm.running_var, self._channels + start)):
                running.mul_(1 - norm.momentum).add_(row[first : first + len(running)], alpha=norm.momentum)
            start = stop
