"""Muon (Jordan et al. 2024) for hidden matrices and AdamW for the rest, as one optimizer.

Muon replaces a matrix's momentum by the nearest orthogonal matrix, found by five Newton-Schulz iterations. A matrix's
step is scaled to the size that AdamW's has (Liu et al. 2025, Muon is Scalable for LLM Training), so that one learning
rate and one weight decay are right for both.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class MuonWithAdamW(torch.optim.Optimizer):
    """Both rules over one list of groups and one state, which is all that others see of an optimizer.

    matrices: stepped by Muon, each as a whole. groups: AdamW's. Either may be empty.
    """

    def __init__(
        self,
        matrices: list[nn.Parameter],
        groups: list[dict[str, Any]],
        *,
        lr: float,
        momentum: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
    ) -> None:
        self._rules: list[torch.optim.Optimizer] = []
        if matrices:
            self._rules.append(
                torch.optim.Muon(
                    matrices, lr=lr, momentum=momentum, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
                )
            )
        if any(group["params"] for group in groups):
            self._rules.append(
                torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)
            )
        super().__init__([group for rule in self._rules for group in rule.param_groups], {})
        for rule in self._rules:
            rule.state = self.state
        self.param_groups = [group for rule in self._rules for group in rule.param_groups]  # the rules' own

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        assert closure is None
        for rule in self._rules:
            rule.step()
