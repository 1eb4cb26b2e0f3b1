"""Starting a run from another's checkpoint: what must be the same, and what may change."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from configs.errors import UsageError
from configs.schema import RunConfig, flatten

# Sections that give the weights their shape; a branch also keeps what gives its state a meaning.
SAME_FOR_WEIGHTS = ("model",)
SAME_FOR_ALL = ("model", "task", "data", "seed", "optimizer.name")


def check_parent(config: RunConfig, parent: Mapping[str, Any], state: Literal["weights", "all"]) -> None:
    """Refuse a parent whose config (a RunConfig as plain values) differs where it must not.

    Raises:
        UsageError: names the keys that differ, with both values, and says which may change.
    """
    same = SAME_FOR_WEIGHTS if state == "weights" else SAME_FOR_ALL
    mine, theirs = flatten(config.model_dump(mode="json")), flatten(dict(parent))
    differing = [
        f"{key} is {mine.get(key, 'unset')}, the parent's {theirs.get(key, 'unset')}"
        for key in sorted({*mine, *theirs})
        if _within(key, same) and mine.get(key) != theirs.get(key)
    ]
    if differing:
        what = "its weights" if state == "weights" else "its whole state"
        raise UsageError(
            f"The run '{config.name}' cannot start from {what}: {'; '.join(differing)}. These must stay the same: "
            f"{', '.join(same)}; every other key may change. Set them as the parent has them"
            + ("." if state == "weights" else ", or take the weights alone (without --branch).")
        )


def _within(key: str, sections: tuple[str, ...]) -> bool:
    return any(key == section or key.startswith(section + ".") for section in sections)
