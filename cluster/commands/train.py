"""`shardyard train`: a run in the foreground, on an embedded Ray or on a cluster that is already there."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from configs.errors import UsageError
from configs.schema import RunConfig


def train(arguments: Namespace) -> dict[str, Any]:
    """Train a recipe; the same name launched again goes on with the run.

    Raises:
        Interrupted: Ctrl-C; saved, resumable. RunFailed: names the first failure and the next command.
    """
    overrides = list(arguments.overrides)
    if arguments.parent is not None:
        overrides += _parent_overrides(arguments)
    elif arguments.branch:
        raise UsageError("--branch goes with --from: `shardyard train RECIPE --from RUN@STEP --branch name=...`.")
    return foreground(arguments, arguments.recipe, overrides)


def foreground(arguments: Namespace, recipe: str | Path | RunConfig, overrides: Sequence[str]) -> dict[str, Any]:
    """Launch, narrate and wait; returns how the run ended."""
    from cluster.launch import train as launch

    run = launch(recipe, overrides, address=arguments.address, json=arguments.json)
    return run.wait()


def _parent_overrides(arguments: Namespace) -> list[str]:
    from cluster.commands.inference import parent_folder
    from configs.load import load

    store = load(arguments.recipe, arguments.overrides).config.store
    state = "all" if arguments.branch else "weights"
    return [f"parent.checkpoint={parent_folder(arguments.parent, store)}", f"parent.state={state}"]
