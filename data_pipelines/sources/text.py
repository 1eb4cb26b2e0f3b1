"""Text files, one document each; or several documents a file, where a separator stands between them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pydantic import Field

from configs.errors import UsageError
from data_pipelines.near_duplicates import group_near_duplicates
from data_pipelines.sources import Document, SourceConfig, file_identity, find_files, read_file


class Config(SourceConfig):
    """Which files, and what separates documents."""

    paths: tuple[str, ...] = Field(min_length=1, description="Files and folders; a folder is searched to the bottom.")
    suffixes: tuple[str, ...] = Field(
        default=(".txt", ".md"), description="Endings of the files taken from folders; '' takes all."
    )
    separator: str | None = Field(
        default=None,
        min_length=1,
        description="What separates documents inside a file ('<|endoftext|>', a blank line); null: a file is one.",
    )


def documents(config: Config) -> Iterator[Document]:
    """The documents in the order of the files, near-duplicates grouped; the separators themselves are left out.

    Raises UsageError for a file that is not UTF-8, NotFound for one that is not there.
    """
    files = find_files(config.paths, config.suffixes)
    groups = group_near_duplicates((key, text.encode("utf-8")) for key, text in _texts(config, files))
    for key, text in _texts(config, files):
        yield Document(key, text, groups[key])


def identity(config: Config) -> list[list[str | int]]:
    """Name, size and time of change of each file."""
    return file_identity(find_files(config.paths, config.suffixes).values())


def _texts(config: Config, files: dict[str, Path]) -> Iterator[tuple[str, str]]:
    for name, file in files.items():
        text = _decode(file)
        if config.separator is None:
            yield name, text
            continue
        for number, part in enumerate(text.split(config.separator)):
            yield f"{name}:{number}", part


def _decode(file: Path) -> str:
    raw = read_file(file)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UsageError(
            f"{file}:{line}: byte {error.start} (0x{raw[error.start]:02x}) is not UTF-8. Convert the file (for example "
            f"iconv -f latin1 -t utf-8), or take it out of data.paths."
        ) from error
