"""One safetensors file: written as a stream with a digest of every block, read by ranges whose blocks are verified.

The format is safetensors (https://github.com/huggingface/safetensors): 8 bytes with the header's length, a JSON header
{name: {dtype, shape, data_offsets}}, the tensors' bytes. Its own library writes a file in one call, without digests or
fsync, and needs a local path to read ranges; both are a few lines here, and its library reads what is written.
"""

from __future__ import annotations

import json
import mmap
import sys
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import xxhash
from torch import Tensor

from configs.errors import Damaged, NotFound
from data_pipelines.storage import Store, explain

BLOCK_BYTES = 1 << 20
_CACHED_BLOCKS = 8  # of a remote file: small tensors that share a block are read at once

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
        {"name", "size" (bytes), "blocks": [xxh3 of each 1 MiB, hex]}.
    """
    assert sys.byteorder == "little", "safetensors files are little-endian"
    ordered = sorted(tensors.items(), key=lambda item: -item[1].element_size())  # keeps every tensor aligned
    blocks = _BlockDigests()
    size = 0
    with store.open_output(name) as file:
        for chunk in _chunks(ordered):
            file.write(chunk)
            blocks.add(chunk)
            size += len(chunk)
    return {"name": name, "size": size, "blocks": blocks.finish()}


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
    """xxh3 of every BLOCK_BYTES of a stream."""

    def __init__(self) -> None:
        self._digests: list[str] = []
        self._block = xxhash.xxh3_64()
        self._filled_bytes = 0

    def add(self, chunk: memoryview) -> None:
        while len(chunk) > 0:
            piece = chunk[: BLOCK_BYTES - self._filled_bytes]
            self._block.update(piece)
            self._filled_bytes += len(piece)
            chunk = chunk[len(piece) :]
            if self._filled_bytes == BLOCK_BYTES:
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
    """A safetensors file open for reading, memory-mapped where it is local. Blocks are verified when first read.

    entry: what write_tensors returned. Every method raises Damaged, naming the file and the block, for bytes that are
    not those that were written.
    """

    def __init__(self, store: Store, entry: Mapping[str, Any]) -> None:
        self._path = store.path(entry["name"])
        self._size: int = entry["size"]
        self._digests: list[str] = entry["blocks"]
        self._verified: set[int] = set()
        self._cache: OrderedDict[int, bytes] = OrderedDict()
        self._map: mmap.mmap | None = None
        self._check_size(store, entry["name"])
        self._file = store.open_input(entry["name"])
        if store.is_local:
            try:
                # A private map: torch wants writable memory, and nothing may reach the file.
                self._map = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_COPY)
            except OSError as error:
                raise explain(error, "read", self._path) from error
        self._header_bytes, self._header = self._read_header()

    def _check_size(self, store: Store, name: str) -> None:
        try:
            size = store.size(name)
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

    def read(self, key: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop), at least one, of a flattened tensor; 1-D, a view of the file where it is mapped."""
        dtype, begin, end = self._header[key]
        first = self._header_bytes + begin
        if stop * dtype.itemsize > end - begin:
            raise Damaged(f"{self._path} holds less of '{key}' than its manifest says.")
        raw = self._range(first + start * dtype.itemsize, first + stop * dtype.itemsize)
        return torch.frombuffer(raw, dtype=dtype, count=stop - start)

    def verify(self) -> list[str]:
        """One message for every damaged block."""
        messages = []
        for index in range(len(self._digests)):
            try:
                self._block(index)
            except Damaged as error:
                messages.append(str(error))
        return messages

    def _range(self, start: int, stop: int) -> bytearray | memoryview:
        """Verified bytes [start, stop), at least one."""
        if not 0 <= start < stop <= self._size:
            raise Damaged(f"{self._path} ends before byte {stop:,}.")
        indices = range(start // BLOCK_BYTES, (stop - 1) // BLOCK_BYTES + 1)
        if self._map is not None:
            for index in indices:
                self._block(index)
            return memoryview(self._map)[start:stop]
        joined = bytearray(b"".join(self._block(index) for index in indices))
        first = indices.start * BLOCK_BYTES
        return joined[start - first : stop - first]

    def _block(self, index: int) -> bytes | memoryview:
        """One verified block."""
        start, stop = index * BLOCK_BYTES, min((index + 1) * BLOCK_BYTES, self._size)
        if index in self._cache:
            return self._cache[index]
        block: bytes | memoryview
        if self._map is not None:
            block = memoryview(self._map)[start:stop]
            if index in self._verified:
                return block
        else:
            self._file.seek(start)
            block = self._file.read(stop - start)
        if index >= len(self._digests) or xxhash.xxh3_64_hexdigest(block) != self._digests[index]:
            raise Damaged(f"{self._path} fails its digest in block {index} (bytes {start:,} to {stop:,}).")
        if self._map is None:
            self._remember(index, bytes(block))
        else:
            self._verified.add(index)
        return block

    def _remember(self, index: int, block: bytes) -> None:
        self._cache[index] = block
        if len(self._cache) > _CACHED_BLOCKS:
            self._cache.popitem(last=False)
