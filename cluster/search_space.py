"""What a sweep varies: `key=value` arguments read as choices and ranges, and values drawn from them. Pure.

    optimizer.name=adamw,lion      one of these
    optimizer.lr=log:1e-4:1e-2     between these, evenly on a logarithmic scale
    model.dropout=lin:0:0.5        between these, evenly
    model.num_layers=int:2:8       a whole number from 2 to 8
    steps=1000                     neither: the same for all trials

None of it needs quotes in a shell. A value that holds a comma itself is written in quotes or brackets, as in YAML.
"""

from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from configs.errors import UsageError
from configs.yaml_text import parse, write_value

# How sweeps run their trials, and what they are judged by: the same for all, or there is nothing to compare.
NOT_VARIED = ("name", "store", "parent", "tracking", "resources", "evaluation", "checkpoint", "recovery")
_DIGITS = 4
_STEP_FACTOR = 1.25
_REDRAW_PROBABILITY = 0.25
_RANGE = re.compile(r"(lin|log|int):(.*)", re.DOTALL)
_FORMS = "write a,b,c for a choice, and lin:LOW:HIGH, log:LOW:HIGH or int:LOW:HIGH for a range"

Values = dict[str, Any]


@dataclass(frozen=True)
class Choice:
    """One of several values."""

    values: tuple[Any, ...]

    def draw(self, rng: random.Random) -> Any:
        """One of them, each as likely."""
        return rng.choice(self.values)

    def near(self, value: Any, rng: random.Random) -> Any:
        """A neighbour in the order in which they were written."""
        place = self.values.index(value) + rng.choice((-1, 1))
        return self.values[min(max(place, 0), len(self.values) - 1)]

    def ends(self) -> tuple[Any, ...]:
        """What has to be valid for all of it to be."""
        return self.values


@dataclass(frozen=True)
class Range:
    """A number from low to high, both included."""

    scale: Literal["lin", "log", "int"]
    low: float
    high: float

    def draw(self, rng: random.Random) -> float:
        """A number in it, rounded to four digits, so that it can be typed again."""
        if self.scale == "int":
            return rng.randint(int(self.low), int(self.high))
        if self.scale == "log":
            return self._within(math.exp(rng.uniform(math.log(self.low), math.log(self.high))))
        return self._within(rng.uniform(self.low, self.high))

    def near(self, value: float, rng: random.Random) -> float:
        """A number a quarter more, or less by the same factor; of whole numbers at least the next one."""
        up = rng.random() < 0.5
        moved = value * _STEP_FACTOR if up == (value >= 0) else value / _STEP_FACTOR
        if self.scale == "int":
            moved = max(round(moved), int(value) + 1) if up else min(round(moved), int(value) - 1)
            return int(min(max(moved, self.low), self.high))
        return self._within(moved)

    def ends(self) -> tuple[float, float]:
        """What has to be valid for all of it to be."""
        return self.low, self.high

    def _within(self, value: float) -> float:
        return min(max(float(f"{value:.{_DIGITS}g}"), self.low), self.high)


Space = dict[str, Choice | Range]


def split_space(arguments: Sequence[str]) -> tuple[list[str], Space]:
    """Arguments of a command as (those that are the same for all trials, those that vary).

    Raises:
        UsageError: a range that is empty or cannot be read, a choice of equal values, a key that is given twice, or
        that no sweep varies.
    """
    fixed: list[str] = []
    space: Space = {}
    seen: set[str] = set()
    for argument in arguments:
        key, _, text = argument.partition("=")
        key = key.strip()
        dimension = _dimension(argument, text.strip())
        if dimension is None:
            fixed.append(argument)
        elif key.partition(".")[0] in NOT_VARIED:
            raise UsageError(
                f"'{argument}': a sweep does not vary {key}: {', '.join(NOT_VARIED)} are the same for all trials."
            )
        else:
            space[key] = dimension
        if key in seen:
            raise UsageError(f"'{argument}': {key} is given twice. Give it once, with all of its values: {_FORMS}.")
        seen.add(key)
    return fixed, space


def grid(space: Space) -> list[Values]:
    """Every combination, the last key varying fastest. Raises UsageError for a range, which has no end of points."""
    ranges = [key for key, dimension in space.items() if isinstance(dimension, Range)]
    if ranges:
        raise UsageError(
            f"{ranges[0]} is a range, and a grid needs points: list them ({ranges[0]}=a,b,c), or use random."
        )
    combinations = itertools.product(*(dimension.ends() for dimension in space.values()))
    return [dict(zip(space, values, strict=True)) for values in combinations]


def draw(space: Space, seed: int, count: int) -> list[Values]:
    """`count` independent draws. The i-th depends on the seed and i alone, so that a longer list begins alike."""
    rngs = (random.Random(f"{seed}/{number}") for number in range(1, count + 1))
    return [{key: dimension.draw(rng) for key, dimension in space.items()} for rng in rngs]


def explore(space: Space, values: Mapping[str, Any], rng: random.Random) -> Values:
    """Values near others: each drawn anew with probability 1/4, moved a little otherwise.

    Jaderberg et al. 2017, Population Based Training of Neural Networks, appendix A.2.
    """
    return {
        key: dimension.draw(rng) if rng.random() < _REDRAW_PROBABILITY else dimension.near(values[key], rng)
        for key, dimension in space.items()
    }


def corners(space: Space) -> list[Values]:
    """Values that `explore` may come to at its extremes: all lowest ones, and each end of each key beside these."""
    first = {key: dimension.ends()[0] for key, dimension in space.items()}
    return [first, *({**first, key: end} for key, dimension in space.items() for end in dimension.ends()[1:])]


def overrides(values: Mapping[str, Any]) -> list[str]:
    """Values as arguments of `shardyard train`."""
    return [f"{key}={write_value(value)}" for key, value in values.items()]


def _dimension(argument: str, text: str) -> Choice | Range | None:
    ranged = _RANGE.fullmatch(text)
    if ranged is not None:
        return _range(argument, ranged[1], ranged[2])
    if re.match(r"(lin|log|int|uniform|loguniform|choice)\(", text) or re.fullmatch(r"[^'\"\[{]+(\|[^|]+)+", text):
        raise UsageError(f"'{argument}' is not understood: {_FORMS}.")
    if "," not in text:
        return None
    listed = parse(f"[{text}]")
    if listed.problems or not isinstance(listed.values, list) or text.endswith(","):
        raise UsageError(f"'{argument}' is not understood: {_FORMS}. A text with a comma in it is quoted: '\"a,b\"'.")
    if len(listed.values) == 1:
        return None  # one list, one mapping, or one quoted text
    if any(value in listed.values[:place] for place, value in enumerate(listed.values)):
        raise UsageError(f"'{argument}' lists a value twice. List each once.")
    return Choice(tuple(listed.values))


def _range(argument: str, scale: str, text: str) -> Range:
    bounds = [parse(part).values for part in text.split(":")]
    numbers = [bound for bound in bounds if isinstance(bound, int | float) and not isinstance(bound, bool)]
    if len(bounds) != 2 or len(numbers) != 2 or not all(math.isfinite(number) for number in numbers):
        raise UsageError(f"'{argument}' is not understood: {_FORMS}, where LOW and HIGH are numbers.")
    low, high = numbers
    if low >= high:
        raise UsageError(f"'{argument}' is empty: {low:g} is not less than {high:g}. Write the lower end first.")
    if scale == "log" and low <= 0:
        raise UsageError(
            f"'{argument}': a logarithmic range begins above 0, and {low:g} does not. Use lin:, or raise it."
        )
    if scale == "int" and not all(isinstance(number, int) for number in numbers):
        raise UsageError(f"'{argument}': an int: range lies between whole numbers. Use lin: for others.")
    if scale == "int":
        return Range("int", low, high)
    return Range("log" if scale == "log" else "lin", float(low), float(high))
