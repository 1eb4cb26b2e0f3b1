"""A source for tests, used as a user's own: rows that a task makes up (its `example`), as many as are asked for."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np

from configs.plugins import find_plugin
from configs.schema import Section
from data_pipelines.columns import Column
from data_pipelines.sources import Bad, Partition, Row, SourceConfig
from tests.tiny import WORDS
from trainer.example_batch import column_of

NEAR_DUPLICATES_SHARE_A_SPLIT = False


class Config(SourceConfig):
    task: dict[str, Any]  # its name and settings
    rows: int = 40


def schema(config: Config) -> tuple[Column, ...]:
    rows = list(_rows(config))
    return tuple(column_of(name, [row[name] for row in rows]) for name in rows[0])


def partitions(config: Config) -> list[Partition]:
    return [Partition("all", ())]


def read(config: Config, partition: Partition) -> Iterator[Row | Bad]:
    for number, row in enumerate(_rows(config)):
        yield Row(f"{number:05d}", row, "validation" if number % 4 == 3 else "train")


def identity(config: Config) -> list[Any]:
    return [config.task, config.rows]


def _rows(config: Config) -> Iterator[dict[str, Any]]:
    """Text stands for tokens, since a build makes those of it."""
    module = find_plugin("trainer.tasks", config.task["name"])
    settings: Section = module.Config(**{key: value for key, value in config.task.items() if key != "name"})
    rng, words = np.random.default_rng(5), random.Random(5)

    def text() -> str:
        return " ".join(words.choice(WORDS) for _ in range(words.randrange(5, 40)))

    for _ in range(config.rows):
        row = module.example(settings, rng)
        if getattr(settings, "tokenizer", None) is not None and "tokens" in row:
            del row["tokens"]
            row["text"] = text()
        elif getattr(settings, "tokenizer", None) is not None and "target" in row:
            row |= {"source": text(), "target": text()}
        yield row
