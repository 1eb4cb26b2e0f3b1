"""A recurrent network of simple cells: Elman's, or the GRU, whose gates decide how much of the state stays.

Elman 1990 (`cell: tanh`); Cho et al. 2014 (`cell: gru`, as torch and cuDNN compute it: the reset gate behind the
recurrent matrix); Schuster and Paliwal 1997 (bidirectional). How sequences of different lengths are read is told in
trainer/parts/recurrent.py.

B = examples, T = positions, H = hidden size, D = directions (2 if bidirectional); S = size of the output. On Tokens
(B, T) or Frames (B, T, channels) it gives (B, T, S) from the states (B, T, D H), or (B, S) from what `pooling` makes
of them.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from trainer.parts import recurrent
from trainer.parts.recurrent import Input, Output, Recurrent, Sizes
from trainer.shapes import ClassLogits, Frames, Logits, Tokens, Values

ACCEPTS = (Tokens, Frames)
GIVES = (Logits, ClassLogits, Values)


class Config(Sizes):
    """Sizes and variants of a recurrent network."""

    cell: Literal["tanh", "gru"] = Field(default="gru", description="tanh: Elman's cell; gru: with two gates.")


def build(config: Config, input: Input, output: Output) -> Recurrent:
    """A network of this cell. Raises UsageError for a bidirectional one that gives logits for each token."""
    return recurrent.build(config.cell, config, input, output)


def init_parameter(config: Config, name: str, tensor: Tensor, generator: torch.Generator) -> None:
    """As trainer/parts/recurrent.py says."""
    recurrent.init_parameter(config.cell, name, tensor, generator)


def num_parameters(config: Config, input: Input, output: Output) -> int:
    """Trainable values. Raises UsageError as `build` does."""
    return recurrent.num_parameters(config.cell, config, input, output)


def flops_per_example(config: Config, input: Input, output: Output) -> float:
    """Of matrix products, forward and backward, over one sequence of full length."""
    return recurrent.flops_per_example(config.cell, config, input, output)
