"""Which waiting jobs start, which running ones make room, and why the others wait. Pure: it knows its arguments alone.

    gangs        all of a job's workers or none, so that two jobs never hold half of what both need
    order        by priority, then by the time of submission
    quota        a user's workers at a time; who is over it waits, and holds nobody up
    preemption   of jobs of a lower priority, if that makes room: they save, and wait again in their old place
    back-fill    a job further back starts if the first that waits for room would not start later for it
                 (EASY: Lifka, "The ANL/IBM SP scheduling system", 1995)

A worker is placed on one node, and the workers of a job are alike, so a job fits where the nodes together have room for
as many workers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

Amounts = Mapping[str, float]
"""How much of each of Ray's resources: CPU, GPU, ..."""
Free = dict[str, Amounts]
"""By node."""

_EPSILON = 1e-6  # Ray counts in ten-thousandths


@dataclass(frozen=True)
class Request:
    """A job, and what it asks for.

    job: its id. worker: what each worker takes. fewest, most: workers; they differ where a run is elastic.
    submitted_at: epoch seconds. expected_s: what is left of it, in seconds; None where nobody knows.
    """

    job: str
    user: str
    worker: Amounts
    fewest: int
    most: int
    priority: int = 0
    submitted_at: float = 0.0
    expected_s: float | None = None

    @property
    def rank(self) -> tuple[int, float, str]:
        """Its place among those that wait: less is sooner."""
        return (-self.priority, self.submitted_at, self.job)


@dataclass(frozen=True)
class Placed:
    """A job that has its places.

    held: workers by node. leaving: it was asked to make room, and saves. told_at: when its expected_s was known; None
    is at its start.
    """

    request: Request
    held: Mapping[str, int]
    started_at: float
    leaving: bool = False
    told_at: float | None = None

    @property
    def ends_at(self) -> float:
        """When its places come free, as far as anybody knows; infinity where nobody does."""
        if self.leaving:
            return -math.inf  # as good as now
        told_at = self.started_at if self.told_at is None else self.told_at
        return math.inf if self.request.expected_s is None else told_at + self.request.expected_s


@dataclass
class Decisions:
    """start: workers by node of each job that may start. preempt: the job for whose sake, by the job that makes room.

    why: the reason, by job that waits.
    """

    start: dict[str, dict[str, int]] = field(default_factory=dict)
    preempt: dict[str, str] = field(default_factory=dict)
    why: dict[str, str] = field(default_factory=dict)


def decide(
    waiting: Iterable[Request], placed: Sequence[Placed], free: Free, quota: Mapping[str, int], now: float
) -> Decisions:
    """What happens now.

    free: what no job holds, by node that answers. quota: workers by user; "default" is everybody else's, without it
    there is no limit.
    """
    decisions, free = Decisions(), dict(free)
    placed, head, head_starts = list(placed), None, math.inf
    used: dict[str, int] = {}
    for job in placed:
        used[job.request.user] = used.get(job.request.user, 0) + max(job.request.most, sum(job.held.values()))

    for request in sorted(waiting, key=lambda request: request.rank):
        allowed = allowance(request.user, quota)
        if used.get(request.user, 0) + request.most > allowed:
            decisions.why[request.job] = (
                f"quota: the runs of {request.user} have {used.get(request.user, 0)} of {allowed:g} workers, and this "
                f"one asks for {request.most}"
            )
            continue
        if fit(request, everything(placed, free)) is None:  # a node is gone, say: whoever fits need not wait for it
            decisions.why[request.job] = f"asks for {asks(request)}, which is more than the whole cluster has now"
            continue
        held = fit(request, free)
        if held is not None and head is not None and not _harmless(request, held, head, placed, free, head_starts, now):
            decisions.why[request.job] = f"its start would delay {head.job}, which comes first"
            continue
        if held is not None:
            decisions.start[request.job] = held
            free = take(free, request.worker, held)
            placed.append(Placed(request, held, now))
            used[request.user] = used.get(request.user, 0) + request.most
            continue
        if head is not None:
            decisions.why[request.job] = f"behind {head.job}"
            continue
        head = request
        victims = _victims(request, placed, free)
        for victim in victims:
            decisions.preempt[victim.request.job] = request.job
        placed = [replace(job, leaving=True) if job in victims else job for job in placed]
        head_starts = earliest(request, placed, free, now)
        decisions.why[request.job] = _reason(request, placed, free)
    return decisions


def allowance(user: str, quota: Mapping[str, int]) -> float:
    """How many workers a user may have at a time."""
    return quota.get(user, quota.get("default", math.inf))


def fit(request: Request, free: Free) -> dict[str, int] | None:
    """Workers by node, as many as find room, on few nodes with little left over; None where the fewest do not."""
    room = {node: _capacity(amounts, request.worker) for node, amounts in free.items()}
    wanted, held = min(request.most, sum(room.values())), dict[str, int]()
    if wanted < request.fewest:
        return None
    while wanted > 0:
        whole = [node for node in room if room[node] >= wanted]
        node = min(whole, key=lambda node: (room[node], node)) if whole else max(room, key=lambda node: room[node])
        held[node] = min(wanted, room.pop(node))
        wanted -= held[node]
    return held


def earliest(request: Request, placed: Iterable[Placed], free: Free, now: float) -> float:
    """When it fits, if nothing else starts; infinity where nobody knows, or never."""
    if fit(request, free) is not None:
        return now
    for job in sorted(placed, key=lambda job: job.ends_at):
        free = _give(free, job)
        if fit(request, free) is not None:
            return max(now, job.ends_at)
    return math.inf


def forecast(
    waiting: Sequence[Request], placed: Sequence[Placed], free: Free, quota: Mapping[str, int], now: float
) -> dict[str, float]:
    """When each waiting job starts if nobody else comes and all take as long as expected, where that can be told."""
    starts = dict[str, float]()
    left, held, free = list(waiting), list(placed), dict(free)
    while left:
        decisions = decide(left, held, free, quota, now)
        for request in [request for request in left if request.job in decisions.start]:
            places = decisions.start[request.job]
            starts.setdefault(request.job, now)
            left.remove(request)
            held.append(Placed(request, places, now))
            free = take(free, request.worker, places)
        if decisions.start:
            continue
        going = [job for job in held if job.leaving or job.request.job in decisions.preempt]
        if not going:
            now = min((job.ends_at for job in held), default=math.inf)
            going = [job for job in held if job.ends_at <= now < math.inf]
        if not going:
            break
        for job in going:
            held.remove(job)
            free = _give(free, job)
            if job.leaving or job.request.job in decisions.preempt:  # it waits again
                known_end = job.request.expected_s is not None and not job.leaving
                left.append(replace(job.request, expected_s=job.ends_at - now) if known_end else job.request)
    known = {request.job for request in waiting}
    return {job: start for job, start in starts.items() if job in known}


def _victims(request: Request, placed: Sequence[Placed], free: Free) -> list[Placed]:
    """Jobs of a lower priority that make room for it, none without need; nobody where it does not fit all the same."""
    free = everything((job for job in placed if job.leaving), free)
    lower = [job for job in placed if job.request.priority < request.priority and not job.leaving]
    lower.sort(key=lambda job: (job.request.priority, -job.started_at))  # the last to start has the least to lose
    chosen, gained = list[Placed](), free
    for job in lower:
        if fit(request, gained) is not None:
            break
        chosen.append(job)
        gained = _give(gained, job)
    if fit(request, gained) is None:
        return []
    for job in reversed(chosen):  # the dearest first
        if fit(request, everything((other for other in chosen if other is not job), free)) is not None:
            chosen.remove(job)
    return chosen


def _harmless(
    request: Request,
    held: Mapping[str, int],
    head: Request,
    placed: Iterable[Placed],
    free: Free,
    head_starts: float,
    now: float,
) -> bool:
    """Whether the head of the queue starts no later if this job starts now."""
    if request.expected_s is not None and now + request.expected_s <= head_starts < math.inf:
        return True
    # Of those that end nobody knows when, the ones that came before it have to end; others would add up in front of it.
    ended = [
        job for job in placed if job.ends_at <= head_starts and (job.ends_at < math.inf or job.request.rank < head.rank)
    ]
    return fit(head, everything(ended, take(free, request.worker, held))) is not None


def _reason(request: Request, placed: Sequence[Placed], free: Free) -> str:
    """Why the head of the queue waits."""
    room = sum(_capacity(amounts, request.worker) for amounts in free.values())
    leaving = [job.request.job for job in placed if job.leaving]
    made = f"; {', '.join(leaving)} saves and makes room" if leaving else ""
    return f"asks for {asks(request)}, and there is room for {room}{made}"


def asks(request: Request) -> str:
    """In words, by the fewest workers."""
    each = ", ".join(f"{amount:g} {name}" for name, amount in request.worker.items() if amount)
    return f"{request.fewest} worker{'s' * (request.fewest > 1)} of {each}"


def everything(placed: Iterable[Placed], free: Free) -> Free:
    """Free, with the places of these jobs."""
    for job in placed:
        free = _give(free, job)
    return free


def _capacity(amounts: Amounts, worker: Amounts) -> int:
    """How many workers find room in these amounts."""
    wanted = {name: amount for name, amount in worker.items() if amount > 0}
    return min((int((amounts.get(name, 0.0) + _EPSILON) // amount) for name, amount in wanted.items()), default=10**9)


def take(free: Free, worker: Amounts, held: Mapping[str, int]) -> Free:
    """Free, without these workers by node."""
    taken = dict(free)
    for node, count in held.items():
        names = {*taken[node], *worker}
        taken[node] = {name: taken[node].get(name, 0.0) - count * worker.get(name, 0.0) for name in names}
    return taken


def _give(free: Free, job: Placed) -> Free:
    """Free, with a job's places; those on nodes that are gone are gone too."""
    there = {node: -count for node, count in job.held.items() if node in free}
    return take(free, job.request.worker, there)
