"""Faces and what is none: 100 cut-outs of each from photos of the press, 25 x 25.

From: scikit-image, skimage/data/lfw_subset.npy; taken from an installed scikit-image where there is one. Out of
Labeled Faces in the Wild (G. Huang et al., 2007), which is for research; scikit-image itself BSD-3.
image: grey, 0 to 1 in the file, here scaled to 0 to 255 (round(v * 255)). label: 1 for a face, 0 for a piece of the
background.
It does not show: who somebody is (a person may be on both sides of the split), or faces among things that look like
one. With 40 images held out one image is 2.5 %.
"""

from __future__ import annotations

import io
from collections.abc import Iterator

import numpy as np
from pydantic import Field

from data_pipelines.packages import Package, member
from data_pipelines.sources import Bad, Column, Partition, Row, SourceConfig

NEAR_DUPLICATES_SHARE_A_SPLIT = False  # no text

PACKAGE = Package(
    "pip",
    "scikit-image",
    "0.25.2",
    "scikit_image-0.25.2-cp311-cp311-manylinux_2_17_x86_64.manylinux2014_x86_64.whl",
    "24cc986e1f4187a12aa319f777b36008764e856e5013666a4a83f8df083c2641",
)
FILE = "skimage/data/lfw_subset.npy"
FILE_SHA256 = "9560ec2f5edfac01973f63a8a99d00053fecd11e21877e18038fbe500f8e872c"


class Config(SourceConfig):
    """It needs no settings of its own."""

    validation_fraction: float = Field(
        default=0.2, ge=0.0, lt=1.0, description="Share of the images that is held out for validation."
    )


def schema(config: Config) -> tuple[Column, ...]:  # noqa: ARG001 - the signature of every source
    """A grey image and whether it is a face."""
    return Column("image", "uint8", (25, 25, 1)), Column("label", "int64")


def partitions(config: Config) -> list[Partition]:  # noqa: ARG001 - the signature of every source
    """All at once."""
    return [Partition("lfw_faces", ())]


def read(config: Config, partition: Partition) -> Iterator[Row | Bad]:  # noqa: ARG001 - the signature of every source
    """The faces, then the others. Raises what `packages.fetch` raises."""
    images = np.load(io.BytesIO(member(PACKAGE, FILE, FILE_SHA256)), allow_pickle=False)  # (N, 25, 25): half are faces
    pixels = np.round(images * 255).astype(np.uint8)[..., None]
    for number, image in enumerate(pixels):
        yield Row(f"{number:03d}", {"image": image, "label": int(2 * number < len(pixels))})


def identity(config: Config) -> list[str]:  # noqa: ARG001 - the signature of every source
    """The file's digest."""
    return [FILE, FILE_SHA256]
