"""Where a run is sent, one file a kind of target; each has a class Target with the methods below.

A job is what a target queues: one launcher of one run, `shardyard train` on the run's resolved config, somewhere on the
target. What it does stands in the run's own folder, as for a run that was launched by hand.
"""

from __future__ import annotations

import getpass
import importlib
from dataclasses import dataclass, field
from typing import Literal, Protocol

from configs.load import Resolved, dump
from configs.schema import Section
from configs.targets import TYPES
from data_pipelines.storage import Store

State = Literal["pending", "running", "finished", "failed", "stopped", "gone", "refused"]
ENDED: tuple[State, ...] = ("finished", "failed", "stopped", "gone", "refused")


@dataclass(frozen=True)
class Job:
    """A run to be sent.

    resolved: its config, whose store is seen from here and from the target. user: whose it is. priority: higher goes
    first, where the queue is Shardyard's. expected_s: how long it will take, where that is known.
    """

    resolved: Resolved
    user: str = field(default_factory=getpass.getuser)
    priority: int = 0
    expected_s: float | None = None

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


@dataclass(frozen=True)
class Queued:
    """A job of a target, as `shardyard queue` shows it. None is what the target does not tell.

    state: waiting, running or leaving (it saves, to make room). position: among those that wait, from 1. asks: for
    what, in words. why: it waits, or leaves. submitted_at, may_start: epoch seconds. expected_s: what is left of it.
    """

    job: str
    run: str
    user: str
    state: str
    asks: str
    why: str = ""
    store: str | None = None
    position: int | None = None
    priority: int | None = None
    submitted_at: float | None = None
    may_start: float | None = None
    expected_s: float | None = None


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

    def queue(self) -> list[Queued]:
        """Shardyard's jobs that have not ended, of all users, those that run first, then as they will start."""

    def logs(self, job_id: str) -> str:
        """What its launcher has printed so far."""

    def stop(self, job_id: str) -> None:
        """End the job; the launcher gets SIGTERM and saves, as far as the target leaves it time."""


def same_store(one: str, other: str) -> bool:
    """Whether two spellings mean the same store."""
    return spelled(one) == spelled(other)


def spelled(store: str) -> str:
    """A store in the one spelling of several that stands for all."""
    return Store(store).uri.rstrip("/")


def open_target(settings: Section) -> Target:
    """The target of these settings."""
    kind = next(name for name, schema in TYPES.items() if type(settings) is schema)
    target: Target = importlib.import_module(f"cluster.targets.{kind}").Target(settings)
    return target
