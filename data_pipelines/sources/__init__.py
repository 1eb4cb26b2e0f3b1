"""Where rows come from: one file a source. `data: {name: jsonl}` is data_pipelines/sources/jsonl.py.

A source file holds

- `class Config(SourceConfig)`: its settings;
- `schema(config) -> tuple[Column, ...]`: the columns of a row's values. Language models take a column "text" (utf8);
  image models "image" and "label". The key is no column of it;
- `partitions(config) -> list[Partition]`: the input in pieces of about `partition_bytes`, always the same for the same
  input, whatever the number of workers. `partition_files` makes them of files;
- `read(config, partition) -> Iterator[Row | Bad]`: the rows of one piece, always in the same order and with the same
  content. A row that cannot be used is a Bad, never an exception; a file that cannot be read is an error with cause
  and remedy. Any process may be given any partition, and memory does not grow with it;
- `identity(config) -> list`: what tells its present state cheaply (names, sizes, times), as plain JSON values. When it
  changes, the data set is built anew;
- `NEAR_DUPLICATES_SHARE_A_SPLIT`: whether texts that are nearly the same shall lie on one side of the split, so that
  what is held out is new to the model. It costs a pass over the source.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

from configs.schema import Section
from data_pipelines.columns import Column
from data_pipelines.filters import FiltersConfig
from data_pipelines.input_files import InputFile, file_identity, find_files, open_input, read_file

__all__ = [
    "MAX_VALUE_BYTES",
    "READING_SETTINGS",
    "Bad",
    "Column",
    "InputFile",
    "Partition",
    "Row",
    "SourceConfig",
    "excerpt",
    "file_identity",
    "find_files",
    "open_input",
    "partition_bytes",
    "partition_files",
    "read_file",
]

_PARTITIONS = 32  # of an input, about, as far as they stay between these sizes
_PARTITION_BYTES = (4 << 20, 64 << 20)
MAX_VALUE_BYTES = 256 << 20  # of a row: a value that takes more makes the row a Bad
_MAX_FILES = 4096  # in a partition: of small files it is their number that takes the time
_EXCERPT_CHARACTERS = 200

# Settings that say how a data set is read, or when its build gives up: they change nothing in it.
READING_SETTINGS = frozenset(
    {"shuffle", "window_blocks", "damage", "retry_s", "stall_s", "cache_bytes", "cache_dir", "max_bad_share"}
)


class SourceConfig(Section):
    """Settings that every source has."""

    validation_fraction: float = Field(
        default=0.01, ge=0.0, lt=1.0, description="Share of the rows that is held out for validation."
    )
    filters: FiltersConfig = Field(default=FiltersConfig(), description="Which rows are left out.")
    duplicates: Literal["keep", "exact", "near"] = Field(
        default="keep",
        description="exact leaves out rows that are the same as an earlier one, near also texts that are nearly the "
        "same (MinHash, similarity 0.5).",
    )
    max_bad_share: float = Field(
        default=0.01,
        ge=0.0,
        le=1.0,
        description="Share of rows that may be malformed; they are listed in quarantine.jsonl. More stop the build.",
    )
    shuffle: Literal["blocks", "examples", "sequential"] = Field(
        default="blocks",
        description="Order of the training examples: blocks permutes blocks, and examples within windows of them; "
        "examples permutes all of them, for local disks; sequential keeps the order of the source.",
    )
    window_blocks: int = Field(
        default=128, ge=1, description="Blocks of 1 to 4 MB in a window of shuffle=blocks; more mixes better."
    )
    damage: Literal["stop", "skip"] = Field(
        default="stop",
        description="What a block that stays damaged does: stop ends the run, skip leaves its examples out on all "
        "workers alike and records it.",
    )
    retry_s: float = Field(
        default=120.0, ge=0, description="Seconds for which reads from a remote store that fail are tried again."
    )
    stall_s: float = Field(
        default=30.0,
        gt=0,
        description="Seconds without a byte after which a read from a remote store is made anew.",
    )
    cache_bytes: int = Field(
        default=16 << 30, ge=64 << 20, description="Most that a node's cache of a remote store's blocks takes on disk."
    )
    cache_dir: str | None = Field(
        default=None,
        min_length=1,
        description="Folder of that cache; null is shardyard/blocks in the user's cache folder.",
    )


@dataclass(frozen=True)
class Partition:
    """A piece of a source that one task reads. Pickles.

    files: paths or URIs, with the keys that tell them apart wherever the data lies. start, stop: where several
    partitions share a file, the range of it that is this one's (bytes, row groups or batches: the source knows).
    """

    name: str
    files: tuple[str, ...]
    start: int | None = None
    stop: int | None = None
    keys: tuple[str, ...] = ()


@dataclass(frozen=True)
class Row:
    """One row. values: by column, numpy arrays, numbers, str or bytes.

    split: the side that the source itself says it belongs to. group: rows of one group lie on one side of the split;
    None: rows of the same content do.
    """

    key: str
    values: Mapping[str, Any]
    split: str | None = None
    group: str | None = None


@dataclass(frozen=True)
class Bad:
    """A row that cannot be used: where it is, why, and how it begins. line: from 1; None where there is none."""

    file: str
    line: int | None
    reason: str
    excerpt: str = ""


def excerpt(raw: bytes | str) -> str:
    """The beginning of a row, for a Bad."""
    if isinstance(raw, str):
        return raw[:_EXCERPT_CHARACTERS]
    return raw[:_EXCERPT_CHARACTERS].decode("utf-8", errors="replace")


def partition_bytes(files: Iterable[InputFile]) -> int:
    """How large partitions of these files shall be, about: 64 MB, and of less than 2 GB so that many cores have work.

    A function of the input alone, for what is built must not depend on the number of cores.
    """
    least, most = _PARTITION_BYTES
    return min(max(sum(file.size for file in files) // _PARTITIONS, least), most)


def partition_files(
    files: list[InputFile], *, cut: bool, target_bytes: int | None = None, max_files: int = _MAX_FILES
) -> list[Partition]:
    """Partitions of about target_bytes: small files together, in order; each large one, where `cut`, in byte ranges.

    A file of more than 1.5 times the target is cut, unless it is compressed, into ranges of equal size. target_bytes:
    None is partition_bytes of these files.
    """
    target_bytes = target_bytes or partition_bytes(files)
    partitions: list[Partition] = []
    group: list[InputFile] = []
    group_bytes = 0
    for file in files:
        large = cut and file.compression is None and 2 * file.size > 3 * target_bytes
        if group and (large or group_bytes + file.size > target_bytes or len(group) >= max_files):
            partitions.append(_together(group))
            group, group_bytes = [], 0
        if large:
            count = -(-file.size // target_bytes)
            for number in range(count):
                start, stop = file.size * number // count, file.size * (number + 1) // count
                name = f"{file.key}, bytes {start} to {stop}"
                partitions.append(Partition(name, (file.path,), start, stop, (file.key,)))
        else:
            group.append(file)
            group_bytes += file.size
    return [*partitions, _together(group)] if group else partitions


def _together(files: list[InputFile]) -> Partition:
    more = f" and {len(files) - 1} more" if len(files) > 1 else ""
    keys = tuple(file.key for file in files)
    return Partition(f"{keys[0]}{more}", tuple(file.path for file in files), keys=keys)
