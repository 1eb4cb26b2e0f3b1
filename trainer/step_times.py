"""What steps take, on each rank: means and the longest since the last reading. Pure."""

from __future__ import annotations

import math

# Disjoint parts of a step, by the host's clock, in seconds a step; what is left of step_s is other work.
PARTS = (
    "data_wait_s",  # until its examples are there
    "forward_s",
    "backward_s",
    "optimizer_s",  # the gradient's norm, the update
    "collective_s",  # waits for other ranks, wherever in the step: see stopwatch.py
    "checkpoint_s",  # until the copy of a checkpoint is made, which the update must not change
)
# Of all ranks together, in a run: some 300 MB. A reader takes seconds for them.
MOST_RANK_ROWS = 1_000_000


def rank_rows_every(steps: int, every: int, world_size: int) -> int:
    """Steps between two rows of a rank, in a run of `steps` steps with tracking.every=`every`.

    Each reading up to MOST_RANK_ROWS, then each second, third, ...: alike on all ranks, so that rows of one step can be
    compared.
    """
    return every * max(1, math.ceil(steps * world_size / every / MOST_RANK_ROWS))


class StepTimes:
    """Of the steps since the last reading."""

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self.steps = 0
        self.step_s = 0.0  # of all of them
        self._longest_s = 0.0
        self._parts = [0.0] * len(PARTS)

    def add(self, step_s: float, parts: tuple[float, ...]) -> None:
        """Count a step. parts: its seconds, as PARTS has them."""
        self.steps += 1
        self.step_s += step_s
        self._longest_s = max(self._longest_s, step_s)
        self._parts = [before + part for before, part in zip(self._parts, parts, strict=True)]

    def read(self) -> dict[str, float]:
        """Means a step, `step_s_max` of the longest, and start again; {} where there was no step."""
        if not self.steps:
            return {}
        means = {name: part / self.steps for name, part in zip(PARTS, self._parts, strict=True)}
        found = {"step_s": self.step_s / self.steps, "step_s_max": self._longest_s} | means
        self._reset()
        return found
