"""What examples look like to a model, and what the model gives back: how tasks and models are matched.

A model file lists the inputs that it takes in `ACCEPTS` and the outputs that it can give in `GIVES`; it gives each of
them for each input. A task's `io(config)` says what it gives and wants. Below each input stands how a model is called
with a batch of it, and below each output what it returns. B = examples.
"""

from __future__ import annotations

from dataclasses import dataclass

# --- inputs


@dataclass(frozen=True)
class Tokens:
    """A sequence of at most `seq_len` ids, each in [0, vocab_size).

    model(tokens, document=None, position=None), each (B, T) with T <= seq_len: int64 ids; which document of its
    sequence a token belongs to, ascending from 0; its place in that document. Without them a sequence is one document.
    Padding is documents of its own: what is asked of the whole input is asked of document 0.

    A model that keeps what it has computed has new_cache(), whose `length` is the positions in it: with cache=...,
    tokens are what follows those of the calls before with the same cache.
    """

    vocab_size: int
    seq_len: int


@dataclass(frozen=True)
class TokenPair:
    """A sequence to read and one to write, from one vocabulary; each of at most `seq_len` ids.

    model(source, source_length, target): (B, S) int64, (B,) int64, (B, T) int64. Position t of the output sees the
    source and target[:, : t + 1].

    To write step by step: with cache=model.new_cache(), target is what follows that of the calls before with the same
    cache, whose `select(rows)` takes other rows of the batch. After a call with model.new_cache(keeps_weights=True),
    each of its `layers` has the `weights` of an attention to the source, (B, heads, T, S).
    """

    vocab_size: int
    seq_len: int


@dataclass(frozen=True)
class Frames:
    """A series of at most `length` moments of `channels` values each.

    model(frames, length): (B, T, channels) in the dtype of the weights, (B,) int64; what follows an example's length
    is padding, and changes nothing.
    """

    channels: int
    length: int


@dataclass(frozen=True)
class Vector:
    """`size` values. model(vector): (B, size) in the dtype of the weights."""

    size: int


@dataclass(frozen=True)
class Image:
    """A picture of normalised values. model(image): (B, channels, height, width) in the dtype of the weights."""

    channels: int
    height: int
    width: int


@dataclass(frozen=True)
class NoisyImage:
    """A picture with noise of one of `steps` strengths, of one of `classes` kinds; kind `classes` stands for any.

    model(image, step, kind): as Image, and (B,) int64 each.
    """

    channels: int
    height: int
    width: int
    steps: int
    classes: int


# --- outputs


@dataclass(frozen=True)
class Logits:
    """(B, T, size): for each position of the input, unnormalised log-probabilities.

    A model on Tokens with `takes_labels = True` gives, with labels=(B, T), the sum of their cross-entropies
    instead: an fp32 scalar for which it need not hold the logits (trainer/parts/head.py).
    """

    size: int


@dataclass(frozen=True)
class MaskedLogits:
    """As Logits, and each position may see all of its document: not for a task that predicts the next token."""

    size: int


@dataclass(frozen=True)
class ClassLogits:
    """(B, size): for the whole input, unnormalised log-probabilities."""

    size: int


@dataclass(frozen=True)
class Values:
    """(B, size): numbers for the whole input."""

    size: int


@dataclass(frozen=True)
class Embedding:
    """(B, size + classes): a direction of length 1, and its cosine with the learned direction of each class."""

    size: int
    classes: int


@dataclass(frozen=True)
class PixelLogits:
    """(B, size, height, width): for each pixel, unnormalised log-probabilities."""

    size: int


@dataclass(frozen=True)
class Pixels:
    """(B, channels, height, width): an image's worth of numbers."""

    channels: int


@dataclass(frozen=True)
class Boxes:
    """(B, rows, columns, classes + 5): what each cell of a grid over the image finds.

    First the logits of the classes; then left, top, right, bottom: non-negative distances in pixels from the cell's
    centre to the box's sides; then the logit of how central the cell is in its box.
    """

    classes: int
