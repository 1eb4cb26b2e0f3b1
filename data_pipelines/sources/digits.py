"""Handwritten digits, 8 x 8: 1,797 scans by 13 people (the test part of the UCI optical recognition data).

From: scikit-learn, sklearn/datasets/data/digits.csv.gz; taken from an installed scikit-learn where there is one.
Licence: CC BY 4.0 (E. Alpaydin, C. Kaynak, UCI Machine Learning Repository); scikit-learn itself BSD-3.
image: grey, 0 to 16 in the file, here scaled to 0 to 255 (round(v * 255 / 16)). label: the digit.
It does not show: who wrote a digit, so the same people's digits are on both sides of the split; nor anything of the
size of a photograph.
"""

from __future__ import annotations

import gzip
import io
from collections.abc import Iterator

import numpy as np
from pydantic import Field

from data_pipelines.packages import Package, member
from data_pipelines.sources import Bad, Column, Partition, Row, SourceConfig

NEAR_DUPLICATES_SHARE_A_SPLIT = False  # no text

PACKAGE = Package(
    "pip",
    "scikit-learn",
    "1.9.1",
    "scikit_learn-1.9.1-cp311-cp311-manylinux_2_27_x86_64.manylinux_2_28_x86_64.whl",
    "52a0703bbc07ad27f560fa63fa68e4c54dd735bfbbf65b4dd3c225dc7547b6df",
)
FILE = "sklearn/datasets/data/digits.csv.gz"
FILE_SHA256 = "09f66e6debdee2cd2b5ae59e0d6abbb73fc2b0e0185d2e1957e9ebb51e23aa22"
_MAX = 16


class Config(SourceConfig):
    """It needs no settings of its own."""

    validation_fraction: float = Field(
        default=0.2, ge=0.0, lt=1.0, description="Share of the images that is held out for validation."
    )


def schema(config: Config) -> tuple[Column, ...]:  # noqa: ARG001 - the signature of every source
    """A grey image and its digit."""
    return Column("image", "uint8", (8, 8, 1)), Column("label", "int64")


def partitions(config: Config) -> list[Partition]:  # noqa: ARG001 - the signature of every source
    """All at once."""
    return [Partition("digits", ())]


def read(config: Config, partition: Partition) -> Iterator[Row | Bad]:  # noqa: ARG001 - the signature of every source
    """The digits in the order of the file. Raises what `packages.fetch` raises."""
    text = gzip.decompress(member(PACKAGE, FILE, FILE_SHA256)).decode("ascii")
    table = np.loadtxt(io.StringIO(text), delimiter=",", ndmin=2)  # (N, 65): 64 pixels, then the digit
    images = np.round(table[:, :-1] * 255 / _MAX).astype(np.uint8).reshape(-1, 8, 8, 1)
    for number, (image, label) in enumerate(zip(images, table[:, -1], strict=True)):
        yield Row(f"{number:04d}", {"image": image, "label": int(label)})


def identity(config: Config) -> list[str]:  # noqa: ARG001 - the signature of every source
    """The file's digest."""
    return [FILE, FILE_SHA256]
