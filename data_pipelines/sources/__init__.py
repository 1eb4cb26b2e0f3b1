"""Where documents come from: one file a source. `data: {name: jsonl}` is data_pipelines/sources/jsonl.py.

A source file holds

- `class Config(SourceConfig)`: its settings;
- `documents(config) -> Iterator[Document]`: always in the same order, with the same content;
- `identity(config) -> list`: what tells its present state cheaply (names, sizes, times), as plain JSON values. When it
  changes, the data set is built anew.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field

from configs.errors import NotFound, UsageError
from configs.schema import Section
from data_pipelines.local_files import explain


class SourceConfig(Section):
    """Settings that every source has."""

    validation_fraction: float = Field(
        default=0.01, ge=0.0, lt=1.0, description="Share of the documents that is held out for validation."
    )


@dataclass(frozen=True)
class Document:
    """One text. Near-duplicates share a group, and a group lies on one side of the train/validation split."""

    key: str
    text: str
    group: str


def find_files(paths: Sequence[str], suffixes: tuple[str, ...]) -> dict[str, Path]:
    """The files named, and those with one of the suffixes ("" takes all) below the folders named; no hidden ones.

    In the order of the paths, sorted within a folder, each file once. Their keys do not tell where the data lies, so
    that it may be moved: the path inside the folder, after the folder's number where several paths are given.
    Raises NotFound for a path that is not there and UsageError where there is no file at all.
    """
    files: dict[str, Path] = {}
    seen: set[Path] = set()
    for number, name in enumerate(paths):
        path = Path(name).expanduser()
        if not path.exists():
            raise NotFound(
                f"There is no file or folder {path.absolute()}. Check data.paths; a relative path starts at the folder "
                "where the command runs."
            )
        prefix = f"{number}/" if len(paths) > 1 else ""
        for file in _walk(path, suffixes) if path.is_dir() else [path]:
            key = prefix + (file.relative_to(path).as_posix() if path.is_dir() else file.name)
            if file.resolve() not in seen:
                seen.add(file.resolve())
                files[key] = file
    if not files:
        raise UsageError(f"There are no {', '.join(suffixes)} files in {', '.join(paths)}. Check data.paths.")
    return files


def _walk(folder: Path, suffixes: tuple[str, ...]) -> Iterator[Path]:
    def fail(error: OSError) -> None:
        raise explain(error, "read", error.filename or folder)

    for parent, folders, names in os.walk(folder, onerror=fail):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if name.endswith(suffixes) and not name.startswith("."):
                yield Path(parent, name)


def read_file(path: Path) -> bytes:
    """The bytes of a source's file; a ShardyardError that names it when it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise explain(error, "read", path) from error


def file_identity(paths: Iterable[Path]) -> list[list[str | int]]:
    """Name, size and time of change of each file: what tells that a file was edited."""
    identities: list[list[str | int]] = []
    for path in paths:
        try:
            status = path.stat()
        except OSError as error:
            raise explain(error, "read", path) from error
        identities.append([str(path), status.st_size, status.st_mtime_ns])
    return identities
