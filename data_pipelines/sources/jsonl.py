"""JSON lines: one JSON object a line, with the text in one field; also compressed (.gz, .zst).

Files are read line by line, and large ones that are not compressed in byte ranges, side by side.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pydantic import Field

from data_pipelines.records import Records, records_of
from data_pipelines.row_values import value_of
from data_pipelines.sources import (
    Bad,
    Column,
    Partition,
    Row,
    SourceConfig,
    file_identity,
    find_files,
    partition_files,
)

NEAR_DUPLICATES_SHARE_A_SPLIT = False
SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".ndjson", ".ndjson.gz", ".ndjson.zst")
BOM = b"\xef\xbb\xbf"  # some editors write it before the first line
_COLUMNS = {
    "text": ("utf8", (None,)),
    "int64": ("int64", ()),
    "float32": ("float32", ()),
    "list of int64": ("int64", (None,)),
    "list of float32": ("float32", (None,)),
}


class Config(SourceConfig):
    """Which files, and which fields are taken."""

    paths: tuple[str, ...] = Field(
        min_length=1,
        description="Files, and folders that are searched for *.jsonl and *.ndjson, also with .gz or .zst behind.",
        examples=[["texts.jsonl"]],
    )
    text_field: str | None = Field(
        default="text", min_length=1, description="The field that holds a document's text; null takes none."
    )
    fields: Mapping[str, Literal["text", "int64", "float32", "list of int64", "list of float32"]] = Field(
        default={}, description="Further fields that are stored, by their names, and what they hold."
    )


def schema(config: Config) -> tuple[Column, ...]:
    """The text, if one is taken, and the further fields."""
    text = (Column("text", "utf8"),) if config.text_field is not None else ()
    return (*text, *(Column(name, *_COLUMNS[kind]) for name, kind in config.fields.items()))


def partitions(config: Config) -> list[Partition]:
    """Small files together, large ones in byte ranges."""
    return partition_files(find_files(config.paths, SUFFIXES), cut=True)


def read(config: Config, partition: Partition) -> Iterator[Row | Bad]:
    """A row for each line that is not blank; a Bad for one that is no JSON object with the fields that are taken."""
    columns = {column.name: column for column in schema(config)}
    fields = {name: config.text_field if name == "text" and config.text_field else name for name in columns}
    for records in records_of(partition):
        yield from _rows(records, columns, fields)


def identity(config: Config) -> list[int | str]:
    """Number, sizes and times of change of the files."""
    return file_identity(find_files(config.paths, SUFFIXES))


def _rows(records: Records, columns: Mapping[str, Column], fields: Mapping[str, str]) -> Iterator[Row | Bad]:
    for record in records:
        if not record.is_whole:
            yield records.too_long(record)
            continue
        try:
            values = json_object(record.raw)
            if values is None:
                continue
            row = {name: _field(values, fields[name], column) for name, column in columns.items()}
        except ValueError as error:
            yield records.bad(record, str(error))
            continue
        yield Row(records.key(record), row)


def json_object(line: bytes) -> dict[str, Any] | None:
    """The JSON object of a line, None of a blank one. Raises ValueError with the reason for anything else."""
    if not line.strip():
        return None
    try:
        values = json.loads(line.removeprefix(BOM).decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} of the line is not UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not a JSON value ({error})") from None
    if not isinstance(values, dict):
        raise ValueError(f"a JSON {type(values).__name__}, not an object")
    return values


def _field(values: Mapping[str, Any], field: str, column: Column) -> Any:
    if field not in values:
        setting = "data.text_field names the one with the text" if column.name == "text" else "see data.fields"
        raise ValueError(f"no field '{field}' (its fields: {', '.join(values)[:200] or 'none'}); {setting}")
    try:
        return value_of(values[field], column)
    except ValueError as error:
        raise ValueError(f"field '{field}' {error}") from None
