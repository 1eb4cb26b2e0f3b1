"""Small GPTs for tests."""

from __future__ import annotations

from typing import Any

import torch

from trainer.initialization import materialize
from trainer.models import gpt
from trainer.shapes import Logits, Tokens

SMALL = {"num_layers": 2, "hidden_size": 32, "num_heads": 4}


def small_gpt(vocab_size: int = 50, seq_len: int = 24, seed: int = 0, **settings: Any) -> gpt.GPT:
    """Weights larger than a fresh GPT's, so that every part of the model matters to its output."""
    config = gpt.Config(**(SMALL | settings))
    with torch.device("meta"):
        module = gpt.build(config, Tokens(vocab_size, seq_len), Logits(vocab_size))

    def init(name: str, tensor: torch.Tensor, generator: torch.Generator) -> None:
        tensor.normal_(1.0, 0.3, generator=generator) if "norm" in name else tensor.normal_(
            0.0, 0.2, generator=generator
        )

    materialize(module, init, seed=seed)
    return module
