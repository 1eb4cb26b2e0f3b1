"""WebDataset: tar files in which the files of one sample follow each other and share a name, up to its first dot.

0001.jpg and 0001.cls are one sample, and so are a/0002.seg.png and a/0002.txt. The format:
https://github.com/webdataset/webdataset. A tar (also .tar.gz, .tgz and .tar.zst) is read once, from its beginning to
its end, one sample at a time.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, BinaryIO, cast

from pydantic import Field

from configs.errors import Damaged
from data_pipelines.input_files import first_line, open_decompressed, without_query
from data_pipelines.row_values import number_in
from data_pipelines.sources import (
    MAX_VALUE_BYTES,
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
SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.zst")
_NUMBERS = ("cls", "cls2", "class", "index", "inx", "id", "count")
_TEXTS = ("txt", "text", "transcript", "caption", "json", "jsonl")


class Config(SourceConfig):
    """Which tars, and which files of a sample are taken."""

    paths: tuple[str, ...] = Field(
        min_length=1,
        description="Tars, and folders that are searched for *.tar, *.tar.gz, *.tgz and *.tar.zst.",
        examples=[["shards"]],
    )
    fields: Mapping[str, str] = Field(
        min_length=1,
        description="Files of a sample that are taken: the name under which each is stored, and its extension, or "
        "several, the first that is there: 'jpg;png'. cls, index, id and count are numbers; txt, text, transcript, "
        "caption and json are text; all others are bytes.",
        examples=[{"image": "jpg;png", "label": "cls"}],
    )


def schema(config: Config) -> tuple[Column, ...]:
    """A column for each field."""
    return tuple(_column(name, extensions) for name, extensions in config.fields.items())


def partitions(config: Config) -> list[Partition]:
    """Small tars together; a large one is one partition."""
    return partition_files(find_files(config.paths, SUFFIXES), cut=False)


def read(config: Config, partition: Partition) -> Iterator[Row | Bad]:
    """The samples; a Bad for one that lacks a file, or whose file is not what its extension says.

    Raises Damaged for a tar that is cut off or is none.
    """
    columns = schema(config)
    wanted = {column.name: _extensions(config.fields[column.name]) for column in columns}
    taken = {extension for extensions in wanted.values() for extension in extensions}
    for path, key in zip(partition.files, partition.keys, strict=True):
        name = without_query(path)
        for sample, files in _samples(path, taken):
            try:
                values = {column.name: _value(column, files, wanted[column.name]) for column in columns}
            except ValueError as error:
                yield Bad(name, None, f"sample '{sample}': {error}")
                continue
            yield Row(f"{key}/{sample}", values)


def identity(config: Config) -> list[int | str]:
    """Number, sizes and times of change of the tars."""
    return file_identity(find_files(config.paths, SUFFIXES))


def _extensions(text: str) -> list[str]:
    return [part for extension in text.split(";") if (part := extension.strip().lstrip(".").lower())]


def _column(name: str, extensions: str) -> Column:
    kinds = {_dtype(extension) for extension in _extensions(extensions)}
    return Column(name, kinds.pop() if len(kinds) == 1 else "binary")


def _dtype(extension: str) -> str:
    last = extension.rpartition(".")[2]
    return "int64" if last in _NUMBERS else "utf8" if last in _TEXTS else "binary"


def _value(column: Column, files: Mapping[str, bytes | None], extensions: list[str]) -> Any:
    extension = next((extension for extension in extensions if extension in files), None)
    if extension is None:
        raise ValueError(f"no file .{' or .'.join(extensions)} (it has {', '.join(sorted(files)) or 'none'})")
    raw = files[extension]
    if raw is None:
        raise ValueError(f".{extension} has more than {MAX_VALUE_BYTES >> 20} MB")
    if column.dtype == "binary":
        return raw
    try:
        text = raw.decode("utf-8")
        return number_in(text.strip(), column.dtype) if column.dtype == "int64" else text
    except UnicodeDecodeError as error:
        raise ValueError(f".{extension} is not UTF-8 (byte {error.start})") from None
    except ValueError as error:
        raise ValueError(f".{extension} {error}") from None


def _samples(path: str, taken: set[str]) -> Iterator[tuple[str, dict[str, bytes | None]]]:
    """(name, content by extension) of each sample: of all its files the names, of those that are taken the bytes.

    None stands for a file that is too large.
    """
    sample, files = "", dict[str, bytes | None]()
    with _opened(path) as tar:
        for member in tar:
            tar.members = []  # type: ignore[attr-defined]  # it keeps each one that it met; of no use in a stream
            folder, _, name = member.name.rpartition("/")
            stem, dot, extension = name.partition(".")
            if not member.isfile() or not stem or not dot:
                continue
            this, extension = f"{folder}/{stem}".lstrip("./"), extension.lower()
            if this != sample and files:
                yield sample, files
                files = {}
            sample = this
            files[extension] = b"" if extension not in taken else _content(tar, member)
        if files:
            yield sample, files


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes | None:
    if member.size > MAX_VALUE_BYTES:
        return None
    file = tar.extractfile(member)
    assert file is not None
    content = file.read()
    if len(content) < member.size:
        raise tarfile.ReadError("unexpected end of data")
    return content


class _Counted:
    """A file that counts the bytes it gave."""

    def __init__(self, file: BinaryIO) -> None:
        self.num_bytes = 0
        self._file = file

    def read(self, size: int) -> bytes:
        """The next bytes."""
        found = self._file.read(size)
        self.num_bytes += len(found)
        return found


@contextmanager
def _opened(path: str) -> Iterator[tarfile.TarFile]:
    try:
        with open_decompressed(path) as file:
            counted = _Counted(file)
            with tarfile.open(fileobj=cast(BinaryIO, counted), mode="r|") as tar:
                yield tar
                if counted.num_bytes < tar.offset + tarfile.BLOCKSIZE:  # tarfile takes this for the end
                    raise tarfile.ReadError("unexpected end of data")
    except tarfile.TarError as error:
        raise Damaged(
            f"{without_query(path)} cannot be read as a tar: {first_line(error)}. It is cut off or damaged, or no tar. "
            "Copy it again from where it is whole, or take it out of data.paths."
        ) from error
