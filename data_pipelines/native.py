"""Many rows copied from mapped memory in one native call that releases the GIL.

torch.index_select on rows of L bytes that overlap (stride 1 byte) copies each with memcpy. The matrix spans the whole
user part of the address space, so that one call serves rows of any number of mapped files and data sets.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

_FIRST = 1 << 16  # nothing is mapped below
_LAST = 1 << 47
_LARGEST_ROW = (1 << 16) - 1  # in bytes: torch counts the values of a matrix in 63 bits
_CHUNKS_EACH = 8  # of a byte string of mean length: on average half a chunk of it is copied in vain
_LARGEST_CHUNK = 4096


def copy_rows(addresses: np.ndarray, out: np.ndarray) -> None:
    """out[i] = the bytes at addresses[i]: (n,) int64 addresses in this process, `out` (n, ...) C-contiguous.

    The caller guarantees that out.nbytes / n bytes can be read from each address: nothing here can check it.
    """
    import torch

    num_rows = len(addresses)
    if num_rows == 0 or out.nbytes == 0:
        return
    assert out.flags.c_contiguous and len(out) == num_rows, (out.shape, num_rows)
    row_bytes = out.nbytes // num_rows
    target = out.reshape(-1).view(np.uint8).reshape(num_rows, row_bytes)
    if row_bytes > _LARGEST_ROW:  # then a call for each costs little
        for number, address in enumerate(addresses.tolist()):
            target[number] = view_at(address, row_bytes, target.dtype)
        return
    torch.index_select(_rows_of(row_bytes), 0, torch.from_numpy(addresses - _FIRST), out=torch.from_numpy(target))


class ListCopies:
    """How byte strings that differ in length are copied: in chunks of one size, with one native call.

    So the last chunk of each also holds what follows it in memory, and the copies do not touch each other. Where that
    would be read from beyond `ends`, a string is copied by itself.

    addresses, num_bytes, ends: (n,) int64; nothing at or after an end is read. Chunks are multiples of item_bytes.
    starts (n,): where the copies begin, in num_bytes of memory.
    """

    def __init__(self, addresses: np.ndarray, num_bytes: np.ndarray, ends: np.ndarray, item_bytes: int) -> None:
        mean = int(num_bytes.mean()) if len(num_bytes) else 0
        pieces = min(mean // _CHUNKS_EACH, _LARGEST_CHUNK) // item_bytes  # items a chunk
        self._chunk = item_bytes << max(0, pieces.bit_length() - 1)
        self._addresses, self._num_bytes = addresses, num_bytes
        self._counts = -(-num_bytes // self._chunk)  # (n,): chunks of each
        self._firsts = np.cumsum(self._counts) - self._counts  # (n,): number of its first chunk
        self._whole = addresses + self._counts * self._chunk <= ends
        self.starts = self._firsts * self._chunk
        self.num_bytes = int(self._counts.sum()) * self._chunk

    def copy(self, out: np.ndarray) -> None:
        """Into memory of num_bytes, C-contiguous."""
        target = out.reshape(-1).view(np.uint8)
        usable = np.flatnonzero(self._whole & (self._counts > 0))
        if len(usable):
            chunk, counts = self._chunk, self._counts
            sources = np.repeat(self._addresses - self._firsts * chunk, counts)
            sources += np.arange(len(sources)) * chunk
            if len(usable) < len(counts):
                sources[~np.repeat(self._whole, counts)] = self._addresses[usable[0]]  # any that may be read
            copy_rows(sources, target.reshape(-1, chunk))
        alone = np.flatnonzero(~self._whole)
        for address, start, size in zip(
            *(each[alone].tolist() for each in (self._addresses, self.starts, self._num_bytes)), strict=True
        ):
            target[start : start + size] = view_at(address, size, np.dtype(np.uint8))


def address_of(array: np.ndarray) -> int:
    """Where an array begins."""
    return int(array.__array_interface__["data"][0])


def view_at(address: int, count: int, dtype: np.dtype[Any]) -> np.ndarray:
    """`count` values of `dtype` at an address, as a view; the caller guarantees that they can be read."""
    start = address - _FIRST
    return _memory()[start : start + count * dtype.itemsize].view(dtype)


@cache
def _memory() -> np.ndarray:
    """(addresses,) uint8: the memory from address _FIRST on; nothing is read until it is indexed."""
    return np.ctypeslib.as_array((ctypes.c_uint8 * (_LAST - _FIRST)).from_address(_FIRST))


@cache
def _rows_of(row_bytes: int) -> Tensor:
    """(addresses, row_bytes) uint8, overlapping: row a is the memory from address _FIRST + a on."""
    import torch

    return torch.from_numpy(_memory()).as_strided((_LAST - _FIRST - row_bytes, row_bytes), (1, 1))
