"""Bytes of the tensors that live, by part, at every moment of what runs: real tensors, or fake ones of any size."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trainer.torch_heap import Place, TorchHeap

_NO_TENSOR = 0  # no storage has this address


@dataclass(frozen=True)
class LogitsShape:
    """Logits have this many values a row, and no other number of elements is excluded."""

    width: int
    excluded: frozenset[int]

    def fits(self, tensor: Tensor) -> bool:
        """Whether the tensor may be logits, or their gradient."""
        return tensor.ndim >= 2 and tensor.shape[-1] == self.width and tensor.numel() not in self.excluded


class Storages(TorchDispatchMode):
    """Follows every storage that an operation makes under this mode, from there to its end.

    A storage counts once, however many tensors look at it, and belongs to the part that was named when it was made
    (`part`), or that it was moved to later (`assign`). Tensors made elsewhere count once `assign` has named them.
    live, peak: bytes by (part, whether on the host while training is on a device). `peak` is that of the moment when
    their sum was largest; host_peak: the same for the host alone. Where malloc is followed, `peak` is of the moment
    when it held most, and what no tensor has of that is the part "heap". operations: those that compute something or
    allocate, so far; views of a tensor are not counted.
    """

    def __init__(self, *, one_memory: bool, follow_malloc: bool = False) -> None:
        """one_memory: the host is the device (a CPU), so one peak counts both. follow_malloc: then by glibc's."""
        super().__init__()
        self.live: dict[tuple[str, bool], int] = {}
        self.peak: dict[tuple[str, bool], int] = {}
        self.host_peak: dict[tuple[str, bool], int] = {}
        self.operations = 0
        self.logits: LogitsShape | None = None  # what is made as activations and fits it belongs to the part "logits"
        self._one_memory = one_memory
        self._highest = {False: 0, True: 0}
        self._sums = {False: 0, True: 0}
        self._place = ("activations", False)
        self._known: dict[int, tuple[tuple[str, bool], int]] = {}
        self._heap = TorchHeap() if follow_malloc else None
        self._where: Place = "heap"

    @contextlib.contextmanager
    def part(self, name: str, *, host: bool = False, where: Place = "heap") -> Iterator[None]:
        """What is made inside belongs to this part; where: whose memory it takes on a CPU."""
        before, self._place, self._where = (self._place, self._where), (name, host), where
        try:
            yield
        finally:
            self._place, self._where = before

    def assign(self, name: str, tensor: Tensor, *, host: bool = False, size: int | None = None) -> None:
        """The tensor's storage belongs to this part from now on. size: what it counts for; None: as before."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._known:
            weakref.finalize(storage, self._forget, key)
            counted = storage.nbytes() if size is None else size
            if self._heap is not None:
                self._heap.storage(key, counted, self._where)
        else:
            place, held = self._known[key]
            counted = held if size is None else size
            if self._heap is not None and counted != held:
                self._heap.storage_freed(key)
                self._heap.storage(key, counted, self._where)
            self._add(place, -held)
        self._known[key] = ((name, host), counted)
        self._add((name, host), counted)

    def import_deepspeed(self) -> None:
        """DeepSpeed makes its engine: what is no tensor's has a place among tensors."""
        if self._heap is not None:
            self._heap.import_deepspeed()

    def for_a_moment(self, size: int) -> None:
        """Bytes that no tensor shows are taken from the heap, and given back at once."""
        if self._heap is not None:
            self._heap.storage(_NO_TENSOR, size, "heap")
            self._add(self._place, 0)
            self._heap.storage_freed(_NO_TENSOR)

    def forget_peak(self) -> None:
        """Look for the peak from now on."""
        for host, kept in ((False, self.peak), (True, self.host_peak)):
            self._highest[host] = 0
            kept.clear()

    @property
    def peak_bytes(self) -> int:
        """Of the device; with one memory, of all."""
        return sum(self.peak.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func.namespace == "aten" and not func.is_view:  # prim.device asks a fake tensor where it is
            self.operations += 1
        if self._heap is not None:
            self._heap.before(tree_leaves(args))
        for leaf in tree_leaves(found):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                if storage._cdata not in self._known:
                    self._made(storage, leaf)
                if self._heap is not None:
                    self._heap.made(leaf)
        return found

    def _made(self, storage: torch.UntypedStorage, tensor: Tensor) -> None:
        key, size, place = storage._cdata, storage.nbytes(), self._place
        if place[0] == "activations" and self.logits is not None and self.logits.fits(tensor):
            place = ("logits", False)
        self._known[key] = (place, size)
        weakref.finalize(storage, self._forget, key)
        if self._heap is not None:
            self._heap.storage(key, size, self._where)
        self._add(place, size)

    def _forget(self, key: int) -> None:
        place, size = self._known.pop(key)
        if self._heap is not None:
            self._heap.storage_freed(key)
        self._add(place, -size)

    def _add(self, place: tuple[str, bool], size: int) -> None:
        self.live[place] = self.live.get(place, 0) + size
        host = place[1] and not self._one_memory
        self._sums[host] += size
        held = self._sums[host] if self._heap is None else self._heap.resident
        if held > self._highest[host]:
            self._highest[host] = held
            kept = {other: live for other, live in self.live.items() if (other[1] and not self._one_memory) == host}
            kept["heap", False] = held - self._sums[host]
            if host:
                self.host_peak = kept
            else:
                self.peak = kept
