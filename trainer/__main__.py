"""`python -m trainer run.yaml [key=value ...]`: one worker, alone or under torchrun; no Ray in the process."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import TYPE_CHECKING

from configs.errors import Interrupted, ShardyardError

if TYPE_CHECKING:
    from trainer.distributed import World
    from trainer.loop import Outcome
    from trainer.progress import Progress
    from trainer.record import RunRecord

NARRATION_EVERY_S = 5.0


def main(arguments: list[str] | None = None) -> int:
    """Parse arguments, train, return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m trainer", description=__doc__)
    parser.add_argument("recipe", help="a recipe file, or a name in configs/recipes")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values that replace the file's")
    parser.add_argument("-v", "--verbose", action="store_true", help="show the traceback of an error")
    parsed = parser.parse_args(arguments)
    try:
        train(parsed.recipe, parsed.overrides)
    except ShardyardError as error:
        if parsed.verbose:
            traceback.print_exception(error)
        print(f"trainer: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    return 0


def train(recipe: str, overrides: list[str]) -> None:
    """Train the recipe in this process, as the rank that torchrun's environment names (alone: 0 of 1).

    Raises:
        Interrupted: stopped by a signal; the run is saved, and the same command goes on with it.
    """
    from configs.load import load
    from data_pipelines.storage import Store
    from trainer.record import RunRecord
    from trainer.validate import validate

    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    resolved = load(recipe, [*overrides, f"resources.workers={world_size}"])
    config = resolved.config
    plan = validate(resolved)
    command = shlex.join([*_launcher(world_size), recipe, *overrides])
    with ExitStack() as stack:
        stop = stack.enter_context(stop_on_signal())
        attempt = _FINISHED
        if rank == 0:
            # Before the ranks meet, so that a refusal is told at once: torchrun then ends the others.
            record = RunRecord.create(Store(config.store), resolved)
            stack.enter_context(record.acquire_lease())
            stack.callback(record.close)
            if record.status() != "finished":
                attempt = record.next_attempt()
            for warning in plan.warnings():
                print(f"warning: {warning}", file=sys.stderr)
        with record_failure(record) if rank == 0 else nullcontext():
            world = _join(rank, world_size, config, stack)
            attempt = int(all_sum([float(attempt)])[0])
        if attempt == _FINISHED:
            if rank == 0:
                print(f"Run '{config.name}' has finished already; there is nothing left to train.")
            return
        if rank > 0:
            record = RunRecord.open(config.store, config.name, rank=rank)
            record.attempt = attempt
            stack.callback(record.close)
        progress = Progress()
        if rank == 0:
            print(_headline(plan), flush=True)
            stack.enter_context(narrated(progress))
        outcome = train_recorded(record, rank, world, progress, stop)
    if rank == 0:
        print(_result(record, outcome))
    if outcome.outcome == "stopped":
        raise Interrupted(f"Stopped and saved after step {outcome.step} of {config.steps}. Go on with: {command}")
@contextmanager
def stop_on_signal() -> Iterator[threading.Event]:
    """An event that the first SIGINT or SIGTERM sets, so that training saves and stops; the second ends at once."""
    stop = threading.Event()

    def request_stop(number: int, _frame: FrameType | None) -> None:
        stop.set()
        signal.signal(number, signal.SIG_DFL)
        print("Saving a checkpoint, then stopping; once more ends at once.", file=sys.stderr, flush=True)

    before = {number: signal.signal(number, request_stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def narrated(progress: Progress) -> Iterator[None]:
    """Print where training is, a line every few seconds, until the block ends."""
    ended = threading.Event()

    def narrate() -> None:
        last = None
        while not ended.wait(NARRATION_EVERY_S):
            now = (progress.phase, progress.step)
            if now != last and progress.loss is not None:
                speed = progress.tokens_per_s or 0
                print(f"step {progress.step}/{progress.steps}  loss {progress.loss:.4f}  {speed:,.0f} tokens/s", flush=True)
            elif now != last:
                print(f"{progress.phase} ...", flush=True)
            last = now

    thread = threading.Thread(target=narrate, name="narration", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


if __name__ == "__main__":
    sys.exit(main())
