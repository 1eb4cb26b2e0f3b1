"""A cluster and its workers in simulated time: a WorkerGroup whose nodes come and go and whose ranks meet faults.

Which nodes a run reserves is decided by the real Placement.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from cluster.controller import RECENT_STEPS, ROOM_POLL_S, SETTLE_S
from cluster.policies import FIRST_BATCH_FACTOR, MAX_GROW_DOUBLINGS, WorkerStatus
from cluster.ray_placement import PLACE_TIMEOUT_S, Placement
from configs.schema import ResourcesConfig
from tests.cluster.fakes import FakeClock, FakeRecord

TICK_S = 0.5
MICRO_BATCHES = 6  # of a global batch, shared by the ranks
PAUSE_S = 15.0  # longer than any limit of a step
SILENCE_S, COLLECTIVE_S = 5.0, 120.0
GROW_AFTER_S = 15.0  # half of the real one, so that a schedule takes half of the time
FIRST_BATCH_S = FIRST_BATCH_FACTOR * SILENCE_S
FATAL = {"kill": "died", "raise": "raised", "stop": "silent", "stuck": "silent", "lost node": "silent"}


def replace(status: WorkerStatus, **fields: Any) -> WorkerStatus:
    """As dataclasses.replace, in a tenth of the time, which is most of what a simulation takes."""
    new = object.__new__(WorkerStatus)
    new.__dict__.update(status.__dict__, **fields)
    return new


@dataclass
class Fault:
    what: str
    rank: int
    step: int
    at: float | None = None
    median_step_s: float = 0.0


@dataclass(eq=False)
class Node:
    """A node with room for one worker: away until it comes, and for a while only promising its room."""

    comes_at: float
    honest_at: float

    def is_there(self, now: float) -> bool:
        return now >= self.comes_at

    def has_room(self, now: float) -> bool:
        return now >= max(self.comes_at, self.honest_at)


class Places(Placement):
    """The real choice of places, on simulated nodes: what takes time there takes simulated time here."""

    def __init__(self, resources: ResourcesConfig, nodes: list[Node], clock: FakeClock) -> None:
        super().__init__(resources)
        self.nodes, self.clock = nodes, clock
        self.held: list[Node | None] = []  # by slot

    def release(self) -> None:
        self._group, self.held = None, []

    def _usable(self, lost: Collection[str]) -> list[int]:
        for slot, node in enumerate(self.held):
            if node is None or not node.is_there(self.clock.now):  # Ray places it again, where there is room
                self.held[slot] = next(iter(self._spare(Node.has_room)), None)
        return [slot for slot, node in enumerate(self.held) if node is not None]

    def _free(self, lost: Collection[str]) -> int:
        return len(self._spare(Node.is_there))

    def _spare(self, which: Callable[[Node, float], bool]) -> list[Node]:
        return [node for node in self.nodes if which(node, self.clock.now) and node not in self.held]

    def _try(self, size: int, lost: Collection[str]) -> bool:
        deadline = self.clock.now + PLACE_TIMEOUT_S
        while len(spare := self._spare(Node.has_room)) < size:
            if self.clock.now >= deadline:
                return False
            self.clock.now += TICK_S
        self._group, self.held = object(), spare[:size]
        return True

    def _size(self, lost: Collection[str]) -> int:
        return max(self._resources.fewest, min(self._resources.most, self._free(lost)))


@dataclass
class Rank:
    """One worker's process: where it is in its step, and since when."""

    status: WorkerStatus
    node: Node
    done: int = 0
    left_s: float = 0.0
    fault: Fault | None = None
    peer_lost_in_s: float | None = None


@dataclass
class Simulation:
    """A WorkerGroup whose ranks train in lockstep, a tick a poll; each attempt has at most one fatal fault.

    Of a step's micro-batches each of n ranks computes an nth, and of the optimizer's work too.
    """

    chance: random.Random
    clock: FakeClock
    record: FakeRecord
    places: Places
    faults: dict[int, list[Fault]]
    steps: int
    micro_batch_s: float
    optimizer_s: float
    alive: bool = False
    stopping: bool = False
    size: int = 0
    share: int = 0  # micro-batches of a rank in a step
    began_at: float = 0.0
    room_since: float | None = None
    futile: int = 0
    grew_after: list[tuple[float, int]] = field(default_factory=list)
    starts: dict[int, int] = field(default_factory=dict)
    steps_s: list[float] = field(default_factory=list)
    step_began_at: float | None = None
    by_place: dict[tuple[int, int], Fault] = field(default_factory=dict)
    ranks: list[Rank] = field(default_factory=list)

    def prepare(self, attempt: int, *, grow: bool = False) -> dict[str, Any]:
        assert not self.alive, "the attempt before was not killed"
        if grow:
            self.grew_after.append((self.clock.now - self.began_at, self.futile))
        slots = self.places.reserve(grow=grow)
        before, self.size = self.size, len(slots)
        self.share = -(-MICRO_BATCHES // self.size)
        self.futile = 0 if self.size > before else self.futile + grow
        if self.size != before:
            self.steps_s.clear()
        self.alive, self.stopping, self.room_since, self.step_began_at = True, False, None, None
        faults = self.faults.get(attempt, [])
        self.by_place = {(fault.rank % self.size, fault.step): fault for fault in faults}
        self.starts[attempt] = start = self.record.saved[-1] if self.record.saved else 0
        self.ranks = []
        for rank, slot in enumerate(slots):
            node = self.places.held[slot]
            assert node is not None
            status = WorkerStatus(rank, f"node-{slot}", "starting", step=start, steps=self.steps)
            self.ranks.append(Rank(status, node))
        return {"workers": [{}] * self.size}

    def room(self) -> int:
        return self.places.room(())

    def start(self, cancelled: Callable[[], bool]) -> None:
        self.began_at = self.clock.now
        for rank in self.ranks:
            rank.status = replace(rank.status, state="running", phase="data")
            rank.left_s = self._work_s(rank)

    def poll(self, timeout_s: float) -> list[WorkerStatus]:
        self.clock.now += TICK_S
        for rank in self.ranks:
            if rank.status.state == "running":
                self._advance(rank)
        if all(rank.status.state == "running" and rank.done > self.share for rank in self.ranks):
            self._complete_step()
        self._expect_growth()
        return [rank.status for rank in self.ranks]

    def request_stop(self) -> None:
        self.stopping = True

    def stacks(self) -> dict[int, str]:
        waits = '  File "trainer/distributed.py", line 1 in all_sum'
        works = '  File "data_pipelines/loader.py", line 1 in read'
        return {rank.status.rank: waits if rank.done > self.share else works for rank in self.ranks}

    def kill(self) -> None:
        self.alive = False

    def honest_room(self) -> int:
        """For how many workers there really is room."""
        here = sum(node.has_room(self.clock.now) for node in self.places.nodes)
        return min(self.places._resources.most, here)

    def _expect_growth(self) -> None:
        """Where there was more room for so long that the run must have seen it, it must be on its way to take it."""
        if self.honest_room() <= self.size:
            self.room_since = None
            return
        self.room_since = self.clock.now if self.room_since is None else self.room_since
        wait_s = GROW_AFTER_S * 2 ** min(self.futile, MAX_GROW_DOUBLINGS)
        due = max(self.began_at + wait_s, self.room_since) + ROOM_POLL_S + SETTLE_S + 2 * TICK_S
        well = all(rank.status.state == "running" and rank.status.unanswered_s == 0.0 for rank in self.ranks)
        if self.clock.now > due and well:  # else the run has something else to do first
            assert self.stopping, "there is room, and nobody takes it"

    def _advance(self, rank: Rank) -> None:
        status, fault = rank.status, self._fault(rank)
        if fault is not None and fault.what in FATAL and rank.done >= 1:
            self._suffer(rank, fault)
            return
        if rank.peer_lost_in_s is not None:
            rank.peer_lost_in_s -= TICK_S
            if rank.peer_lost_in_s <= 0:
                error = "RuntimeError: [../gloo/transport/tcp/pair.cc] Connection closed by peer"
                rank.status = replace(status, state="raised", error=error, failed_at=self.clock.now)
                return
        rank.left_s -= TICK_S
        quiet_s = status.quiet_s + TICK_S
        if rank.done <= self.share and rank.left_s <= 0:
            rank.done, quiet_s = rank.done + 1, 0.0
            rank.left_s = self._work_s(rank)
        phase = "optimizer" if rank.done >= self.share else "backward"
        if fault is not None and fault.what == "evaluation":
            phase = "evaluation"
        rank.status = replace(status, phase=phase, quiet_s=quiet_s)

    def _suffer(self, rank: Rank, fault: Fault) -> None:
        status = rank.status
        if fault.at is None:
            fault.at = self.clock.now
            fault.median_step_s = median(self.steps_s[-RECENT_STEPS:]) if self.steps_s else 0.0
            if fault.what == "lost node":
                rank.node.comes_at = self.clock.now + self.chance.choice([0.0, 30.0, 1000.0])
        if fault.what in ("kill", "raise"):
            state, error = ("died", "gone") if fault.what == "kill" else ("raised", "ValueError: bad")
            rank.status = replace(status, state=state, error=error, failed_at=self.clock.now)
            for other in self.ranks:
                other.peer_lost_in_s = self.chance.uniform(0.0, 0.6)
            return
        mute = fault.what in ("stop", "lost node")
        rank.status = replace(
            status,
            phase="data",
            quiet_s=status.quiet_s + TICK_S,
            unanswered_s=status.unanswered_s + TICK_S if mute else 0.0,
            node_unanswered_s=status.node_unanswered_s + TICK_S if fault.what == "lost node" else 0.0,
        )

    def _complete_step(self) -> None:
        if self.step_began_at is not None:  # an attempt's first step may take long
            self.steps_s.append(self.clock.now - self.step_began_at)
        self.step_began_at = self.clock.now
        step = self.ranks[0].status.step + 1
        if step % 10 == 0 or self.stopping or step == self.steps:
            self.record.saved.append(step)
        state = "finished" if step == self.steps else "stopped" if self.stopping else "running"
        for rank in self.ranks:
            rank.status = replace(rank.status, step=step, state=state, quiet_s=0.0)
            rank.done = 0
        for rank in self.ranks:
            rank.left_s = self._work_s(rank)

    def _fault(self, rank: Rank) -> Fault | None:
        return self.by_place.get((rank.status.rank, rank.status.step))

    def _work_s(self, rank: Rank) -> float:
        """How long a rank's next piece of a step takes: a micro-batch, or at the end its part of the optimizer."""
        if rank.done >= self.share:
            return self.optimizer_s / self.size
        fault = self._fault(rank)
        usual = self.micro_batch_s * self.chance.uniform(0.8, 1.2)
        # Five times longer; and what may take far longer than any limit of a step.
        return usual * 5 if fault is not None and fault.what == "slow step" else usual + self._pause_s(rank, fault)

    def _pause_s(self, rank: Rank, fault: Fault | None) -> float:
        pauses = fault is not None and fault.what in ("evaluation", "slow first step") and rank.done == 0
        return PAUSE_S if pauses else 0.0
