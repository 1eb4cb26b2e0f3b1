"""The last layer of a model that gives logits for each position."""

from __future__ import annotations

from torch import Tensor, nn

from trainer.parts.cross_entropy import linear_cross_entropy


class LogitsHead(nn.Linear):
    """Logits, or the loss that they would give."""

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """x (B, T, C): (B, T, V); with labels (B, T), the sum of their cross-entropies, an fp32 scalar."""
        if labels is None:
            return super().forward(x)
        return linear_cross_entropy(x.flatten(0, 1), self.weight, self.bias, labels.flatten())
