"""Equal slots in one range of addresses, into which files are mapped and out of which they are taken again."""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref

import numpy as np

from configs.errors import ShardyardError
from data_pipelines.mapped import _libc

_MAP_FIXED = 0x10
_MAP_NORESERVE = 0x4000
_PROT_NONE = 0
_FAILED = ctypes.c_void_p(-1).value


class Slots:
    """A range of addresses, cut into slots. Only what was mapped or filled may be read. Not safe to change from several
    threads at once.

    The range is given back when neither this object nor an array on it is left.
    """

    def __init__(self, number: int, size: int) -> None:
        self.number = number
        self.slot_bytes = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        self._libc = _libc()
        num_bytes = max(1, number) * self.slot_bytes + mmap.PAGESIZE  # the last page is never readable
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        address = self._libc.mmap(None, num_bytes, _PROT_NONE, flags, -1, 0)
        if address in (None, _FAILED):
            raise ShardyardError(
                f"Cannot reserve {num_bytes} bytes of addresses for {number} blocks: "
                f"{os.strerror(ctypes.get_errno())}. Raise the limit on virtual memory (ulimit -v unlimited)."
            )
        self._address = int(address)
        memory = (ctypes.c_uint8 * num_bytes).from_address(self._address)
        finalizer = weakref.finalize(memory, self._libc.munmap, self._address, num_bytes)
        finalizer.atexit = False  # threads may still be reading then
        self.array: np.ndarray = np.ctypeslib.as_array(memory)  # the whole range
        self.array.flags.writeable = False

    def offset(self, slot: int) -> int:
        """Where a slot begins in `array`."""
        return slot * self.slot_bytes

    def content(self, slot: int, size: int) -> np.ndarray:
        """The first bytes of a slot: (size,) uint8."""
        return self.array[self.offset(slot) : self.offset(slot) + size]

    def map(self, slot: int, descriptor: int, size: int) -> None:
        """Make the first bytes of a file, which must have them, those of a slot."""
        self._replace(slot, size, mmap.PROT_READ, mmap.MAP_SHARED, descriptor)

    def fill(self, slot: int, content: bytes | memoryview) -> None:
        """Make a copy of `content` in memory that of a slot."""
        size = len(content)
        self._replace(slot, size, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1)
        address = self._address + self.offset(slot)
        ctypes.memmove(address, bytes(content), size)

    def clear(self, slot: int) -> None:
        """Let go of what is in a slot."""
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        self._replace(slot, self.slot_bytes, _PROT_NONE, flags, -1)

    def _replace(self, slot: int, size: int, protection: int, flags: int, descriptor: int) -> None:
        assert 0 <= slot < self.number and 0 < size <= self.slot_bytes, (slot, size)
        address = self._address + self.offset(slot)
        if self._libc.mmap(address, size, protection, flags | _MAP_FIXED, descriptor, 0) != address:
            raise ShardyardError(
                f"Cannot map a block of {size} bytes: {os.strerror(ctypes.get_errno())}. Where very many are mapped, "
                "raise the limit (sysctl vm.max_map_count=1000000)."
            )
