"""The life of a run: place, train, notice failures, restart, stop. A state machine over a group of workers.

    queued -> placing -> running -> finished
                 ^          |-----> stopping -> stopped
             restarting <---|-----> failed

It knows neither Ray nor processes: a WorkerGroup starts, watches and kills them, policies.py decides, the run's record
keeps what happened, and a clock tells the time. Tests drive it with fakes.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from statistics import median
from typing import Any, Literal, Protocol

from cluster.policies import (
    Failure,
    GiveUp,
    WorkerStatus,
    first_failure,
    is_consequence,
    mark_silent,
    next_action,
    next_size,
)
from configs.errors import RunFailed, ShardyardError
from configs.schema import RecoveryConfig

POLL_S = 0.1
CONTROL_POLL_S = 1.0
ROOM_POLL_S = 5.0
# Of which the median is a usual step.
RECENT_STEPS = 50
# How long to look for the cause when all that is known is that some workers lost a peer.
SETTLE_S = 1.0
# And longer, while a node has not answered for so long, though it is asked more often: it may be the cause.
MUTE_S = 0.6


class State(StrEnum):
    """Where a run's controller is."""

    QUEUED = "queued"
    PLACING = "placing"
    RUNNING = "running"
    RESTARTING = "restarting"
    STOPPING = "stopping"
    FINISHED = "finished"
    STOPPED = "stopped"
    FAILED = "failed"


class WorkerGroup(Protocol):
    """The worker processes of one attempt."""

    def prepare(self, attempt: int, *, grow: bool = False) -> dict[str, Any]:
        """Place as many workers as there is room for, and let them import; returns what to record.

        grow: also in places other than those of the attempt before. Raises Unreachable if too few fit.
        """

    def room(self) -> int:
        """How many workers could train now, at most as many as the run takes."""

    def start(self, cancelled: Callable[[], bool]) -> None:
        """Wait until all have imported and tell them to train; returns early when one failed, or when cancelled."""

    def poll(self, timeout_s: float) -> list[WorkerStatus]:
        """Every worker's status, by rank; waits up to timeout_s for one to end."""

    def request_stop(self) -> None:
        """Ask every worker to save a checkpoint and return. Does not wait."""

    def stacks(self) -> dict[int, str]:
        """Python stacks of the training threads by rank, of those that can be had within a second; also recorded."""

    def kill(self) -> None:
        """End every worker at once; when it returns their processes are gone."""


class Record(Protocol):
    """What the controller uses of trainer.record.RunRecord."""

    def next_attempt(self) -> int: ...  # noqa: D102
    def event(self, kind: str, **fields: Any) -> None: ...  # noqa: D102
    def stop_requested(self) -> str | None: ...  # noqa: D102
    def checkpoints(self) -> list[dict[str, Any]]: ...  # noqa: D102


class Clock(Protocol):
    """A monotonic clock."""

    def __call__(self) -> float: ...  # noqa: D102


@dataclass(frozen=True)
class Outcome:
    """How a run ended: after which completed step, and how many restarts it took."""

    outcome: Literal["finished", "stopped"]
    step: int
    restarts: int


class Controller:
    """Drives one run to its end. `run()` does it in the calling thread; other threads may request or force a stop."""

    def __init__(
        self,
        group: WorkerGroup,
        record: Record,
        recovery: RecoveryConfig,
        *,
        resume_command: str = "shardyard runs resume",
        lease_lost: Callable[[], bool] = lambda: False,
        notice: Callable[[str], None] = lambda _: None,
        clock: Clock = time.monotonic,
    ) -> None:
        self.state = State.QUEUED
        self.attempt = 0
        self.workers: list[WorkerStatus] = []
        self.failures: list[Failure] = []
        self._group = group
        self._record = record
        self._recovery = recovery
        self._resume_command = resume_command
        self._lease_lost = lease_lost
        self._notice = notice
        self._clock = clock
        self._stop_reason: str | None = None
        self._aborted = threading.Event()
        self._control_polled_at = clock()
        self._steps_seen: dict[int, tuple[int, float]] = {}
        self._steps_s: deque[float] = deque(maxlen=RECENT_STEPS)
        self._trained: set[int] = set()
        self._size = 0
        self._growing = False
        self._futile_growths = 0  # in a row
        self._running_since = self._room_polled_at = clock()

    @property
    def stopping(self) -> bool:
        """Whether a stop was asked for."""
        return self._stop_reason is not None

    def request_stop(self, reason: str) -> None:
        """Let the workers save a checkpoint and end. Any thread may call it; later reasons are ignored."""
        self._stop_reason = self._stop_reason or reason

    def abort(self) -> None:
        """End at once, without a checkpoint. Any thread may call it."""
        self._aborted.set()
        self.request_stop("ended at once")

    def prepare(self) -> None:
        """Queue and place the first attempt, so that the workers import while the caller does something else."""
        self.attempt = self._record.next_attempt()
        self._record.event("queued")
        self._place()

    def run(self) -> Outcome:
        """Train until the run has finished or stopped; `prepare` comes first.

        Raises:
            RunFailed: the run gave up; the message names the first cause, the last checkpoint, and the next command.
            Unreachable: its workers found no place. After any error call `fail`.
        """
        assert self.attempt > 0, "prepare() comes first"
        while True:
            failure = self._run_attempt()
            if failure is not None:
                self._recover(failure)
            elif self._growing and self._stop_reason is None and self.workers[0].state == "stopped":
                self._grow()
            else:
                return self._end()

    def fail(self, error: BaseException) -> None:
        """Leave no worker behind, and record an end that is not recorded yet."""
        with contextlib.suppress(Exception):  # the cluster itself may be gone, and `error` says what counts
            self._group.kill()
        if self.state is not State.FAILED:
            self.state = State.FAILED
            self._record.event("failed", error=str(error) or type(error).__name__, final=True)

    def _place(self, *, grow: bool = False) -> None:
        self.state = State.PLACING
        placed = self._group.prepare(self.attempt, grow=grow)
        self._record.event("placed", **placed)
        before, self._size = self._size, len(placed["workers"])
        self._futile_growths = 0 if self._size > before else self._futile_growths + grow
        if before not in (0, self._size):
            self._steps_s.clear()  # each does more, or less, of a step now
            self._record.event("resized", workers_before=before, workers=self._size)
            self._notice(f"{self._size} workers go on where {before} were: the same steps with the same examples.")

    def _run_attempt(self) -> Failure | None:
        """One attempt of placed workers, to its end; the failure that ended it, None if nothing did."""
        self._steps_seen, self._trained, self._growing = {}, set(), False
        self._group.start(lambda: self._stop_reason is not None)
        if self._stop_reason is not None:
            return None  # nothing was trained yet, so there is nothing to save
        self.state = State.RUNNING
        self._running_since = self._clock()
        while True:
            self.workers = workers = self._poll()
            if any(worker.failed for worker in workers) and (failure := self._settle(workers)) is not None:
                return failure
            if all(worker.state in ("finished", "stopped") for worker in workers):
                return None
            self._poll_control()
            self._poll_room()
            if self._aborted.is_set():
                return None
            if self._stop_reason is not None and self.state is State.RUNNING:
                self.state = State.STOPPING
                self._notice(f"Stopping ({self._stop_reason}): saving a checkpoint first.")
                self._group.request_stop()

    def _poll(self) -> list[WorkerStatus]:
        workers, now = self._group.poll(POLL_S), self._clock()
        for worker in workers:
            step, since = self._steps_seen.setdefault(worker.rank, (worker.step, now))
            if worker.step <= step:
                continue
            if worker.rank in self._trained:  # what came before an attempt's first step is not the step's
                self._steps_s.append((now - since) / (worker.step - step))
            if step > 0:  # the first change may be a checkpoint's, and no step
                self._trained.add(worker.rank)
            self._steps_seen[worker.rank] = (worker.step, now)
        return mark_silent(workers, self._recovery, self._median_step_s)

    def _median_step_s(self, worker: WorkerStatus) -> float | None:
        return median(self._steps_s) if self._steps_s and worker.rank in self._trained else None

    def _settle(self, workers: list[WorkerStatus]) -> Failure | None:
        """Give the cause a moment to show where only its consequences are known yet; None if all was well after all."""
        deadline = self._clock() + SETTLE_S
        while (
            any(worker.failed for worker in workers)
            and all(is_consequence(worker) for worker in workers if worker.failed)
            and any(worker.state == "running" for worker in workers)  # else there is nobody left to fail
            and (self._clock() < deadline or any(_is_mute(worker) for worker in workers))
        ):
            self.workers = workers = self._poll()
        failed = [worker for worker in workers if worker.failed]
        if any(worker.state == "silent" for worker in failed):
            stacks = self._group.stacks()
            failed = [replace(worker, stack=stacks.get(worker.rank)) for worker in failed]
        return first_failure(failed) if failed else None

    def _poll_control(self) -> None:
        if self._clock() - self._control_polled_at < CONTROL_POLL_S:
            return
        self._control_polled_at = self._clock()
        if self._lease_lost():
            raise RunFailed(
                "Another launcher took the run over, because this one was not heard of for too long. The workers here "
                "were ended; follow the other one."
            )
        with contextlib.suppress(ShardyardError):  # a store that does not answer is asked again, and training goes on
            reason = self._record.stop_requested()
            if reason is not None:
                self.request_stop(reason)

    def _poll_room(self) -> None:
        """Have the workers save and stop where more could go on."""
        now = self._clock()
        if self.state is not State.RUNNING or self._growing or now - self._room_polled_at < ROOM_POLL_S:
            return
        self._room_polled_at = now
        trained_s = now - self._running_since
        if next_size(self._size, self._group.room(), trained_s, self._futile_growths) > self._size:
            self._growing = True
            self._notice("There is room for more workers: saving a checkpoint first.")
            self._group.request_stop()

    def _grow(self) -> None:
        """Go on with more workers, from the checkpoint that the others have just saved."""
        self.state = State.RESTARTING
        self._group.kill()
        self.attempt = self._record.next_attempt()
        self._record.event("restarted", step=self._last_checkpoint()[0] or 0, reason="there is room for more workers")
        self._place(grow=True)

    def _end(self) -> Outcome:
        """All workers returned, or they were not needed."""
        finished = bool(self.workers) and all(worker.state == "finished" for worker in self.workers)
        self._group.kill()
        saved = self._last_checkpoint()[0] or 0
        if finished:
            step = self.workers[0].steps or saved
        elif self.workers and all(worker.state == "stopped" for worker in self.workers):
            step = max(saved, *(worker.step for worker in self.workers))  # what they told last may be some steps old
        else:
            step = saved  # ended at once: what came after is lost
        self.state = State.FINISHED if finished else State.STOPPED
        # Nobody asked here, so a signal did there.
        reason = {} if finished else {"reason": self._stop_reason or "a worker was told to end (SIGTERM)"}
        self._record.event(self.state.value, step=step, **reason)
        return Outcome("finished" if finished else "stopped", step, len(self.failures))

    def _recover(self, failure: Failure) -> None:
        """Kill what is left and go on from the last good checkpoint, or give up."""
        noticed_at = self._clock()
        if self._growing and failure.user_error:  # it would have trained on, had it not been asked to save and stop
            failure = replace(failure, user_error=False)
            self._futile_growths += 1
        self._group.kill()
        step, path = self._last_checkpoint()
        self.failures.append(replace(failure, saved=step or 0))
        action = next_action(self.failures, self._recovery)
        if self._stop_reason is not None:
            action = GiveUp("the run was stopping")
        self._record.event(
            "failed",
            rank=failure.rank,
            node=failure.node,
            cause=failure.kind,
            phase=failure.phase,
            step=failure.step,
            error=failure.error,
            log=failure.log,
            stack=failure.stack,
            summary=failure.describe(),
            detected_s=round(failure.detected_s, 3),
            killed_s=round(self._clock() - noticed_at, 3),
            checkpoint=path,
            final=isinstance(action, GiveUp),
            decision=action.reason,
        )
        if isinstance(action, GiveUp):
            self.state = State.FAILED
            raise RunFailed(self._obituary(failure, action, step))
        self.state = State.RESTARTING
        where = f"the checkpoint of step {step}" if step is not None else "the beginning"
        self._notice(f"{failure.describe().rstrip('.')}. Going on from {where}: {action.reason}.")
        self.attempt = self._record.next_attempt()
        self._record.event("restarted", step=step or 0, reason=action.reason)
        self._place()

    def _last_checkpoint(self) -> tuple[int | None, str | None]:
        checkpoints: Sequence[dict[str, Any]] = self._record.checkpoints()
        return (checkpoints[-1]["step"], str(checkpoints[-1]["path"])) if checkpoints else (None, None)

    def _obituary(self, failure: Failure, action: GiveUp, step: int | None) -> str:
        saved = f"The last good checkpoint is of step {step}." if step is not None else "There is no checkpoint yet."
        return (
            f"{failure.describe().rstrip('.')}. Given up, since {action.reason}. {saved} Log: {failure.log}. When the "
            f"cause is mended, go on with: {self._resume_command}"
        )


def _is_mute(worker: WorkerStatus) -> bool:
    """Whether a worker's node has left pings unanswered, but does not count as lost yet."""
    return worker.state == "running" and worker.node_unanswered_s > MUTE_S
