"""Text files (UTF-8, also .gz and .zst), one document each; or several, where a separator stands between them."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import Field

from data_pipelines.input_files import open_decompressed, without_query
from data_pipelines.records import MAX_RECORD_BYTES, records_of
from data_pipelines.sources import (
    Bad,
    Column,
    InputFile,
    Partition,
    Row,
    SourceConfig,
    excerpt,
    file_identity,
    find_files,
    partition_files,
)

NEAR_DUPLICATES_SHARE_A_SPLIT = True


class Config(SourceConfig):
    """Which files, and what separates documents."""

    paths: tuple[str, ...] = Field(
        min_length=1, description="Files and folders; a folder is searched to the bottom.", examples=[["texts"]]
    )
    suffixes: tuple[str, ...] = Field(
        default=(".txt", ".md"),
        min_length=1,
        description="Endings of the files taken from folders, also with .gz or .zst behind; '' takes all.",
    )
    separator: str | None = Field(
        default=None,
        min_length=1,
        description="What separates documents inside a file ('<|endoftext|>', a blank line); null: a file is one.",
    )


def schema(config: Config) -> tuple[Column, ...]:  # noqa: ARG001 - the signature of every source
    """The text alone."""
    return (Column("text", "utf8"),)


def partitions(config: Config) -> list[Partition]:
    """Small files together; large ones in byte ranges, where documents are separated."""
    return partition_files(_files(config), cut=config.separator is not None)


def read(config: Config, partition: Partition) -> Iterator[Row | Bad]:
    """The documents in the order of the files; the separators themselves are left out. A Bad for what is not UTF-8."""
    if config.separator is None:
        for path, key in zip(partition.files, partition.keys, strict=True):
            yield _whole(path, key)
        return
    for records in records_of(partition, config.separator.encode("utf-8")):
        for record in records:
            if not record.is_whole:
                yield records.too_long(record)
                continue
            try:
                yield Row(records.key(record), {"text": record.raw.decode("utf-8")})
            except UnicodeDecodeError as error:
                yield Bad(without_query(records.path), None, _not_utf8(error, record.offset), excerpt(record.raw))


def identity(config: Config) -> list[int | str]:
    """Number, sizes and times of change of the files."""
    return file_identity(_files(config))


def _files(config: Config) -> list[InputFile]:
    suffixes = tuple(suffix + ending for suffix in config.suffixes for ending in ("", ".gz", ".zst"))
    return find_files(config.paths, ("",) if "" in config.suffixes else suffixes)


def _whole(path: str, key: str) -> Row | Bad:
    with open_decompressed(path) as file:
        raw = file.read(MAX_RECORD_BYTES + 1)
    name = without_query(path)
    if len(raw) > MAX_RECORD_BYTES:
        reason = f"longer than {MAX_RECORD_BYTES >> 20} MB; set data.separator to what separates its documents"
        return Bad(name, None, reason, excerpt(raw[:1024]))
    try:
        return Row(key, {"text": raw.decode("utf-8")})
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        start = raw.rfind(b"\n", 0, error.start) + 1
        return Bad(name, line, _not_utf8(error, 0), excerpt(raw[start : start + 1024]))


def _not_utf8(error: UnicodeDecodeError, offset: int) -> str:
    wrong = error.object[error.start]
    return f"byte {offset + error.start} (0x{wrong:02x}) is not UTF-8; convert the file (iconv -f latin1 -t utf-8)"
