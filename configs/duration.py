"""How often something is due: every so many steps, or every so much time ("90s", "10m", "1h30m")."""

from __future__ import annotations

import re
from dataclasses import dataclass

_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_PART = r"[0-9]+(?:\.[0-9]+)?[smhd]"


@dataclass(frozen=True)
class Interval:
    """Exactly one of the two is set."""

    steps: int | None = None
    seconds: float | None = None


def parse_interval(value: object) -> Interval:
    """Turn a number of steps, or text of number-unit pairs (s, m, h, d), into an :class:`Interval`.

    Raises ValueError with a message for users when ``value`` is neither, or is not positive.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        if value < 1:
            raise ValueError(f"{value} is too small; use at least 1 step, or a time such as 10m")
        return Interval(steps=value)
    if isinstance(value, str) and re.fullmatch(rf"(?:{_PART})+", value):
        seconds = sum(float(part[:-1]) * _SECONDS[part[-1]] for part in re.findall(_PART, value))
        if seconds <= 0:
            raise ValueError(f"{value!r} is no time at all; use a time such as 10m, or a number of steps")
        return Interval(seconds=seconds)
    if isinstance(value, str) and value.strip().isdecimal():
        raise ValueError(f"{value!r} is text; for steps write {int(value)} without quotes, for seconds {int(value)}s")
    raise ValueError(
        f"{value!r} is neither a number of steps nor a time; write for example 100, or a time with its unit: "
        "90s, 10m, 2h, 1h30m"
    )
