"""The queue of a Ray cluster: who of those that wait there may start, by cluster/scheduling.py.

It keeps nothing that could be lost. Each job's launcher is on the cluster from its submission on, and reports here
every second what it asks for and whether it has its places; a queue that is killed and comes back knows them all again
after some seconds. It comes with the first launcher and goes with the last.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from cluster.scheduling import Free, Placed, Request, allowance, asks, decide, fit, forecast, take
from configs.errors import UsageError

State = Literal["waiting", "admitted", "leaving"]
Places = Mapping[str, Mapping[str, int]]
"""Workers by node, by placement group's name."""

SILENT_S = 15.0
# How long a queue that was killed listens before it lets anybody start.
LISTEN_S = 5.0
# How long a queue stays that nobody needs.
IDLE_S = 30.0


@dataclass(frozen=True)
class Report:
    """What a launcher says.

    request: its expected_s is what is left now. group: name of its placement group. is_new: nobody has answered it yet.
    turn: how often it has been in the queue. since: epoch seconds at which it was let in, this time.
    """

    request: Request
    state: State
    group: str
    is_new: bool = True
    turn: int = 0
    since: float = 0.0


@dataclass(frozen=True)
class Reply:
    """What a launcher is to do. why: the reason, for a user."""

    verdict: Literal["wait", "start", "leave", "refused"]
    why: str = ""


@dataclass(frozen=True)
class Cluster:
    """What all nodes that answer have, and what nobody holds of it, by node; and the places of all groups."""

    nodes: Free
    free: Free
    places: Places


@dataclass
class _Entry:
    report: Report
    heard_at: float
    state: State
    places: dict[str, int]  # where the queue takes its workers to be, until they are there
    why: str = "it has just come"


class JobQueue:
    """The queue, without Ray around it. `report` is called by launchers, `tick` a few times a second.

    cluster: its state now. quota: workers by user. restarted: launchers may have their places already.
    """

    def __init__(
        self,
        cluster: Callable[[], Cluster],
        quota: Callable[[], Mapping[str, int]],
        *,
        restarted: bool = False,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._cluster = cluster
        self._read_quota = quota
        self._clock = clock
        self._lock = threading.Lock()
        self._entries: dict[str, _Entry] = {}
        self._quota: Mapping[str, int] = {}
        self._problem = ""
        self._starts: dict[str, float] = {}
        self._needed_at = clock()
        self._listens_until = clock() + (LISTEN_S if restarted else 0.0)

    @property
    def idle(self) -> bool:
        """Whether nobody has needed it for a while."""
        return self._clock() > self._needed_at + IDLE_S

    def report(self, report: Report) -> Reply:
        """Hear a launcher, and tell it what to do."""
        with self._lock:
            entry = self._entries.get(report.request.job)
            if entry is None:
                never = self._never(report.request) if report.is_new else ""
                if never:
                    return Reply("refused", never)
                entry = _Entry(report, self._clock(), report.state, {})
            elif report.turn > entry.report.turn:
                entry = replace(entry, state=report.state, why="it waits again")
            elif report.state == "waiting" and entry.state == "leaving":  # before it heard that it may start
                entry.state = "waiting"
            entry.report, entry.heard_at = report, self._clock()
            self._entries[report.request.job] = entry
            self._needed_at = self._clock()
            if report.state == "waiting":
                return Reply("start") if entry.state == "admitted" else Reply("wait", entry.why)
            return Reply("leave", entry.why) if entry.state == "leaving" else Reply("start")

    def leave(self, job: str) -> None:
        """Forget a job that has ended."""
        with self._lock:
            self._entries.pop(job, None)

    def tick(self) -> None:
        """Decide anew."""
        cluster = self._cluster()
        try:
            quota, self._problem = self._read_quota(), ""
        except UsageError as error:
            quota, self._problem = self._quota, str(error)  # the one before, until it is mended
        with self._lock:
            self._quota, now = quota, self._clock()
            silent = [job for job, entry in self._entries.items() if entry.heard_at < now - SILENT_S]
            for job in silent:
                del self._entries[job]
            if now < self._listens_until:
                for entry in self._entries.values():
                    entry.why = "the queue was restarted, and listens first who has places already"
                return
            placed, free = self._placed(cluster, now)
            waiting = [entry.report.request for entry in self._entries.values() if entry.state == "waiting"]
            decisions = decide(waiting, placed, free, quota, now)
            for job, places in decisions.start.items():
                self._entries[job].state, self._entries[job].places = "admitted", places
                self._entries[job].why = ""
            for job, sake in decisions.preempt.items():
                other = self._entries[sake].report.request
                self._entries[job].state = "leaving"
                self._entries[job].why = f"it makes room for {sake}, whose priority is {other.priority}"
            for job, why in decisions.why.items():
                self._entries[job].why = why
            self._starts = forecast(waiting, placed, free, quota, now)

    def table(self) -> dict[str, Any]:
        """All that is in the queue, in order, as plain values: what `shardyard queue` shows."""
        with self._lock:
            entries = sorted(
                self._entries.values(), key=lambda each: (each.state == "waiting", each.report.request.rank)
            )
            waiting = [entry.report.request.job for entry in entries if entry.state == "waiting"]
            rows = []
            for entry in entries:
                request = entry.report.request
                waits = entry.state == "waiting"
                start = self._starts.get(request.job) if waits else None
                rows.append(
                    {
                        "job": request.job,
                        "run": entry.report.group.rpartition("/")[2],
                        "store": entry.report.group.rpartition("/")[0],
                        "user": request.user,
                        "state": {"admitted": "running"}.get(entry.state, entry.state),
                        "position": waiting.index(request.job) + 1 if waits else None,
                        "priority": request.priority,
                        "asks": asks(request),
                        "submitted_at": request.submitted_at,
                        "why": entry.why,
                        "may_start": start,
                        "expected_s": request.expected_s,
                    }
                )
            return {"jobs": rows, "problem": self._problem}

    def _never(self, request: Request) -> str:
        """Why it will not start, however long it waits."""
        most = allowance(request.user, self._read_quota_or_last())
        if request.most > most:
            return (
                f"It asks for {request.most} workers, and the quota of {request.user} is {most:g}. Lower "
                "resources.workers, or ask who keeps the cluster for more (quota.yaml on its head)."
            )
        if fit(request, self._cluster().nodes) is None:
            return (
                f"It asks for {asks(request)}, which is more than the whole cluster has. Lower resources.workers, "
                "resources.threads or resources.gpus_per_worker."
            )
        return ""

    def _read_quota_or_last(self) -> Mapping[str, int]:
        try:
            return self._read_quota()
        except UsageError:
            return self._quota

    def _placed(self, cluster: Cluster, now: float) -> tuple[list[Placed], Free]:
        """Jobs that have their places, or will within seconds, and what is free besides."""
        placed, free = [], cluster.free
        for entry in self._entries.values():
            if entry.state == "waiting":
                continue
            request, held = entry.report.request, cluster.places.get(entry.report.group)
            if held is None:
                # Ray may have put another there meanwhile, whose places it then takes.
                chosen = {node: free[node] for node in entry.places if node in free}
                held = fit(request, chosen) or fit(request, free) or {}
                free = take(free, request.worker, held)
            since = entry.report.since if entry.report.state != "waiting" else now
            placed.append(Placed(request, held, since, leaving=entry.state == "leaving", told_at=now))
        return placed, free
