"""A data source of one's own, named by its module: small pictures that show their class."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from pydantic import Field

from data_pipelines.sources import Bad, Column, Partition, Row, SourceConfig

NEAR_DUPLICATES_SHARE_A_SPLIT = False
NUM_CLASSES, SIZE_PX = 4, 8


class Config(SourceConfig):
    """How many."""

    rows: int = Field(default=60, ge=1, description="Pictures in all.")
    brighter: int = Field(default=0, description="Added to each value.")


def schema(config: Config) -> tuple[Column, ...]:
    return Column("image", "uint8", (SIZE_PX, SIZE_PX, 3)), Column("label", "int64")


def partitions(config: Config) -> list[Partition]:
    return [Partition("pictures", ())]


def read(config: Config, partition: Partition) -> Iterator[Row | Bad]:
    rng = np.random.default_rng(1)
    for number in range(config.rows):
        label = number % NUM_CLASSES
        image = rng.integers(0, 100, (SIZE_PX, SIZE_PX, 3)).astype(np.uint8)
        image[:: 1 + label % 2, :: 1 + label // 2] += 100 + config.brighter
        yield Row(f"{number:04d}", {"image": image, "label": label})


def identity(config: Config) -> list[int]:
    return [config.rows, config.brighter]
