"""How commands speak: narration for a person, or JSON alone on stdout."""

from __future__ import annotations

import shlex
import sys
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

from configs.errors import UsageError

DEFAULT_STORE = "runs"


def run_arguments(run: str, store: str) -> str:
    """A run and its store as a command takes them, quoted for the shell."""
    return shlex.join([run, *([] if store == DEFAULT_STORE else ["--store", store])])


def run_and_step(source: str) -> tuple[str, int | None]:
    """What RUN or RUN@STEP names. Raises UsageError where no step stands after '@'."""
    name, at, step = source.partition("@")
    if at and not step.isdecimal():
        raise UsageError(f"'{source}' names no checkpoint: after '@' stands a step, as in {name}@100.")
    return name, int(step) if at else None


def say(arguments: Namespace, text: str = "") -> None:
    """Print a line for a person: on stdout, or on stderr where stdout belongs to --json."""
    print(text, file=sys.stderr if arguments.json else sys.stdout, flush=True)


def facts(arguments: Namespace, values: dict[str, Any]) -> None:
    """Print names and values in two columns."""
    width = max((len(name) for name in values), default=0)
    for name, value in values.items():
        say(arguments, f"{name:<{width}}  {pretty(value)}")


def table(arguments: Namespace, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print rows under a header, columns aligned, numbers to the right."""
    cells = [[pretty(value) for value in row] for row in rows]
    widths = [max(len(header[i]), *(len(row[i]) for row in cells), 0) for i in range(len(header))]
    right = [
        bool(rows) and all(isinstance(row[i], int | float) or row[i] is None for row in rows)
        for i in range(len(header))
    ]
    for row in [list(header), *cells]:
        say(
            arguments,
            "  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True)).rstrip(),
        )


def pretty(value: Any) -> str:
    """A value as a person writes it: grouped digits, four significant ones for a float, '-' for nothing."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"
    return str(value)


def age(seconds: float) -> str:
    """A length of time in its two largest units: '3d 4h', '12m 5s'."""
    for unit, size, lower, lower_size in (("d", 86400, "h", 3600), ("h", 3600, "m", 60), ("m", 60, "s", 1)):
        if seconds >= size:
            return f"{int(seconds // size)}{unit} {int(seconds % size // lower_size)}{lower}"
    return f"{seconds:.0f}s"
