"""Where a run is sent, one file a kind of target; each has a class Target with the methods below.

A job is what a target queues: one launcher of one run, `shardyard train` on the run's resolved config, somewhere on the
target. What it does stands in the run's own folder, as for a run that was launched by hand.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Literal, Protocol

from configs.load import Resolved, dump
from configs.schema import Section
from configs.targets import TYPES

State = Literal["pending", "running", "finished", "failed", "stopped", "gone", "refused"]
ENDED: tuple[State, ...] = ("finished", "failed", "stopped", "gone", "refused")


@dataclass(frozen=True)
class Job:
    """A run to be sent. resolved: its config, whose store is seen from here and from the target."""

    resolved: Resolved

    @property
    def run(self) -> str:
        """The run's name."""
        return self.resolved.config.name

    @property
    def recipe(self) -> str:
        """The text of the recipe that the job trains."""
        return dump(self.resolved)


@dataclass(frozen=True)
class Status:
    """A job's state; "refused" is pending for a reason that does not go away.

    reason: why it is pending, or how it ended, in the target's words. exit_code: of the launcher.
    """

    state: State
    reason: str = ""
    exit_code: int | None = None


class Target(Protocol):
    """What can be asked of a target. Each method may raise Unreachable, and UsageError for what the target refuses."""

    def render(self, job: Job) -> str:
        """Exactly what `submit` hands over, as text."""

    def submit(self, job: Job) -> str:
        """Queue the job; its id."""

    def find(self, run: str, store: str) -> str | None:
        """The id of the run's job that is pending or running; None without one."""

    def status(self, job_id: str) -> Status:
        """How the job stands; "gone" where the target knows it no longer."""

    def why_pending(self, job_id: str) -> str:
        """Why it has not started, with the target's own reason and what can be done."""

    def logs(self, job_id: str) -> str:
        """What its launcher has printed so far."""

    def stop(self, job_id: str) -> None:
        """End the job; the launcher gets SIGTERM and saves, as far as the target leaves it time."""


def open_target(settings: Section) -> Target:
    """The target of these settings."""
    kind = next(name for name, schema in TYPES.items() if type(settings) is schema)
    target: Target = importlib.import_module(f"cluster.targets.{kind}").Target(settings)
    return target
