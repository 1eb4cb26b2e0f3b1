"""`python -m trainer run.yaml [key=value ...]`: one worker, alone or under torchrun; no Ray in the process."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from configs.errors import Interrupted, ShardyardError


def main() -> int:
    """Parse arguments, train, return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m trainer", description=__doc__)
    parser.add_argument("recipe", help="a recipe file, or a name in configs/recipes")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values that replace the file's")
    parser.add_argument("-v", "--verbose", action="store_true", help="show the traceback of an error")
    arguments = parser.parse_args()
    try:
        train(arguments.recipe, arguments.overrides)
    except ShardyardError as error:
        if arguments.verbose:
            raise
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


def train(recipe: str, overrides: list[str]) -> None:
    """Train the recipe in this process, as the rank that torchrun's environment names (alone: 0 of 1).

    Raises:
        Interrupted: stopped by a signal; the run is saved and the same command resumes it.
    """
    from configs.load import load
    from trainer.distributed import all_sum, close_world, init_world
    from trainer.validate import validate

    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    resolved = load(recipe, [*overrides, f"resources.workers={world_size}"])
    config = resolved.config
    validate(resolved)
    with stop_on_signal() as stop:
        world = init_world(
            rank,
            world_size,
            int(os.environ.get("LOCAL_RANK", 0)),
            "env://" if world_size > 1 else None,
            use_gpu=config.resources.gpus_per_worker > 0,
            threads=config.resources.threads,
            timeout_s=config.recovery.collective_timeout_s,
        )
        try:
            with held_record(resolved, rank) as (record, attempt):
                # Rank 0 numbers the attempt; the others learn it, and that the record exists, from this sum.
                attempt = int(all_sum([float(attempt)])[0])
                outcome = train_in_record(record, resolved, attempt, world, stop)
        finally:
            close_world()
    if outcome.outcome == "stopped":
        command = " ".join(["python -m trainer", recipe, *overrides])
        raise Interrupted(f"Stopped and saved after step {outcome.step} of {config.steps}. Go on with: {command}")
