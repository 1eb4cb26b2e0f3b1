"""An exponential moving average of the fp32 master weights, cut among the ranks as they are.

After each update average <- d average + (1 - d) weights, with d = min(decay, (1 + t) / (10 + t)) after t updates, so
that the first weights are soon forgotten (TensorFlow's ExponentialMovingAverage). It goes element by element: nothing
is gathered.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class WeightAverage:
    """flats: the tensors that hold this rank's masters. num_updates: t."""

    def __init__(self, flats: Iterable[Tensor], decay: float) -> None:
        self._decay = decay
        self._pairs = {id(flat): (flat, flat.detach().clone()) for flat in flats}
        self.num_updates = 0

    def of(self, flat: Tensor) -> Tensor:
        """The average of a tensor of masters, laid out like it."""
        return self._pairs[id(flat)][1]

    @torch.no_grad()
    def update(self) -> None:
        """Take in the masters as they are after an update."""
        decay = min(self._decay, (1 + self.num_updates) / (10 + self.num_updates))
        for flat, average in self._pairs.values():
            average.lerp_(flat, 1 - decay)
        self.num_updates += 1

    @torch.no_grad()
    def reset(self) -> None:
        """Begin anew with the masters as they are."""
        for flat, average in self._pairs.values():
            average.copy_(flat)
        self.num_updates = 0

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange masters and averages; done twice, every bit is as before."""
        for flat, average in self._pairs.values():
            held = flat.clone()
            flat.copy_(average)
            average.copy_(held)
