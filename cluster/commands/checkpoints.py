"""`shardyard ckpt ls | verify | prune`: the checkpoints of a run."""

from __future__ import annotations

import contextlib
import os
import time
from argparse import Namespace
from typing import Any

from cluster.commands.output import run_and_step, run_arguments, say, table
from configs.errors import Damaged, NotFound, ShardyardError, Unreachable, UsageError
from configs.schema import CheckpointConfig
from data_pipelines.storage import Store
from trainer.record import RunRecord
from trainer.record_rows import RowWriter

MIB = 2**20


def ls(arguments: Namespace) -> list[dict[str, Any]]:
    """One line a checkpoint, the oldest first; those that no manifest makes whole are told too."""
    from trainer.checkpoint import saved_steps

    checkpoints = _checkpoints(arguments.store, arguments.run)
    rows = [_described(checkpoints, step) for step in reversed(saved_steps(checkpoints))]
    if not rows:
        say(arguments, f"There is no checkpoint in {checkpoints.uri} yet. Train until checkpoint.every is reached.")
        return []
    header = ("STEP", "MIB", "WORKERS", "ZERO", "PRECISION", "EVALUATION")
    shown = [
        (
            row["step"],
            None if row["size_bytes"] is None else round(row["size_bytes"] / MIB, 1),
            row["world_size"],
            row["zero_stage"],
            row["precision"],
            ", ".join(f"{name} {value:.4g}" for name, value in row["evaluation"].items() if name in _SHOWN) or None,
        )
        for row in rows
    ]
    table(arguments, header, shown)
    for row in rows:
        if "error" in row:
            say(arguments, f"\nstep {row['step']:,}: {row['error']}")
    return rows


_SHOWN = ("loss", "accuracy", "bits_per_byte")


def verify(arguments: Namespace) -> list[dict[str, Any]]:
    """Read every byte of a checkpoint, or of all of a run, against its digest. What it finds is an event of the run.

    Raises:
        Damaged: one or more are; says which can be used.
    """
    from trainer.checkpoint import saved_steps

    name, step = run_and_step(arguments.run)
    checkpoints = _checkpoints(arguments.store, name)
    there = saved_steps(checkpoints)
    if step is not None and step not in there:
        shown = ", ".join(f"{each:,}" for each in there) or "none yet"
        raise NotFound(f"There is no checkpoint of step {step:,} in {checkpoints.uri}. There is: {shown}.")
    rows = []
    for each in there if step is None else [step]:
        damage = _damage(checkpoints, each)
        _note(RunRecord.open(arguments.store, name), each, damage)
        rows.append({"step": each, "damage": damage})
        say(arguments, f"step {each:,}: {'good' if not damage else ' '.join(damage)}")
    good = [row["step"] for row in rows if not row["damage"]]
    if len(good) < len(rows):
        way = f"Good ones: {', '.join(f'{each:,}' for each in good)}." if good else "None of them is good."
        resume = f" A resume takes the newest good one by itself: shardyard runs resume {_quoted(arguments, name)}"
        raise Damaged(
            f"{len(rows) - len(good)} of {len(rows)} are damaged or unfinished. {way}{resume if good else ''}"
        )
    return rows


def _note(record: RunRecord, step: int, damage: list[str]) -> None:
    """By a writer of its own, since the run's launcher may write meanwhile."""
    row = {"kind": "checkpoint_verified", "step": step, "damage": damage}
    writer = RowWriter(record.store, "events", record.attempt, f"verify-{os.getpid()}")
    writer.append({"time": time.time(), "attempt": record.attempt, **row})
    with contextlib.suppress(ShardyardError):  # whoever may only read the store may verify, too
        writer.close()


def prune(arguments: Namespace) -> dict[str, Any]:
    """Delete older checkpoints of a run that does not run: all but the newest good ones, and what the options keep.

    Raises:
        UsageError: the run is running; it has its own rule in `checkpoint`.
    """
    from trainer.checkpoint import Retention

    record = RunRecord.open(arguments.store, arguments.run)
    if record.status() == "running":
        raise UsageError(
            f"Run '{arguments.run}' is running, and keeps its checkpoints as its config's section `checkpoint` says. "
            f"Stop it first: shardyard runs stop {_quoted(arguments, arguments.run)}"
        )
    rule = record.config.checkpoint
    kept = CheckpointConfig(keep=arguments.keep, keep_every=arguments.every, keep_best=rule.keep_best)
    retention = Retention(record.store.child("checkpoints"), kept)
    steps = retention.going() if arguments.dry_run else retention.apply()
    what = "would go" if arguments.dry_run else "deleted"
    say(arguments, f"{len(steps)} {what}" + (f": {', '.join(f'{step:,}' for step in sorted(steps))}" if steps else ""))
    return {"deleted": [] if arguments.dry_run else sorted(steps), "would_go": sorted(steps)}


def _checkpoints(store: str, run: str) -> Store:
    return RunRecord.open(store, run).store.child("checkpoints")


def _quoted(arguments: Namespace, run: str) -> str:
    return run_arguments(run, arguments.store)


def _described(checkpoints: Store, step: int) -> dict[str, Any]:
    from trainer.checkpoint import CheckpointReader, folder_name

    row: dict[str, Any] = {"step": step, "path": checkpoints.child(folder_name(step)).path()}
    try:
        reader = CheckpointReader(checkpoints.child(folder_name(step)))
    except Unreachable:
        raise
    except ShardyardError as error:
        nothing = dict.fromkeys(("size_bytes", "world_size", "zero_stage", "precision"))
        return row | nothing | {"evaluation": {}, "error": str(error)}
    found = reader.manifest
    return row | {
        "size_bytes": reader.size_bytes,
        "world_size": found["world_size"],
        "zero_stage": found["zero_stage"],
        "precision": found.get("config", {}).get("precision"),
        "evaluation": found.get("evaluation", {}),
    }


def _damage(checkpoints: Store, step: int) -> list[str]:
    from trainer.checkpoint import CheckpointReader, folder_name

    try:
        return CheckpointReader(checkpoints.child(folder_name(step))).verify()
    except Unreachable:
        raise
    except ShardyardError as error:
        return [str(error)]
