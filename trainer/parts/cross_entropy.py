"""Summed cross-entropy in fp32 that holds one matrix of logits, or none.

`F.cross_entropy` allocates three more matrices as large as the logits, which for a language model are its largest
tensors. `summed_cross_entropy` keeps one number a row, and its backward pass writes the gradient once, in chunks that
stay in the cache. `linear_cross_entropy` takes what the logits are made of, and makes those of a few rows at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORED = -100  # the label of a position that is no item of the loss; PyTorch's own convention
CPU_CHUNK_VALUES = 2**18  # 1 MiB of fp32: about a core's second-level cache
GPU_CHUNK_VALUES = 2**27
# Of a matrix product: with fewer rows, reading and adding to the weights takes longer than the product itself.
LEAST_ROWS = 256


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
        for rows in _chunks(logits, logits.shape[1]):
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
        for rows in _chunks(logits, logits.shape[1]):
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


def linear_cross_entropy(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
    """summed_cross_entropy(F.linear(hidden, weight, bias), labels), without ever holding the (N, V) logits.

    hidden: (N, C). weight: (V, C), bias: (V,), all of one floating dtype. labels: (N,) int64.
    The gradients are computed with the loss, a chunk of rows at a time, and kept until the backward pass, which only
    scales them (as in Hsu et al. 2024, Liger Kernel): nothing is computed twice, and what is held is (N, C) and, in
    fp32, (V, C) instead of (N, V).
    """
    return _LinearCrossEntropy.apply(hidden, weight, bias, labels, torch.is_grad_enabled())


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, with_gradients: bool
    ) -> Tensor:
        losses = torch.empty(labels.shape, dtype=torch.float32, device=hidden.device)  # (N,)
        ignored = labels == IGNORED
        label = labels.clamp(min=0).unsqueeze(1)
        # Softmax's small values vanish in fp16, where the loss scale would come too late to save them.
        ctx.scale = 256.0 if hidden.dtype == torch.float16 else 1.0
        if with_gradients:
            grad_hidden = torch.empty_like(hidden)
            grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
            grad_bias = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)
        for rows in _chunks(hidden, len(weight), LEAST_ROWS):
            chunk = F.linear(hidden[rows], weight, bias).float()
            normaliser = chunk.logsumexp(1, keepdim=True)
            torch.sub(normaliser, chunk.gather(1, label[rows]), out=losses[rows].unsqueeze(1))
            if not with_gradients:
                continue
            chunk.sub_(normaliser).exp_()  # softmax
            chunk.scatter_add_(1, label[rows], torch.full_like(label[rows], -1, dtype=torch.float32))
            chunk.masked_fill_(ignored[rows].unsqueeze(1), 0.0)
            if grad_bias is not None:
                grad_bias += chunk.sum(0)
            scaled = chunk.mul_(ctx.scale).to(hidden.dtype) if hidden.dtype != torch.float32 else chunk
            torch.mm(scaled, weight, out=grad_hidden[rows])
            if grad_weight.dtype == hidden.dtype:
                grad_weight.addmm_(scaled.T, hidden[rows])
            else:
                grad_weight += scaled.T @ hidden[rows]
        if with_gradients:
            ctx.gradients = grad_hidden, grad_weight, grad_bias
            ctx.dtype = weight.dtype
        return losses.masked_fill_(ignored, 0.0).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None, None]:
        grad_hidden, grad_weight, grad_bias = ctx.gradients
        del ctx.gradients
        unscaled = grad_output / ctx.scale
        grad_bias = None if grad_bias is None else grad_bias.mul_(grad_output).to(ctx.dtype)
        return grad_hidden.mul_(unscaled), grad_weight.mul_(unscaled).to(ctx.dtype), grad_bias, None, None


_planned_for_gpu = ContextVar("planned_for_gpu", default=False)


@contextmanager
def as_on_gpu() -> Iterator[None]:
    """Chunks inside are those of a GPU: for fake logits on a machine that has none."""
    token = _planned_for_gpu.set(True)
    try:
        yield
    finally:
        _planned_for_gpu.reset(token)


def _chunks(matrix: Tensor, classes: int, least: int = 1) -> Iterator[slice]:
    """Rows of the matrix for which so many logits each are not too many, but at least so many rows."""
    values = GPU_CHUNK_VALUES if matrix.is_cuda or _planned_for_gpu.get() else CPU_CHUNK_VALUES
    size = max(least, values // classes)
    return (slice(start, start + size) for start in range(0, matrix.shape[0], size))
