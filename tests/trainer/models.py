"""Small GPTs for tests."""

from __future__ import annotations

from typing import Any

import torch

from trainer.initialization import materialize
from trainer.models import gpt
from trainer.shapes import Logits, Tokens

SMALL = {"num_layers": 2, "hidden_size": 32, "num_heads": 4}


def small_gpt(vocab_size: int = 50, seq_len: int = 24, seed: int = 0, **settings: Any) -> gpt.GPT:
    """Weights ten times larger than at the start of training, so that every part of the model matters to its output."""
    config = gpt.Config(**(SMALL | settings))
    with torch.device("meta"):
        module = gpt.build(config, Tokens(vocab_size, seq_len), Logits(vocab_size))

    def init(name: str, tensor: torch.Tensor, generator: torch.Generator) -> None:
        gpt.init_parameter(config, name, tensor, generator)
        if "norm" in name:
            tensor.normal_(1.0, 0.3, generator=generator)
        else:
            tensor.mul_(10)

    materialize(module, init, seed=seed)
    return module
