"""What is wrong with a configuration: problems, each with its place, and the error that shows them all at once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from configs.errors import UsageError


@dataclass(frozen=True)
class Problem:
    """One fault. ``where`` is "run.yaml:14", "command line" or "default"; ``key`` is dotted, "" for the whole file."""

    where: str
    key: str
    message: str

    def __str__(self) -> str:
        return f"{self.where} {self.key}: {self.message}" if self.key else f"{self.where}: {self.message}"


class ConfigError(UsageError):
    """A configuration that is refused; ``problems`` holds everything that is wrong with it.

    ``values`` and ``origins`` are what was read, where it was read that far: enough to look for more.
    """

    def __init__(
        self,
        problems: Iterable[Problem],
        values: Mapping[str, Any] | None = None,
        origins: Mapping[str, str] | None = None,
    ) -> None:
        self.problems = tuple(sorted(dict.fromkeys(problems), key=_place))
        self.values = values or {}
        self.origins = origins or {}
        super().__init__("\n".join(str(problem) for problem in self.problems))


def where(key: str, origins: Mapping[str, str], fallback: str) -> str:
    """The place to look at for ``key``: its own, else that of something below it, else that of what holds it."""
    while key:
        if key in origins:
            return origins[key]
        below = (origin for other, origin in origins.items() if other.startswith(key + ".") and origin != "default")
        found = next(below, None)
        if found is not None:
            return found
        key = key.rpartition("[" if key.endswith("]") else ".")[0]
    return fallback


def _place(problem: Problem) -> tuple[bool, str, int, str]:
    """Files first, by line; then the command line."""
    file, _, line = problem.where.rpartition(":")
    return (not line.isdigit() or not file, file, int(line) if file and line.isdigit() else 0, problem.key)
