"""A residual network for images from 8 x 8 to 224 x 224 and beyond.

He et al. 2016 (Deep Residual Learning), with the strides on the 3 x 3 convolutions (ResNet v1.5) and, in the
bottleneck, four times the width at its end. `block: bottleneck` with `blocks: [3, 4, 6, 3]` is ResNet-50, and
`block: basic` with `blocks: [2, 2, 2, 2]` ResNet-18. Images below 128 pixels begin with one 3 x 3 convolution, as the
paper's networks for CIFAR-10 do; a stage halves the map only while 4 x 4 are left, so that small images fit too.
Normalisation is by batch (trainer/parts/batch_norm.py), or by groups (Wu and He 2018) without running statistics.
As an Embedding its end is a direction, and the cosines of it with directions that stand for the classes (Wang et al.
2017, NormFace).

B = examples, K = channels of the image, C = channels of a map, H, W = its height and width, N = outputs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from configs.schema import Section
from trainer.parts.batch_norm import BatchNorm2d
from trainer.parts.stochastic_depth import DropBranch, rates
from trainer.shapes import ClassLogits, Embedding, Image, Values

ACCEPTS = (Image,)
GIVES = (ClassLogits, Values, Embedding)
Output = ClassLogits | Values | Embedding

LARGE_PX = 128  # from here on the stem quarters the image
SMALLEST_MAP = 4
EXPANSION = 4  # of a bottleneck's width at its end


class TrunkConfig(Section):
    """Sizes and variants of what other networks share with this one: all but its end."""

    blocks: tuple[int, ...] = Field(
        min_length=1, description="Residual blocks of each stage; a stage doubles the width.", examples=[(1, 1)]
    )
    width: int = Field(ge=1, description="Channels of the first stage.", examples=[16])
    block: Literal["basic", "bottleneck"] = Field(
        default="basic",
        description="basic: two 3 x 3 convolutions; bottleneck: 1 x 1, 3 x 3, 1 x 1, for deep networks.",
    )
    norm: Literal["batch", "group"] = Field(
        default="batch", description="batch: by the micro-batch's statistics; group: each example by itself."
    )
    groups: int = Field(default=8, ge=1, description="Most groups of channels that norm=group normalises together.")
    stochastic_depth: float = Field(
        default=0.0, ge=0, lt=1, description="Share of examples that skip the last block in training; rises from 0."
    )


class Config(TrunkConfig):
    """Sizes and variants of a residual network."""

    dropout: float = Field(default=0.0, ge=0, lt=1, description="Share of the last features dropped.")


class Convolution(NamedTuple):
    """One of the network's convolutions: square kernel, and the side lengths of the map that it gives."""

    inputs: int
    outputs: int
    kernel: int
    stride: int
    height: int
    width: int


class Normed(nn.Module):
    """A convolution without bias, and the norm behind it."""

    def __init__(self, shape: Convolution, config: TrunkConfig) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(
            shape.inputs, shape.outputs, shape.kernel, shape.stride, padding=shape.kernel // 2, bias=False
        )
        self.norm = _norm(shape.outputs, config)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W): (B, C', H / stride, W / stride)."""
        return self.norm(self.convolution(x))


class Residual(nn.Module):
    """A block of two or three convolutions, added to its input (or to a projection of it, where the shape changes)."""

    def __init__(
        self, branch: list[Convolution], shortcut: Convolution | None, config: TrunkConfig, drop: float
    ) -> None:
        super().__init__()
        self.branch = nn.ModuleList(Normed(shape, config) for shape in branch)
        self.shortcut = None if shortcut is None else Normed(shortcut, config)
        self.drop = DropBranch(drop)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W): (B, C', H', W')."""
        y = x
        for layer in self.branch[:-1]:
            y = F.relu(layer(y))
        y = self.drop(self.branch[-1](y))
        return F.relu(y + (x if self.shortcut is None else self.shortcut(x)))


class Trunk(nn.Module):
    """The convolutions, from the image to its features."""

    def __init__(self, config: TrunkConfig, image: Image) -> None:
        super().__init__()
        stem, blocks = _plan(config, image)
        self._pools = _is_large(image)
        self._stage_ends = _stage_ends(config)
        self.stem = Normed(stem, config)
        self.blocks = nn.ModuleList(
            Residual(branch, shortcut, config, drop)
            for (branch, shortcut), drop in zip(blocks, rates(config.stochastic_depth, len(blocks)), strict=True)
        )

    def maps(self, image: Tensor) -> list[Tensor]:
        """(B, K, H, W), in the dtype of the weights: (B, C, H', W') at the end of each stage."""
        x = F.relu(self.stem(image))
        if self._pools:
            x = F.max_pool2d(x, 3, stride=2, padding=1)
        maps = []
        for number, block in enumerate(self.blocks):
            x = block(x)
            if number in self._stage_ends:
                maps.append(x)
        return maps


class Directions(nn.Module):
    """A learned direction for each class."""

    def __init__(self, size: int, classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(classes, size))

    def forward(self, x: Tensor) -> Tensor:
        """(B, size), any length: x with length 1, and its cosine with each direction, (B, size + classes)."""
        unit = F.normalize(x.float(), dim=1)
        cosine = F.linear(unit, F.normalize(self.weight.float(), dim=1))
        return torch.cat([unit, cosine], dim=1)


class CNN(Trunk):
    """The whole network."""

    def __init__(self, config: Config, image: Image, output: Output) -> None:
        super().__init__(config, image)
        self.dropout = nn.Dropout(config.dropout)
        self.head = nn.Linear(stage_maps(config, image)[-1].channels, output.size)
        self.directions = Directions(output.size, output.classes) if isinstance(output, Embedding) else None

    def forward(self, image: Tensor) -> Tensor:
        """(B, K, H, W), in the dtype of the weights: (B, N); an Embedding is fp32."""
        features = self.maps(image)[-1]
        outputs = self.head(self.dropout(features.mean(dim=(2, 3))))
        return outputs if self.directions is None else self.directions(outputs)


def build(config: Config, input: Image, output: Output) -> CNN:
    """A network for images of this size."""
    return CNN(config, input, output)


def init_parameter(config: TrunkConfig, name: str, tensor: Tensor, generator: torch.Generator) -> None:  # noqa: ARG001
    """Norms 1 and 0; convolutions normal with variance 2 / fan-out (He et al. 2015); the head small, its bias 0.

    The classes' directions are spread evenly: only that of their values matters, not the length.
    """
    if name.endswith("bias"):
        tensor.zero_()
    elif name.startswith("directions"):
        tensor.normal_(0.0, tensor.shape[1] ** -0.5, generator=generator)
    elif "norm" in name:
        tensor.fill_(1.0)
    elif name.startswith("head"):
        tensor.normal_(0.0, 0.01, generator=generator)
    else:
        outputs, _, height, width = tensor.shape
        tensor.normal_(0.0, (2 / (outputs * height * width)) ** 0.5, generator=generator)


def num_parameters(config: Config, input: Image, output: Output) -> int:
    """Trainable values: convolutions, two a channel for its norm, the head, and the directions of classes."""
    values = sum(each.outputs * (each.inputs * each.kernel**2 + 2) for each in convolutions(config, input))
    return values + (stage_maps(config, input)[-1].channels + 1) * output.size + _direction_values(output)


def flops_per_example(config: Config, input: Image, output: Output) -> float:
    """Of convolutions, the head and the cosines, forward and backward (twice the forward).

    The first convolution has no gradient for its input, the image.
    """
    products = [
        each.outputs * each.inputs * each.kernel**2 * each.height * each.width for each in convolutions(config, input)
    ]
    head = stage_maps(config, input)[-1].channels * output.size + _direction_values(output)
    return 3.0 * 2.0 * (sum(products) + head) - 2.0 * products[0]


def _direction_values(output: Output) -> int:
    return output.size * output.classes if isinstance(output, Embedding) else 0


# --- shapes


def _is_large(image: Image) -> bool:
    return min(image.height, image.width) >= LARGE_PX


def _plan(config: TrunkConfig, image: Image) -> tuple[Convolution, list[tuple[list[Convolution], Convolution | None]]]:
    """The stem, and of each block the branch's convolutions and its shortcut's (None: the input itself)."""
    height, width, channels = image.height, image.width, config.width
    if _is_large(image):
        height, width = -(-height // 2), -(-width // 2)
        stem = Convolution(image.channels, channels, 7, 2, height, width)
        height, width = -(-height // 2), -(-width // 2)
    else:
        stem = Convolution(image.channels, channels, 3, 1, height, width)
    blocks = []
    for stage, count in enumerate(config.blocks):
        inner = config.width * 2**stage
        outer = inner * (EXPANSION if config.block == "bottleneck" else 1)
        for number in range(count):
            stride = 2 if stage and number == 0 and min(height, width) >= 2 * SMALLEST_MAP else 1
            before = height, width
            height, width = -(-height // stride), -(-width // stride)
            if config.block == "bottleneck":
                branch = [
                    Convolution(channels, inner, 1, 1, *before),
                    Convolution(inner, inner, 3, stride, height, width),
                    Convolution(inner, outer, 1, 1, height, width),
                ]
            else:
                branch = [
                    Convolution(channels, inner, 3, stride, height, width),
                    Convolution(inner, outer, 3, 1, height, width),
                ]
            same = stride == 1 and channels == outer
            blocks.append((branch, None if same else Convolution(channels, outer, 1, stride, height, width)))
            channels = outer
    return stem, blocks


def convolutions(config: TrunkConfig, image: Image) -> Iterator[Convolution]:
    """All of the trunk, the first of them on the image."""
    stem, blocks = _plan(config, image)
    yield stem
    for branch, shortcut in blocks:
        yield from branch
        if shortcut is not None:
            yield shortcut


class StageMap(NamedTuple):
    """What a stage ends in; stride: pixels of the image from value to value."""

    channels: int
    stride: int
    height: int
    width: int


def stage_maps(config: TrunkConfig, image: Image) -> list[StageMap]:
    """The maps that the trunk gives, from fine to coarse."""
    _, blocks = _plan(config, image)
    stride, maps = 4 if _is_large(image) else 1, []
    for number, (branch, _) in enumerate(blocks):
        stride *= math.prod(each.stride for each in branch)
        if number in _stage_ends(config):
            last = branch[-1]
            maps.append(StageMap(last.outputs, stride, last.height, last.width))
    return maps


def _stage_ends(config: TrunkConfig) -> set[int]:
    """The number of the last block of each stage, counted through."""
    return {end - 1 for end in itertools.accumulate(config.blocks)}


def _norm(channels: int, config: TrunkConfig) -> nn.Module:
    if config.norm == "batch":
        return BatchNorm2d(channels)
    groups = max(count for count in range(1, config.groups + 1) if channels % count == 0)
    return nn.GroupNorm(groups, channels)
