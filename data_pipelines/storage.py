"""The one way to touch a store: a local folder, or any file system that pyarrow.fs or fsspec reaches by URI.

Paths are relative to the store's root and use "/". Whatever the operating system or the object store reports comes
out as one paragraph: the path, the cause, the remedy. Object stores cannot append or rename, so what grows is written
as numbered segments (see SegmentWriter), and a file is there as a whole or not at all.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import unquote, urlsplit

from configs.errors import ShardyardError, Unreachable
from data_pipelines.file_systems import CONTACT_S, open_file_system
from data_pipelines.local_files import explain, is_temporary, replace_file
from data_pipelines.segments import SegmentWriter
from data_pipelines.time_limit import Stalled, within

__all__ = ["FileFacts", "OutputFile", "SegmentWriter", "Store", "explain"]

_reached: set[str] = set()  # addresses of stores that have answered

Names = list[str]  # inside the class, `list` is the method


@dataclass(frozen=True)
class FileFacts:
    """What a file system tells of a file or a folder. changed: time of change in ns, where it is told."""

    path: str
    is_folder: bool
    size: int
    changed: int | None


class Store:
    """A folder of files, on a local disk, or behind a URI of pyarrow.fs (s3://, gs://, hdfs://) or fsspec (hf://, ...).

    A local root is made absolute at once, so that a store means the same folder in every process. Stores pickle.
    Every method raises a ShardyardError for what goes wrong (NotFound for what is not there).
    """

    def __init__(self, uri: str | Path) -> None:
        text = str(uri)
        self._root: Path | None = None
        self._parent: tuple[Store, tuple[str, ...]] | None = None  # and the folders below it
        if text.startswith("file://"):
            text = unquote(urlsplit(text).path)
        if "://" not in text:
            # Not Path's own, which refuses the home of an unknown user: as in a shell, ~nobody is then a folder's name.
            self._root = Path(os.path.expanduser(text)).absolute()
            text = str(self._root)
        self.uri: str = text

    def __repr__(self) -> str:
        return f"Store({self.uri!r})"

    def __reduce__(self) -> tuple[type[Store], tuple[str]]:
        return Store, (self.uri,)

    @property
    def is_local(self) -> bool:
        """Whether the files lie on this machine's own file systems."""
        return self._root is not None

    @cached_property
    def _remote(self) -> tuple[Any, str]:
        """(pyarrow file system, root path in it).

        A folder uses its parent's: pyarrow opens no file system of S3 while a request of another one is under way, and
        that may take a minute.
        """
        if self._parent is not None:
            parent, folders = self._parent
            file_system, root = parent._remote
            return file_system, "/".join([root, *folders])
        scheme, _, rest = self.uri.partition("?")[0].partition("://")
        address = f"{scheme}://{rest.partition('/')[0]}"
        try:
            file_system, root = (
                open_file_system(self.uri) if address in _reached else within(CONTACT_S, self._first_contact)
            )
        except Stalled as error:
            raise Unreachable(
                f"{address} has not answered for {CONTACT_S:g} s. Check the network, the address, and the proxy if "
                "there is one."
            ) from error
        except OSError as error:
            raise explain(error, "open", self.path()) from error
        _reached.add(address)
        return file_system, root.rstrip("/")

    def _first_contact(self) -> tuple[Any, str]:
        """Open the file system, and ask it for something; what it says to that is for the requests that follow."""
        file_system, root = open_file_system(self.uri)
        if file_system.type_name != "s3":  # which limits its time itself
            with contextlib.suppress(Exception):
                file_system.get_file_info(root)
        return file_system, root

    def child(self, *parts: str) -> Store:
        """The store whose root is a folder of this one (which need not exist yet)."""
        base, question_mark, query = self.uri.partition("?")
        found = Store("/".join([base.rstrip("/"), *parts]) + question_mark + query)
        found._parent = None if self.is_local else (self, parts)
        return found

    def path(self, path: str = "") -> str:
        """The full path or URI of a file, for messages."""
        if self._root is not None:
            return str(self._root / path)
        return f"{self.uri.partition('?')[0].rstrip('/')}/{path}".rstrip("/")

    def local_path(self, path: str = "") -> Path | None:
        """The file's path on this machine's disk; None for a remote store."""
        return None if self._root is None else self._root / path

    @contextlib.contextmanager
    def explained(self, action: str, path: str) -> Iterator[None]:
        """Make ShardyardErrors of the OSErrors of a block that does `action` ("read", "write", ...) to `path`."""
        try:
            yield
        except OSError as error:
            raise explain(error, action, self.path(path)) from error

    # --- whole files

    def read_bytes(self, path: str) -> bytes:
        """The whole file."""
        with self.explained("read", path):
            if self._root is not None:
                return (self._root / path).read_bytes()
            file_system, root = self._remote
            with file_system.open_input_file(f"{root}/{path}") as file:
                return bytes(file.read())

    def read_text(self, path: str) -> str:
        """The whole file, which is UTF-8."""
        return self.read_bytes(path).decode("utf-8")

    def write_atomic(self, path: str, data: bytes | bytearray | memoryview | str) -> None:
        """Replace a file as a whole: a reader, or a crash at any moment, sees the old bytes or the new ones."""
        raw = data.encode("utf-8") if isinstance(data, str) else data
        with self.explained("write", path):
            if self._root is not None:
                replace_file(self._root / path, raw)
                return
            with self._output_stream(path) as stream:
                stream.write(raw)

    def exists(self, path: str = "") -> bool:
        """Whether there is a file or a folder of this name."""
        with self.explained("look up", path):
            if self._root is not None:
                return (self._root / path).exists()
            from pyarrow.fs import FileType

            file_system, root = self._remote
            return bool(file_system.get_file_info(f"{root}/{path}".rstrip("/")).type != FileType.NotFound)

    def size(self, path: str) -> int:
        """The file's length in bytes."""
        with self.explained("look up", path):
            if self._root is not None:
                return (self._root / path).stat().st_size
            file_system, root = self._remote
            size = file_system.get_file_info(f"{root}/{path}").size
            if size is None:
                raise FileNotFoundError(path)
            return int(size)

    def info(self, path: str = "") -> FileFacts | None:
        """What there is of this name; None where there is nothing."""
        with self.explained("look up", path), contextlib.suppress(FileNotFoundError):
            if self._root is not None:
                status = (self._root / path).stat()
                return FileFacts(path, stat.S_ISDIR(status.st_mode), status.st_size, status.st_mtime_ns)
            from pyarrow.fs import FileType

            file_system, root = self._remote
            info = file_system.get_file_info(f"{root}/{path}".rstrip("/"))
            if info.type != FileType.NotFound:
                return FileFacts(path, info.type == FileType.Directory, info.size or 0, info.mtime_ns)
        return None

    def delete(self, path: str) -> None:
        """Remove a file; one that is not there is no error."""
        with self.explained("delete", path), contextlib.suppress(FileNotFoundError):
            if self._root is not None:
                (self._root / path).unlink()
                return
            file_system, root = self._remote
            file_system.delete_file(f"{root}/{path}")

    # --- folders

    def list(self, folder: str = "") -> Names:
        """Sorted names of the files directly in a folder; [] where there is no such folder."""
        return self._names(folder, folders=False)

    def list_dirs(self, folder: str = "") -> Names:
        """Sorted names of the folders directly in a folder; [] where there is no such folder."""
        return self._names(folder, folders=True)

    def _names(self, folder: str, *, folders: bool) -> Names:
        with self.explained("list", folder):
            if self._root is not None:
                with contextlib.suppress(FileNotFoundError), os.scandir(self._root / folder) as entries:
                    names = [entry.name for entry in entries if entry.is_dir() == folders]
                    return sorted(name for name in names if not is_temporary(name))
                return []
            from pyarrow.fs import FileSelector, FileType

            file_system, root = self._remote
            wanted = FileType.Directory if folders else FileType.File
            found = file_system.get_file_info(FileSelector(f"{root}/{folder}".rstrip("/"), allow_not_found=True))
            return sorted(info.base_name for info in found if info.type == wanted)

    def walk(self, folder: str = "") -> Iterator[FileFacts]:
        """The files of a folder and of all folders in it, in any order, by their paths inside it."""
        with self.explained("list", folder):
            if self._root is not None:
                base = str(self._root / folder)
                for parent, _, names in os.walk(base):
                    for name in names:
                        path = os.path.join(parent, name)
                        status = os.stat(path)
                        yield FileFacts(path[len(base) :].lstrip(os.sep), False, status.st_size, status.st_mtime_ns)
                return
            from pyarrow.fs import FileSelector, FileType

            file_system, root = self._remote
            top = f"{root}/{folder}".rstrip("/")
            for info in file_system.get_file_info(FileSelector(top, recursive=True)):
                if info.type == FileType.File:
                    inside = info.path.lstrip("/").removeprefix(top.lstrip("/")).lstrip("/")
                    yield FileFacts(inside, False, info.size or 0, info.mtime_ns)

    def delete_dir(self, path: str = "") -> None:
        """Remove a folder and all in it; one that is not there is no error."""
        with self.explained("delete", path), contextlib.suppress(FileNotFoundError):
            if self._root is not None:
                shutil.rmtree(self._root / path)
                return
            file_system, root = self._remote
            file_system.delete_dir(f"{root}/{path}".rstrip("/"))

    # --- streams

    def open_input(self, path: str) -> BinaryIO:
        """A seekable binary file to read from."""
        with self.explained("read", path):
            if self._root is not None:
                return open(self._root / path, "rb")
            file_system, root = self._remote
            file: BinaryIO = file_system.open_input_file(f"{root}/{path}")
            return file

    def open_output(self, path: str) -> OutputFile:
        """A binary file to write, made durable by close(). Left by an exception in `with`, it is removed again.

        A local file shows its bytes as they come: write a manifest last, or use write_atomic.
        """
        return OutputFile(self, path)

    def _output_stream(self, path: str) -> Any:
        """A remote file to write, in a folder that is made where there have to be folders."""
        file_system, root = self._remote
        target = f"{root}/{path}"
        try:
            return file_system.open_output_stream(target, compression=None)
        except FileNotFoundError:
            file_system.create_dir(target.rpartition("/")[0], recursive=True)
            return file_system.open_output_stream(target, compression=None)

    # --- what grows

    def appender(self, path_prefix: str) -> SegmentWriter:
        """A writer of lines to "<path_prefix>-000001.jsonl", "...-000002.jsonl", ..."""
        return SegmentWriter(self, path_prefix)

    def segments(self, path_prefix: str) -> Names:
        """Paths of the segments written under a prefix, in the order of writing."""
        folder, _, stem = path_prefix.rpartition("/")
        pattern = re.compile(re.escape(stem) + r"-(\d{6,})\.jsonl")
        numbered = [(int(match[1]), name) for name in self.list(folder) if (match := pattern.fullmatch(name))]
        return [f"{folder}/{name}" if folder else name for _, name in sorted(numbered)]

    def read_segments(self, path_prefix: str) -> bytes:
        """All whole lines written under a prefix, in order; the torn last line of a killed writer is left out."""
        parts = [self.read_bytes(path) for path in self.segments(path_prefix)]
        return b"".join(part[: part.rfind(b"\n") + 1] for part in parts)


class OutputFile(io.RawIOBase):
    """A file being written in a store; its errors are ShardyardErrors."""

    def __init__(self, store: Store, path: str) -> None:
        super().__init__()
        self._store = store
        self._path = path
        self._written_bytes = 0
        with store.explained("write", path):
            target = store.local_path(path)
            if target is not None:
                target.parent.mkdir(parents=True, exist_ok=True)
                self._file: Any = open(target, "wb", buffering=1 << 20)  # noqa: SIM115 - closed by close()
            else:
                self._file = store._output_stream(path)

    def writable(self) -> bool:
        """Always; it cannot be read."""
        return True

    def write(self, data: Any) -> int:
        """Write all of `data` (bytes or a buffer); the number of bytes."""
        count = memoryview(data).nbytes
        with self._store.explained("write", self._path):
            self._file.write(data)
        self._written_bytes += count
        return count

    def tell(self) -> int:
        """Bytes written so far."""
        return self._written_bytes

    def close(self) -> None:
        """Make what was written durable."""
        if self.closed:
            return
        super().close()
        with self._store.explained("write", self._path):
            try:
                if self._store.is_local:
                    self._file.flush()
                    os.fsync(self._file.fileno())
            finally:
                self._file.close()

    def __exit__(self, kind: object, *rest: object) -> None:
        if kind is None:
            self.close()
            return
        with contextlib.suppress(ShardyardError):
            self.close()
        with contextlib.suppress(ShardyardError):
            self._store.delete(self._path)
