"""Where a worker is, written by its training thread and read by the thread that answers pings."""

from __future__ import annotations

import time
from typing import Any


class Progress:
    """What a worker is doing now. Cheap enough to be set many times a step, and safe to read from another thread.

    Each field has one writer and is replaced whole, so no lock is needed: a reader sees the old value or the new one.
    Setting `phase` counts as a sign of life; a long phase calls `touch()` on its way.

    phase: "starting", "data", "forward", "backward", "optimizer", "evaluation", "checkpoint", "finished", ...
    step: optimizer steps completed. steps: the run's total, None before it is known.
    loss, tokens_per_s: of the latest step, None before the first.
    updated_at: `time.monotonic()` of this process at the last sign of life.
    """

    def __init__(self) -> None:
        self._phase = "starting"
        self.step = 0
        self.steps: int | None = None
        self.loss: float | None = None
        self.tokens_per_s: float | None = None
        self.updated_at = time.monotonic()

    @property
    def phase(self) -> str:
        """What the worker does now; setting it counts as a sign of life."""
        return self._phase

    @phase.setter
    def phase(self, phase: str) -> None:
        self._phase = phase
        self.updated_at = time.monotonic()

    def touch(self) -> None:
        """Say that the worker is alive, for work that stays long in one phase."""
        self.updated_at = time.monotonic()

    def snapshot(self) -> dict[str, Any]:
        """All fields, and `silent_s`: seconds since the last sign of life, since this clock means nothing elsewhere."""
        return {
            "phase": self._phase,
            "step": self.step,
            "steps": self.steps,
            "loss": self.loss,
            "tokens_per_s": self.tokens_per_s,
            "updated_at": self.updated_at,
            "silent_s": time.monotonic() - self.updated_at,
        }
