"""What torch (2.13) asks of malloc around its tensors: their memory, and the small objects that describe them.

In bytes, as traced in a training step of a GPT: a storage is an object of 96 and the values; a tensor one of 176 with a
version counter of 24, and 184 (a view: 312) more where a backward pass will come to it. An operation of that pass is a
node of some 500 to 700 with lists of its edges and of the shapes that it needs, and with tensors that it has saved.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterable
from typing import Any, Literal

from torch import Tensor

from trainer.malloc import Heap

_STORAGE, _TENSOR = 96, (176, 24)
_DIFFERENTIABLE, _NODE = (184,), (736, 32, 32, 176, 16, 16, 32, 176)
_DIFFERENTIABLE_VIEW, _VIEW_NODE = (312,), (488, 16, 24)
# What is kept beside tensors (mallinfo2 before and after, the same for every model): by deepspeed.initialize, which
# imports modules once the model is there, and by the operations of the first step.
_IMPORTED_BYTES, _FIRST_BYTES, _KEPT_OBJECT = 15 << 20, 5 << 19, 1536
KEPT_BYTES = _IMPORTED_BYTES + _FIRST_BYTES
_GLOO_THREADS = 2  # ProcessGroupGloo.hpp: Options::threads
# Whose memory a storage takes: the training thread's heap, that of a thread which communicates, or a mapping.
Place = Literal["heap", "communication", "mapping"]
_SMALLEST, _LARGEST_LEFT, _LEFT_OF_EACH = 24, 1024, 300


class _Lifetime:
    """Ends with what holds it."""


class TorchHeap:
    """A heap in which tensors, real or fake, have the places that real ones would have."""

    def __init__(self) -> None:
        self._heap = Heap()
        self._first = _FIRST_BYTES // _KEPT_OBJECT
        self._threads = [Heap(process=self._heap) for _ in range(_GLOO_THREADS)]
        self._next_thread = itertools.cycle(self._threads)
        self._storages: dict[int, tuple[int, Heap, int]] = {}
        # Imports have left small free blocks of all sizes between used ones: small objects go there first.
        left = [self._heap.malloc(size) for _ in range(_LEFT_OF_EACH) for size in range(_SMALLEST, _LARGEST_LEFT, 16)]
        for address in left[::2]:
            self._heap.free(address)
        self._before = self._heap.resident

    @property
    def resident(self) -> int:
        """Bytes of memory that malloc holds, beside those from before."""
        return self._heap.resident - self._before + sum(thread.resident for thread in self._threads)

    def import_deepspeed(self) -> None:
        """Modules, which stay: they fill gaps, and lie where the heap would else end."""
        for _ in range(_IMPORTED_BYTES // _KEPT_OBJECT):
            self._heap.malloc(_KEPT_OBJECT)

    def storage(self, key: int, size: int, where: Place) -> None:
        """A storage's object and its values."""
        described = self._heap.malloc(_STORAGE)
        heap = next(self._next_thread) if where == "communication" else self._heap
        values = heap.map(size) if where == "mapping" else heap.tensor(size)
        self._storages[key] = described, heap, values

    def storage_freed(self, key: int) -> None:
        """Both go."""
        described, heap, values = self._storages.pop(key)
        heap.free(values)
        self._heap.free(described)

    def made(self, tensor: Tensor) -> None:
        """An operation's result: what describes it lives as long. The first operations leave something for good."""
        self._objects(tensor, _TENSOR)
        if self._first > 0:
            self._first -= 1
            self._heap.malloc(_KEPT_OBJECT)

    def before(self, operands: Iterable[Any]) -> None:
        """An operation's operands: the nodes that made them live as long as the graph."""
        for each in operands:
            node: Any = each.grad_fn if isinstance(each, Tensor) else None
            if node is None or "heap" in node.metadata:
                continue
            view = each._is_view()
            self._objects(each, _DIFFERENTIABLE_VIEW if view else _DIFFERENTIABLE)
            node.metadata["heap"] = lifetime = _Lifetime()
            self._objects(lifetime, _VIEW_NODE if view else _NODE)

    def _objects(self, holder: object, sizes: Iterable[int]) -> None:
        weakref.finalize(holder, self._free, [self._heap.malloc(size) for size in sizes])

    def _free(self, addresses: list[int]) -> None:
        for address in reversed(addresses):
            self._heap.free(address)
