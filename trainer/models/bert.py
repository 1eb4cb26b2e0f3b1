"""BERT: an encoder whose every position sees both sides of it (Devlin et al. 2018, arXiv:1810.04805).

Token, position and kind embeddings, then blocks of self-attention and MLP, each normalised *after* it is added to the
stream, as in the paper. The head over tokens is the paper's: a layer with GELU and norm, then the transposed token
embedding with a bias. What is asked of the whole input is read from document 0: from its first token through the
paper's pooler ([CLS], tanh), or from the mean of its tokens (Reimers and Gurevych 2019, Sentence-BERT).

B = examples, T = tokens, C = hidden size, H = heads, D = C / H = head size, F = size inside the MLP, V = vocabulary,
N = outputs.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from configs.schema import Section
from trainer.parts.recompute import DESCRIPTION, Recompute, run_block
from trainer.shapes import ClassLogits, MaskedLogits, Tokens, Values

ACCEPTS = (Tokens,)
GIVES = (MaskedLogits, ClassLogits, Values)


class Config(Section):
    """Sizes and variants of an encoder."""

    num_layers: int = Field(ge=1, description="Blocks of attention and MLP.", examples=[2])
    hidden_size: int = Field(ge=2, description="Width of the stream.", examples=[128])
    num_heads: int = Field(ge=1, description="Heads; each is hidden_size / num_heads wide.", examples=[4])
    intermediate_size: int | None = Field(
        default=None, ge=1, description="Width inside the MLP; null is four times hidden_size."
    )
    max_positions: int | None = Field(
        default=None, ge=1, description="Positions that have an embedding; null is the task's seq_len."
    )
    num_kinds: int = Field(
        default=2, ge=1, description="Rows of the table of kinds of sentence; all tokens here are of the first."
    )
    pooling: Literal["cls", "mean"] = Field(
        default="cls", description="Of the whole input: cls reads its first token through a tanh layer; mean, them all."
    )
    dropout: float = Field(
        default=0.1, ge=0, lt=1, description="Share dropped of embeddings, attention, branches and pooled values."
    )
    norm_eps: float = Field(default=1e-12, gt=0, description="Added to the variance in LayerNorm.")
    activation_checkpointing: Recompute = Field(default=False, description=DESCRIPTION)

    @model_validator(mode="after")
    def _heads_fit(self) -> Config:
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} is not a multiple of num_heads={self.num_heads}, so the heads cannot "
                "share it equally. Use a num_heads that divides hidden_size"
            )
        return self

    @property
    def mlp_size(self) -> int:
        """F."""
        return self.intermediate_size or 4 * self.hidden_size


class Embeddings(nn.Module):
    """The sum of what a token is, where it stands and which kind of sentence it is in; normalised."""

    def __init__(self, config: Config, vocab_size: int, num_positions: int) -> None:
        super().__init__()
        self.token = nn.Embedding(vocab_size, config.hidden_size)
        self.position = nn.Embedding(num_positions, config.hidden_size)
        self.kind = nn.Embedding(config.num_kinds, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, tokens: Tensor, position: Tensor | None) -> Tensor:
        """tokens, position: (B, T); None is 0 .. T-1. Returns (B, T, C)."""
        if position is None:
            position = torch.arange(tokens.shape[1], device=tokens.device).unsqueeze(0)
        x = self.token(tokens) + self.position(position) + self.kind(torch.zeros_like(position))
        return self.dropout(self.norm(x))


class Attention(nn.Module):
    """Self-attention to both sides."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        width = config.hidden_size
        self._heads = (config.num_heads, width // config.num_heads)
        self._dropout = config.dropout
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.output = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """x (B, T, C), mask (B, 1, T, T) to add to the scores, or None: (B, T, C)."""
        q, k, v = (each(x).unflatten(-1, self._heads).transpose(1, 2) for each in (self.query, self.key, self.value))
        dropout = self._dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)  # (B, H, T, D)
        return self.output(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention, then MLP; each is added to the stream, and the sum normalised."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.attention_norm = nn.LayerNorm(config.hidden_size, config.norm_eps)
        self.up = nn.Linear(config.hidden_size, config.mlp_size)
        self.down = nn.Linear(config.mlp_size, config.hidden_size)
        self.mlp_norm = nn.LayerNorm(config.hidden_size, config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """x (B, T, C), mask as Attention takes it: (B, T, C)."""
        x = self.attention_norm(x + self.dropout(self.attention(x, mask)))
        return self.mlp_norm(x + self.dropout(self.down(F.gelu(self.up(x)))))


class TokenHead(nn.Module):
    """Which token stands at each position."""

    def __init__(self, config: Config, embedding: nn.Embedding) -> None:
        super().__init__()
        self.transform = nn.Linear(config.hidden_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, config.norm_eps)
        self.decoder = nn.Linear(config.hidden_size, embedding.num_embeddings)
        self.decoder.weight = embedding.weight

    def forward(self, x: Tensor, document: Tensor | None) -> Tensor:  # noqa: ARG002 - as PooledHead
        """(B, T, C): (B, T, V)."""
        return self.decoder(self.norm(F.gelu(self.transform(x))))


class PooledHead(nn.Module):
    """Numbers for document 0 as a whole."""

    def __init__(self, config: Config, outputs: int) -> None:
        super().__init__()
        self.pooler = nn.Linear(config.hidden_size, config.hidden_size) if config.pooling == "cls" else None
        self.dropout = nn.Dropout(config.dropout)
        self.classifier = nn.Linear(config.hidden_size, outputs)

    def forward(self, x: Tensor, document: Tensor | None) -> Tensor:
        """x (B, T, C), document (B, T) or None for one document: (B, N)."""
        if self.pooler is not None:
            pooled = torch.tanh(self.pooler(x[:, 0]))
        elif document is None:
            pooled = x.mean(1)
        else:
            inside = (document == 0).unsqueeze(-1)  # (B, T, 1)
            pooled = x.masked_fill(~inside, 0.0).sum(1) / inside.sum(1)
        return self.classifier(self.dropout(pooled))


class BERT(nn.Module):
    """The whole model."""

    def __init__(self, config: Config, input: Tokens, output: MaskedLogits | ClassLogits | Values) -> None:
        super().__init__()
        self._recompute = config.activation_checkpointing
        self.embeddings = Embeddings(config, input.vocab_size, _num_positions(config, input))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.head: nn.Module
        if isinstance(output, MaskedLogits):
            self.head = TokenHead(config, self.embeddings.token)
        else:
            self.head = PooledHead(config, output.size)

    def forward(self, tokens: Tensor, document: Tensor | None = None, position: Tensor | None = None) -> Tensor:
        """(B, T, V) for tokens, or (B, N) for the whole input; in the dtype of the weights.

        tokens: (B, T) int64. document: (B, T), tokens see those of the same number; None is one document a row.
        position: (B, T), each token's place in its document; None is 0 .. T-1.
        """
        x = self.embeddings(tokens, position)  # (B, T, C)
        mask = None if document is None else _same_document(document, x.dtype)
        for number, block in enumerate(self.blocks):
            x = run_block(self._recompute, number, block, x, mask)
        return self.head(x, document)


def _same_document(document: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, T): what is added to scores, (B, 1, T, T): 0 for tokens of the same document, else -inf."""
    other = document.unsqueeze(2) != document.unsqueeze(1)
    mask = torch.zeros(other.shape, dtype=dtype, device=document.device)
    return mask.masked_fill_(other, float("-inf")).unsqueeze(1)


def build(config: Config, input: Tokens, output: MaskedLogits | ClassLogits | Values) -> BERT:
    """An encoder for sequences of up to `input.seq_len`."""
    if isinstance(output, MaskedLogits):
        assert input.vocab_size == output.size, "the head gives one logit for each id that the model takes"
    return BERT(config, input, output)


def init_parameter(config: Config, name: str, tensor: Tensor, generator: torch.Generator) -> None:
    """Norms 1, biases 0, the rest normal with the paper's standard deviation, 0.02 at its width of 768.

    Positions begin as waves (Vaswani et al. 2017) of that size, and are learned as all else: a step to a neighbour is
    then the same linear map everywhere, which a small model finds much sooner than one for each place.
    """
    std = 0.02 * (768 / config.hidden_size) ** 0.5
    if name.endswith("norm.weight"):
        tensor.fill_(1.0)
    elif name.endswith("bias"):
        tensor.zero_()
    elif name == "embeddings.position.weight":
        tensor.copy_(_waves(*tensor.shape)).mul_(std * 2**0.5)
    else:
        tensor.normal_(0.0, std, generator=generator)


def _waves(positions: int, width: int) -> Tensor:
    """(positions, width): sines, then cosines, of wavelengths from 2 pi to 10,000 x 2 pi."""
    pairs = -(-width // 2)
    angles = torch.outer(torch.arange(positions).float(), 10000.0 ** (-torch.arange(pairs).float() / pairs))
    return torch.cat([angles.sin(), angles.cos()], 1)[:, :width]


def num_parameters(config: Config, input: Tokens, output: MaskedLogits | ClassLogits | Values) -> int:
    """Trainable values; the tied matrix is counted once."""
    width, mlp = config.hidden_size, config.mlp_size
    embeddings = (input.vocab_size + _num_positions(config, input) + config.num_kinds + 2) * width
    block = 4 * (width + 1) * width + (width + 1) * mlp + (mlp + 1) * width + 4 * width
    if isinstance(output, MaskedLogits):
        head = (width + 1) * width + 2 * width + output.size
    else:
        head = _pooler_size(config) + (width + 1) * output.size
    return embeddings + config.num_layers * block + head


def flops_per_example(config: Config, input: Tokens, output: MaskedLogits | ClassLogits | Values) -> float:
    """Of all matrix products, forward and backward (twice the forward), over a full sequence."""
    length, width = input.seq_len, config.hidden_size
    matrices = config.num_layers * (4 * width**2 + 2 * width * config.mlp_size)
    pairs = config.num_layers * 2 * length * width  # scores and their sum over values, for each query
    if isinstance(output, MaskedLogits):
        return 6.0 * length * (matrices + pairs + width**2 + output.size * width)
    pooler = width**2 if config.pooling == "cls" else 0
    return 6.0 * (length * (matrices + pairs) + pooler + width * output.size)


def _num_positions(config: Config, input: Tokens) -> int:
    return config.max_positions or input.seq_len


def _pooler_size(config: Config) -> int:
    return (config.hidden_size + 1) * config.hidden_size if config.pooling == "cls" else 0


_PRETRAINED = {
    "embeddings.token": "embeddings.word_embeddings",
    "embeddings.position": "embeddings.position_embeddings",
    "embeddings.kind": "embeddings.token_type_embeddings",
    "embeddings.norm": "embeddings.LayerNorm",
    "attention.query": "attention.self.query",
    "attention.key": "attention.self.key",
    "attention.value": "attention.self.value",
    "attention.output": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "up": "intermediate.dense",
    "down": "output.dense",
    "mlp_norm": "output.LayerNorm",
    "head.transform": "cls.predictions.transform.dense",
    "head.norm": "cls.predictions.transform.LayerNorm",
    "head.decoder": "cls.predictions",
    "head.pooler": "pooler.dense",
    "head.classifier": "classifier",
}


def pretrained_names(
    config: Config,  # noqa: ARG001 - the signature of every model
    names: Iterable[str],
    stored: Collection[str],
) -> dict[str, str]:
    """What transformers calls parameters: in a BertModel, or behind "bert." in a model that has a head on it."""
    theirs = {name: _pretrained_name(name) for name in names}
    return {name: f"bert.{other}" if f"bert.{other}" in stored else other for name, other in theirs.items()}


def _pretrained_name(name: str) -> str:
    module, _, kind = name.rpartition(".")
    block = re.fullmatch(r"blocks\.(\d+)\.(.+)", module)
    if block is None:
        return f"{_PRETRAINED[module]}.{kind}"
    return f"encoder.layer.{block[1]}.{_PRETRAINED[block[2]]}.{kind}"
