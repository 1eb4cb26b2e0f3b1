"""What one example looks like to a model, and what the model gives back: how tasks and models are matched.

A model file lists the inputs that it takes in `ACCEPTS`; a task's `io(config)` says what it gives and wants.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tokens:
    """A sequence of at most `seq_len` ids, each in [0, vocab_size)."""

    vocab_size: int
    seq_len: int


@dataclass(frozen=True)
class Image:
    """A picture of normalised values: (channels, height, width)."""

    channels: int
    height: int
    width: int


@dataclass(frozen=True)
class Logits:
    """For each position of the input, `size` unnormalised log-probabilities."""

    size: int


@dataclass(frozen=True)
class ClassLogits:
    """For the whole input, `size` unnormalised log-probabilities."""

    size: int
