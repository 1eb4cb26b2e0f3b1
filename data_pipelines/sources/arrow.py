"""Arrow IPC files (also those of Feather version 2, and streams): some of their columns, read batch by batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from pydantic import Field

from data_pipelines.arrow_files import open_arrow, partition_arrow_files
from data_pipelines.arrow_rows import check_same, columns_of, rows_of
from data_pipelines.input_files import without_query
from data_pipelines.sources import Bad, Column, Partition, Row, SourceConfig, file_identity, find_files

NEAR_DUPLICATES_SHARE_A_SPLIT = False
SUFFIXES = (".arrow", ".arrows", ".feather", ".ipc")


class Config(SourceConfig):
    """Which files, and which of their columns."""

    paths: tuple[str, ...] = Field(
        min_length=1,
        description="Files, and folders that are searched for *.arrow, *.arrows, *.feather and *.ipc.",
        examples=[["texts.arrow"]],
    )
    columns: Mapping[str, str] = Field(
        default={"text": "text"},
        min_length=1,
        description="Columns that are taken: the name under which each is stored, and the file's. A language model "
        "reads text, an image model image and label.",
    )


def schema(config: Config) -> tuple[Column, ...]:
    """The columns as the first file has them."""
    return arrow_schema(find_files(config.paths, SUFFIXES)[0].path, config.columns)


def partitions(config: Config) -> list[Partition]:
    """Small files together; large ones by record batches."""
    return partition_arrow_files(find_files(config.paths, SUFFIXES))


def read(config: Config, partition: Partition) -> Iterator[Row | Bad]:
    """The rows; a Bad for one with a null, or a number that is not finite, in a column that is taken.

    Raises UsageError for a file whose columns are not those of the first.
    """
    yield from read_arrow(partition, schema(config), config.columns)


def identity(config: Config) -> list[int | str]:
    """Number, sizes and times of change of the files."""
    return file_identity(find_files(config.paths, SUFFIXES))


def arrow_schema(path: str, wanted: Mapping[str, str]) -> tuple[Column, ...]:
    """The stored columns of an Arrow file."""
    with open_arrow(path) as file:
        return columns_of(file.schema, wanted, without_query(path))


def read_arrow(partition: Partition, columns: tuple[Column, ...], wanted: Mapping[str, str]) -> Iterator[Row | Bad]:
    """The rows of a partition of Arrow files."""
    names = list({*wanted.values()})
    for path, key in zip(partition.files, partition.keys, strict=True):
        name = without_query(path)
        with open_arrow(path) as file:
            check_same(columns, columns_of(file.schema, wanted, name), name)
            for first, batch in file.batches(partition.start, partition.stop):
                yield from rows_of(batch.select(names), columns, wanted, file=name, key=key, first=first)
