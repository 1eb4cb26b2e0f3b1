"""One safetensors file: written as a stream with a digest of every block, read by ranges whose blocks are verified.

The format is safetensors (https://github.com/huggingface/safetensors): 8 bytes with the header's length, a JSON header
{name: {dtype, shape, data_offsets}}, the tensors' bytes. Its own library writes a file in one call, without digests or
fsync, and needs a local path to read ranges; both are a few lines here, and its library reads what is written.
"""

from __future__ import annotations

import json
import os
import sys
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import xxhash
from torch import Tensor

from configs.errors import Damaged, NotFound
from data_pipelines.storage import Store

OLD_BLOCK_BYTES = 1 << 20  # of files whose entry does not tell
_SMALLEST_BLOCK, _LARGEST_BLOCK, _BLOCKS = 4 << 10, 256 << 10, 4096
_VERIFIED_BLOCKS = 64  # read at once
_EDGES = 8

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_DTYPE_CODES = {dtype: code for code, dtype in _DTYPES.items()}


def write_tensors(store: Store, name: str, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Write contiguous CPU tensors and make the file durable. After an error a part of it may stay.

    Returns:
        {"name", "size" (bytes), "block_bytes", "blocks": [xxh3 of each block, hex]}.
    """
    assert sys.byteorder == "little", "safetensors files are little-endian"
    ordered = sorted(tensors.items(), key=lambda item: -item[1].element_size())  # keeps every tensor aligned
    chunks = list(_chunks(ordered))
    size = sum(map(len, chunks))
    blocks = _BlockDigests(block_bytes(size))
    with store.open_output(name) as file:
        for chunk in chunks:
            file.write(chunk)
            blocks.add(chunk)
    return {"name": name, "size": size, "block_bytes": block_bytes(size), "blocks": blocks.finish()}


def block_bytes(size: int) -> int:
    """Of a file of `size` bytes: a power of two; few bytes beside those asked for are read, and digests stay few."""
    found = _SMALLEST_BLOCK
    while found < _LARGEST_BLOCK and found * _BLOCKS < size:
        found *= 2
    return found


def _chunks(ordered: list[tuple[str, Tensor]]) -> Iterator[memoryview]:
    header: dict[str, Any] = {}
    offset = 0
    for key, tensor in ordered:
        end = offset + tensor.numel() * tensor.element_size()
        code = _DTYPE_CODES[tensor.dtype]
        header[key] = {"dtype": code, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield memoryview(len(text).to_bytes(8, "little") + text)
    for _, tensor in ordered:
        if tensor.numel() > 0:
            raw: Any = tensor.reshape(-1).view(torch.uint8).numpy()
            yield memoryview(raw)


class _BlockDigests:
    """xxh3 of every block of a stream."""

    def __init__(self, block_bytes: int) -> None:
        self._block_bytes = block_bytes
        self._digests: list[str] = []
        self._block = xxhash.xxh3_64()
        self._filled_bytes = 0

    def add(self, chunk: memoryview) -> None:
        while len(chunk) > 0:
            piece = chunk[: self._block_bytes - self._filled_bytes]
            self._block.update(piece)
            self._filled_bytes += len(piece)
            chunk = chunk[len(piece) :]
            if self._filled_bytes == self._block_bytes:
                self._next()

    def _next(self) -> None:
        self._digests.append(self._block.hexdigest())
        self._block = xxhash.xxh3_64()
        self._filled_bytes = 0

    def finish(self) -> list[str]:
        if self._filled_bytes:
            self._next()
        return self._digests


class TensorFile:
    """A safetensors file open for reading by ranges. Blocks are verified whenever they are read.

    It is read, not mapped: pages of a map count as the process's memory, and a file that is cut while it is mapped ends
    the process.

    entry: what write_tensors returned. Every method raises Damaged, naming the file and the block, for bytes that are
    not those that were written.
    """

    def __init__(self, store: Store, entry: Mapping[str, Any]) -> None:
        self._store = store
        self._name: str = entry["name"]
        self._path = store.path(entry["name"])
        self._size: int = entry["size"]
        self._digests: list[str] = entry["blocks"]
        self._block_bytes: int = entry.get("block_bytes", OLD_BLOCK_BYTES)
        self._read_blocks: set[int] = set()
        self._edges: OrderedDict[int, bytes] = OrderedDict()
        self._check_size()
        self._file = store.open_input(entry["name"])
        if store.is_local and hasattr(os, "posix_fadvise"):  # the kernel is not to read ahead of what is asked for
            os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        self._header_bytes, self._header = self._read_header()

    def _check_size(self) -> None:
        try:
            size = self._store.size(self._name)
        except NotFound as error:
            raise Damaged(f"{self._path} is missing.") from error
        if size != self._size:
            raise Damaged(f"{self._path} has {size:,} bytes instead of {self._size:,}.")

    def _read_header(self) -> tuple[int, dict[str, tuple[torch.dtype, int, int]]]:
        start = 8 + int.from_bytes(self._range(0, 8), "little")
        try:
            header = json.loads(bytes(self._range(8, start)))
            tensors = {key: (_DTYPES[value["dtype"]], *value["data_offsets"]) for key, value in header.items()}
            good = all(0 <= begin <= end <= self._size - start for _, begin, end in tensors.values())
            good &= all(type(offset) is int for _, *offsets in tensors.values() for offset in offsets)
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
            raise Damaged(f"{self._path} has no safetensors header.") from error
        if not good:
            raise Damaged(f"{self._path} has a header that points outside the file.")
        return start, tensors

    def __contains__(self, key: str) -> bool:
        return key in self._header

    @property
    def bytes_read(self) -> int:
        """Of all blocks that were read so far, each counted once."""
        return sum(min(self._block_bytes, self._size - index * self._block_bytes) for index in self._read_blocks)

    def read(self, key: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop), at least one, of a flattened tensor; 1-D, in memory of its own."""
        dtype, begin, end = self._header[key]
        first = self._header_bytes + begin
        if stop * dtype.itemsize > end - begin:
            raise Damaged(f"{self._path} holds less of '{key}' than its manifest says.")
        raw = self._range(first + start * dtype.itemsize, first + stop * dtype.itemsize)
        return torch.frombuffer(raw, dtype=dtype, count=stop - start)

    def verify(self) -> list[str]:
        """One message for every damaged block."""
        messages: list[str] = []
        for first in range(0, len(self._digests), _VERIFIED_BLOCKS):
            raw = memoryview(
                bytearray(min(_VERIFIED_BLOCKS * self._block_bytes, self._size - first * self._block_bytes))
            )
            messages += self._read_into(raw, first)
        return messages

    def _range(self, start: int, stop: int) -> memoryview:
        """Verified bytes [start, stop), at least one."""
        if not 0 <= start < stop <= self._size:
            raise Damaged(f"{self._path} ends before byte {stop:,}.")
        size = self._block_bytes
        first, last = start // size, (stop - 1) // size
        base = first * size
        raw = memoryview(bytearray(min((last + 1) * size, self._size) - base))
        low, high = 0, len(raw)
        if (edge := self._edges.get(first)) is not None:
            raw[: len(edge)] = edge
            low = len(edge)
        if (edge := self._edges.get(last)) is not None and last > first:
            high = len(raw) - len(edge)
            raw[high:] = edge
        if low < high:
            damage = self._read_into(raw[low:high], (base + low) // size)
            if damage:
                raise Damaged(damage[0])
        self._remember(first, bytes(raw[:size]))
        self._remember(last, bytes(raw[last * size - base :]))
        return raw[start - base : stop - base]

    def _read_into(self, raw: memoryview, first: int) -> list[str]:
        """Fill `raw` with whole blocks from number `first` on; one message for every damaged one."""
        size = self._block_bytes
        with self._store.explained("read", self._name):
            self._file.seek(first * size)
            filled = 0
            while count := self._file.readinto(raw[filled:]):  # type: ignore[attr-defined]
                filled += count
        messages = []
        for index, offset in enumerate(range(0, len(raw), size), start=first):
            block = raw[offset : offset + size]
            if index >= len(self._digests) or xxhash.xxh3_64_hexdigest(block) != self._digests[index]:
                begin = index * size
                messages.append(
                    f"{self._path} fails its digest in block {index} (bytes {begin:,} to {begin + len(block):,})."
                )
            self._read_blocks.add(index)
        return messages

    def _remember(self, index: int, block: bytes) -> None:
        """Keep a block that the next range may share."""
        self._edges[index] = block
        if len(self._edges) > _EDGES:
            self._edges.popitem(last=False)
