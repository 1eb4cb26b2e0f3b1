"""Recurrent networks: what trainer/models/rnn.py and trainer/models/lstm.py have in common.

Each layer and direction is one call of torch's fused kernel over sequences that are padded at their end. What is
valid comes first, so padding cannot change it; the reverse direction reads each sequence turned around within its own
length, and so begins at its last valid item. torch's packed sequences give the same values, but their backward pass on
a CPU takes time in the square of the length: 5 to 10 times as long at 200 steps, measured with torch 2.13.

Frames may pass through a convolution first (as in Deep Speech 2, Amodei et al. 2016), to which everything outside of a
sequence is 0.

B = examples, T = positions, N = sequences, L = length of the longest, K = values a position, H = hidden size,
G = gates (4 of an LSTM, 3 of a GRU, 1), D = directions.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from configs.errors import UsageError
from configs.schema import Section
from trainer.parts.head import LogitsHead
from trainer.shapes import ClassLogits, Frames, Logits, Tokens, Values

Cell = Literal["lstm", "gru", "tanh"]
Input = Tokens | Frames
Output = Logits | ClassLogits | Values

GATES = {"lstm": 4, "gru": 3, "tanh": 1}
EMBEDDING_STD = 0.1  # small, so that rare words say little: on film reviews and tweets 80.0 % right, with 0.5 78.2 %


class Sizes(Section):
    """Sizes and variants of a recurrent network."""

    num_layers: int = Field(ge=1, description="Recurrent layers, one above the other.", examples=[2])
    hidden_size: int = Field(ge=1, description="Values of a layer's state, in each direction.", examples=[24])
    embedding_size: int | None = Field(
        default=None, ge=1, description="Values of a token's embedding; null is hidden_size. Frames have none."
    )
    kernel_size: int | None = Field(
        default=None,
        ge=1,
        description="Moments that a convolution in front of the layers sees at once, around each; null has none. "
        "Tokens have none.",
    )
    bidirectional: bool = Field(
        default=False,
        description="Read each sequence in reverse too; refused where logits are asked for at each token.",
    )
    pooling: Literal["last", "mean", "mean_max"] = Field(
        default="last",
        description="What stands for a sequence: the last state of each direction; the mean of all; mean and maximum.",
    )
    dropout: float = Field(
        default=0.0, ge=0, lt=1, description="Share of values dropped from the embedding and behind each layer."
    )

    @property
    def directions(self) -> int:
        """D."""
        return 2 if self.bidirectional else 1

    def layer_inputs(self, input: Input) -> list[int]:
        """Values a position that each layer reads."""
        if isinstance(input, Frames):
            first = input.channels if self.kernel_size is None else self.hidden_size
        else:
            first = self.embedding_size or self.hidden_size
        return [first] + [self.directions * self.hidden_size] * (self.num_layers - 1)

    def features(self, output: Output) -> int:
        """Values that the head reads."""
        pooled = 2 if self.pooling == "mean_max" and not isinstance(output, Logits) else 1
        return pooled * self.directions * self.hidden_size


class Direction(nn.Module):
    """One layer in one direction: torch's cell of that name, with its weights as they stand there."""

    def __init__(self, cell: Cell, inputs: int, hidden_size: int) -> None:
        super().__init__()
        self._cell = cell
        rows = GATES[cell] * hidden_size
        self.weight_ih = nn.Parameter(torch.empty(rows, inputs))
        self.weight_hh = nn.Parameter(torch.empty(rows, hidden_size))
        self.bias_ih = nn.Parameter(torch.empty(rows))
        self.bias_hh = nn.Parameter(torch.empty(rows))

    def forward(self, x: Tensor) -> Tensor:
        """x (N, L, K): the states after each item, (N, L, H). The first state is 0."""
        weights = (self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)
        state = x.new_zeros(1, x.shape[0], weights[1].shape[1])
        # Biases, one layer, no dropout, whether there may be a backward pass, one direction, examples first.
        options = (True, 1, 0.0, torch.is_grad_enabled(), False, True)
        if self._cell == "lstm":
            return torch.lstm(x, (state, state), weights, *options)[0]
        run = torch.gru if self._cell == "gru" else torch.rnn_tanh
        return run(x, state, weights, *options)[0]


class Layer(nn.Module):
    """One layer, in one direction or in both."""

    def __init__(self, cell: Cell, inputs: int, sizes: Sizes) -> None:
        super().__init__()
        self.forwards = Direction(cell, inputs, sizes.hidden_size)
        self.reverse = Direction(cell, inputs, sizes.hidden_size) if sizes.bidirectional else None

    def forward(self, x: Tensor, turned: Tensor | None) -> Tensor:
        """x (N, L, K), turned as `_turn` takes it: (N, L, D H), the reverse direction behind the forward one."""
        states = self.forwards(x)
        if self.reverse is None:
            return states
        return torch.cat([states, _turn(self.reverse(_turn(x, turned)), turned)], dim=-1)


class Stack(nn.Module):
    """All layers, with dropout behind each."""

    def __init__(self, cell: Cell, sizes: Sizes, inputs: list[int]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(cell, width, sizes) for width in inputs)
        self.dropout = nn.Dropout(sizes.dropout)

    def forward(self, x: Tensor, length: Tensor | None) -> Tensor:
        """x (N, L, K), length (N,) or None for L: (N, L, D H)."""
        turned = None if length is None else _turned(length, x.shape[1])  # (N, L)
        for layer in self.layers:
            x = self.dropout(layer(x, turned))
        return x


def _turned(length: Tensor, longest: int) -> Tensor:
    """Where each place of a turned sequence is read, (N, L): its valid items in reverse, then the padding."""
    place = torch.arange(longest, device=length.device).expand(len(length), longest)
    last = length.unsqueeze(1) - 1
    return torch.where(place <= last, last - place, place)


def _turn(x: Tensor, turned: Tensor | None) -> Tensor:
    return x.flip(1) if turned is None else x.gather(1, turned.unsqueeze(-1).expand_as(x))


class Recurrent(nn.Module):
    """The layers and the head."""

    def __init__(self, cell: Cell, sizes: Sizes, input: Input, output: Output) -> None:
        super().__init__()
        self._hidden_size = sizes.hidden_size
        self._pooling = None if isinstance(output, Logits) else sizes.pooling
        self.stack = Stack(cell, sizes, sizes.layer_inputs(input))
        self.head = (LogitsHead if isinstance(output, Logits) else nn.Linear)(sizes.features(output), output.size)

    def read(self, x: Tensor, length: Tensor | None) -> Tensor:
        """x (N, L, K), length (N,) or None for L: (N, L, size), or (N, size) where that is asked."""
        states = self.stack(x, length)  # (N, L, D H)
        return self.head(states if self._pooling is None else self._pooled(states, length))

    def _pooled(self, states: Tensor, length: Tensor | None) -> Tensor:
        if length is None:
            length = torch.full((states.shape[0],), states.shape[1], device=states.device)
        count = length.clamp(min=1).view(-1, 1, 1)
        if self._pooling == "last":
            last = (count - 1).expand(-1, 1, self._hidden_size)
            ahead, reverse = states.split([self._hidden_size, states.shape[2] - self._hidden_size], dim=2)
            return torch.cat([ahead.gather(1, last)[:, 0], reverse[:, 0]], dim=1)
        padding = torch.arange(states.shape[1], device=states.device).view(1, -1, 1) >= count
        mean = (states.masked_fill(padding, 0.0).sum(1, dtype=torch.float32) / count[:, 0]).to(states.dtype)
        if self._pooling == "mean":
            return mean
        return torch.cat([mean, states.masked_fill(padding, float("-inf")).amax(1)], dim=1)


class FrameReader(Recurrent):
    """A recurrent network on Frames."""

    def __init__(self, cell: Cell, sizes: Sizes, input: Frames, output: Output) -> None:
        super().__init__(cell, sizes, input, output)
        self.convolution = (
            None
            if sizes.kernel_size is None
            else nn.Conv1d(input.channels, sizes.hidden_size, sizes.kernel_size, padding="same")
        )

    def forward(self, frames: Tensor, length: Tensor) -> Tensor:
        """frames (B, T, K) in the dtype of the weights, length (B,): (B, T, size), or (B, size)."""
        length = length.to(torch.int64)
        if self.convolution is not None:
            padding = torch.arange(frames.shape[1], device=length.device) >= length.unsqueeze(1)
            frames = frames.masked_fill(padding.unsqueeze(-1), 0.0).transpose(1, 2)
            frames = F.relu(self.convolution(frames)).transpose(1, 2)  # (B, T, H)
        return self.read(frames, length)


class TokenReader(Recurrent):
    """A recurrent network on Tokens."""

    def __init__(self, cell: Cell, sizes: Sizes, input: Tokens, output: Output) -> None:
        super().__init__(cell, sizes, input, output)
        self.takes_labels = isinstance(output, Logits)
        self.seq_len = input.seq_len
        self.embedding = nn.Embedding(input.vocab_size, sizes.layer_inputs(input)[0])
        self.dropout = nn.Dropout(sizes.dropout)

    def forward(
        self,
        tokens: Tensor,
        document: Tensor | None = None,
        position: Tensor | None = None,  # noqa: ARG002 - the state tells it
        labels: Tensor | None = None,
    ) -> Tensor:
        """tokens (B, T), document (B, T) or None for one: (B, T, size), each document read by itself.

        With labels (B, T) the sum of their cross-entropies, an fp32 scalar. Or (B, size), of each example's document 0;
        what is behind it is not read.
        """
        x = self.dropout(self.embedding(tokens))  # (B, T, K)
        if self._pooling is not None:
            return self.read(x, None if document is None else (document == 0).sum(1))
        if document is None:
            return self.head(self.stack(x, None), labels)
        places = documents_apart(document)
        apart = x.new_zeros(places.shape.numel(), x.shape[2]).index_copy(0, places.at, x.flatten(0, 1))
        states = self.stack(apart.unflatten(0, places.shape), None)  # (N, L, H)
        return self.head(states.flatten(0, 1)[places.at].unflatten(0, tokens.shape), labels)


class Places(NamedTuple):
    """Where packed positions lie when each document is a row of its own."""

    at: Tensor  # (B T,), the place of each among N L
    shape: torch.Size  # N, L


def documents_apart(document: Tensor) -> Places:
    """A row for each document of each example; document (B, T). It waits for a GPU, to know how many there are."""
    begins = torch.ones_like(document, dtype=torch.bool)
    begins[:, 1:] = document[:, 1:] != document[:, :-1]
    row = begins.flatten().cumsum(0) - 1  # (B T,)
    start = begins.flatten().nonzero().squeeze(1)  # (N,)
    place = torch.arange(document.numel(), device=document.device) - start[row]
    longest = int(place.max()) + 1
    return Places(row * longest + place, torch.Size((len(start), longest)))


# --- what a model's file hands on


def build(cell: Cell, sizes: Sizes, input: Input, output: Output) -> Recurrent:
    """A network of this cell. Raises UsageError as `refuse_looking_ahead` does."""
    refuse_looking_ahead(sizes, input, output)
    if isinstance(input, Tokens):
        return TokenReader(cell, sizes, input, output)
    return FrameReader(cell, sizes, input, output)


def refuse_looking_ahead(sizes: Sizes, input: Input, output: Output) -> None:
    """Raises UsageError for a bidirectional model that gives logits for each token: it would copy the next one.

    A model is not told what its logits are for, so masked language modelling, where it would be right, is refused too.
    """
    if sizes.bidirectional and isinstance(input, Tokens) and isinstance(output, Logits):
        raise UsageError(
            "model.bidirectional=true with a task that asks for logits at each token: read in reverse, a sequence "
            "shows the token that is to be predicted. Set model.bidirectional=false."
        )


def init_parameter(cell: Cell, name: str, tensor: Tensor, generator: torch.Generator) -> None:
    """Recurrent matrices orthogonal gate by gate (Saxe et al. 2014), others by Glorot and Bengio (2010); biases 0.

    An LSTM's forget gate begins at 1, so that it remembers at first (Jozefowicz et al. 2015). The head begins small, a
    convolution with variance 2 / fan-in (He et al. 2015).
    """
    if name.endswith("bias") or "bias_" in name:
        tensor.zero_()
        if cell == "lstm" and name.endswith("bias_ih"):
            tensor.view(4, -1)[1].fill_(1.0)  # input, forget, cell, output
    elif name.startswith("embedding"):
        tensor.normal_(0.0, EMBEDDING_STD, generator=generator)
    elif name.startswith("head"):
        tensor.normal_(0.0, 0.02, generator=generator)
    elif name.startswith("convolution"):
        tensor.normal_(0.0, (2 / (tensor.shape[1] * tensor.shape[2])) ** 0.5, generator=generator)
    else:
        for gate in tensor.view(GATES[cell], -1, tensor.shape[1]):
            if name.endswith("weight_hh"):
                nn.init.orthogonal_(gate, generator=generator)
            else:
                nn.init.xavier_uniform_(gate, generator=generator)


def num_parameters(cell: Cell, sizes: Sizes, input: Input, output: Output) -> int:
    """Trainable values. Raises UsageError as `refuse_looking_ahead` does."""
    refuse_looking_ahead(sizes, input, output)
    widths = sizes.layer_inputs(input)
    rows = GATES[cell] * sizes.hidden_size
    layers = sizes.directions * sum(rows * (width + sizes.hidden_size + 2) for width in widths)
    embedding = input.vocab_size * widths[0] if isinstance(input, Tokens) else 0
    filters = _filter_values(sizes, input)
    convolution = filters + sizes.hidden_size if filters else 0
    return embedding + convolution + layers + (sizes.features(output) + 1) * output.size


def flops_per_example(cell: Cell, sizes: Sizes, input: Input, output: Output) -> float:
    """Of matrix products, forward and backward (twice the forward), over one sequence of full length.

    Frames and the first states, which are 0, have no gradient.
    """
    length = input.seq_len if isinstance(input, Tokens) else input.length
    widths = sizes.layer_inputs(input)
    rows = GATES[cell] * sizes.hidden_size
    layers = sizes.directions * sum(length * rows * (width + sizes.hidden_size) for width in widths)
    head = sizes.features(output) * output.size * (length if isinstance(output, Logits) else 1)
    constant = sizes.directions * sizes.num_layers * rows * sizes.hidden_size
    convolution = length * _filter_values(sizes, input)
    if isinstance(input, Frames):
        constant += convolution or sizes.directions * length * rows * widths[0]
    return 3.0 * 2.0 * (convolution + layers + head) - 2.0 * constant


def _filter_values(sizes: Sizes, input: Input) -> int:
    """Of the convolution in front."""
    return input.channels * sizes.hidden_size * (sizes.kernel_size or 0) if isinstance(input, Frames) else 0
