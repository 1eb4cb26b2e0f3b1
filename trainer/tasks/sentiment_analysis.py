"""Sentiment analysis, or any other classification of texts: which of `num_classes` a text belongs to.

A stored row has `tokens`, which the build makes of the source's `text` (the end mark, then its ids), and `label`, the
number of its class. Texts of like length share micro-batches.

A batch, B = examples, T = tokens of the longest: tokens (B, T), ids, then 0; tokens_length (B,) int32; label (B,)
int64, -100 where it does not count. The model reads the first seq_len tokens of each; padding is a document of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from data_pipelines.tokenizer import EOS_ID, TokenizerConfig
from trainer.parts.cross_entropy import IGNORED, summed_cross_entropy
from trainer.parts.labels import Classes, check_labels, total_weight, weights_of  # noqa: F401 - parts of the task
from trainer.shapes import ClassLogits, Tokens


class Config(Classes):
    """How long a text may be, what a token is, and how many classes there are."""

    seq_len: int = Field(ge=1, description="Tokens read of a text, its beginning.", examples=[128])
    num_classes: int = Field(default=2, ge=2, description="Classes; labels are 0 to num_classes - 1.")
    tokenizer: TokenizerConfig = Field(default=TokenizerConfig(), description="How text becomes tokens.")


def columns(config: Config) -> tuple[str, ...]:  # noqa: ARG001 - the signature of every task
    """What it reads of a stored row."""
    return ("tokens", "label")


def example(config: Config, rng: np.random.Generator) -> dict[str, Any]:
    """Random ids, led by the end mark, and any class."""
    tokens = rng.integers(1, config.tokenizer.vocab_size, int(rng.integers(2, 2 * config.seq_len + 2)))
    tokens[0] = EOS_ID
    return {"tokens": tokens.astype(np.uint16), "label": np.int64(rng.integers(config.num_classes))}


def packing(config: Config) -> None:  # noqa: ARG001
    """Examples are rows."""
    return


def length_column(config: Config) -> str:  # noqa: ARG001
    """Texts of like length are put side by side."""
    return "tokens"


def io(config: Config) -> tuple[Tokens, ClassLogits]:
    """Ids in, one logit a class out."""
    return Tokens(config.tokenizer.vocab_size, config.seq_len), ClassLogits(config.num_classes)


def check(batch: Mapping[str, Tensor], config: Config) -> None:
    """Raises UsageError for a label that is none of the classes."""
    check_labels("A text", batch["label"], config.num_classes)


def num_items(batch: Mapping[str, Tensor]) -> int:
    """Texts that count."""
    return int((batch["label"] != IGNORED).sum())


def num_tokens(batch: Mapping[str, Tensor]) -> int:
    """Tokens of the texts, also those behind seq_len."""
    return int(batch["tokens_length"].sum())


def idle(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The batch with no label that counts: its loss is zero, and so is every gradient."""
    return {**batch, "label": torch.full_like(batch["label"], IGNORED)}


def loss(model: nn.Module, batch: Mapping[str, Tensor], config: Config) -> Tensor:
    """Sum of -log p(label) in nats, weighted: an fp32 scalar."""
    labels = batch["label"].to(torch.int64)
    return summed_cross_entropy(_logits(model, batch, config), labels, weights=weights_of(labels, config.class_weights))


def evaluate(model: nn.Module, batch: Mapping[str, Tensor], config: Config) -> dict[str, float]:
    """Sums over the texts that count: nll_nats, texts, and correct (those whose class was the likeliest)."""
    labels = batch["label"].to(torch.int64)
    logits = _logits(model, batch, config)  # (B, num_classes)
    return {
        "nll_nats": float(summed_cross_entropy(logits, labels)),
        "texts": float(num_items(batch)),
        "correct": float((logits.argmax(-1) == labels).sum()),
    }


def metrics(sums: Mapping[str, float], config: Config, split: Any) -> dict[str, float]:  # noqa: ARG001
    """loss (nats a text) and accuracy; nothing where no text counted."""
    if not sums.get("texts"):
        return {}
    return {"loss": sums["nll_nats"] / sums["texts"], "accuracy": sums["correct"] / sums["texts"]}


def _logits(model: nn.Module, batch: Mapping[str, Tensor], config: Config) -> Tensor:
    """(B, num_classes)."""
    tokens = batch["tokens"][:, : config.seq_len].to(torch.int64)
    padding = torch.arange(tokens.shape[1], device=tokens.device) >= batch["tokens_length"].unsqueeze(1)
    return model(tokens, padding.to(torch.int32))
