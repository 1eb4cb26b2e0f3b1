"""U-Net: an image in, an image's worth of outputs out, with what was seen at every resolution on the way down.

Ronneberger et al. 2015 (U-Net), with the residual blocks, group norms (Wu and He 2018) and time embedding of Ho et al.
2020 (Denoising Diffusion Probabilistic Models). Step and kind of a noisy image scale and shift the norms (Dhariwal and
Nichol 2021), so a group of few channels cannot cancel them. Any size will do: the map below an odd one is rounded up,
by the convolutions' own padding, and cropped again on the way up.

B = examples, K = channels of the image, C = channels of a map, H, W = its height and width, E = size of the embedding
of step and kind, N = outputs a pixel.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from configs.schema import Section
from trainer.shapes import Image, NoisyImage, PixelLogits, Pixels

ACCEPTS = (Image, NoisyImage)
GIVES = (PixelLogits, Pixels)
LONGEST_WAVE = 10000.0  # of the step's embedding, for steps from 0 to STEPS
STEPS = 1000.0


class Config(Section):
    """Sizes and variants of a U-Net."""

    width: int = Field(ge=2, description="Channels at the full resolution.", examples=[8])
    multipliers: tuple[int, ...] = Field(
        default=(1, 2, 4), min_length=1, description="Channels of each level, in widths; each halves the map before."
    )
    blocks: int = Field(default=1, ge=1, description="Residual blocks of a level, on the way down and up.")
    attention_heads: int = Field(
        default=0, ge=0, description="Heads of the self-attention at the lowest resolution; 0 is none."
    )
    groups: int = Field(
        default=8, ge=1, description="Most groups of channels that are normalised together, of two or more each."
    )
    dropout: float = Field(default=0.0, ge=0, lt=1, description="Share of values dropped inside each block.")

    @model_validator(mode="after")
    def _heads_fit(self) -> Config:
        channels = self.channels[-1]
        if self.attention_heads and channels % self.attention_heads:
            raise ValueError(
                f"the lowest level has width * multipliers[-1] = {channels} channels, which attention_heads="
                f"{self.attention_heads} cannot share equally. Use a number of heads that divides {channels}"
            )
        return self

    @property
    def channels(self) -> tuple[int, ...]:
        """C of each level, from the full resolution down."""
        return tuple(self.width * each for each in self.multipliers)


class Residual(nn.Module):
    """Norm, SiLU, 3 x 3 convolution, twice; added to the input, or to a projection of it where the width changes."""

    def __init__(self, inputs: int, outputs: int, embedding: int, config: Config) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(_groups(inputs, config), inputs)
        self.convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.inner_norm = nn.GroupNorm(_groups(outputs, config), outputs)
        self.condition = nn.Linear(embedding, 2 * outputs) if embedding else None
        self.dropout = nn.Dropout(config.dropout)
        self.last = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, bias=False) if inputs != outputs else None

    def forward(self, x: Tensor, embedding: Tensor | None) -> Tensor:
        """x (B, C, H, W), embedding (B, E) where it was built for one: (B, C', H, W)."""
        y = self.inner_norm(self.convolution(F.silu(self.norm(x))))
        if self.condition is not None:
            scale, shift = self.condition(embedding)[:, :, None, None].chunk(2, dim=1)
            y = y * (1 + scale) + shift
        y = self.last(self.dropout(F.silu(y)))
        return y + (x if self.shortcut is None else self.shortcut(x))


class Attention(nn.Module):
    """Every place of the map looks at every other; added to the input."""

    def __init__(self, channels: int, config: Config) -> None:
        super().__init__()
        self._heads = config.attention_heads
        self.norm = nn.GroupNorm(_groups(channels, config), channels)
        self.inputs = nn.Linear(channels, 3 * channels, bias=False)
        self.last = nn.Linear(channels, channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W): the same shape."""
        places = self.norm(x).flatten(2).transpose(1, 2)  # (B, HW, C)
        q, k, v = self.inputs(places).unflatten(-1, (3, self._heads, -1)).permute(2, 0, 3, 1, 4)  # (B, heads, HW, D)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # (B, HW, C)
        return x + self.last(y).transpose(1, 2).unflatten(2, x.shape[2:])


class Embedding(nn.Module):
    """How strong the noise is, as waves of its step, and what kind of image it is: one vector."""

    def __init__(self, width: int, input: NoisyImage) -> None:
        super().__init__()
        self._waves = width // 2
        self._scale = STEPS / input.steps
        self.first = nn.Linear(2 * self._waves, 4 * width)
        self.second = nn.Linear(4 * width, 4 * width)
        self.kind = nn.Embedding(input.classes + 1, 4 * width)

    def forward(self, step: Tensor, kind: Tensor) -> Tensor:
        """(B,) and (B,) int64: (B, E)."""
        exponents = torch.arange(self._waves, dtype=torch.float32, device=step.device) / self._waves
        angles = torch.outer(step.float() * self._scale, LONGEST_WAVE**-exponents)
        waves = torch.cat([angles.sin(), angles.cos()], dim=1).to(self.kind.weight.dtype)
        return F.silu(self.second(F.silu(self.first(waves))) + self.kind(kind))


class Level(nn.Module):
    """Residual blocks at one resolution."""

    def __init__(self, inputs: int, outputs: int, embedding: int, config: Config) -> None:
        super().__init__()
        sizes = [inputs, *[outputs] * config.blocks]
        self.blocks = nn.ModuleList(Residual(*pair, embedding, config) for pair in itertools.pairwise(sizes))

    def forward(self, x: Tensor, embedding: Tensor | None) -> Tensor:
        """(B, C, H, W): (B, C', H, W)."""
        for block in self.blocks:
            x = block(x, embedding)
        return x


class UNet(nn.Module):
    """The whole network."""

    def __init__(self, config: Config, input: Image | NoisyImage, outputs: int) -> None:
        super().__init__()
        channels, size = config.channels, _embedding_size(config, input)
        self.embedding = Embedding(config.width, input) if isinstance(input, NoisyImage) else None
        self.stem = nn.Conv2d(input.channels, channels[0], 3, padding=1)
        self.down_levels = nn.ModuleList(
            Level(*pair, size, config) for pair in itertools.pairwise([channels[0], *channels])
        )
        self.downs = nn.ModuleList(nn.Conv2d(each, each, 3, stride=2, padding=1) for each in channels[:-1])
        self.attention = Attention(channels[-1], config) if config.attention_heads else None
        self.bottom = Residual(channels[-1], channels[-1], size, config)
        self.ups = nn.ModuleList(nn.Conv2d(below, above, 3, padding=1) for above, below in itertools.pairwise(channels))
        self.up_levels = nn.ModuleList(Level(2 * each, each, size, config) for each in channels[:-1])
        self.norm = nn.GroupNorm(_groups(channels[0], config), channels[0])
        self.head = nn.Conv2d(channels[0], outputs, 3, padding=1)

    def forward(self, image: Tensor, step: Tensor | None = None, kind: Tensor | None = None) -> Tensor:
        """image (B, K, H, W) in the dtype of the weights; of a noisy one also step and kind (B,): (B, N, H, W)."""
        embedding = None if self.embedding is None else self.embedding(step, kind)
        x = self.down_levels[0](self.stem(image), embedding)
        seen = []
        for down, level in zip(self.downs, self.down_levels[1:], strict=True):
            seen.append(x)
            x = level(down(x), embedding)
        if self.attention is not None:
            x = self.attention(x)
        x = self.bottom(x, embedding)
        for up, level in zip(reversed(self.ups), reversed(self.up_levels), strict=True):
            beside = seen.pop()
            height, width = beside.shape[2:]
            x = up(F.interpolate(x, scale_factor=2.0, mode="nearest")[:, :, :height, :width])
            x = level(torch.cat([x, beside], dim=1), embedding)
        return self.head(F.silu(self.norm(x)))


def build(config: Config, input: Image | NoisyImage, output: PixelLogits | Pixels) -> UNet:
    """A network for images of this size; it takes others too."""
    return UNet(config, input, _outputs(output))


def init_parameter(config: Config, name: str, tensor: Tensor, generator: torch.Generator) -> None:  # noqa: ARG001
    """Norms 1 and 0, biases 0; matrices and convolutions normal with variance 2 / fan-in (He et al. 2015).

    What ends a branch, or the network, is ten times smaller: a block begins near the identity, as it does in Ho et al.
    2020 with zeros, and everything learns from the first step on.
    """
    if name.endswith("bias"):
        tensor.zero_()
    elif "norm" in name:
        tensor.fill_(1.0)
    else:
        fan_in = 1 if name == "embedding.kind.weight" else tensor[0].numel()
        std = (2 / fan_in) ** 0.5
        if name.endswith(("last.weight", "condition.weight", "embedding.kind.weight")) or name.startswith("head"):
            std /= 10
        tensor.normal_(0.0, std, generator=generator)


def num_parameters(config: Config, input: Image | NoisyImage, output: PixelLogits | Pixels) -> int:
    """Trainable values: convolutions, matrices, biases, and two a channel for its norm."""
    size = _embedding_size(config, input)
    values = 0
    for each in _convolutions(config, input, output):
        values += each.inputs * each.outputs * each.kernel**2 + (each.outputs if each.has_bias else 0)
    for _, inputs, outputs in _residuals(config):
        values += 2 * inputs + 2 * outputs + (2 * outputs * (size + 1) if size else 0)
    lowest, width = config.channels[-1], config.width
    if config.attention_heads:
        values += 4 * lowest**2 + 2 * lowest
    if isinstance(input, NoisyImage):
        values += (2 * (width // 2) + 1) * size + (size + 1) * size + (input.classes + 1) * size
    return values + 2 * config.channels[0]


def flops_per_example(config: Config, input: Image | NoisyImage, output: PixelLogits | Pixels) -> float:
    """Of convolutions and matrix products, forward and backward (twice the forward).

    What reads the image, and the waves of its step, has no gradient for its input.
    """
    size, lowest = _embedding_size(config, input), config.channels[-1]
    convolutions = list(_convolutions(config, input, output))
    products = sum(each.inputs * each.outputs * each.kernel**2 * each.places for each in convolutions)
    products += sum(2 * outputs * size for _, _, outputs in _residuals(config))
    if config.attention_heads:
        places = _places(config, input)[-1]
        products += 4 * lowest**2 * places + 2 * lowest * places**2
    stem = convolutions[0]
    first = stem.inputs * stem.outputs * stem.kernel**2 * stem.places
    if isinstance(input, NoisyImage):
        waves = 2 * (config.width // 2) * size
        products, first = products + waves + size**2, first + waves
    return 3.0 * 2.0 * products - 2.0 * first


# --- shapes


class Convolution(NamedTuple):
    """One of the network's convolutions: square kernel, and how many places (H x W) the map that it gives has."""

    inputs: int
    outputs: int
    kernel: int
    places: int
    has_bias: bool


def _convolutions(config: Config, input: Image | NoisyImage, output: PixelLogits | Pixels) -> Iterator[Convolution]:
    channels, places = config.channels, _places(config, input)
    yield Convolution(input.channels, channels[0], 3, places[0], True)
    for level, inputs, outputs in _residuals(config):
        yield Convolution(inputs, outputs, 3, places[level], False)
        yield Convolution(outputs, outputs, 3, places[level], False)
        if inputs != outputs:
            yield Convolution(inputs, outputs, 1, places[level], False)
    for level in range(1, len(channels)):
        above, below = channels[level - 1], channels[level]
        yield Convolution(above, above, 3, places[level], True)
        yield Convolution(below, above, 3, places[level - 1], True)
    yield Convolution(channels[0], _outputs(output), 3, places[0], True)


def _residuals(config: Config) -> Iterator[tuple[int, int, int]]:
    """Of each residual block: the number of its level, its inputs and its outputs."""
    channels = config.channels
    lowest = len(channels) - 1
    for level, (above, own) in enumerate(itertools.pairwise([channels[0], *channels])):
        for number in range(config.blocks):
            yield level, above if number == 0 else own, own
            if level < lowest:  # on the way up
                yield level, 2 * own if number == 0 else own, own
    yield lowest, channels[-1], channels[-1]


def _places(config: Config, input: Image | NoisyImage) -> list[int]:
    """H x W of each level."""
    levels = range(len(config.channels))
    return [math.ceil(input.height / 2**level) * math.ceil(input.width / 2**level) for level in levels]


def _groups(channels: int, config: Config) -> int:
    most = min(config.groups, max(channels // 2, 1))
    return max(count for count in range(1, most + 1) if channels % count == 0)


def _embedding_size(config: Config, input: Image | NoisyImage) -> int:
    return 4 * config.width if isinstance(input, NoisyImage) else 0


def _outputs(output: PixelLogits | Pixels) -> int:
    return output.size if isinstance(output, PixelLogits) else output.channels
