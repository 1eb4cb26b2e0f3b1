"""Summed cross-entropy in fp32 that never holds a second matrix of logits.

`F.cross_entropy` allocates three more matrices as large as the logits, which for a language model are its largest
tensors. Here the forward pass keeps one number a row, and the backward pass writes the gradient once, in chunks that
stay in the cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORED = -100  # the label of a position that is no item of the loss; PyTorch's own convention
CPU_CHUNK_VALUES = 2**18  # 1 MiB of fp32: about a core's second-level cache
GPU_CHUNK_VALUES = 2**27


def summed_cross_entropy(
    logits: Tensor, labels: Tensor, smoothing: float = 0.0, weights: Tensor | None = None
) -> Tensor:
    """Sum of -log softmax(logits)[label] over the rows whose label is not IGNORED: an fp32 scalar.

    logits: (N, V), any floating dtype; computed in fp32. labels: (N,) int64. smoothing: that share of the label's
    probability of 1 is spread evenly over all V classes (Szegedy et al. 2016). weights: (N,) fp32, how often each row
    counts; None is once.
    Ignored rows give exactly zero, and get a gradient of exactly zero even where their logits are not finite.
    """
    return _SummedCrossEntropy.apply(logits, labels, smoothing, weights)


class _SummedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, smoothing: float, weights: Tensor | None) -> Tensor:
        normaliser = torch.empty(labels.shape, dtype=torch.float32, device=logits.device)  # (N,) log of softmax's sum
        target = torch.empty_like(normaliser)  # (N,) mean of the logits by the label's distribution
        for rows in _chunks(logits):
            chunk = logits[rows].float()
            torch.logsumexp(chunk, 1, out=normaliser[rows])
            target[rows] = chunk.gather(1, labels[rows].clamp(min=0).unsqueeze(1)).squeeze(1)
            if smoothing:
                target[rows] = target[rows].lerp(chunk.mean(1), smoothing)
        ctx.save_for_backward(logits, labels, normaliser)
        ctx.smoothing, ctx.weights = smoothing, weights
        losses = normaliser - target
        if weights is not None:
            losses *= weights
        return losses.masked_fill_(labels == IGNORED, 0.0).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None, None]:
        logits, labels, normaliser = ctx.saved_tensors
        gradient = torch.empty_like(logits)
        ignored = (labels == IGNORED).unsqueeze(1)
        label = labels.clamp(min=0).unsqueeze(1)
        for rows in _chunks(logits):
            chunk = gradient[rows] if gradient.dtype == torch.float32 else torch.empty(0, device=logits.device)
            torch.sub(logits[rows].float(), normaliser[rows].unsqueeze(1), out=chunk)
            chunk.exp_()  # softmax
            if ctx.smoothing:
                chunk.sub_(ctx.smoothing / logits.shape[1])
            chunk.scatter_add_(1, label[rows], torch.full_like(label[rows], ctx.smoothing - 1, dtype=torch.float32))
            if ctx.weights is not None:
                chunk.mul_(ctx.weights[rows].unsqueeze(1))
            chunk.mul_(grad_output).masked_fill_(ignored[rows], 0.0)
            if gradient.dtype != torch.float32:
                gradient[rows] = chunk
        return gradient, None, None, None


_planned_for_gpu = ContextVar("planned_for_gpu", default=False)


@contextmanager
def as_on_gpu() -> Iterator[None]:
    """Chunks inside are those of a GPU: for fake logits on a machine that has none."""
    token = _planned_for_gpu.set(True)
    try:
        yield
    finally:
        _planned_for_gpu.reset(token)


def _chunks(logits: Tensor) -> Iterator[slice]:
    values = GPU_CHUNK_VALUES if logits.is_cuda or _planned_for_gpu.get() else CPU_CHUNK_VALUES
    size = max(1, values // logits.shape[1])
    return (slice(start, start + size) for start in range(0, logits.shape[0], size))
