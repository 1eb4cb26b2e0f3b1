"""The source code of this machine's own Python standard library: real text that is always there.

A document is a .py file below the `stdlib` path of sysconfig, in sorted order; its key is the path relative to it.
Left out are installed packages (site-packages, dist-packages), caches, empty files, and files that are not UTF-8 or
that this user may not read, so that it works for every user. So are the library's own tests: some distributions ship
Python without them, and where they are there they are half of the text. What is left, 11 to 13 MB, is much the same
everywhere; the fingerprint tells exactly which it was. Licence: PSF.
"""

from __future__ import annotations

import os
import platform
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from configs.errors import UsageError
from data_pipelines.sources import Bad, Column, InputFile, Partition, Row, SourceConfig, partition_files

NEAR_DUPLICATES_SHARE_A_SPLIT = True
_LEFT_OUT = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
_PARTITION_BYTES = 4 << 20  # the whole is small: so that several processes have something to do


class Config(SourceConfig):
    """It needs no settings of its own."""


def schema(config: Config) -> tuple[Column, ...]:  # noqa: ARG001 - the signature of every source
    """The text alone."""
    return (Column("text", "utf8"),)


def partitions(config: Config) -> list[Partition]:  # noqa: ARG001
    """The files in a few groups. Raises UsageError where this Python has no source files."""
    root = _root()
    files = [_input_file(path, root) for path in _files(root)]
    if not files:
        raise UsageError(
            f"There are no .py files in {root}: this Python keeps its standard library elsewhere (in an archive, or "
            "compiled). Use a Python with its sources, or data: {name: text, paths: [...]}."
        )
    return partition_files(files, cut=False, target_bytes=_PARTITION_BYTES)


def read(config: Config, partition: Partition) -> Iterator[Row | Bad]:  # noqa: ARG001
    """The files that are text."""
    for path, key in zip(partition.files, partition.keys, strict=True):
        text = _read(Path(path))
        if text:
            yield Row(key, {"text": text})


def identity(config: Config) -> list[object]:  # noqa: ARG001
    """The Python version, and name and size of each file."""
    root = _root()
    sizes = [[path.relative_to(root).as_posix(), path.stat().st_size] for path in _files(root)]
    return [platform.python_version(), sizes]


def _root() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _files(root: Path) -> list[Path]:
    files = []
    for parent, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in _LEFT_OUT]
        files += [Path(parent, name) for name in names if name.endswith(".py")]
    return sorted(path for path in files if path.is_file())


def _input_file(path: Path, root: Path) -> InputFile:
    return InputFile(path.relative_to(root).as_posix(), str(path), path.stat().st_size, None)


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError):
        return ""
