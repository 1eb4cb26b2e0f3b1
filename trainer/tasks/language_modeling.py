"""Language modelling: predict each token of a document from those before it.

Documents are packed to sequences of `seq_len` tokens with their boundaries kept (data_pipelines/pack.py). Every token
of every document, and each document's end, is predicted exactly once an epoch.

A batch, B = examples, T = seq_len: tokens (B, T + 1), ids, of which the first T are read and the last T predicted;
valid (B,), how many predictions of an example count, from its first on. What follows from them (labels, and which
document a token belongs to, since each begins with the end mark) is computed on the device.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from data_pipelines.tokenizer import EOS_ID, Tokenizer
from trainer.generate import generate_text
from trainer.parts.cross_entropy import IGNORED, summed_cross_entropy
from trainer.parts.packed_text import PackedText, columns, example, packing  # noqa: F401 - parts of the task
from trainer.shapes import Logits, Tokens

if TYPE_CHECKING:
    from trainer.run_data import Totals


class Config(PackedText):
    """Length of a sequence, and what a token is."""


def io(config: Config) -> tuple[Tokens, Logits]:
    """Ids in, one logit for each id out."""
    vocab_size = config.tokenizer.vocab_size
    return Tokens(vocab_size, config.seq_len), Logits(vocab_size)


def num_items(batch: Mapping[str, Tensor]) -> int:
    """Labels that count."""
    return int(batch["valid"].sum())


def num_tokens(batch: Mapping[str, Tensor]) -> int:
    """Positions that the model computes, padding included."""
    examples, length = batch["tokens"].shape
    return examples * (length - 1)


def idle(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The batch with no label that counts: its loss is zero, and so is every gradient."""
    return {**batch, "valid": torch.zeros_like(batch["valid"])}


def loss(model: nn.Module, batch: Mapping[str, Tensor], config: Config) -> Tensor:  # noqa: ARG001
    """Sum of -log p(label) in nats over the labels that count: an fp32 scalar."""
    sequences = unpack(batch["tokens"], batch["valid"])
    if getattr(getattr(model, "module", model), "takes_labels", False):  # model may be DeepSpeed's engine around it
        return model(sequences.tokens, sequences.document, sequences.position, labels=sequences.labels)
    return summed_cross_entropy(_logits(model, sequences).flatten(0, 1), sequences.labels.flatten())


def evaluate(model: nn.Module, batch: Mapping[str, Tensor], config: Config) -> dict[str, float]:  # noqa: ARG001
    """Sums over the labels that count: nll_nats, tokens, and correct (those that were the likeliest)."""
    sequences = unpack(batch["tokens"], batch["valid"])
    labels = sequences.labels
    logits = _logits(model, sequences)  # (B, T, V)
    nll = summed_cross_entropy(logits.flatten(0, 1), labels.flatten())
    correct = (logits.argmax(-1) == labels) & (labels != IGNORED)
    return {"nll_nats": float(nll), "tokens": float(num_items(batch)), "correct": float(correct.sum())}


class Sequences(NamedTuple):
    """What a model reads and has to predict, each (B, T)."""

    tokens: Tensor  # int64
    labels: Tensor  # int64: the token that follows, or -100 where none counts
    document: Tensor  # int32: 0 for the sequence's first document, one more after each end mark
    position: Tensor  # int32: since the document's end mark, or since the start of the sequence


def unpack(tokens: Tensor, valid: Tensor) -> Sequences:
    """tokens: (B, T + 1) of any integer type; valid: (B,). Padding is a document of its own."""
    ids = tokens.to(torch.int64)
    index = torch.arange(ids.shape[1], dtype=torch.int32, device=ids.device)
    marks = (ids == EOS_ID) & (index <= valid.unsqueeze(1) + 1)  # padding is made of end marks: its first is one
    document = marks.cumsum(1, dtype=torch.int32)
    position = index - torch.where(marks, index, 0).cummax(1).values
    labels = ids[:, 1:].masked_fill(index[:-1] >= valid.unsqueeze(1), IGNORED)
    return Sequences(ids[:, :-1], labels, (document - document[:, :1])[:, :-1], position[:, :-1])


def _logits(model: nn.Module, sequences: Sequences) -> Tensor:
    return model(sequences.tokens, sequences.document, sequences.position)


def metrics(sums: Mapping[str, float], config: Config, split: Totals) -> dict[str, float]:  # noqa: ARG001
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
