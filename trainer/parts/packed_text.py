"""What tasks share that read documents packed to sequences (data_pipelines/pack.py)."""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field

from configs.schema import Section
from data_pipelines.tokenizer import EOS_ID, TokenizerConfig


class PackedText(Section):
    """Length of a sequence, and what a token is."""

    seq_len: int = Field(ge=1, description="Tokens a sequence: the most context the model sees.", examples=[256])
    tokenizer: TokenizerConfig = Field(default=TokenizerConfig(), description="How text becomes tokens.")
    packing: Literal["concat", "best_fit"] = Field(
        default="concat",
        description="How documents fill sequences: concat cuts one stream; best_fit splits none that fits in one.",
    )


def columns(config: PackedText) -> tuple[str, ...]:  # noqa: ARG001 - the signature of every task
    """What it reads of a stored row."""
    return ("tokens",)


def example(config: PackedText, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """A document of random ids, led by its end mark."""
    tokens = rng.integers(1, config.tokenizer.vocab_size, int(rng.integers(2, 2 * config.seq_len))).astype(np.uint16)
    tokens[0] = EOS_ID
    return {"tokens": tokens}


def packing(config: PackedText) -> int:
    """Documents are packed to sequences of this length."""
    return config.seq_len
