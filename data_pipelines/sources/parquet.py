"""Parquet files: some of their columns. Large files are read side by side, by row groups."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING

from pydantic import Field

from data_pipelines.arrow_rows import check_same, columns_of, damage_named, partition_pieces, rows_of
from data_pipelines.input_files import open_input, without_query
from data_pipelines.sources import (
    Bad,
    Column,
    InputFile,
    Partition,
    Row,
    SourceConfig,
    file_identity,
    find_files,
    partition_bytes,
    partition_files,
)

if TYPE_CHECKING:
    import pyarrow.parquet as pq

NEAR_DUPLICATES_SHARE_A_SPLIT = False
SUFFIXES = (".parquet", ".pq")
_BATCH_ROWS = 1024
_BATCH_BYTES = 16 << 20  # of rows that are large
_BUFFER_BYTES = 1 << 20  # of each column, read at once from a disk
_REMOTE_BUFFER_BYTES = 8 << 20  # from a store, where each read is a request
_THREADS = 16  # that read the ends of remote files


class Config(SourceConfig):
    """Which files, and which of their columns."""

    paths: tuple[str, ...] = Field(
        min_length=1,
        description="Files, and folders that are searched for *.parquet.",
        examples=[["texts.parquet"]],
    )
    columns: Mapping[str, str] = Field(
        default={"text": "text"},
        min_length=1,
        description="Columns that are taken: the name under which each is stored, and the file's. A language model "
        "reads text, an image model image and label.",
    )


def schema(config: Config) -> tuple[Column, ...]:
    """The columns as the first file has them."""
    first = find_files(config.paths, SUFFIXES)[0]
    with _opened(first.path) as file:
        return columns_of(file.schema_arrow, config.columns, without_query(first.path))


def partitions(config: Config) -> list[Partition]:
    """Small files together; large ones by row groups, about partition_bytes of them."""
    files = find_files(config.paths, SUFFIXES)
    target_bytes = partition_bytes(files)
    with ThreadPoolExecutor(_THREADS) as threads:
        cut = dict(zip(files, threads.map(partial(_by_row_groups, target_bytes=target_bytes), files), strict=True))
    partitions: list[Partition] = []
    together: list[InputFile] = []
    for file in files:
        if cut[file]:
            partitions += [*partition_files(together, cut=False, target_bytes=target_bytes), *cut[file]]
            together = []
        else:
            together.append(file)
    return partitions + partition_files(together, cut=False, target_bytes=target_bytes)


def read(config: Config, partition: Partition) -> Iterator[Row | Bad]:
    """The rows; a Bad for one with a null, or a number that is not finite, in a column that is taken.

    Raises UsageError for a file whose columns are not those of the first.
    """
    columns, names = schema(config), list({*config.columns.values()})
    for path, key in zip(partition.files, partition.keys, strict=True):
        name = without_query(path)
        with _opened(path) as file:
            check_same(columns, columns_of(file.schema_arrow, config.columns, name), name)
            groups = list(range(file.num_row_groups))[partition.start : partition.stop]
            number = sum(file.metadata.row_group(group).num_rows for group in range(partition.start or 0))
            for group in groups:
                for batch in file.iter_batches(_batch_rows(file, group, names), [group], names):
                    yield from rows_of(batch, columns, config.columns, file=name, key=key, first=number)
                    number += batch.num_rows


def identity(config: Config) -> list[int | str]:
    """Number, sizes and times of change of the files."""
    return file_identity(find_files(config.paths, SUFFIXES))


def _by_row_groups(file: InputFile, target_bytes: int) -> list[Partition]:
    """Partitions of a large file; none of one that is small, or that is one row group."""
    if 2 * file.size <= 3 * target_bytes:
        return []
    with _opened(file.path) as opened:
        sizes = [opened.metadata.row_group(group).total_byte_size for group in range(opened.num_row_groups)]
    count = min(len(sizes), -(-file.size // target_bytes))
    return partition_pieces(file, sizes, count, "row groups") if count > 1 else []


def _batch_rows(file: pq.ParquetFile, group: int, names: list[str]) -> int:
    """How many rows of a row group are taken at once, by the mean size of these columns in it."""
    metadata = file.metadata.row_group(group)
    num_bytes = 0
    for number in range(metadata.num_columns):
        leaf = metadata.column(number)
        if f"{leaf.path_in_schema}.".startswith(tuple(f"{name}." for name in names)):
            num_bytes += leaf.total_uncompressed_size
    return min(_BATCH_ROWS, 1 + metadata.num_rows * _BATCH_BYTES // max(1, num_bytes))


@contextlib.contextmanager
def _opened(path: str) -> Iterator[pq.ParquetFile]:
    """The file, of which a buffer for each column is in memory at a time, however large its row groups are."""
    import pyarrow.parquet as pq

    buffer_bytes = _REMOTE_BUFFER_BYTES if "://" in path else _BUFFER_BYTES
    with (
        open_input(path) as raw,
        damage_named(path, "Parquet"),
        pq.ParquetFile(raw, pre_buffer=False, buffer_size=buffer_bytes) as file,
    ):
        yield file
