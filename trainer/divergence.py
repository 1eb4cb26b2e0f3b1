"""A loss or gradient that is no number, or a spike: how it is noticed, and how often in a row it may be.

Compared are what the record shows of a step: `loss`, the mean over the global batch, and `grad_norm`, before clipping;
both are alike on all ranks. Each must be finite and, with recovery.spike_factor, at most that factor times the median
of its own values in the last 64 steps that did not diverge, once there are 16 of them. The median lags behind a falling
loss, so the limit is above it, and one spike moves it by nothing. A loss whose median is not positive has no limit.

Steps whose update fp16's scaler took back are no divergence, and are not remembered.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from configs.errors import RunFailed
from configs.schema import RecoveryConfig

if TYPE_CHECKING:
    from trainer.engine import StepStats

WINDOW = 64  # steps
FEWEST = 16  # steps before which nothing is a spike
MOST_IN_A_ROW = 10


@dataclass(frozen=True)
class Limits:
    """What a step's loss and gradient norm may be at most; infinite where any finite number will do."""

    loss: float = math.inf
    grad_norm: float = math.inf

    @property
    def has_norm(self) -> bool:
        """Whether not every finite norm will do."""
        return self.grad_norm < math.inf


def exceeds(value: float | None, limit: float) -> bool:
    """Whether a value is no finite number, or above its limit; None is unknown, and does not."""
    return value is not None and not (math.isfinite(value) and value <= limit)


@dataclass(frozen=True)
class Finding:
    """A step that diverged: in `what`, whose `value` exceeds `limit`. done: completed steps with it."""

    done: int
    what: str
    value: float
    limit: float
    loss: float
    grad_norm: float | None

    def __str__(self) -> str:
        above = "" if not math.isfinite(self.value) else f", above its limit of {self.limit:.6g}"
        return f"The {self.what} of step {self.done} is {self.value:.6g}{above}"


@dataclass
class Divergence:
    """What the last steps were like, alike on all ranks; part of a checkpoint, since it decides what comes next.

    in_a_row: divergences since a step beyond them, `furthest`, went well.
    """

    config: RecoveryConfig
    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    in_a_row: int = 0
    furthest: int = 0

    def limits(self) -> Limits:
        """Of the next step."""
        return Limits(self._limit(self.losses), self._limit(self.grad_norms))

    def _limit(self, values: list[float]) -> float:
        if self.config.spike_factor is None or len(values) < FEWEST:
            return math.inf
        median = statistics.median(values)
        return self.config.spike_factor * median if median > 0 else math.inf

    def judge(self, done: int, stats: StepStats) -> Finding | None:
        """What is wrong with the step that makes `done` completed ones; None if nothing is: then it is remembered."""
        if stats.skipped:  # fp16's scaler has taken the update back, and tries again with a smaller scale
            return None
        limits = self.limits()
        for what, value, limit in (
            ("loss", stats.loss, limits.loss),
            ("gradient's norm", stats.grad_norm, limits.grad_norm),
        ):
            if value is not None and exceeds(value, limit):
                return Finding(done, what, value, limit, stats.loss, stats.grad_norm)
        if self.config.spike_factor is not None:
            self.losses = [*self.losses, stats.loss][-WINDOW:]
            if stats.grad_norm is not None:
                self.grad_norms = [*self.grad_norms, stats.grad_norm][-WINDOW:]
        if done >= self.furthest:
            self.in_a_row = 0
        return None

    def count(self, finding: Finding) -> None:
        """Count a divergence.

        Raises:
            RunFailed: with recovery.divergence=stop; else when it comes too often without a good step beyond it.
        """
        self.in_a_row += 1
        self.furthest = max(self.furthest, finding.done)
        remedy = "Lower optimizer.lr, set optimizer.clip_grad_norm, or use precision=fp32 or bf16."
        if math.isfinite(finding.value):
            remedy = "Lower optimizer.lr, or raise recovery.spike_factor if training needs such values."
        if self.config.divergence == "stop":
            raise RunFailed(
                f"{finding}. The last checkpoint is from before it. {remedy} `shardyard replay` lists that step's "
                "examples by their loss; recovery.divergence=skip or rollback goes on without them."
            )
        if self.in_a_row >= MOST_IN_A_ROW:
            raise RunFailed(
                f"{finding}: the {self.in_a_row}th divergence in a row, so it is not a few bad examples. The weights "
                f"are those from before the first. {remedy}"
            )

    def state(self) -> dict[str, Any]:
        """For a checkpoint's manifest."""
        return {
            "losses": self.losses,
            "grad_norms": self.grad_norms,
            "in_a_row": self.in_a_row,
            "furthest": self.furthest,
        }

    @classmethod
    def of(cls, config: RecoveryConfig, state: Mapping[str, Any] | None) -> Divergence:
        """As a checkpoint has it."""
        return cls(config, **(state or {}))

    def return_to(self, state: Mapping[str, Any] | None) -> None:
        """Remember the steps that a checkpoint does. What diverged since then still counts."""
        before = Divergence.of(self.config, state)
        self.losses, self.grad_norms = before.losses, before.grad_norms
