"""A rank's state copied to host memory, so that training may go on while it is written."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trainer.checkpoint_files import Ranges, tensor_key
from trainer.engine_state import Fragment

_ALIGNMENT_BYTES = 64


@dataclass(frozen=True)
class Snapshot:
    """What one save writes.

    tensors: by tensor_key, on the CPU. ranges: {name: [[start, stop], ...]} of what they hold. header: the manifest's
    other fields, on rank 0. stall_s: how long training waited for the copy.
    """

    step: int
    save: str
    tensors: dict[str, Tensor]
    ranges: Ranges
    header: dict[str, Any]
    stall_s: float


class SnapshotBuffer:
    """One host buffer that every snapshot is copied into: fresh memory would cost more than the copy (page faults).

    It is pinned where the state comes from a GPU. What copy() returned is overwritten by the next copy().
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def copy(self, fragments: Iterable[Fragment]) -> tuple[dict[str, Tensor], Ranges]:
        """(tensors, ranges) of a Snapshot."""
        fragments = list(fragments)
        sizes = [fragment.tensor.numel() * fragment.tensor.element_size() for fragment in fragments]
        padded = [-(-size // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES for size in sizes]
        on_gpu = self._device.type == "cuda"
        if self._bytes.numel() != sum(padded):
            self.free()
            self._bytes = torch.empty(sum(padded), dtype=torch.uint8, pin_memory=on_gpu)
        tensors: dict[str, Tensor] = {}
        ranges: Ranges = {}
        offset = 0
        for fragment, size, length in zip(fragments, sizes, padded, strict=True):
            copy = self._bytes[offset : offset + size].view(fragment.tensor.dtype)
            copy.copy_(fragment.tensor, non_blocking=on_gpu)
            offset += length
            tensors[tensor_key(fragment.kind, fragment.name, fragment.start)] = copy
            held = [fragment.start, fragment.start + copy.numel()]
            if held not in ranges.setdefault(fragment.name, []):  # the other kinds hold the same range
                ranges[fragment.name].append(held)
        if on_gpu:
            torch.cuda.synchronize(self._device)
        return tensors, ranges

    def free(self) -> None:
        """Give the memory back."""
        self._bytes = torch.empty(0, dtype=torch.uint8)
