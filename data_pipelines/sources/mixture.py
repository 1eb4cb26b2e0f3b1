"""Several sources in given shares: each a data set of its own, mixed when it is read (data_pipelines/mixture.py).

    data:
      name: mixture
      sources:
      - {weight: 0.7, data: {name: jsonl, paths: [web.jsonl]}}
      - {weight: 0.3, max_epochs: 4, data: {name: text, paths: [books]}}
      changes:
      - {at: 100000, weights: [0.5, 0.5]}     # from so many examples on
      - {step: 2000, weights: [0.2, 0.8]}     # or after so many steps

How a source is split, filtered and rid of duplicates stands in its own `data`; how the mixture is read, here.
As a source by itself a mixture is its sources one after the other: what their tokenizer is trained on.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Self

from pydantic import Field, model_validator

from configs.errors import UsageError
from configs.schema import Plugin, Section
from data_pipelines.sources import READING_SETTINGS, Bad, Column, Partition, Row, SourceConfig

NEAR_DUPLICATES_SHARE_A_SPLIT = False  # the sources say it for themselves


class WeightedSource(Section):
    """One of the sources."""

    weight: float = Field(ge=0.0, description="Its share of the examples, relative to the others'.")
    max_epochs: float | None = Field(
        default=None, gt=0, description="How often each of its examples is seen at most; null: as often as it takes."
    )
    data: Plugin = Field(description="The source, as in `data` of a run without a mixture.")


class WeightChange(Section):
    """Other shares from a point on."""

    at: int | None = Field(default=None, ge=1, description="From how many examples on; null where step is given.")
    step: int | None = Field(
        default=None,
        ge=1,
        description="Or: after how many steps, each of batch.global_batch_size examples, since the run began.",
    )
    weights: tuple[float, ...] = Field(min_length=1, description="The new weight of each source.")

    @model_validator(mode="after")
    def _refuse_other_than_one_place(self) -> Self:
        if (self.at is None) == (self.step is None):
            given = "neither" if self.at is None else f"at: {self.at} and step: {self.step}"
            raise ValueError(f"a change of weights has either at (examples) or step, and this one has {given}")
        return self

    def position(self, global_batch_size: int) -> int:
        """From how many examples on, in a run that takes so many a step."""
        if self.at is not None:
            return self.at
        assert self.step is not None
        return self.step * global_batch_size


class Config(SourceConfig):
    """Which sources, and in what shares."""

    sources: tuple[WeightedSource, ...] = Field(min_length=1, description="The sources and their weights.")
    changes: tuple[WeightChange, ...] = Field(default=(), description="Weights that change during the run.")

    @model_validator(mode="after")
    def _refuse_what_belongs_to_a_source(self) -> Self:
        own = {*READING_SETTINGS - {"max_bad_share"}, "sources", "changes"}
        if others := sorted(self.model_fields_set - own):
            raise ValueError(f"{', '.join(others)} of a mixture is set in the `data` of each source")
        if any(source.data.name == "mixture" for source in self.sources):
            raise ValueError("a mixture has no mixture among its sources; list their sources here")
        return self


def schema(config: Config) -> tuple[Column, ...]:
    """The columns, which all sources share. Raises UsageError where they do not."""
    found = [source.schema(settings) for source, settings in _sources(config)]
    if any(columns != found[0] for columns in found):
        names = "; ".join(", ".join(column.name for column in columns) for columns in found)
        raise UsageError(f"The sources of a mixture must have the same columns, and these have: {names}.")
    return found[0]


def partitions(config: Config) -> list[Partition]:
    """Those of all sources; the number of the source stands before the name."""
    return [
        replace(partition, name=f"{number}/{partition.name}")
        for number, (source, settings) in enumerate(_sources(config))
        for partition in source.partitions(settings)
    ]


def read(config: Config, partition: Partition) -> Iterator[Row | Bad]:
    """The rows of a partition, as its source reads them."""
    number, _, name = partition.name.partition("/")
    source, settings = _sources(config)[int(number)]
    yield from source.read(settings, replace(partition, name=name))


def identity(config: Config) -> list[Any]:
    """Those of the sources."""
    return [source.identity(settings) for source, settings in _sources(config)]


def _sources(config: Config) -> list[tuple[Any, Any]]:
    from data_pipelines.partition_rows import source_of

    return [source_of(source.data) for source in config.sources]
