"""Masked language modelling: tell tokens that were hidden from what stands on both sides of them (Devlin et al. 2018).

Documents are packed to sequences of `seq_len` tokens (data_pipelines/pack.py). Of the tokens of a sequence, end marks
left out, a share of `masked` is chosen, one at least. Of those 80 % are replaced by a mark of their own, 10 % by a
random token, and 10 % stay: all of them are to be told, and the model cannot know of the last two kinds which they are.

In training the choice comes from the example's generator (seed and position in the order): another one in each epoch.
In evaluation it follows from the sequence's tokens alone, so every seed and every model is asked the same.

The loader hands `preparation` one packed sequence: tokens (T + 1,) and valid, as language_modeling has them in a batch.
Here the first T are read, of which the first `valid` are text.

A batch, B = examples, T = seq_len: tokens (B, T) int32, ids as the model sees them, `vocab_size` for the mark; labels
(B, T) int32, the token that stood there, -100 where none is asked; valid (B,) int32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xxhash
from pydantic import Field
from torch import Tensor, nn

from data_pipelines.tokenizer import EOS_ID
from trainer.parts.cross_entropy import IGNORED, summed_cross_entropy
from trainer.parts.packed_text import PackedText, columns, example, packing  # noqa: F401 - parts of the task
from trainer.shapes import MaskedLogits, Tokens

if TYPE_CHECKING:
    from data_pipelines.columns import Column

REPLACED, RANDOM = 0.8, 0.1  # of the chosen tokens; the rest stays


class Config(PackedText):
    """Length of a sequence, what a token is, and how many are hidden."""

    masked: float = Field(default=0.15, gt=0, lt=1, description="Share of the tokens that the model has to tell.")


def io(config: Config) -> tuple[Tokens, MaskedLogits]:
    """Ids and the mark in, one logit for each of them out (the mark's, never right, keeps the two tables one)."""
    size = config.tokenizer.vocab_size + 1
    return Tokens(size, config.seq_len), MaskedLogits(size)


def preparation(
    config: Config,
    stored: Sequence[Column],  # noqa: ARG001
    *,
    training: bool,
) -> Callable[[Mapping[str, Any], np.random.Generator], dict[str, np.ndarray]]:
    """Hides tokens of a packed sequence."""
    return partial(_prepare, config=config, training=training)


def _prepare(
    row: Mapping[str, Any], rng: np.random.Generator, *, config: Config, training: bool
) -> dict[str, np.ndarray]:
    tokens, valid = np.asarray(row["tokens"])[:-1].astype(np.int32), int(row["valid"])
    if not training:
        rng = np.random.default_rng(xxhash.xxh3_64_intdigest(tokens.tobytes()))
    labels = np.full_like(tokens, IGNORED)
    told = np.flatnonzero(tokens[:valid] != EOS_ID)
    if len(told):
        chosen = rng.choice(told, max(1, round(config.masked * len(told))), replace=False)
        labels[chosen] = tokens[chosen]
        fate, others = rng.random(len(chosen)), rng.integers(1, config.tokenizer.vocab_size, len(chosen))
        changed = np.where(fate < REPLACED + RANDOM, others, tokens[chosen])
        tokens[chosen] = np.where(fate < REPLACED, config.tokenizer.vocab_size, changed)
    return {"tokens": tokens, "labels": labels, "valid": np.asarray(valid, np.int32)}


def num_items(batch: Mapping[str, Tensor]) -> int:
    """Tokens to tell."""
    return int((batch["labels"] != IGNORED).sum())


def num_tokens(batch: Mapping[str, Tensor]) -> int:
    """Positions that the model computes, padding included."""
    return batch["tokens"].numel()


def idle(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The batch with nothing to tell: its loss is zero, and so is every gradient."""
    return {**batch, "labels": torch.full_like(batch["labels"], IGNORED)}


def loss(model: nn.Module, batch: Mapping[str, Tensor], config: Config) -> Tensor:  # noqa: ARG001
    """Sum of -log p(hidden token) in nats: an fp32 scalar."""
    return summed_cross_entropy(*_told(model, batch))


def evaluate(model: nn.Module, batch: Mapping[str, Tensor], config: Config) -> dict[str, float]:  # noqa: ARG001
    """Sums over the tokens to tell: nll_nats, tokens, and correct (those that were the likeliest)."""
    logits, labels = _told(model, batch)
    return {
        "nll_nats": float(summed_cross_entropy(logits, labels)),
        "tokens": float(len(labels)),
        "correct": float((logits.argmax(-1) == labels).sum()),
    }


def metrics(sums: Mapping[str, float], config: Config, split: Any) -> dict[str, float]:  # noqa: ARG001
    """loss (nats a hidden token), perplexity, and accuracy: the share that was told right. Nothing where none was."""
    if not sums.get("tokens"):
        return {}
    nats = sums["nll_nats"] / sums["tokens"]
    return {
        "loss": nats,
        "perplexity": math.exp(min(nats, 700.0)),  # beyond it a float overflows
        "accuracy": sums["correct"] / sums["tokens"],
    }


def _told(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Logits (N, V) at the tokens to tell, and those tokens (N,) int64."""
    tokens, labels = batch["tokens"].to(torch.int64), batch["labels"].to(torch.int64)
    document, position = _documents(tokens, batch["valid"])
    asked = labels != IGNORED
    return model(tokens, document, position)[asked], labels[asked]


def _documents(tokens: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Which document of its sequence a token (B, T) is in, and where, int64; all padding is one document."""
    index = torch.arange(tokens.shape[1], device=tokens.device)
    end = valid.unsqueeze(1)
    begins = ((tokens == EOS_ID) & (index < end)) | (index == end)
    document = begins.cumsum(1)
    position = index - torch.where(begins, index, 0).cummax(1).values
    return document - document[:, :1], position
