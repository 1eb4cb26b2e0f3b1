"""All Arrow files of a data set in one range of addresses.

A range is reserved (which takes no memory), and each file is mapped at its place in it when it is first used. So the
data set is one flat array of bytes, in which a batch of rows is gathered with one native call (native.py).
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import threading
import weakref
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from configs.errors import ShardyardError
from data_pipelines.local_files import explain

_PAGE = mmap.PAGESIZE
_FOLIO = 2 << 20  # the kernel caches and drops pages in groups of up to so many bytes
_MAP_FIXED = 0x10
_MAP_NORESERVE = 0x4000
_PROT_NONE = 0
_FAILED = ctypes.c_void_p(-1).value


class MappedFiles:
    """Files of a folder in one range of addresses, read-only. Safe to use from several threads and after a fork.

    The range is given back when neither this object nor an array or tensor on it is left. Only what map() has made
    readable may be touched: the rest of the range ends the process, like any wild pointer.
    """

    def __init__(self, folder: Path, files: Mapping[str, int]) -> None:
        self._folder = folder
        self._files = dict(files)
        self._names = tuple(files)
        sizes = np.array(list(files.values()), np.int64)
        self.offsets = np.zeros(len(sizes) + 1, np.int64)  # (files + 1,): where each file begins in the range
        np.cumsum(-(-sizes // _PAGE) * _PAGE, out=self.offsets[1:])
        self._readable: dict[int, int] = {}
        self._lock = threading.Lock()
        self._libc = _libc()
        self._size = int(self.offsets[-1]) + _PAGE  # a page at the end that is never readable
        self.address = self._reserve()
        self._memory = self._array()

    def __reduce__(self) -> tuple[Any, ...]:
        return MappedFiles, (self._folder, self._files)

    def path(self, file: int) -> Path:
        """Where a file is."""
        return self._folder / self._names[file]

    def size(self, file: int) -> int:
        """How long a file should be."""
        return self._files[self._names[file]]

    def offset(self, file: int) -> int:
        """Where a file begins in the range."""
        return int(self.offsets[file])

    @cached_property
    def array(self) -> np.ndarray:
        """The range: (size,) uint8, read-only."""
        view = self._memory[:]
        view.flags.writeable = False
        return view

    def map(self, file: int) -> int | None:
        """Make a file's bytes readable: how many of them are there (never more than its size), None for no file.

        Raises ShardyardErrors for what else keeps it from being read.
        """
        readable = self._readable.get(file)
        if readable is None:
            with self._lock:
                readable = self._readable.get(file)
                if readable is None:
                    readable = self._map(file)
                    if readable is not None:
                        self._readable[file] = readable
        return readable

    def will_need(self, start: int, num_bytes: int) -> None:
        """Ask the system to read a part of the range ahead."""
        first = start // _PAGE * _PAGE
        self._libc.madvise(self.address + first, start + num_bytes - first, mmap.MADV_WILLNEED)

    def read_again(self, file: int, start: int, stop: int) -> None:
        """Have bytes start..stop of a mapped file come from the disk when they are next touched.

        So what was damaged in memory alone is whole again. The kernel drops a cached page once nobody maps it: not
        where another process does.
        """
        first = start // _FOLIO * _FOLIO
        end = min(-(-stop // _FOLIO) * _FOLIO, -(-(self.map(file) or 0) // _PAGE) * _PAGE)
        self._libc.madvise(self.address + self.offset(file) + first, end - first, mmap.MADV_DONTNEED)
        with contextlib.suppress(OSError):  # without it the page cache is what there is
            descriptor = os.open(self.path(file), os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.posix_fadvise(descriptor, first, end - first, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)

    def _reserve(self) -> int:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        address = self._libc.mmap(None, self._size, _PROT_NONE, flags, -1, 0)
        if address in (None, _FAILED):
            raise ShardyardError(
                f"Cannot reserve {self._size} bytes of addresses for the data set {self._folder}: "
                f"{os.strerror(ctypes.get_errno())}. Raise the limit on virtual memory (ulimit -v unlimited)."
            )
        return int(address)

    def _array(self) -> np.ndarray:
        memory: Any = (ctypes.c_uint8 * self._size).from_address(self.address)
        finalizer = weakref.finalize(memory, self._libc.munmap, self.address, self._size)
        finalizer.atexit = False  # threads may still be reading then
        return np.frombuffer(memory, np.uint8)

    def _map(self, file: int) -> int | None:
        path = self.path(file)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise explain(error, "read", path) from error
        try:
            size = min(os.fstat(descriptor).st_size, self.size(file))
            if size:
                self._map_at(self.address + self.offset(file), size, descriptor, path)
        finally:
            os.close(descriptor)
        return size

    def _map_at(self, address: int, size: int, descriptor: int, path: Path) -> None:
        flags = mmap.MAP_SHARED | _MAP_FIXED
        if self._libc.mmap(address, size, mmap.PROT_READ, flags, descriptor, 0) != address:
            raise ShardyardError(
                f"Cannot map {path}: {os.strerror(ctypes.get_errno())}. Where there are very many files, raise the "
                "limit on maps (sysctl vm.max_map_count=1000000)."
            )


def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return libc
