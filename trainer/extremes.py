"""What lies between two readings: with tracking.every=100 a spike of one step would else be seen by chance. Pure.

Beside a metric X of EXTREMES a reading after several steps has

    X_min, X_max   smallest and largest finite value since the last reading, none where no value is finite
    X_bad          how many values are not finite (NaN, infinite), none where all are

so that a curve with them shows what it would with tracking.every=1, whatever that is.
"""

from __future__ import annotations

import math

EXTREMES = ("loss", "grad_norm")
BOUNDS = ("_min", "_max", "_bad")


def bounds_of(metric: str) -> tuple[str, str, str] | None:
    """Names of the metrics that bound this one; None where none do."""
    smallest, largest, bad = (metric + bound for bound in BOUNDS)
    return (smallest, largest, bad) if metric in EXTREMES else None


def is_bound(metric: str) -> bool:
    """Whether a metric belongs to the curve of another."""
    return any(metric == name + bound for name in EXTREMES for bound in BOUNDS)


class Extremes:
    """Of the steps since the last reading."""

    def __init__(self) -> None:
        self._steps: list[tuple[float | None, ...]] = []

    def add(self, values: tuple[float | None, ...]) -> None:
        """Count a step. values: as EXTREMES has them, None where one is unknown."""
        self._steps.append(values)

    def forget(self) -> None:
        """Start again: the weights of these steps are gone."""
        self._steps = []

    def read(self) -> dict[str, float]:
        """The metrics, and start again; {} where a reading has one step, and says all itself."""
        steps, self._steps = self._steps, []
        found: dict[str, float] = {}
        if len(steps) > 1:
            for name, values in zip(EXTREMES, zip(*steps, strict=True), strict=True):
                known = [value for value in values if value is not None]
                finite = [value for value in known if math.isfinite(value)]
                if finite:
                    found |= {f"{name}_min": min(finite), f"{name}_max": max(finite)}
                if len(finite) < len(known):
                    found[f"{name}_bad"] = float(len(known) - len(finite))
        return found
