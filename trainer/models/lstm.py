"""LSTM: a recurrent network whose cell state is changed by gates, so that it can remember for long.

Hochreiter and Schmidhuber 1997; Gers et al. 2000 (the forget gate); Schuster and Paliwal 1997 (bidirectional). How
sequences of different lengths are read is told in trainer/parts/recurrent.py.

B = examples, T = positions, H = hidden size, D = directions (2 if bidirectional); S = size of the output. On Tokens
(B, T) or Frames (B, T, channels) it gives (B, T, S) from the states (B, T, D H), or (B, S) from what `pooling` makes
of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.parts import recurrent
from trainer.parts.recurrent import Input, Output, Recurrent, Sizes
from trainer.shapes import ClassLogits, Frames, Logits, Tokens, Values

ACCEPTS = (Tokens, Frames)
GIVES = (Logits, ClassLogits, Values)


class Config(Sizes):
    """Sizes and variants of an LSTM."""


def build(config: Config, input: Input, output: Output) -> Recurrent:
    """An LSTM. Raises UsageError for a bidirectional one that gives logits for each token."""
    return recurrent.build("lstm", config, input, output)


def init_parameter(config: Config, name: str, tensor: Tensor, generator: torch.Generator) -> None:  # noqa: ARG001
    """As trainer/parts/recurrent.py says."""
    recurrent.init_parameter("lstm", name, tensor, generator)


def num_parameters(config: Config, input: Input, output: Output) -> int:
    """Trainable values. Raises UsageError as `build` does."""
    return recurrent.num_parameters("lstm", config, input, output)


def flops_per_example(config: Config, input: Input, output: Output) -> float:
    """Of matrix products, forward and backward, over one sequence of full length."""
    return recurrent.flops_per_example("lstm", config, input, output)
