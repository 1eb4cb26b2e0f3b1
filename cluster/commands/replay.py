"""`shardyard replay RUN --step N`: the step once more, by processes of its own on this machine; or its data alone."""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import sys
import tempfile
import traceback
from argparse import Namespace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from cluster.commands.output import pretty, run_arguments, say, table
from cluster.zygote import die_with
from configs import errors
from configs.errors import RunFailed, ShardyardError
from trainer.record import RunRecord
from trainer.replay import Target, find_target, replay_rank

_COMPARED = ("loss", "grad_norm")
_SHOWN_CHARACTERS = 60


class Differs(RunFailed):
    """The step came out otherwise than the record has it. replay: what the command would have given."""

    def __init__(self, text: str, replay: dict[str, Any]) -> None:
        super().__init__(text)
        self.replay = replay


def replay(arguments: Namespace) -> dict[str, Any]:
    """Re-run a step, compare it with the record bit by bit, and list its examples by their loss."""
    from trainer import checkpoint

    record = RunRecord.open(arguments.store, arguments.run)
    if arguments.data_only:
        return _data_only(arguments, record)
    target = find_target(record, arguments.step)
    config = record.config
    found = checkpoint.newest(
        record.store.child("checkpoints"), lambda text: print(text, file=sys.stderr), before=target.step
    )
    checkpoint_step = None if found is None else found[0]
    world_size = arguments.workers or target.world_size
    origin = "the beginning" if checkpoint_step is None else f"the checkpoint of step {checkpoint_step:,}"
    say(arguments, f"Step {target.step:,} of attempt {target.attempt}, with {world_size} worker(s), from {origin}.")
    for doubt in _doubts(record, target, world_size, checkpoint_step or 0):
        say(arguments, f"The bits may differ: {doubt}.")

    made = _in_processes(
        world_size, (arguments.store, arguments.run, target, checkpoint_step), config.resources.threads
    )
    recorded = {"loss": target.loss, "grad_norm": target.grad_norm}
    same = all(_same(made[name], recorded[name]) for name in _COMPARED)
    result = {"run": record.name, "step": target.step, "attempt": target.attempt, "world_size": world_size}
    result |= {"from_step": made["from_step"], "bit_equal": same, "recorded": recorded}
    result |= {"replayed": {name: made[name] for name in _COMPARED}, "examples": made["examples"]}
    steps = target.step - made["from_step"]
    say(arguments, f"{steps:,} step(s) were re-run, {steps - 1:,} of them to rebuild the weights.\n")
    header = ("", "RECORDED", "REPLAYED", "SAME BITS")
    rows = [
        (name, _exactly(recorded[name]), _exactly(made[name]), _same(made[name], recorded[name])) for name in _COMPARED
    ]
    table(arguments, header, rows)
    say(arguments)
    shown = [
        (
            each["sample_id"],
            pretty(each["loss"]),
            each["items"],
            ", ".join(each["documents"])[:_SHOWN_CHARACTERS],
            each["preview"],
        )
        for each in made["examples"][: arguments.top]
    ]
    table(arguments, ("EXAMPLE", "LOSS", "ITEMS", "FROM", "WHAT"), shown)
    if not same:
        raise Differs(
            f"Step {target.step} of run '{record.name}' is not what its record says. Either the record, the data, "
            "the code or the machine (processor, versions, threads) has changed since, or a worker computed wrongly: "
            f"replay a step next to it (shardyard replay {run_arguments(arguments.run, arguments.store)} --step "
            f"{max(target.step - 1, 1)}).",
            result,
        )
    return result


def _data_only(arguments: Namespace, record: RunRecord) -> dict[str, Any]:
    """List what the step took, as it is stored."""
    from trainer.step_examples import step_examples

    found = step_examples(record, arguments.step, arguments.top)
    say(arguments, f"Step {found['step']:,} took {found['total']:,} example(s).\n")
    rows = [
        (each["sample_id"], each["dataset"], each["file"], ", ".join(map(str, each["rows"][:4])), _what(each))
        for each in found["examples"]
    ]
    table(arguments, ("EXAMPLE", "DATA SET", "FILE", "ROWS", "WHAT"), rows)
    return {"run": record.name} | found


def _what(example: dict[str, Any]) -> str:
    """An example in a line."""
    shown = []
    for column, value in example["values"].items():
        if isinstance(value, dict):
            value = " ".join(value["text"].split()) if "text" in value else value.get("shape", value.get("length"))
        shown.append(f"{column} {value}"[:_SHOWN_CHARACTERS])
    return ", ".join(shown)[:_SHOWN_CHARACTERS]


def _doubts(record: RunRecord, target: Target, world_size: int, from_step: int) -> list[str]:
    """Why a replay may not give the record's bits although nothing is wrong. In exact mode there is no such reason."""
    if record.config.determinism == "exact":
        return []
    doubts = []
    if world_size != target.world_size:
        doubts.append(f"the step was run by {target.world_size} worker(s)")
    started = [event for event in record.events() if event["kind"] == "started"]
    start = next(event["step"] for event in started if event["attempt"] == target.attempt)
    if from_step < start and {event["world_size"] for event in started} != {world_size}:
        doubts.append(f"the steps up to {start:,} were run by an earlier attempt, with other numbers of workers")
    return doubts


def _same(one: float | None, other: float | None) -> bool:
    """Equal in every bit, or both no number, or both unknown."""
    return one == other or (one is not None and other is not None and math.isnan(one) and math.isnan(other))


def _exactly(value: float | None) -> str:
    return "-" if value is None else repr(value)


# --- the processes


def _in_processes(world_size: int, arguments: tuple[Any, ...], threads: int) -> dict[str, Any]:
    """What rank 0 of so many new processes gives; none is left when this returns, or when this process dies.

    Raises ShardyardErrors: what any of them raised first.
    """
    context = multiprocessing.get_context("spawn")
    # Before torch is imported there: it reads thread counts once. They meet at a file and talk over loopback.
    environment = {"OMP_NUM_THREADS": str(threads), "GLOO_SOCKET_IFNAME": "lo" if sys.platform == "linux" else "lo0"}
    with tempfile.TemporaryDirectory(prefix="shardyard-replay-") as folder:
        workers = []
        try:
            for rank in range(world_size):
                receiver, sender = context.Pipe(duplex=False)
                meeting_point = f"file://{folder}/meeting-point"
                given = (sender, environment, rank, world_size, meeting_point, arguments)
                process = context.Process(target=_work, args=given, daemon=True)
                process.start()
                sender.close()
                workers.append((process, receiver))
            return _collected([receiver for _, receiver in workers])
        finally:
            for process, receiver in workers:
                receiver.close()
                process.kill()
                process.join()


def _collected(receivers: list[Connection]) -> dict[str, Any]:
    results: dict[int, dict[str, Any]] = {}
    while len(results) < len(receivers):
        for receiver in wait([each for rank, each in enumerate(receivers) if rank not in results]):
            assert isinstance(receiver, Connection)
            rank = receivers.index(receiver)
            try:
                results[rank] = receiver.recv()
            except EOFError:
                raise RunFailed(
                    f"Rank {rank} of the replay died. The system may have killed it for its memory: give it fewer "
                    "--workers, or a larger machine."
                ) from None
            if "error" in results[rank]:
                raise getattr(errors, results[rank]["kind"], RunFailed)(results[rank]["error"])
    return results[0]


def _work(
    sender: Connection,
    environment: dict[str, str],
    rank: int,
    world_size: int,
    meeting_point: str,
    arguments: tuple[Any, ...],
) -> None:
    die_with()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, who ends us
    os.environ.update(environment)
    try:
        result = replay_rank(rank, world_size, meeting_point, *arguments)
    except ShardyardError as error:
        result = {"error": str(error), "kind": type(error).__name__}
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(frame.filename).name}:{frame.lineno}"
        result = {"error": f"Rank {rank} failed: {type(error).__name__}: {error} ({where}).", "kind": "RunFailed"}
    sender.send(result)
    sender.close()
    os._exit(0)  # nothing of torch's or DeepSpeed's is worth tidying up
