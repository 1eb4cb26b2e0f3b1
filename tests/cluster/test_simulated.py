"""The controller and its policies in simulated time: random faults, random room, and what must always hold.

The nodes are simulated too; which of them a run reserves is decided by the real Placement.
"""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import pytest
import ray

from cluster import policies
from cluster.controller import RECENT_STEPS, ROOM_POLL_S, SETTLE_S, Controller
from cluster.policies import FIRST_BATCH_FACTOR, MAX_GROW_DOUBLINGS, WorkerStatus
from cluster.ray_placement import PLACE_TIMEOUT_S, Placement
from configs.errors import RunFailed, Unreachable
from configs.schema import RecoveryConfig, ResourcesConfig
from tests.cluster.fakes import FakeClock, FakeRecord

# `make test` runs a tenth of the 10,000 that SIMULATED_SCHEDULES=10000 asks for.
SCHEDULES = int(os.environ.get("SIMULATED_SCHEDULES", "1000"))
TICK_S = 0.5
MICRO_BATCHES = 6  # of a global batch, shared by the ranks
PAUSE_S = 15.0  # longer than any limit of a step
SILENCE_S, COLLECTIVE_S = 5.0, 120.0
GROW_AFTER_S = 15.0  # half of the real one, so that a schedule takes half of the time
FIRST_BATCH_S = FIRST_BATCH_FACTOR * SILENCE_S
FATAL = {"kill": "died", "raise": "raised", "stop": "silent", "stuck": "silent", "lost node": "silent"}
HARMLESS = ("slow step", "evaluation", "slow first step")


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


def make(seed: int) -> tuple[Simulation, Controller, RecoveryConfig, str | None]:
    chance = random.Random(seed)
    fewest, steps = chance.randint(1, 3), chance.randint(11, 18)
    most = fewest + chance.choice([0, 1, 3])
    faults: dict[int, list[Fault]] = {}
    for attempt in range(1, chance.randint(1, 5)):
        kinds = [*chance.sample(HARMLESS, chance.randint(0, 2)), chance.choice(list(FATAL))]
        # Steps of a fresh start, after the ones that may take as long as they like.
        places = chance.sample(range(4, steps), len(kinds))
        faults[attempt] = [
            Fault(what, chance.randrange(most), 0 if what == "slow first step" else place)
            for what, place in zip(kinds, places, strict=True)
        ]
    clock, record = FakeClock(), FakeRecord()
    nodes = [
        Node(
            chance.choice([0.0, 0.0, chance.uniform(0.0, 60.0)]), chance.choice([0.0, 0.0, chance.uniform(0.0, 200.0)])
        )
        for _ in range(most + chance.randint(0, 1))
    ]
    for node in nodes[: fewest - (chance.random() < 0.02)]:  # seldom there is too little room from the beginning
        node.comes_at = node.honest_at = 0.0
    places = Places(ResourcesConfig(workers=most, min_workers=fewest), nodes, clock)
    micro_batch_s, optimizer_s = chance.choice([(0.12, 0.0), (0.12, 0.0), (0.25, 8.0), (0.5, 0.0)])
    group = Simulation(chance, clock, record, places, faults, steps, micro_batch_s, optimizer_s)
    recovery = RecoveryConfig(max_restarts=chance.randint(0, 6), silence_s=SILENCE_S, collective_timeout_s=COLLECTIVE_S)
    controller = Controller(group, record, recovery, clock=clock)
    event = chance.choice([None, None, None, "stop", "abort", "lease", "store outage"])
    if event is not None:
        _let_happen(event, chance.uniform(0.0, 60.0), group, controller)
    return group, controller, recovery, event


def _let_happen(event: str, at: float, group: Simulation, controller: Controller) -> None:
    poll, clock, record = group.poll, group.clock, group.record
    if event == "lease":
        controller._lease_lost = lambda: clock.now > at
    if event == "store outage":
        record.stop_requested = _unreachable  # type: ignore[method-assign]

    def acting_poll(timeout_s: float) -> list[WorkerStatus]:
        if event in ("stop", "abort") and clock.now > at and not controller.stopping:
            controller.request_stop("asked") if event == "stop" else controller.abort()
        return poll(timeout_s)

    group.poll = acting_poll  # type: ignore[method-assign]


def _unreachable() -> bool:
    raise Unreachable("the store does not answer")


def test_random_schedules_in_simulated_time(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("cluster_resources", "available_resources"):
        monkeypatch.setattr(ray, name, lambda: {"CPU": 9.0})
    monkeypatch.setattr(ray, "nodes", list)
    monkeypatch.setattr(policies, "GROW_AFTER_S", GROW_AFTER_S)
    seen: dict[str, int] = {}
    for seed in range(SCHEDULES):
        group, controller, recovery, event = make(seed)
        times: list[float] = []
        tell = group.record.event

        def event_at(kind: str, tell: Any = tell, times: Any = times, clock: Any = group.clock, **fields: Any) -> None:
            tell(kind, **fields)
            times.append(clock.now)

        group.record.event = event_at  # type: ignore[method-assign]
        try:
            controller.prepare()
            ended = controller.run().outcome
        except RunFailed as error:
            ended = "failed"
            controller.fail(error)
        except Unreachable as error:
            ended = "no room"
            assert "did not come free" in str(error), seed
            controller.fail(error)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error
        check(seed, group, recovery, event, ended, times)
        resized = sum(row["kind"] == "resized" for row in group.record.rows)
        for what in (ended, *["resized"] * (resized > 0), *["futile"] * (group.futile > 0)):
            seen[what] = seen.get(what, 0) + 1
    print(seen)
    assert set(seen) == {"finished", "stopped", "failed", "no room", "resized", "futile"}, seen


def check(
    seed: int, group: Simulation, recovery: RecoveryConfig, event: str | None, ended: str, times: list[float]
) -> None:
    rows = group.record.rows
    failed = [(at, row) for at, row in zip(times, rows, strict=True) if row["kind"] == "failed" and "rank" in row]
    assert not group.alive, seed
    assert rows[-1]["kind"] == ("failed" if ended == "no room" else ended), seed
    assert len(failed) <= recovery.max_restarts + 1, seed
    assert (ended == "stopped") <= (event in ("stop", "abort")), seed
    if ended == "failed":
        assert rows[-1].get("final") and (event == "lease" or failed), seed
        if "used up" in rows[-1].get("decision", ""):
            assert len(failed) == recovery.max_restarts + 1, f"seed {seed}: a resize cost a restart"
    if ended == "no room":
        assert group.honest_room() < group.places._resources.fewest, seed
    assert len({row["attempt"] for _, row in failed}) == len(failed), seed
    for at, row in failed:
        check_failure(seed, group, at, row)
    check_sizes(seed, group)


def check_failure(seed: int, group: Simulation, at: float, row: dict[str, Any]) -> None:
    """It is a real one, named rightly, and noticed within its bound."""
    attempt = row["attempt"]
    true = [fault for fault in group.faults.get(attempt, []) if fault.what in FATAL and fault.at is not None]
    assert true, f"seed {seed}: a false alarm in attempt {attempt}: {row}"
    (fault,) = true
    size = next(len(placed["workers"]) for placed in group.record.rows if is_placed(placed, attempt))
    assert (row["rank"], row["cause"]) == (fault.rank % size, FATAL[fault.what]), f"seed {seed}: {fault}, {row}"
    assert fault.at is not None
    bound_s = {"kill": 2 * TICK_S, "raise": 2 * TICK_S, "stop": SILENCE_S, "lost node": 0.7 * SILENCE_S + TICK_S}
    # Where ranks only wait, once all of them do so; before the first steps there is no usual length of one.
    limit_s = max(SILENCE_S, 3 * fault.median_step_s)
    if fault.step <= group.starts[attempt] + 1:
        limit_s = max(limit_s, FIRST_BATCH_S)
    micro_batch_s = max(TICK_S, 1.2 * group.micro_batch_s + TICK_S)
    waits_s = limit_s + -(-MICRO_BATCHES // size) * micro_batch_s + group.optimizer_s / size
    assert at - fault.at <= bound_s.get(fault.what, waits_s) + 2 * TICK_S, f"seed {seed}: {fault}, told at {at}"


def check_sizes(seed: int, group: Simulation) -> None:
    """Every size is allowed, every change of it told once, and no growth came early or without progress."""
    rows, resources = group.record.rows, group.places._resources
    sizes = [len(row["workers"]) for row in rows if row["kind"] == "placed"]
    assert all(resources.fewest <= size <= resources.most for size in sizes), seed
    told = [(row["workers_before"], row["workers"]) for row in rows if row["kind"] == "resized"]
    assert told == [pair for pair in itertools.pairwise(sizes) if pair[0] != pair[1]], seed
    for trained_s, futile in group.grew_after:
        assert trained_s >= GROW_AFTER_S * 2 ** min(futile, MAX_GROW_DOUBLINGS), seed
    for row in rows:
        if row["kind"] == "restarted" and "room" in row["reason"]:
            assert row["step"] > group.starts[row["attempt"] - 1], f"seed {seed}: it grew without a step between"


def is_placed(row: dict[str, Any], attempt: int) -> bool:
    return bool(row["kind"] == "placed" and row["attempt"] == attempt)
