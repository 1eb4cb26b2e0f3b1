"""A multilayer perceptron on all values of an input at once: the least that learns (Rumelhart et al. 1986).

B = examples, K = channels, H, W = height and width of an image, S = size of a vector, C = hidden size, N = outputs.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from configs.schema import Section
from trainer.shapes import ClassLogits, Image, Values, Vector

ACCEPTS = (Image, Vector)
GIVES = (ClassLogits, Values)


class Config(Section):
    """Sizes of a multilayer perceptron."""

    num_layers: int = Field(ge=1, description="Hidden layers.", examples=[2])
    hidden_size: int = Field(ge=1, description="Width of each hidden layer.", examples=[128])
    dropout: float = Field(default=0.0, ge=0, lt=1, description="Share of hidden values dropped.")


class MLP(nn.Module):
    """The whole network."""

    def __init__(self, config: Config, inputs: int, outputs: int) -> None:
        super().__init__()
        sizes = [inputs, *[config.hidden_size] * config.num_layers]
        self.layers = nn.ModuleList(nn.Linear(*pair) for pair in itertools.pairwise(sizes))
        self.dropout = nn.Dropout(config.dropout)
        self.head = nn.Linear(config.hidden_size, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """(B, K, H, W) or (B, S), in the dtype of the weights: (B, N)."""
        x = x.flatten(1)
        for layer in self.layers:
            x = self.dropout(F.relu(layer(x)))
        return self.head(x)


def build(config: Config, input: Image | Vector, output: ClassLogits | Values) -> MLP:
    """A network for inputs of this size."""
    return MLP(config, _values(input), output.size)


def init_parameter(config: Config, name: str, tensor: Tensor, generator: torch.Generator) -> None:  # noqa: ARG001
    """Matrices normal with variance 2 / inputs (He et al. 2015), the head's small; biases 0."""
    if name.endswith("bias"):
        tensor.zero_()
    elif name.startswith("head"):
        tensor.normal_(0.0, 0.01, generator=generator)
    else:
        tensor.normal_(0.0, (2 / tensor.shape[1]) ** 0.5, generator=generator)


def num_parameters(config: Config, input: Image | Vector, output: ClassLogits | Values) -> int:
    """Trainable values."""
    width = config.hidden_size
    hidden = (_values(input) + 1) * width + (config.num_layers - 1) * (width + 1) * width
    return hidden + (width + 1) * output.size


def flops_per_example(config: Config, input: Image | Vector, output: ClassLogits | Values) -> float:
    """Of all matrix products, forward and backward (twice the forward); the first has no gradient for its input."""
    width, first = config.hidden_size, _values(input) * config.hidden_size
    products = first + (config.num_layers - 1) * width**2 + width * output.size
    return 3.0 * 2.0 * products - 2.0 * first


def _values(input: Image | Vector) -> int:
    return input.size if isinstance(input, Vector) else input.channels * input.height * input.width
