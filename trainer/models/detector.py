"""A detector in one stage, without anchors: each cell of a grid says which object it is in, and how far its sides are.

Tian et al. 2019 (FCOS), on one grid in place of a pyramid of them. The features are the residual network's of
trainer/models/cnn.py; its coarser maps are added, enlarged, to that of the grid's stride (Lin et al. 2017, feature
pyramids). How central a cell is in its box is said beside the sides, as FCOS's authors do in their later version.
With `patch` the image is first folded, patch x patch pixels to one of patch^2 times the channels (Shi et al. 2016, in
reverse), which spares small images the convolutions at full size.

B = examples, K = channels of the image, H, W = its height and width, C = channels of a map, R, S = rows and columns of
the grid, N = classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from configs.errors import UsageError
from trainer.models import cnn
from trainer.models.cnn import Convolution, Normed, Trunk
from trainer.shapes import Boxes, Image

ACCEPTS = (Image,)
GIVES = (Boxes,)
FIRST_PROBABILITY = (
    0.01  # of each class in each cell, at first: nearly all cells are empty (Lin et al. 2017, focal loss)
)


class Config(cnn.TrunkConfig):
    """Sizes and variants of a detector."""

    stride: int = Field(
        ge=1, description="Pixels from cell to cell of the grid; one of the strides of the stages.", examples=[2]
    )
    channels: int = Field(ge=1, description="Channels of the merged map and of the heads.", examples=[16])
    head_layers: int = Field(default=1, ge=1, description="3 x 3 convolutions of each of the two heads.")
    patch: int = Field(default=1, ge=1, description="Fold squares of so many pixels a side into channels first.")


class Merge(nn.Module):
    """The maps of several stages as one, of the finest one's size."""

    def __init__(self, laterals: list[Convolution], config: Config) -> None:
        super().__init__()
        self.laterals = nn.ModuleList(Normed(shape, config) for shape in laterals)

    def forward(self, maps: list[Tensor]) -> Tensor:
        """(B, C, H, W) each, from fine to coarse: (B, C', R, S)."""
        merged = self.laterals[-1](maps[-1])
        for lateral, finer in zip(reversed(self.laterals[:-1]), reversed(maps[:-1]), strict=True):
            merged = lateral(finer) + F.interpolate(merged, size=finer.shape[2:], mode="nearest")
        return F.relu(merged)


class Head(nn.Module):
    """Convolutions of one width."""

    def __init__(self, layers: list[Convolution], config: Config) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Normed(shape, config) for shape in layers)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C', R, S): the same shape."""
        for layer in self.layers:
            x = F.relu(layer(x))
        return x


class Detector(nn.Module):
    """The whole network."""

    def __init__(self, config: Config, image: Image, classes: int) -> None:
        super().__init__()
        laterals, head = _plan(config, image)
        self._patch = config.patch
        self._stride = config.stride
        self._merged = len(laterals)
        self.trunk = Trunk(config, _folded(config, image))
        self.merge = Merge(laterals, config)
        self.class_head = Head(head, config)
        self.box_head = Head(head, config)
        self.classes = nn.Conv2d(config.channels, classes, 3, padding=1)
        self.sides = nn.Conv2d(config.channels, 4, 3, padding=1)
        self.centre = nn.Conv2d(config.channels, 1, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        """(B, K, H, W), in the dtype of the weights: (B, R, S, N + 5)."""
        maps = self.trunk.maps(F.pixel_unshuffle(image, self._patch))
        merged = self.merge(maps[-self._merged :])
        in_class, in_box = self.class_head(merged), self.box_head(merged)
        sides = F.softplus(self.sides(in_box)) * self._stride  # in pixels
        return torch.cat([self.classes(in_class), sides, self.centre(in_box)], dim=1).permute(0, 2, 3, 1)


def build(config: Config, input: Image, output: Boxes) -> Detector:
    """A detector for images of this size. Raises UsageError for a stride or a patch that does not fit it."""
    return Detector(config, input, output.classes)


def init_parameter(config: Config, name: str, tensor: Tensor, generator: torch.Generator) -> None:
    """As trainer/models/cnn.py does; what is predicted from the heads small, and each class unlikely."""
    if name == "classes.bias":
        tensor.fill_(-math.log((1 - FIRST_PROBABILITY) / FIRST_PROBABILITY))
    elif name in ("classes.weight", "sides.weight", "centre.weight"):
        tensor.normal_(0.0, 0.01, generator=generator)
    else:
        cnn.init_parameter(config, name, tensor, generator)


def num_parameters(config: Config, input: Image, output: Boxes) -> int:
    """Trainable values: convolutions, two a channel for their norms, and what is predicted from the heads."""
    normed = sum(each.outputs * (each.inputs * each.kernel**2 + 2) for each in _convolutions(config, input))
    return normed + (output.classes + 5) * (config.channels * 9 + 1)


def flops_per_example(config: Config, input: Image, output: Boxes) -> float:
    """Of convolutions, forward and backward (twice the forward); the first has no gradient for its input, the image."""
    products = [
        each.outputs * each.inputs * each.kernel**2 * each.height * each.width for each in _convolutions(config, input)
    ]
    _, head = _plan(config, input)
    predicted = (output.classes + 5) * config.channels * 9 * head[0].height * head[0].width
    return 3.0 * 2.0 * (sum(products) + predicted) - 2.0 * products[0]


# --- shapes


def _folded(config: Config, image: Image) -> Image:
    """What the trunk sees of an image."""
    patch = config.patch
    if image.height % patch or image.width % patch:
        raise UsageError(
            f"model.patch={patch} does not divide images of {image.height} x {image.width}. Set it to a divisor of "
            "both, or to 1."
        )
    return replace(image, channels=image.channels * patch**2, height=image.height // patch, width=image.width // patch)


def _plan(config: Config, image: Image) -> tuple[list[Convolution], list[Convolution]]:
    """The convolutions that merge the stages, from that of the grid on, and those of a head."""
    maps = cnn.stage_maps(config, _folded(config, image))  # from fine to coarse
    strides = [config.patch * each.stride for each in maps]
    if config.stride not in strides:
        known = ", ".join(map(str, sorted(set(strides))))
        raise UsageError(
            f"model.stride={config.stride}: the stages of model.blocks={list(config.blocks)} on images of "
            f"{image.height} x {image.width} have the strides {known}. Set model.stride to one of them, or change "
            "model.blocks or model.patch."
        )
    merged = maps[strides.index(config.stride) :]
    grid = merged[0]
    laterals = [Convolution(each.channels, config.channels, 1, 1, each.height, each.width) for each in merged]
    layer = Convolution(config.channels, config.channels, 3, 1, grid.height, grid.width)
    return laterals, [layer] * config.head_layers


def _convolutions(config: Config, image: Image) -> Iterator[Convolution]:
    """All that have a norm, the first of them on the image."""
    yield from cnn.convolutions(config, _folded(config, image))
    laterals, head = _plan(config, image)
    yield from laterals
    yield from head * 2
