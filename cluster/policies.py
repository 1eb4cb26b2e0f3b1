"""What to do about workers that die, raise or fall silent. Pure functions: facts in, a decision with its reason out."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from configs.schema import RecoveryConfig

# A crash that comes back at the same step comes from the run itself, not from the machine.
SAME_STEP_LIMIT = 3
# A port chosen on a node may be taken before it is used; that says nothing about the run, so it costs no restart.
PORT_RETRIES = 5
# A step may take this many times the usual one (the median of the latest) before its worker counts as hung.
SLOW_STEP_FACTOR = 3.0
# A worker counts as hung after this share of its limit, so that it is named within it.
NOTICED_AT = 0.9
# And its node as gone after this share of silence_s, in which not even the actor there has answered.
NODE_LOST_AT = 0.7
# Before an attempt's first steps no data may come for this many times silence_s: a cold store is slow.
FIRST_BATCH_FACTOR = 12.0
# A run grows no sooner after its start, or its last change of size, or failure.
GROW_AFTER_S = 30.0
# Each growth that brought no more workers doubles that, this often at most: half an hour.
MAX_GROW_DOUBLINGS = 6
# What a step consists of; other phases (evaluation, checkpoint, restore) have no usual length.
STEP_PHASES = ("data", "forward", "backward", "optimizer")

# What a healthy rank reports when another one has gone.
_PEER_ERRORS = (
    "connection closed by peer",
    "connection reset by peer",
    "connection refused",
    "broken pipe",
    "socket closed",
    "socket timeout",
    "recvbytes",
    "sendbytes",
    "gloo::",
    "[gloo]",
    "ncclremoteerror",
    "nccl communicator was aborted",
    "remote process exited or there was a network error",
    "timed out waiting",
    "wait timeout after",
)
# Files whose functions wait for other ranks.
_COLLECTIVES = ("distributed_c10d.py", "trainer/distributed.py", "deepspeed/comm/")
_PORT_ERRORS = ("eaddrinuse", "address already in use")

State = Literal["starting", "running", "finished", "stopped", "died", "raised", "silent"]
FAILED_STATES = ("died", "raised", "silent")


@dataclass(frozen=True)
class WorkerStatus:
    """One worker as its group sees it now.

    state: "starting" until it is told to train. "died": its process or node is gone. "raised": its training ended in an
    error. "silent": found hung (set by `find_silent`).
    log: path of its log. step: completed steps. phase: what it does (see trainer/progress.py).
    node_unanswered_s: since its node last answered a ping. unanswered_s: since the process that trains did.
    quiet_s: since training last showed a sign of life. stack: of the training thread, the innermost call first.
    failed_at: epoch seconds, by its own clock, when it raised. user_error: only the user can mend the cause.
    peer_failed: it raised only because another worker failed, which reports the cause.
    """

    rank: int
    node: str
    state: State
    log: str = ""
    phase: str = "starting"
    step: int = 0
    steps: int | None = None
    loss: float | None = None
    tokens_per_s: float | None = None
    node_unanswered_s: float = 0.0
    unanswered_s: float = 0.0
    quiet_s: float = 0.0
    stack: str | None = None
    error: str | None = None
    failed_at: float | None = None
    user_error: bool = False
    peer_failed: bool = False

    @property
    def failed(self) -> bool:
        """Whether it can train no more."""
        return self.state in FAILED_STATES


@dataclass(frozen=True)
class Failure:
    """The first cause of an attempt's end. detected_s: from the worker's last sign of life to its discovery.

    phase: what it was in when it failed; "collective" where it hung there, waiting for others. step: the last that it
    told of, which may be some steps old where it died. saved: of the newest checkpoint by then.
    """

    kind: State
    rank: int
    node: str
    phase: str
    step: int
    error: str
    log: str
    detected_s: float
    user_error: bool = False
    stack: str | None = None
    saved: int = 0

    def describe(self) -> str:
        """Who failed, where, in what and why, in a sentence."""
        what = f"{_VERBS[self.kind]} during {self.phase}, after step {self.step}"
        return f"Worker {self.rank} on {self.node} {what}: {self.error}"


_VERBS = {"died": "died", "raised": "failed", "silent": "hung"}


@dataclass(frozen=True)
class Restart:
    """Start a new attempt from the last good checkpoint."""

    reason: str


@dataclass(frozen=True)
class GiveUp:
    """End the run as failed."""

    reason: str


def next_action(failures: Sequence[Failure], recovery: RecoveryConfig) -> Restart | GiveUp:
    """What follows the latest of all failures of this launch, oldest first."""
    latest = failures[-1]
    if latest.user_error:
        return GiveUp("a restart would end in the same way")
    if _port_was_taken(latest):
        tries = sum(_port_was_taken(failure) for failure in failures)
        if tries <= PORT_RETRIES:
            return Restart(f"the port was taken in between; trying another ({tries} of {PORT_RETRIES})")
        return GiveUp(f"{tries} ports in a row were taken by other programs between being chosen and being used")
    counted = [failure for failure in failures if not _port_was_taken(failure)]
    recent = counted[-SAME_STEP_LIMIT:]
    if len(recent) == SAME_STEP_LIMIT and len({(each.kind, each.step, each.saved) for each in recent}) == 1:
        return GiveUp(f"it ended {SAME_STEP_LIMIT} times in a row after the same step, {latest.step}")
    if len(counted) > recovery.max_restarts:
        return GiveUp(f"recovery.max_restarts={recovery.max_restarts} restarts are used up")
    return Restart(f"restart {len(counted)} of {recovery.max_restarts}")


def next_size(size: int, room: int, trained_s: float, futile: int = 0) -> int:
    """How many workers a run of `size` should go on with, where there is room for `room`.

    Growing costs a save and a start, so it has to have trained for a while since the last one: for longer, where the
    last `futile` growths brought no more workers, since room was promised that was not to be had.
    """
    return size if trained_s < GROW_AFTER_S * 2 ** min(futile, MAX_GROW_DOUBLINGS) else max(size, room)


def first_failure(workers: Sequence[WorkerStatus]) -> Failure:
    """The cause among the failed workers: the others' broken connections are its consequences.

    A process that is gone comes before one that raised, the earlier error before the later one, a stopped process
    before one that only waits, and any of them before what may be a consequence. Where all hang and answer, it is one
    that does not wait in a collective; then the one with the fewest steps; then the one that fell silent first.
    """

    def order(worker: WorkerStatus) -> tuple[bool, int, float, bool, int, float]:
        kinds = {"died": 0, "raised": 1, "silent": 2}
        steps = worker.step if worker.state == "silent" else 0
        waits = in_collective(worker.stack)
        return is_consequence(worker), kinds[worker.state], worker.failed_at or 0.0, waits, steps, -worker.quiet_s

    worker = min((worker for worker in workers if worker.failed), key=order)
    place = innermost(worker.stack)
    return Failure(
        kind=worker.state,
        rank=worker.rank,
        node=worker.node,
        phase="collective" if worker.state == "silent" and in_collective(worker.stack) else worker.phase,
        step=worker.step,
        error=(worker.error or "no error was reported") + (f", in {place}" if place else ""),
        log=worker.log,
        detected_s=worker.quiet_s if worker.state == "silent" else worker.unanswered_s,
        user_error=worker.user_error,
        stack=worker.stack,
    )


def in_collective(stack: str | None) -> bool:
    """Whether a stack (see WorkerStatus) is of a thread that waits for other ranks."""
    return any(name in (stack or "") for name in _COLLECTIVES)


def innermost(stack: str | None) -> str | None:
    """Where a thread is: "function (file:line)" of its innermost call."""
    call = re.search(r'File "([^"]*)", line (\d+) in (.*)', stack or "")
    return f"{call[3]} ({call[1]}:{call[2]})" if call else None


def is_consequence(worker: WorkerStatus) -> bool:
    """Whether a worker may only suffer from another one's end: its peer has gone, or it answers but waits."""
    if worker.state == "silent":
        return worker.unanswered_s < worker.quiet_s / 2
    lost_peer = _mentions(worker.error, _PEER_ERRORS) and not worker.user_error
    return worker.state == "raised" and (worker.peer_failed or lost_peer)


def mark_silent(
    workers: Sequence[WorkerStatus], recovery: RecoveryConfig, median_step_s: Callable[[WorkerStatus], float | None]
) -> list[WorkerStatus]:
    """Workers, those that hang now as "silent". median_step_s: None for one that has not completed a step yet.

    A worker that answers may only wait for a slower one. So it counts as hung while nobody that has completed as few
    steps is at work. Who compiles, or waits for others, in its first step is not, once a first batch is overdue too.
    """
    reasons = [find_silent(worker, recovery, median_step_s(worker)) for worker in workers]
    running = [worker.state == "running" for worker in workers]
    fewest = min((worker.step for worker, runs in zip(workers, running, strict=True) if runs), default=0)
    at_work = any(
        runs and reason is None and worker.step == fewest and not _may_wait_for_data(worker, recovery)
        for worker, runs, reason in zip(workers, running, reasons, strict=True)
    )
    return [
        worker
        if reason is None or (at_work and not _unheard(worker, recovery))
        else replace(worker, state="silent", error=reason)
        for worker, reason in zip(workers, reasons, strict=True)
    ]


def find_silent(worker: WorkerStatus, recovery: RecoveryConfig, median_step_s: float | None) -> str | None:
    """Why a running worker counts as hung, None if it does not.

    A worker that answers no ping for `silence_s` is stopped or cut off. One that answers, but shows no sign of life in
    its training for that long, hangs too, unless its steps are known to be slow. Before its first step, and outside
    of steps, it may load, restore, compile, evaluate or wait for others for as long as a collective may take; but its
    first batch has to come within FIRST_BATCH_FACTOR times silence_s.
    """
    if worker.state != "running":
        return None
    if worker.node_unanswered_s > NODE_LOST_AT * recovery.silence_s:
        return f"its node has not answered for {worker.node_unanswered_s:.1f} s: it, or the network to it, is gone"
    setting = f"recovery.silence_s={recovery.silence_s:g}"
    if _unheard(worker, recovery):
        return f"its process has not answered for {worker.unanswered_s:.1f} s ({setting}): it is stopped, or starved"
    limit_s = max(recovery.silence_s, recovery.collective_timeout_s)
    if median_step_s is not None and worker.phase in STEP_PHASES:
        limit_s = max(recovery.silence_s, SLOW_STEP_FACTOR * median_step_s)
    elif worker.phase == "data" and worker.steps is not None:  # before they are known it opens the data set
        limit_s = min(limit_s, FIRST_BATCH_FACTOR * recovery.silence_s)
    if worker.quiet_s > NOTICED_AT * limit_s:
        return f"no progress for {worker.quiet_s:.1f} s, where at most {limit_s:.1f} s are expected"
    return None


def _unheard(worker: WorkerStatus, recovery: RecoveryConfig) -> bool:
    node_lost = worker.node_unanswered_s > NODE_LOST_AT * recovery.silence_s
    return node_lost or worker.unanswered_s > NOTICED_AT * recovery.silence_s


def _may_wait_for_data(worker: WorkerStatus, recovery: RecoveryConfig) -> bool:
    """Whether a worker that is in a step may do nothing but wait for one whose data does not come."""
    limit_s = FIRST_BATCH_FACTOR * recovery.silence_s
    return worker.phase in STEP_PHASES and worker.quiet_s > NOTICED_AT * limit_s


def _port_was_taken(failure: Failure) -> bool:
    return failure.kind == "raised" and failure.step == 0 and _mentions(failure.error, _PORT_ERRORS)


def _mentions(error: str | None, phrases: Sequence[str]) -> bool:
    text = (error or "").lower()
    return any(phrase in text for phrase in phrases)
