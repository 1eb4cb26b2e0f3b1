"""GPT: a decoder-only Transformer in the form that Llama gave it.

Sources: Vaswani et al. 2017 (Transformer); Radford et al. 2019 (GPT-2: pre-norm, residual projections initialised
smaller by 1/sqrt(2 L)); Nguyen & Salazar 2019 (initial width of the matrices); Zhang & Sennrich 2019 (RMSNorm); Su et
al. 2021 (rotary positions); Shazeer 2020 (SwiGLU); Ainslie et al. 2023 (grouped-query attention); Touvron et al. 2023
(Llama: most of these together).

Shapes: B = batch, T = positions, V = vocabulary, C = hidden size, H = query heads, G = key/value heads,
D = C / H = head size, F = intermediate size, L = layers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from configs.schema import Section
from trainer.parts.head import LogitsHead
from trainer.parts.kv_cache import Cache, LayerCache
from trainer.parts.recompute import DESCRIPTION, Recompute, run_block
from trainer.parts.stochastic_depth import DropBranch, rates
from trainer.shapes import Logits, Tokens

ACCEPTS = (Tokens,)
GIVES = (Logits,)
TABLE_STD = 0.02  # of the output matrix, and of the embedding where both are one
EMBEDDING_STD = 0.5


class Config(Section):
    """Sizes and variants of a GPT."""

    num_layers: int = Field(ge=1, description="Blocks of attention and MLP.", examples=[4])
    hidden_size: int = Field(ge=2, description="Width of the residual stream.", examples=[256])
    num_heads: int = Field(ge=1, description="Query heads; each is hidden_size / num_heads wide.", examples=[4])
    num_kv_heads: int | None = Field(
        default=None, ge=1, description="Key/value heads, each shared by equally many query heads; null is num_heads."
    )
    intermediate_size: int | None = Field(
        default=None, ge=1, description="Width inside the MLP; null is 8/3 of hidden_size, rounded up to 64."
    )
    tie_embeddings: bool = Field(default=True, description="One matrix for the token embedding and the output.")
    dropout: float = Field(
        default=0.0, ge=0, lt=1, description="Share of values dropped from the embedding and from each branch."
    )
    stochastic_depth: float = Field(
        default=0.0, ge=0, lt=1, description="Share of examples that skip the last block in training; rises from 0."
    )
    rope_theta: float = Field(default=10000.0, gt=0, description="Base of the rotary wavelengths.")
    norm_eps: float = Field(default=1e-5, gt=0, description="Added to the mean square in RMSNorm.")
    activation_checkpointing: Recompute = Field(default=False, description=DESCRIPTION)

    @model_validator(mode="after")
    def _heads_fit(self) -> Config:
        if self.hidden_size % (2 * self.num_heads):
            raise ValueError(
                f"hidden_size={self.hidden_size} with num_heads={self.num_heads} gives heads of "
                f"{self.hidden_size / self.num_heads:g} values; rotary positions need an even whole number. "
                f"Use a hidden_size that is a multiple of {2 * self.num_heads}"
            )
        if self.num_heads % self.kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.kv_heads}, so the query heads "
                "cannot share them equally. Use a num_kv_heads that divides num_heads"
            )
        return self

    @property
    def kv_heads(self) -> int:
        """G."""
        return self.num_kv_heads or self.num_heads

    @property
    def head_size(self) -> int:
        """D."""
        return self.hidden_size // self.num_heads

    @property
    def mlp_size(self) -> int:
        """F."""
        return self.intermediate_size or -(-8 * self.hidden_size // (3 * 64)) * 64


class Rotary(nn.Module):
    """Rotation of each pair of neighbouring values by position x theta^(-2i/D).

    The table is complex: one multiplication rotates a pair, and `.bfloat16()` and `.half()`, which convert real
    buffers, leave it exact.
    """

    table: Tensor

    def __init__(self, seq_len: int, head_size: int, theta: float) -> None:
        super().__init__()
        self._theta = theta
        self.register_buffer("table", torch.empty(seq_len, head_size // 2, dtype=torch.complex64), persistent=False)
        self.reset_buffers()

    def reset_buffers(self) -> None:
        """Compute the table anew, where it is."""
        seq_len, pairs = self.table.shape
        wavelengths = self._theta ** (torch.arange(pairs, dtype=torch.float32, device=self.table.device) / pairs)
        positions = torch.arange(seq_len, dtype=torch.float32, device=self.table.device)
        angles = torch.outer(positions, 1 / wavelengths)  # (T, D/2)
        self.table.copy_(torch.complex(angles.cos(), angles.sin()))

    def forward(self, length: int, position: Tensor | None) -> Tensor:
        """Rotations for `position` (B, T), or for 0 .. length-1: complex (B or 1, T, 1, D/2)."""
        rotations = self.table[:length].unsqueeze(0) if position is None else self.table[position]
        return rotations.unsqueeze(2)


def rotate(x: Tensor, rotations: Tensor) -> Tensor:
    """Rotate x (B, T, heads, D) in fp32; the result has x's dtype."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))  # (B, T, heads, D/2)
    return torch.view_as_real(pairs * rotations).flatten(-2).to(x.dtype)


class Attention(nn.Module):
    """Causal self-attention; several query heads may share a key/value head."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        width, kv_width = config.hidden_size, config.kv_heads * config.head_size
        self._head_size = config.head_size
        self._grouped = config.kv_heads != config.num_heads
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, kv_width, bias=False)
        self.value = nn.Linear(width, kv_width, bias=False)
        self.output = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, rotations: Tensor, mask: Tensor | None, past: LayerCache | None = None) -> Tensor:
        """x (B, T, C), rotations from Rotary, mask (B, 1, T, T) or None for causal: (B, T, C)."""
        heads = (-1, self._head_size)
        q = rotate(self.query(x).unflatten(-1, heads), rotations).transpose(1, 2)  # (B, H, T, D)
        k = rotate(self.key(x).unflatten(-1, heads), rotations).transpose(1, 2)  # (B, G, T, D)
        v = self.value(x).unflatten(-1, heads).transpose(1, 2)  # (B, G, T, D)
        if past is not None:
            k, v = past.extend(k, v)
        causal = mask is None and k.shape[2] == q.shape[2]  # else it is one position, that sees all before it
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=self._grouped
        )  # (B, H, T, D)
        return self.output(y.transpose(1, 2).flatten(2))  # (B, T, C)


class SwiGLU(nn.Module):
    """The MLP: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.gate = nn.Linear(config.hidden_size, config.mlp_size, bias=False)
        self.up = nn.Linear(config.hidden_size, config.mlp_size, bias=False)
        self.down = nn.Linear(config.mlp_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C): (B, T, C), by way of (B, T, F)."""
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """Attention, then MLP, each normalised before and added to the residual stream."""

    def __init__(self, config: Config, drop: float) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.hidden_size, config.norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = nn.RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = SwiGLU(config)
        self.dropout = nn.Sequential(nn.Dropout(config.dropout), DropBranch(drop))

    def forward(self, x: Tensor, rotations: Tensor, mask: Tensor | None, past: LayerCache | None = None) -> Tensor:
        """x (B, T, C), the rest as Attention takes it: (B, T, C)."""
        x = x + self.dropout(self.attention(self.attention_norm(x), rotations, mask, past))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


class GPT(nn.Module):
    """The whole model; `seq_len` is the most positions that it can take."""

    takes_labels = True

    def __init__(self, config: Config, vocab_size: int, seq_len: int) -> None:
        super().__init__()
        self.seq_len = seq_len
        self._recompute = config.activation_checkpointing
        self.embedding = nn.Embedding(vocab_size, config.hidden_size)
        self.rotary = Rotary(seq_len, config.head_size, config.rope_theta)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, drop) for drop in rates(config.stochastic_depth, config.num_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.norm_eps)
        self.head = LogitsHead(config.hidden_size, vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight

    def new_cache(self) -> Cache:
        """An empty one."""
        return Cache([LayerCache() for _ in self.blocks])

    def forward(
        self,
        tokens: Tensor,
        document: Tensor | None = None,
        position: Tensor | None = None,
        cache: Cache | None = None,
        labels: Tensor | None = None,
    ) -> Tensor:
        """Logits for the token that follows each position, or the loss that they would give.

        tokens: (B, T) int64, T at most seq_len.
        document: (B, T), tokens see only earlier tokens of the same number; None is one document a row.
        position: (B, T), each token's position in its document; None is 0 .. T-1.
        cache: without gradients, for one document a row: tokens follow those of the calls before with the same cache.
            They are one a row, unless it is empty, and with those before at most seq_len.
        labels: (B, T), the tokens that follow, or IGNORED (trainer/parts/cross_entropy.py).
        Returns (B, T, V) in the dtype of the weights; with labels the sum of their cross-entropies, an fp32 scalar.
        """
        x = self.dropout(self.embedding(tokens))  # (B, T, C)
        if cache is not None:
            assert document is None and (cache.length == 0 or tokens.shape[1] == 1), (cache.length, tokens.shape)
            position = torch.arange(cache.length, cache.length + tokens.shape[1], device=tokens.device).unsqueeze(0)
            cache.length += tokens.shape[1]
        rotations = self.rotary(tokens.shape[1], position)
        mask = None if document is None else document_mask(document, x.dtype)
        for number, block in enumerate(self.blocks):
            past = None if cache is None else cache.layers[number]
            x = run_block(self._recompute, number, block, x, rotations, mask, past)
        return self.head(self.norm(x), labels)


def document_mask(document: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to attention scores: 0 for earlier tokens of the same document, else -inf.

    document: (B, T). Returns (B, 1, T, T), in the dtype that the kernel would otherwise convert it to in each layer.
    """
    length = document.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=document.device).tril()
    allowed = (document.unsqueeze(2) == document.unsqueeze(1)) & causal  # (B, T, T)
    mask = torch.zeros(allowed.shape, dtype=dtype, device=document.device)
    return mask.masked_fill_(~allowed, float("-inf")).unsqueeze(1)


def build(config: Config, input: Tokens, output: Logits) -> GPT:
    """A GPT for sequences of up to `input.seq_len`."""
    assert input.vocab_size == output.size, "a language model gives one logit for each id that it takes"
    return GPT(config, input.vocab_size, input.seq_len)


def init_parameter(config: Config, name: str, tensor: Tensor, generator: torch.Generator) -> None:
    """Norms 1; matrices normal with std sqrt(2 / 5 C), those that write to the residual stream 1 / sqrt(2 L) of it.

    2 L branches are added to the stream: so its variance at the start does not grow with depth. An embedding of its own
    starts large, or the first layers would drown what token stands where: on source code, a model of 3.3M parameters
    had 2.51 bits per byte after 256,000 tokens; with one small matrix at both ends, 2.80.
    """
    if "norm" in name:
        tensor.fill_(1.0)
        return
    if name == "embedding.weight" and not config.tie_embeddings:
        std = EMBEDDING_STD
    elif name in ("embedding.weight", "head.weight"):
        std = TABLE_STD
    else:
        std = (2 / (5 * config.hidden_size)) ** 0.5
    if name.endswith(("attention.output.weight", "mlp.down.weight")):
        std *= (2 * config.num_layers) ** -0.5
    tensor.normal_(0.0, std, generator=generator)


def num_parameters(config: Config, input: Tokens, output: Logits) -> int:
    """Trainable values; the tied matrix is counted once."""
    width = config.hidden_size
    head = 0 if config.tie_embeddings else output.size * width
    norms = (2 * config.num_layers + 1) * width
    return input.vocab_size * width + config.num_layers * _block_matrices(config) + norms + head


def flops_per_example(config: Config, input: Tokens, output: Logits) -> float:
    """Of all matrix products, forward and backward (twice the forward), over a full sequence.

    Attention is counted over all T x T pairs, as torch.utils.flop_counter does, also where the mask leaves half of
    them out; recomputed activations are not counted (Chowdhery et al. 2022, appendix B).
    """
    length, width = input.seq_len, config.hidden_size
    matrices = config.num_layers * _block_matrices(config) + output.size * width
    pairs = config.num_layers * 2 * length * width  # scores and their sum over values, for each query
    return 3.0 * 2.0 * length * (matrices + pairs)


def _block_matrices(config: Config) -> int:
    attention = 2 * config.hidden_size * (config.hidden_size + config.kv_heads * config.head_size)
    return attention + 3 * config.hidden_size * config.mlp_size
