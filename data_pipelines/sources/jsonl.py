"""JSON lines: one JSON object a line, with the text in one field. Read line by line, so files may be large."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import xxhash
from pydantic import Field

from configs.errors import UsageError
from data_pipelines.local_files import explain
from data_pipelines.sources import Document, SourceConfig, file_identity, find_files


class Config(SourceConfig):
    """Which files, and which field holds the text."""

    paths: tuple[str, ...] = Field(min_length=1, description="Files, and folders that are searched for *.jsonl.")
    text_field: str = Field(default="text", description="The field that holds a document's text.")


def documents(config: Config) -> Iterator[Document]:
    """A document for each line that is not blank; its key is file:line. The same texts share a group.

    Raises UsageError for a line that is no such JSON object, with file and line.
    """
    for name, file in find_files(config.paths, (".jsonl",)).items():
        for number, line in enumerate(_lines(file), start=1):
            if line.strip():
                text = _text(line, config.text_field, f"{file}:{number}")
                yield Document(f"{name}:{number}", text, xxhash.xxh3_128_hexdigest(text.encode("utf-8")))


def identity(config: Config) -> list[list[str | int]]:
    """Name, size and time of change of each file."""
    return file_identity(find_files(config.paths, (".jsonl",)).values())


def _lines(file: Path) -> Iterator[bytes]:
    try:
        with file.open("rb") as lines:
            yield from lines
    except OSError as error:
        raise explain(error, "read", file) from error


def _text(line: bytes, field: str, place: str) -> str:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{place}: byte {error.start} of the line is not UTF-8. Convert the file, or remove the line."
        ) from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise UsageError(
            f"{place}: not a JSON value ({error}). Each line must be one JSON object; repair or remove it."
        ) from error
    if not isinstance(row, dict):
        raise UsageError(
            f'{place}: a JSON {type(row).__name__}, not an object such as {{"{field}": "..."}}. Repair it.'
        )
    if field not in row:
        fields = ", ".join(row) or "none"
        raise UsageError(
            f"{place}: no field '{field}' (its fields: {fields}). Set data.text_field, or repair the line."
        )
    text = row[field]
    if not isinstance(text, str):
        kind = type(text).__name__
        raise UsageError(f"{place}: field '{field}' is {kind}, not text. Set data.text_field, or repair the line.")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UsageError(
            f"{place}: field '{field}' holds half of a surrogate pair, which is no text. Repair the line."
        ) from error
    return text
