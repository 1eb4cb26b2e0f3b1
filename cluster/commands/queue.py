"""`shardyard queue`: what waits at a target, and why."""

from __future__ import annotations

import time
from argparse import Namespace
from dataclasses import asdict
from typing import Any

from cluster.commands.output import age, say, table
from cluster.targets import Queued, open_target
from configs.errors import UsageError
from configs.targets import LocalTarget, load_target, load_targets, target_file


def queue(arguments: Namespace) -> dict[str, Any]:
    """Print the jobs of a target: those that run, then those that wait in the order of the queue."""
    name, settings = _chosen(arguments.on)
    if isinstance(settings, LocalTarget):
        raise UsageError("A run on this machine starts at once: it has no queue. Name another target with --on.")
    jobs = open_target(settings).queue()
    now = time.time()
    if not jobs:
        say(arguments, f"Nothing runs or waits at {name}.")
    else:
        table(
            arguments,
            ("", "RUN", "USER", "PRIORITY", "ASKS FOR", "STATE", "SINCE", "STARTS", "WHY"),
            [_row(job, now) for job in jobs],
        )
    return {"target": name, "jobs": [asdict(job) for job in jobs]}


def _chosen(name: str | None) -> tuple[str, Any]:
    """The target that was named, or the only one that there is."""
    if name is not None:
        return name, load_target(name)
    file = target_file()
    targets = {} if file is None else load_targets(file)
    remote = {name: settings for name, settings in targets.items() if not isinstance(settings, LocalTarget)}
    if len(remote) != 1:
        there = f"there are {', '.join(remote)}" if remote else "targets.yaml has none (docs/targets.md)"
        raise UsageError(f"Name the target whose queue you mean with --on: {there}.")
    return next(iter(remote.items()))


def _row(job: Queued, now: float) -> tuple[Any, ...]:
    starts = ""
    if job.state == "waiting":
        starts = "nobody knows" if job.may_start is None else f"in {age(max(0.0, job.may_start - now))}"
    since = "" if job.submitted_at is None else age(now - job.submitted_at)
    return (job.position or "", job.run, job.user, job.priority, job.asks, job.state, since, starts, job.why)
