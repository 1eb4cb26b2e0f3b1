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
    target = torch.from_numpy(out.reshape(-1).view(np.uint8)).view(num_rows, row_bytes)
    torch.index_select(_rows_of(row_bytes), 0, torch.from_numpy(addresses - _FIRST), out=target)


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
