"""Memory that is used again: fresh pages cost ten times a warm copy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np


class Buffers:
    """Named arrays that keep their memory between calls. Not safe to share between threads.

    What take() gave is overwritten by the next take() of the same name: whoever fills the buffers again must know that
    nobody reads them any more.
    """

    def __init__(self, pin: bool = False) -> None:
        self._pin = pin  # page-locked, for asynchronous copies to a GPU
        self._memory: dict[str, np.ndarray] = {}  # name -> uint8, at least as large as what was asked for
        self._parts: dict[int, Buffers] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """An array of that shape, C-contiguous; its content is arbitrary."""
        kind = np.dtype(dtype)
        num_bytes = math.prod(shape) * kind.itemsize
        memory = self._memory.get(name)
        if memory is None or len(memory) < num_bytes:
            spare = 0 if memory is None else num_bytes // 8  # lengths that vary a little do not allocate each time
            self._memory[name] = memory = self._allocate(max(64, num_bytes + spare))
        return memory[:num_bytes].view(kind).reshape(shape)

    def part(self, number: int) -> Buffers:
        """Buffers within these, with names of their own."""
        if number not in self._parts:
            self._parts[number] = Buffers(self._pin)
        return self._parts[number]

    @property
    def num_bytes(self) -> int:
        """What is held."""
        return sum(map(len, self._memory.values())) + sum(part.num_bytes for part in self._parts.values())

    def _allocate(self, num_bytes: int) -> np.ndarray:
        if not self._pin:
            return np.empty(num_bytes, np.uint8)
        import torch

        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True).numpy()
