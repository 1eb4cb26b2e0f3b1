"""A rank's state copied to host memory behind the next forward and backward, so that training may go on."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from trainer.checkpoint_files import Ranges, tensor_key
from trainer.engine_state import Fragment

_ALIGNMENT_BYTES = 64


class Reading:
    """Whether a thread reads an engine's masters and optimizer state: whoever changes them waits first.

    waited_s: how long that took since the reading began.
    """

    def __init__(self) -> None:
        self._ended = threading.Event()
        self._ended.set()
        self.waited_s = 0.0

    def begin(self) -> None:
        """Have writers wait; in their own thread."""
        self.wait()
        self.waited_s = 0.0
        self._ended.clear()

    def end(self) -> None:
        """Let writers go on."""
        self._ended.set()

    def wait(self) -> None:
        """Return when nobody reads."""
        if not self._ended.is_set():
            started = time.perf_counter()
            self._ended.wait()
            self.waited_s += time.perf_counter() - started


@dataclass(frozen=True)
class Snapshot:
    """What one save writes.

    fragments: views of live memory, the same until reading.end(). header: the manifest's other fields, on rank 0.
    stall_s: how long training has waited up to here.
    """

    step: int
    save: str
    fragments: list[Fragment]
    reading: Reading
    header: dict[str, Any]
    stall_s: float


class SnapshotBuffer:
    """One host buffer that every snapshot is copied into: fresh memory would cost more than the copy (page faults).

    It is pinned where the state comes from a GPU, and filled by a stream of its own. What copy() returned is
    overwritten by the next copy().
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._device = device
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def begin(self, fragments: Iterable[Fragment]) -> list[Fragment]:
        """What copy() is to be given, in another thread; buffers are cloned here, since forward changes them."""
        held = [replace(each, tensor=each.tensor.clone()) if each.kind == "buffer" else each for each in fragments]
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
        return held

    def copy(self, fragments: list[Fragment]) -> tuple[dict[str, Tensor], Ranges]:
        """Tensors by tensor_key, on the CPU, and {name: [[start, stop], ...]} of what they hold."""
        sizes = [fragment.tensor.numel() * fragment.tensor.element_size() for fragment in fragments]
        padded = [-(-size // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES for size in sizes]
        if self._bytes.numel() != sum(padded):
            self.free()
            self._bytes = torch.empty(sum(padded), dtype=torch.uint8, pin_memory=self._stream is not None)
        tensors: dict[str, Tensor] = {}
        ranges: Ranges = {}
        offset = 0
        with torch.cuda.stream(self._stream):  # nothing without one
            for fragment, size, length in zip(fragments, sizes, padded, strict=True):
                copy = self._bytes[offset : offset + size].view(fragment.tensor.dtype)
                copy.copy_(fragment.tensor, non_blocking=self._stream is not None)
                offset += length
                tensors[tensor_key(fragment.kind, fragment.name, fragment.start)] = copy
                held = [fragment.start, fragment.start + copy.numel()]
                if held not in ranges.setdefault(fragment.name, []):  # the other kinds hold the same range
                    ranges[fragment.name].append(held)
        if self._stream is not None:
            self._stream.synchronize()
        return tensors, ranges

    def free(self) -> None:
        """Give the memory back."""
        self._bytes = torch.empty(0, dtype=torch.uint8)
