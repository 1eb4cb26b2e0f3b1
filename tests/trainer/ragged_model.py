"""A model of one's own: the mean of a signal's moments, and a linear layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from configs.schema import Section
from trainer.shapes import ClassLogits


@dataclass(frozen=True)
class Signal:
    """Moments of so many values, as many as there are."""

    channels: int


class Config(Section):
    """Nothing to set."""


ACCEPTS = (Signal,)
GIVES = (ClassLogits,)


class Mean(nn.Module):
    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.head = nn.Linear(channels, classes)

    def forward(self, signal: Tensor, length: Tensor) -> Tensor:
        """(B, L, C), (B,): (B, N)."""
        inside = torch.arange(signal.shape[1]) < length.unsqueeze(1)
        return self.head((signal * inside.unsqueeze(2)).sum(1) / length.unsqueeze(1))


def build(config: Config, input: Signal, output: Any) -> nn.Module:
    return Mean(input.channels, output.size)


def init_parameter(config: Config, name: str, tensor: Tensor, generator: torch.Generator) -> None:
    tensor.normal_(0.0, 0.5, generator=generator)


def num_parameters(config: Config, input: Signal, output: Any) -> int:
    return (input.channels + 1) * output.size


def flops_per_example(config: Config, input: Signal, output: Any) -> float:
    return 6.0 * input.channels * output.size
