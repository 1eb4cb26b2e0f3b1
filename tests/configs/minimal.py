"""The least that a run needs, for tests to change."""

from __future__ import annotations

from typing import Any


def minimal(**changes: Any) -> dict[str, Any]:
    """A valid mapping with only required keys, and ``changes`` to its top level."""
    return {
        "name": "small",
        "steps": 100,
        "task": {"name": "language_modeling", "seq_len": 8},
        "model": {"name": "gpt"},
        "data": {"name": "text"},
        "batch": {"global_batch_size": 8, "micro_batch_size": 2},
        "optimizer": {"lr": 1e-3},
    } | changes
