"""Language modelling: predict each token of a document from those before it.

Documents are packed to sequences of `seq_len` tokens with their boundaries kept (data_pipelines/pack.py). Every token
of every document, and each document's end, is predicted exactly once an epoch.

A batch, B = examples, T = seq_len: tokens (B, T) int64; labels (B, T) int64, the token that follows each position, or
-100 where none counts; document, position (B, T) int32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from configs.schema import Section
from data_pipelines.tokenizer import Tokenizer, TokenizerConfig
from trainer.cross_entropy import IGNORED, summed_cross_entropy
from trainer.generate import generate_text
from trainer.shapes import Logits, Tokens

if TYPE_CHECKING:
    import pyarrow

    from data_pipelines.pack import PackedSplit


class Config(Section):
    """Length of a sequence, and what a token is."""

    seq_len: int = Field(ge=1, description="Tokens a sequence: the most context the model sees.", examples=[256])
    tokenizer: TokenizerConfig = Field(default=TokenizerConfig(), description="How text becomes tokens.")


def schema() -> pyarrow.Schema:
    """One example before packing: a document."""
    import pyarrow

    return pyarrow.schema(
        [("key", pyarrow.string()), ("tokens", pyarrow.list_(pyarrow.uint32())), ("num_bytes", pyarrow.int64())]
    )


def packing(config: Config) -> int:
    """Documents are packed to sequences of this length."""
    return config.seq_len


def io(config: Config) -> tuple[Tokens, Logits]:
    """Ids in, one logit for each id out."""
    vocab_size = config.tokenizer.vocab_size
    return Tokens(vocab_size, config.seq_len), Logits(vocab_size)


def prepare(row: Mapping[str, Any], rng: np.random.Generator, config: Config) -> dict[str, np.ndarray]:  # noqa: ARG001
    """Inputs and labels from a packed sequence of T + 1 tokens, of which `valid` labels count."""
    tokens = row["tokens"].astype(np.int64)  # (T + 1,)
    labels = tokens[1:].copy()
    labels[row["valid"] :] = IGNORED
    return {
        "tokens": tokens[:-1],
        "labels": labels,
        "document": row["document"][:-1],
        "position": row["position"][:-1],
    }


def num_items(batch: Mapping[str, Tensor]) -> int:
    """Labels that count."""
    return int((batch["labels"] != IGNORED).sum())


def num_tokens(batch: Mapping[str, Tensor]) -> int:
    """Positions that the model computes, padding included."""
    return batch["tokens"].numel()


def idle(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The batch with no label that counts: its loss is zero, and so is every gradient."""
    return {**batch, "labels": torch.full_like(batch["labels"], IGNORED)}


def loss(model: nn.Module, batch: Mapping[str, Tensor], config: Config) -> Tensor:  # noqa: ARG001
    """Sum of -log p(label) in nats over the labels that count: an fp32 scalar."""
    logits = _logits(model, batch)  # (B, T, V)
    return summed_cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())


def evaluate(model: nn.Module, batch: Mapping[str, Tensor], config: Config) -> dict[str, float]:  # noqa: ARG001
    """Sums over the labels that count: nll_nats, tokens, and correct (those that were the likeliest)."""
    labels = batch["labels"]
    logits = _logits(model, batch)  # (B, T, V)
    nll = summed_cross_entropy(logits.flatten(0, 1), labels.flatten())
    correct = (logits.argmax(-1) == labels) & (labels != IGNORED)
    return {"nll_nats": float(nll), "tokens": float(num_items(batch)), "correct": float(correct.sum())}


def _logits(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    return model(batch["tokens"], batch["document"], batch["position"])


def metrics(sums: Mapping[str, float], config: Config, split: PackedSplit) -> dict[str, float]:  # noqa: ARG001
    """loss (nats a token), perplexity, accuracy, and bits_per_byte of the documents' text.

    bits_per_byte needs no tokenizer to be compared: -log2 p over every token (a document's end is one) / bytes. Over
    a part of the split it is an estimate, with the whole split's tokens a byte; over all of it, exact.
    Nothing where no label counted, or where the split is empty, so that there are no sums.
    """
    if not sums.get("tokens"):
        return {}
    nats = sums["nll_nats"] / sums["tokens"]
    return {
        "loss": nats,
        "perplexity": math.exp(min(nats, 700.0)),  # beyond it a float overflows
        "accuracy": sums["correct"] / sums["tokens"],
        "bits_per_byte": nats / math.log(2) * split.num_tokens / max(split.num_bytes, 1),
    }


def sample(model: nn.Module, tokenizer: Tokenizer, length: int, seed: int) -> str:
    """Up to `length` tokens of a document that the model makes up, the unlikely tail cut off."""
    return "".join(generate_text(model, tokenizer, "", max_tokens=length, temperature=0.8, top_p=0.95, seed=seed))
