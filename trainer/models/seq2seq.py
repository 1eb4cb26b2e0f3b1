"""An encoder-decoder Transformer: it reads one sequence and writes another.

Sources: Vaswani et al. 2017 (Transformer: sinusoidal positions, ReLU, embeddings times sqrt(C)); Press & Wolf 2017 (one
matrix for both embeddings and the output); Xiong et al. 2020 (each branch normalised before it, which trains without a
long warmup). No biases. With `copies` each id is either generated or copied from the source (See et al. 2017,
https://arxiv.org/abs/1704.04368): p = p_gen softmax(logits) + (1 - p_gen) copied. An id is copied with the weight that
one head of the last decoder layer's attention to the source gives to it; the other heads may look elsewhere.

Shapes: B = batch, S = positions read, T = positions written, V = vocabulary, C = hidden size, H = heads, D = C / H,
F = intermediate size, E and L = layers of the encoder and the decoder.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from configs.schema import Section
from trainer.shapes import Logits, TokenPair

ACCEPTS = (TokenPair,)
GIVES = (Logits,)


class Config(Section):
    """Sizes of an encoder-decoder Transformer."""

    encoder_layers: int = Field(ge=1, description="Blocks of self-attention and MLP that read.", examples=[2])
    decoder_layers: int = Field(ge=1, description="Blocks that write, with attention to what was read.", examples=[2])
    hidden_size: int = Field(ge=2, description="Width of the residual stream.", examples=[32])
    num_heads: int = Field(
        ge=1, description="Heads of each attention; each is hidden_size / num_heads wide.", examples=[4]
    )
    intermediate_size: int | None = Field(
        default=None, ge=1, description="Width inside the MLP; null is 4 hidden_size."
    )
    dropout: float = Field(
        default=0.0, ge=0, lt=1, description="Share of values dropped from the embeddings and from each branch."
    )
    copies: bool = Field(
        default=False,
        description="Ids of the source may also be copied to where the decoder looks at them.",
        examples=[True],
    )
    norm_eps: float = Field(default=1e-5, gt=0, description="Added to the variance in LayerNorm.")

    @model_validator(mode="after")
    def _heads_fit(self) -> Config:
        if self.hidden_size % self.num_heads or self.hidden_size % 2:
            raise ValueError(
                f"hidden_size={self.hidden_size} is not an even multiple of num_heads={self.num_heads}, so the heads "
                f"or the pairs of sine and cosine do not fit. Use an even hidden_size that is a multiple of num_heads"
            )
        return self

    @property
    def mlp_size(self) -> int:
        """F."""
        return self.intermediate_size or 4 * self.hidden_size


@dataclass
class LayerCache:
    """Keys and values of one decoder layer: of what was read, and of what was written so far; each (B, H, ., D)."""

    keeps_weights: bool = False
    read: tuple[Tensor, Tensor] | None = None
    written: tuple[Tensor, Tensor] | None = None
    weights: Tensor | None = None  # of the attention to what was read, (B, H, T, S), where they are kept


@dataclass
class Cache:
    """What a decoder need not compute again for the next positions: empty at first, the model fills it."""

    layers: list[LayerCache]
    mask: Tensor | None = None  # (B, 1, 1, S); None before the source is read
    length: int = 0  # positions written

    def select(self, rows: Tensor) -> None:
        """Keep these rows (int64) of the batch, in this order; one may come several times."""
        for layer in self.layers:
            assert layer.read is not None and layer.written is not None
            layer.read = layer.read[0][rows], layer.read[1][rows]
            layer.written = layer.written[0][rows], layer.written[1][rows]
        if self.mask is not None:
            self.mask = self.mask[rows]


class Positions(nn.Module):
    """Sines and cosines of each position, of wavelengths from 2 pi to 10000 x 2 pi."""

    table: Tensor

    def __init__(self, seq_len: int, width: int) -> None:
        super().__init__()
        self.register_buffer("table", torch.empty(seq_len, width), persistent=False)
        self.reset_buffers()

    def reset_buffers(self) -> None:
        """Compute the table anew, where it is."""
        seq_len, width = self.table.shape
        device = self.table.device
        frequencies = 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float32, device=device) / width)
        angles = torch.outer(torch.arange(seq_len, dtype=torch.float32, device=device), frequencies)  # (T, C/2)
        self.table.copy_(torch.stack([angles.sin(), angles.cos()], -1).flatten(1))

    def forward(self, start: int, stop: int) -> Tensor:
        """(stop - start, C) of these positions."""
        return self.table[start:stop]


class Attention(nn.Module):
    """Attention of one sequence to another, or to itself."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        width = config.hidden_size
        self._heads = (config.num_heads, width // config.num_heads)
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.output = nn.Linear(width, width, bias=False)

    def keys_and_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Of x (B, S, C), each (B, H, S, D)."""
        return self._split(self.key(x)), self._split(self.value(x))

    def forward(
        self,
        x: Tensor,
        keys_and_values: tuple[Tensor, Tensor],
        mask: Tensor | None = None,
        causal: bool = False,
        kept: LayerCache | None = None,
    ) -> Tensor:
        """x (B, T, C): (B, T, C). mask (B, 1, 1, S): added to the scores. kept: takes the weights, if it wants them."""
        q, (k, v) = self._split(self.query(x)), keys_and_values
        if kept is not None and kept.keeps_weights:
            scores = q @ k.transpose(2, 3) * q.shape[3] ** -0.5
            kept.weights = (scores if mask is None else scores + mask).softmax(3, dtype=torch.float32)
            y = kept.weights.to(v.dtype) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)  # (B, H, T, D)
        return self.output(y.transpose(1, 2).flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(2, self._heads).transpose(1, 2)


class MLP(nn.Module):
    """down(relu(up(x)))."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.up = nn.Linear(config.hidden_size, config.mlp_size, bias=False)
        self.down = nn.Linear(config.mlp_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C): (B, T, C), by way of (B, T, F)."""
        return self.down(F.relu(self.up(x)))


def norm(config: Config) -> nn.LayerNorm:
    """Of the residual stream."""
    return nn.LayerNorm(config.hidden_size, config.norm_eps, bias=False)


class EncoderLayer(nn.Module):
    """Self-attention, then MLP, each normalised before and added to the residual stream."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.attention_norm, self.attention = norm(config), Attention(config)
        self.mlp_norm, self.mlp = norm(config), MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x (B, S, C), mask (B, 1, 1, S): (B, S, C)."""
        normed = self.attention_norm(x)
        x = x + self.dropout(self.attention(normed, self.attention.keys_and_values(normed), mask))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


class DecoderLayer(nn.Module):
    """Causal self-attention, attention to what was read, MLP."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.attention_norm, self.attention = norm(config), Attention(config)
        self.reading_norm, self.reading = norm(config), Attention(config)
        self.mlp_norm, self.mlp = norm(config), MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, memory: Tensor | None, mask: Tensor | None, cache: LayerCache) -> Tensor:
        """x (B, T, C) after what the cache holds, memory (B, S, C), None where the cache holds it: (B, T, C)."""
        normed = self.attention_norm(x)
        keys, values = self.attention.keys_and_values(normed)
        if cache.written is not None:
            assert x.shape[1] == 1, "what follows is written one position at a time"
            keys, values = torch.cat([cache.written[0], keys], 2), torch.cat([cache.written[1], values], 2)
        cache.written = keys, values
        x = x + self.dropout(self.attention(normed, cache.written, causal=x.shape[1] > 1))
        if cache.read is None:
            assert memory is not None
            cache.read = self.reading.keys_and_values(memory)
        x = x + self.dropout(self.reading(self.reading_norm(x), cache.read, mask, kept=cache))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


class Seq2Seq(nn.Module):
    """The whole model; `seq_len` is the most positions that it reads, and that it writes."""

    def __init__(self, config: Config, vocab_size: int, seq_len: int) -> None:
        super().__init__()
        self.seq_len = seq_len
        self._scale = config.hidden_size**0.5
        self.embedding = nn.Embedding(vocab_size, config.hidden_size)
        self.positions = Positions(seq_len, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)
        self.encoder = nn.ModuleList(EncoderLayer(config) for _ in range(config.encoder_layers))
        self.encoder_norm = norm(config)
        self.decoder = nn.ModuleList(DecoderLayer(config) for _ in range(config.decoder_layers))
        self.decoder_norm = norm(config)
        self.head = nn.Linear(config.hidden_size, vocab_size, bias=False)
        self.head.weight = self.embedding.weight
        self.gate = nn.Linear(config.hidden_size, 1) if config.copies else None

    def new_cache(self, *, keeps_weights: bool = False) -> Cache:
        """An empty one; with keeps_weights each layer's `weights` are those of its attention to the source."""
        cache = Cache([LayerCache(keeps_weights) for _ in self.decoder])
        cache.layers[-1].keeps_weights |= self.gate is not None
        return cache

    def forward(self, source: Tensor, source_length: Tensor, target: Tensor, cache: Cache | None = None) -> Tensor:
        """Logits (B, T, V) of what follows each position of target; where it copies, log-probabilities in fp32.

        source: (B, S) int64; source_length: (B,); target: (B, T) int64; S and T at most seq_len.
        cache: with it target is only what follows what was written before, and the source is read at the first call.
        """
        cache = self.new_cache() if cache is None else cache
        memory = None
        if cache.mask is None:
            memory, cache.mask = self._read(source, source_length)
        x = self._embedded(target, cache.length)
        cache.length += target.shape[1]
        for block, kept in zip(self.decoder, cache.layers, strict=True):
            x = block(x, memory, cache.mask, kept)
        x = self.decoder_norm(x)
        if self.gate is None:
            return self.head(x)
        weights = cache.layers[-1].weights
        assert weights is not None
        return mixture(self.head(x), self.gate(x), weights[:, 0], source)

    def _read(self, source: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
        """(B, S, C), and what is added to scores: (B, 1, 1, S), -inf for padding."""
        x = self._embedded(source, 0)
        padding = torch.arange(source.shape[1], device=source.device) >= length.unsqueeze(1)  # (B, S)
        mask = torch.zeros(padding.shape, dtype=x.dtype, device=x.device).masked_fill_(padding, float("-inf"))
        mask = mask[:, None, None]
        for block in self.encoder:
            x = block(x, mask)
        return self.encoder_norm(x), mask

    def _embedded(self, tokens: Tensor, start: int) -> Tensor:
        x = self.embedding(tokens) * self._scale
        return self.dropout(x + self.positions(start, start + tokens.shape[1]).to(x.dtype))


def mixture(logits: Tensor, gate: Tensor, attention: Tensor, source: Tensor) -> Tensor:
    """log(p_gen softmax(logits) + (1 - p_gen) copied) in fp32, p_gen = sigmoid(gate): (B, T, V).

    logits (B, T, V); gate (B, T, 1); attention (B, T, S) fp32, which sums to 1; source (B, S) the ids it is to.
    Only ids of the source have more than what is generated, so little else is as large as the logits.
    """
    gate = gate.float()
    generated = logits.float().log_softmax(2) + F.logsigmoid(gate)  # (B, T, V)
    first = (source.unsqueeze(2) == source.unsqueeze(1)).int().argmax(2)  # (B, S), where each id stands first
    copied = torch.zeros_like(attention).scatter_add(2, first.unsqueeze(1).expand_as(attention), attention)
    ids = source.unsqueeze(1).expand_as(attention)
    log_copied = copied.clamp(min=torch.finfo(torch.float32).tiny).log() + F.logsigmoid(-gate)  # (B, T, S)
    gain = F.softplus(log_copied - generated.gather(2, ids))  # log(1 + copied / generated)
    return generated.scatter_add(2, ids, gain.masked_fill(copied == 0, 0.0))


def build(config: Config, input: TokenPair, output: Logits) -> Seq2Seq:
    """A model that reads and writes sequences of up to `input.seq_len`."""
    assert input.vocab_size == output.size, "it writes the ids that it reads"
    return Seq2Seq(config, input.vocab_size, input.seq_len)


def init_parameter(config: Config, name: str, tensor: Tensor, generator: torch.Generator) -> None:
    """Norms 1; the embedding normal with std C^-0.5, so that what enters, and the logits, have unit variance.

    Matrices uniform with the variance 2 / (rows + columns) (Glorot & Bengio 2010). The gate's bias 0: p_gen is a half.
    """
    if "norm" in name:
        tensor.fill_(1.0)
    elif name == "gate.bias":
        tensor.zero_()
    elif name in ("embedding.weight", "head.weight"):
        tensor.normal_(0.0, config.hidden_size**-0.5, generator=generator)
    else:
        bound = (6 / sum(tensor.shape)) ** 0.5
        tensor.uniform_(-bound, bound, generator=generator)


def num_parameters(config: Config, input: TokenPair, output: Logits) -> int:  # noqa: ARG001 - the signature of all
    """Trainable values; the embedding is the output too."""
    width, attention, mlp = config.hidden_size, 4 * config.hidden_size**2, 2 * config.hidden_size * config.mlp_size
    encoder = config.encoder_layers * (attention + mlp + 2 * width)
    decoder = config.decoder_layers * (2 * attention + mlp + 3 * width)
    gate = width + 1 if config.copies else 0
    return input.vocab_size * width + encoder + decoder + 2 * width + gate


def flops_per_example(config: Config, input: TokenPair, output: Logits) -> float:
    """Of all matrix products, forward and backward (twice the forward), over full sequences.

    Attention is counted over all pairs, also where the mask leaves some of them out.
    """
    width, length = config.hidden_size, input.seq_len
    attention = 4 * width**2 + 2 * length * width  # a position's, with its scores and the sum over values
    mlp = 2 * width * config.mlp_size
    layers = config.encoder_layers * (attention + mlp) + config.decoder_layers * (2 * attention + mlp)
    gate = width if config.copies else 0
    return 3.0 * 2.0 * length * (layers + output.size * width + gate)
