"""Ending a run once evaluations show no gain, with the weights of the best of them (Prechelt 1998)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from configs.errors import UsageError
from configs.schema import EarlyStoppingConfig


@dataclass
class EarlyStopping:
    """What the evaluations so far have shown, alike on all ranks.

    best: the best value, None before the first. best_step: completed steps with it; its checkpoint is kept.
    waited: evaluations since then.
    """

    config: EarlyStoppingConfig
    best: float | None = None
    best_step: int = 0
    waited: int = 0

    @property
    def ended(self) -> bool:
        """Whether training is to go no further."""
        return self.waited >= self.config.patience

    def value_in(self, metrics: Mapping[str, float]) -> float:
        """What is compared, of the metrics of an evaluation.

        Raises:
            UsageError: the task has no such metric.
        """
        name = f"validation/{self.config.metric}"
        if name not in metrics:
            known = ", ".join(sorted(each.removeprefix("validation/") for each in metrics))
            raise UsageError(
                f"early_stopping.metric={self.config.metric}: an evaluation has no such value. It has {known}."
            )
        return metrics[name]

    def add(self, step: int, value: float) -> bool:
        """Count an evaluation after `step` completed steps; whether it is the best so far."""
        if self._is_better(value):
            self.best, self.best_step, self.waited = value, step, 0
            return True
        self.waited += 1
        return False

    def _is_better(self, value: float) -> bool:
        if not math.isfinite(value):
            return False
        if self.best is None:
            return True
        gain = value - self.best if self.config.goal == "max" else self.best - value
        return gain > self.config.min_gain

    def state(self) -> dict[str, Any]:
        """For a checkpoint's manifest."""
        return {"metric": self.config.metric, "best": self.best, "best_step": self.best_step, "waited": self.waited}

    @classmethod
    def of(cls, config: EarlyStoppingConfig, state: Mapping[str, Any] | None) -> EarlyStopping:
        """As a checkpoint has it; what was found of another metric counts for nothing."""
        if state is None or state["metric"] != config.metric:
            return cls(config)
        return cls(config, state["best"], state["best_step"], state["waited"])

    def return_to(self, state: Mapping[str, Any] | None) -> None:
        """Know what a checkpoint does, and no more."""
        before = EarlyStopping.of(self.config, state)
        self.best, self.best_step, self.waited = before.best, before.best_step, before.waited
