"""The files that a source is read from: on this machine's disk, or behind any URI that storage.py reaches.

A path is a local path or a URI (`s3://bucket/folder?endpoint_override=...`, `gs://...`, `hf://...`). Within a URI the
path is percent-encoded. Keys do not tell where the data lies, so that it may be moved.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO
from urllib.parse import quote, unquote, urlsplit

import xxhash

from configs.errors import Damaged, NotFound, UsageError
from data_pipelines.local_files import explain
from data_pipelines.storage import Store

_COMPRESSIONS = {".gz": "gzip", ".tgz": "gzip", ".zst": "zstd"}


@dataclass(frozen=True)
class InputFile:
    """One file. key: its path inside the folder that was named; path: local path or URI; changed: when, in ns."""

    key: str
    path: str
    size: int
    changed: int | None

    @property
    def compression(self) -> str | None:
        """gzip or zstd where the name ends so."""
        return compression_of(self.path)


def find_files(paths: Sequence[str], suffixes: tuple[str, ...], setting: str = "data.paths") -> list[InputFile]:
    """The files named, and those with one of the suffixes ("" takes all) below the folders named; no hidden ones.

    In the order of the paths, sorted within a folder, each file once. A key is the path inside the folder, after the
    folder's number where several paths are given. Suffixes are compared without regard to case.
    Raises NotFound for a path that is not there and UsageError where there is no file at all.
    """
    found: list[InputFile] = []
    seen: set[str] = set()
    for number, name in enumerate(paths):
        prefix = f"{number}/" if len(paths) > 1 else ""
        for file in _below(name, suffixes, setting):
            real = file.path if "://" in file.path else os.path.realpath(file.path)
            if real not in seen:
                seen.add(real)
                found.append(InputFile(prefix + file.key, file.path, file.size, file.changed))
    if not found:
        wanted = ", ".join(suffix for suffix in suffixes if suffix)
        raise UsageError(f"There are no {wanted + ' ' if wanted else ''}files in {', '.join(paths)}. Check {setting}.")
    return found


def file_identity(files: Iterable[InputFile]) -> list[int | str]:
    """How many files, of how many bytes, and a digest of their names, sizes and times of change."""
    count = size = 0
    state = xxhash.xxh3_128()
    for file in files:
        count, size = count + 1, size + file.size
        state.update(f"{len(file.key)}:{file.key}:{file.size}:{file.changed};".encode("utf-8", "surrogateescape"))
    return [count, size, state.hexdigest()]


def compression_of(path: str) -> str | None:
    """gzip or zstd where the name of the file ends so, None elsewhere."""
    return _COMPRESSIONS.get(os.path.splitext(without_query(path).lower())[1])


def without_query(path: str) -> str:
    """A path for messages, for keys, for the ending of its name: a URI without its query."""
    return path.partition("?")[0] if "://" in path else path


@contextlib.contextmanager
def open_input(path: str | Path) -> Iterator[BinaryIO]:
    """A seekable binary file, as it is stored. OSErrors of the block are raised as ShardyardErrors that name it."""
    name = str(path)
    try:
        if _is_remote(name):
            store, inside = _resolve(name)
            with store.open_input(inside) as file:
                yield file
        else:
            with open(local(name), "rb") as file:
                yield file
    except OSError as error:
        raise explain(error, "read", without_query(name)) from error


@contextlib.contextmanager
def open_decompressed(path: str | Path) -> Iterator[BinaryIO]:
    """A binary file to read from the beginning, decompressed where its name ends in .gz or .zst.

    Several compressed streams one after the other in a file are read as one.
    Raises Damaged for a compressed file that is cut off or no such file.
    """
    name, compression = str(path), compression_of(str(path))
    with open_input(name) as file:
        if compression is None:
            yield file
            return
        import pyarrow as pa

        try:
            with pa.CompressedInputStream(pa.PythonFile(_Numbered(file), mode="r"), compression) as stream:
                yield stream
        except OSError as error:
            if error.errno is not None:
                raise  # of the disk or the store
            raise Damaged(
                f"{without_query(name)} cannot be decompressed ({first_line(error)}): it is cut off or damaged, or is "
                f"no {compression} file. Copy it again from where it is whole, or take it out of the data's paths."
            ) from error


class _Numbered:
    """A file whose errors have an errno, also those of a store, by which they are told from a decompressor's."""

    closed = False

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def read(self, size: int) -> bytes:
        """The next bytes."""
        try:
            return self._file.read(size)
        except OSError as error:
            if error.errno is not None:
                raise
            raise OSError(errno.EREMOTEIO, first_line(error)) from error

    def close(self) -> None:
        """Who opened the file closes it."""


def read_file(path: str | Path, most: int | None = None) -> bytes:
    """The bytes of a source's file, or the first so many; a ShardyardError that names it when it cannot be read."""
    with open_input(path) as file:
        return bytes(file.read() if most is None else file.read(most))


def stat_file(path: str, key: str) -> InputFile:
    """One file's facts. Raises NotFound."""
    if _is_remote(path):
        store, inside = _resolve(path)
        info = store.info(inside)
        if info is None or info.is_folder:
            raise NotFound(f"There is no file {without_query(path)}. Check the path.")
        return InputFile(key, path, info.size, info.changed)
    return _local_file(local(path), key)


def list_folders(folder: str, below: str = "") -> list[str]:
    """Sorted names of the folders, hidden ones left out, in a folder below a folder. Raises NotFound."""
    if _is_remote(folder):
        store, inside = _resolve(folder)
        names = store.list_dirs(f"{inside}/{below}".strip("/"))
        if not names and store.info(inside) is None:
            raise NotFound(f"There is no folder {without_query(folder)}. Check the address and the credentials.")
    else:
        path = local(folder) / below
        if not path.is_dir():
            raise NotFound(f"There is no folder {path.absolute()}. A relative path starts where the command runs.")
        names = Store(path).list_dirs()
    return [name for name in names if not name.startswith(".")]


def join_path(folder: str, relative: str) -> str:
    """A path below a folder, which may be a URI; an absolute path or a URI stays as it is."""
    if "://" in relative:
        return relative
    if "://" not in folder or os.path.isabs(relative):
        return os.path.join(folder, relative)
    base, mark, query = folder.partition("?")
    return f"{base.rstrip('/')}/{quote(relative)}{mark}{query}"


def folder_of(path: str) -> str:
    """The folder that a file is in."""
    if "://" not in path:
        return os.path.dirname(path)
    base, mark, query = path.partition("?")
    return base.rpartition("/")[0] + mark + query


def local(path: str) -> Path:
    """A local path, or file:// URI, as a Path."""
    return Path(unquote(urlsplit(path).path) if path.startswith("file://") else path).expanduser()


def _is_remote(path: str) -> bool:
    return "://" in path and not path.startswith("file://")


def first_line(error: Exception) -> str:
    """What an error says, for a sentence."""
    return (str(error) or type(error).__name__).strip().splitlines()[0].rstrip(".")


@lru_cache(maxsize=64)
def _store(base: str) -> Store:
    """The store of a bucket or host; kept, since to open one may take several requests."""
    return Store(base)


def _resolve(uri: str) -> tuple[Store, str]:
    """(the store of the URI's bucket or host, path in it)."""
    base, mark, query = uri.partition("?")
    scheme, _, rest = base.partition("://")
    host, _, path = rest.partition("/")
    return _store(f"{scheme}://{host}{mark}{query}"), unquote(path).strip("/")


def _below(name: str, suffixes: tuple[str, ...], setting: str) -> Iterator[InputFile]:
    if _is_remote(name):
        yield from _below_uri(name, suffixes, setting)
        return
    path = local(name)
    if not path.exists():
        raise NotFound(
            f"There is no file or folder {path.absolute()}. Check {setting}; a relative path starts at the folder "
            "where the command runs."
        )
    if not path.is_dir():
        yield _local_file(path, path.name)
        return
    for file in _walk(path, suffixes):
        yield _local_file(file, file.relative_to(path).as_posix())


def _local_file(path: Path, key: str) -> InputFile:
    try:
        status = path.stat()
    except OSError as error:
        raise explain(error, "read", path) from error
    return InputFile(key, str(path), status.st_size, status.st_mtime_ns)


def _walk(folder: Path, suffixes: tuple[str, ...]) -> Iterator[Path]:
    def fail(error: OSError) -> None:
        raise explain(error, "read", error.filename or folder)

    for parent, folders, names in os.walk(folder, onerror=fail):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if _wanted(name, suffixes) and os.path.isfile(os.path.join(parent, name)):
                yield Path(parent, name)


def _wanted(name: str, suffixes: tuple[str, ...]) -> bool:
    return name.lower().endswith(tuple(suffix.lower() for suffix in suffixes)) and not name.startswith(".")


def _below_uri(uri: str, suffixes: tuple[str, ...], setting: str) -> Iterator[InputFile]:
    store, path = _resolve(uri)
    base, mark, query = uri.partition("?")
    scheme, _, rest = base.partition("://")
    root = f"{scheme}://{rest.partition('/')[0]}"
    info = store.info(path)
    if info is None:
        raise NotFound(f"There is no file or folder {base}. Check {setting}, and the credentials if it is there.")
    if not info.is_folder:
        name = path.rpartition("/")[2]
        yield InputFile(name, f"{root}/{quote(path)}{mark}{query}", info.size, info.changed)
        return
    found = []
    for file in store.walk(path):
        parts = file.path.split("/")
        if _wanted(parts[-1], suffixes) and not any(part.startswith(".") for part in parts):
            found.append(((*((1, part) for part in parts[:-1]), (0, parts[-1])), file))
    for _, file in sorted(found, key=lambda pair: pair[0]):  # as a local folder: its files, then its folders
        whole = f"{path}/{file.path}".lstrip("/")
        yield InputFile(file.path, f"{root}/{quote(whole)}{mark}{query}", file.size, file.changed)
