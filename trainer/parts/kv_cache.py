"""What a decoder keeps while it writes, so that each position is computed once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class LayerCache:
    """Rotated keys, and values, of the positions before: (B, G, T, D) each; None before the first."""

    keys: Tensor | None = None
    values: Tensor | None = None

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Those of all positions, with these as the last."""
        if self.keys is not None and self.values is not None:
            keys, values = torch.cat([self.keys, keys], 2), torch.cat([self.values, values], 2)
        self.keys, self.values = keys, values
        return keys, values


@dataclass
class Cache:
    """What need not be computed again for the positions that follow; the model fills it."""

    layers: list[LayerCache]
    length: int = 0  # positions in it
