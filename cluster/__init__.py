"""Many processes on many machines: the only package that imports ray or mlflow, and only when they are needed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cluster.launch import Run, train

__all__ = ["Run", "train"]


def __getattr__(name: str) -> Any:
    """`from cluster import train` imports the launcher when it is asked for, so that `--help` stays instant."""
    if name in __all__:
        from cluster import launch

        return getattr(launch, name)
    raise AttributeError(f"module 'cluster' has no attribute '{name}'")
