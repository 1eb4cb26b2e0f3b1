"""A data source of one's own, named by its module: signals of 1 to 40 moments, two classes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from pydantic import Field

from data_pipelines.sources import Bad, Column, Partition, Row, SourceConfig

NEAR_DUPLICATES_SHARE_A_SPLIT = False
CHANNELS = 3


class Config(SourceConfig):
    """How many, and of which kind."""

    rows: int = Field(default=60, ge=1, description="Signals in all.")
    kind: int = Field(default=0, description="Another number gives other signals.")
    poison: float | None = Field(default=None, description="All moments of poisoned signals; null is no number.")
    poisoned: tuple[int, ...] = Field(default=(), description="Numbers of those.")
    integers: bool = Field(default=False, description="Whether `moments` takes eight bytes.")


def schema(config: Config) -> tuple[Column, ...]:
    moments = Column("moments", "int64" if config.integers else "int32")
    return Column("signal", "float32", (None, CHANNELS)), Column("label", "int64"), moments


def partitions(config: Config) -> list[Partition]:
    return [Partition("signals", ())]


def read(config: Config, partition: Partition) -> Iterator[Row | Bad]:
    rng = np.random.default_rng(config.kind)
    for number in range(config.rows):
        label = number % 2
        signal = rng.normal(label, 1.0, (int(rng.integers(1, 41)), CHANNELS)).astype(np.float32)
        if number in config.poisoned:
            signal[:] = np.nan if config.poison is None else config.poison
        yield Row(f"{number:04d}", {"signal": signal, "label": label, "moments": len(signal)})


def identity(config: Config) -> list[Any]:
    return [config.rows, config.kind, config.poison, *config.poisoned]
