"""`python -m trainer run.yaml [key=value ...]`: one worker, alone or under torchrun; no Ray in the process."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from types import FrameType
from typing import TYPE_CHECKING

from configs.errors import Interrupted, Preempted, RunFailed, ShardyardError, UsageError
from trainer.progress import Progress

if TYPE_CHECKING:
    from configs.load import Resolved
    from configs.schema import RunConfig
    from trainer.distributed import World
    from trainer.lease import Lease
    from trainer.loop import Outcome
    from trainer.record import RunRecord

NARRATION_EVERY_S = 5.0
WATCH_EVERY_S = 1.0
# How a scheduler says that it needs the machine.
PREEMPTIONS = (signal.SIGTERM, signal.SIGUSR1)
# A scheduler may tell every process of a job to end, and torchrun its ranks once more: within this time that is one.
SAME_REQUEST_S = 1.0
# How torch says that another rank has gone.
LOST_PEER = ("connection", "peer", "timed out", "timeout")


def main(arguments: list[str] | None = None) -> int:
    """Parse arguments, train, return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m trainer", description=__doc__)
    parser.add_argument("recipe", help="a recipe file, or a name in configs/recipes")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values that replace the file's")
    parser.add_argument("-v", "--verbose", action="store_true", help="show the traceback of an error")
    parsed = parser.parse_args(arguments)
    command = shlex.join(["python", "-m", "trainer", parsed.recipe, *parsed.overrides])
    try:
        outcome, told_by = train(parsed.recipe, parsed.overrides)
        if outcome.outcome == "stopped":
            kind = Preempted if told_by in PREEMPTIONS else Interrupted
            raise kind(f"Stopped and saved after step {outcome.step}. Go on with the same command: {command}")
    except ShardyardError as error:
        from trainer.redact import Redactor

        redactor = Redactor(os.environ)  # libraries put what they were called with into their errors
        if parsed.verbose:
            print(redactor.text("".join(traceback.format_exception(error))), file=sys.stderr)
        print(redactor.text(f"trainer: {error}"), file=sys.stderr, flush=True)
        return error.exit_code
    except KeyboardInterrupt:  # while the imports run: later a signal is no exception
        print("trainer: Interrupted before training began.", file=sys.stderr, flush=True)
        return Interrupted.exit_code
    return 0


def train(recipe: str, overrides: list[str]) -> tuple[Outcome, int | None]:
    """Train the recipe in this process, as the rank that torchrun's environment names (alone: 0 of 1).

    Returns how it ended, and the number of the signal that asked for it, if one did.
    """
    from trainer.record import RunRecord
    from trainer.validate import load_recipe, validate

    rank, world_size = _number("RANK", 0), _number("WORLD_SIZE", 1)
    resolved = load_recipe(recipe, [*overrides, f"resources.workers={world_size}"])
    plan = validate(resolved, sees_inputs=rank == 0)
    config = resolved.config
    progress = Progress()
    with ExitStack() as stack:
        stop = stack.enter_context(stop_on_signal())
        attempt = 0
        if rank == 0:
            # Before the ranks meet, so that a refusal is told at once: torchrun then ends the others.
            record, lease = launched(resolved, stack)
            attempt = 0 if record.status() == "finished" else record.next_attempt()
            stack.enter_context(failures_recorded(record, rank, progress))
            if attempt:
                print(plan.headline(), flush=True)
                for warning in plan.warnings():
                    print(f"warning: {warning}", file=sys.stderr)
            stack.enter_context(watched(record, lease, progress, stop))
        world = join(rank, world_size, config)
        stack.callback(leave)
        attempt = agreed(attempt)
        from trainer.loop import Outcome
        from trainer.run_datasets import decide_together

        if attempt == 0:
            if rank == 0:
                print(f"Run '{config.name}' has finished already; there is nothing left to train.")
            return Outcome("finished", config.steps), None
        if rank > 0:
            record = RunRecord.open(config.store, config.name, rank=rank)
            record.attempt = attempt
            stack.callback(record.close)
            stack.enter_context(failures_recorded(record, rank, progress))
        progress.phase = "data"
        decide_together(record, plan, world)
        outcome = run(record, world, progress, stop)
    if rank == 0:
        print(result(record, outcome), flush=True)
    return outcome, stop.signal


def _number(name: str, alone: int) -> int:
    """An environment variable of torchrun; `alone` where it is not set."""
    text = os.environ.get(name, str(alone))
    if not text.isdecimal():
        raise UsageError(
            f"The environment variable {name} is {text!r}, and has to be a whole number, as torchrun sets it. Unset it "
            "to train in one process, or start with torchrun (torchrun --nproc-per-node 2 -m trainer RECIPE)."
        )
    return int(text)


def launched(resolved: Resolved, stack: ExitStack) -> tuple[RunRecord, Lease]:
    """The run's record, and its lease, held until `stack` is left."""
    from data_pipelines.storage import Store
    from trainer.record import RunRecord

    record = RunRecord.create(Store(resolved.config.store), resolved)
    lease = stack.enter_context(record.acquire_lease())
    stack.callback(record.close)
    return record, lease


def join(rank: int, world_size: int, config: RunConfig) -> World:
    """Meet the other ranks where torchrun says."""
    from trainer.distributed import world_of

    host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if world_size == 1:
        host, port = "127.0.0.1", "0"
    elif not host or not port:
        raise UsageError(
            f"WORLD_SIZE={world_size} is set, but MASTER_ADDR or MASTER_PORT is not, so the ranks cannot meet. Start "
            "them with torchrun (torchrun --nproc-per-node 2 -m trainer RECIPE), or unset WORLD_SIZE and RANK."
        )
    return world_of(config, rank, world_size, _number("LOCAL_RANK", 0), f"tcp://{host}:{port}")


def agreed(attempt: int) -> int:
    """Rank 0's number of the attempt, on every rank; the others give 0."""
    from trainer.distributed import all_sum

    return int(all_sum([float(attempt)])[0])


def leave() -> None:
    """Leave the other ranks."""
    from trainer.distributed import close_world

    close_world()


def run(record: RunRecord, world: World, progress: Progress, stop: threading.Event) -> Outcome:
    """Run the loop; rank 0 records how it ended."""
    from trainer.loop import train as run_loop
    from trainer.session import open_session

    with open_session(record, world, progress) as session:
        outcome = run_loop(session, stop)
    if world.rank == 0:
        record.event(outcome.outcome, step=outcome.step)
    return outcome


def result(record: RunRecord, outcome: Outcome) -> str:
    """How it ended, in a line."""
    rows, checkpoints = record.stitched(), record.checkpoints()
    names = ("loss", "validation/loss", "validation/bits_per_byte")
    found = [f"{name} {rows[-1][name]:.4g}" for name in names if rows and name in rows[-1]]
    where = f" Checkpoint: {checkpoints[-1]['path']}" if checkpoints else ""
    return f"Run '{record.name}' has {outcome.outcome} after step {outcome.step:,}: {', '.join(found)}.{where}"


@contextmanager
def failures_recorded(record: RunRecord, rank: int, progress: Progress) -> Iterator[None]:
    """Record what goes wrong in the block (every rank may be the one that knows the cause), and say it in a paragraph.

    Raises:
        RunFailed: for an error of no class of ours: in a user's file, or because another rank is gone.
    """
    try:
        yield
    except BaseException as error:
        text = str(error) if isinstance(error, ShardyardError) else f"{type(error).__name__}: {error}"
        where = {"rank": rank, "phase": progress.phase, "step": progress.step}
        record.event("failed", cause="raised", error=text, final=True, **where)
        if isinstance(error, ShardyardError) or not isinstance(error, Exception):
            raise
        frame = traceback.extract_tb(error.__traceback__)[-1]
        lost = any(word in text.lower() for word in LOST_PEER)
        hint = "If another rank ended first, its output tells the cause. " if lost else ""
        raise RunFailed(
            f"Rank {rank} failed during {progress.phase}, after step {progress.step}: {text} ({frame.filename}:"
            f"{frame.lineno}; -v shows the traceback). {hint}When the cause is mended, the same command goes on from "
            "the newest good checkpoint."
        ) from error


class Stop(threading.Event):
    """Set when training should save and stop. signal: the number of the signal that asked for it, if one did."""

    signal: int | None = None


@contextmanager
def stop_on_signal() -> Iterator[Stop]:
    """What the first signal sets, so that training saves and stops; the same one later ends at once."""
    stop = Stop()
    asked_at: dict[int, float] = {}

    def request_stop(number: int, _frame: FrameType | None) -> None:
        if number in asked_at:
            if time.monotonic() - asked_at[number] > SAME_REQUEST_S:
                signal.signal(number, signal.SIG_DFL)
                signal.raise_signal(number)
            return
        asked_at[number] = time.monotonic()
        stop.signal = stop.signal or number
        stop.set()
        print("Saving a checkpoint, then stopping; once more ends at once.", file=sys.stderr, flush=True)

    before = {number: signal.signal(number, request_stop) for number in (signal.SIGINT, *PREEMPTIONS)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def watched(record: RunRecord, lease: Lease, progress: Progress, stop: threading.Event) -> Iterator[None]:
    """Until the block ends: say where training is every few seconds, and hear `shardyard runs stop`."""
    ended = threading.Event()

    def watch() -> None:
        said, said_at = None, time.monotonic()
        while not ended.wait(WATCH_EVERY_S):
            if not stop.is_set() and (lease.lost or asked_to_stop(record)):
                why = "another launcher took the run over" if lease.lost else "asked by `shardyard runs stop`"
                print(f"Stopping ({why}): saving a checkpoint first.", file=sys.stderr, flush=True)
                stop.set()
            now = (progress.phase, progress.step)
            if now != said and time.monotonic() - said_at >= NARRATION_EVERY_S:
                print(where(progress), flush=True)
                said, said_at = now, time.monotonic()

    thread = threading.Thread(target=watch, name="watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def asked_to_stop(record: RunRecord) -> bool:
    """Whether `shardyard runs stop` was called; no, while the store does not answer."""
    with suppress(ShardyardError):
        return record.stop_requested() is not None
    return False


def where(progress: Progress) -> str:
    """Where training is, in a line."""
    if progress.loss is None:
        return f"{progress.phase} ..."
    speed = f"  {progress.tokens_per_s:,.0f} tokens/s" if progress.tokens_per_s else ""
    return f"step {progress.step:,}/{progress.steps:,}  loss {progress.loss:.4f}{speed}"


if __name__ == "__main__":
    sys.exit(main())
