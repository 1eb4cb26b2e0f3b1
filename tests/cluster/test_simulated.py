"""The controller and its policies in simulated time: random schedules of faults, and what must hold in each of them."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from cluster.controller import Controller
from cluster.policies import WorkerStatus
from configs.errors import RunFailed, Unreachable
from configs.schema import RecoveryConfig
from tests.cluster.fakes import FakeClock, FakeRecord

# `make test` runs a tenth of the 10,000 that SIMULATED_SCHEDULES=10000 asks for.
SCHEDULES = int(os.environ.get("SIMULATED_SCHEDULES", "1000"))
TICK_S = 0.5
MICRO_BATCHES = 4
SILENCE_S, COLLECTIVE_S = 5.0, 120.0
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


@dataclass
class Rank:
    """One worker's process: where it is in its step, and since when."""

    status: WorkerStatus
    done: int = 0
    left_s: float = 0.0
    fault: Fault | None = None
    peer_lost_in_s: float | None = None


@dataclass
class Simulation:
    """A WorkerGroup whose ranks train in lockstep, a tick a poll; each attempt has at most one fatal fault."""

    chance: random.Random
    clock: FakeClock
    record: FakeRecord
    faults: dict[int, list[Fault]]
    size: int
    steps: int
    step_s: float
    alive: bool = False
    stopping: bool = False
    attempts: int = 0
    starts: dict[int, int] = field(default_factory=dict)
    by_place: dict[tuple[int, int], Fault] = field(default_factory=dict)
    ranks: list[Rank] = field(default_factory=list)

    def prepare(self, attempt: int, *, grow: bool = False) -> dict[str, Any]:
        assert not self.alive, "the attempt before was not killed"
        self.alive, self.stopping, self.attempts = True, False, attempt
        self.by_place = {(fault.rank, fault.step): fault for fault in self.faults.get(attempt, [])}
        self.starts[attempt] = start = self.record.saved[-1] if self.record.saved else 0
        self.ranks = [
            Rank(WorkerStatus(rank, f"node-{rank}", "starting", step=start, steps=self.steps))
            for rank in range(self.size)
        ]
        return {"workers": [{}] * self.size}

    def room(self) -> int:
        return self.size

    def start(self, cancelled: Callable[[], bool]) -> None:
        for rank in self.ranks:
            rank.status = replace(rank.status, state="running", phase="data")
            rank.left_s = self._micro_batch_s(rank)

    def poll(self, timeout_s: float) -> list[WorkerStatus]:
        self.clock.now += TICK_S
        for rank in self.ranks:
            if rank.status.state == "running":
                self._advance(rank)
        running = [rank for rank in self.ranks if rank.status.state == "running"]
        if len(running) == self.size and all(rank.done == MICRO_BATCHES for rank in running):
            self._complete_step()
        return [rank.status for rank in self.ranks]

    def request_stop(self) -> None:
        self.stopping = True

    def stacks(self) -> dict[int, str]:
        waits = '  File "trainer/distributed.py", line 1 in all_sum'
        works = '  File "data_pipelines/loader.py", line 1 in read'
        return {rank.status.rank: waits if rank.done == MICRO_BATCHES else works for rank in self.ranks}

    def kill(self) -> None:
        self.alive = False

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
        if rank.done < MICRO_BATCHES and rank.left_s <= 0:
            rank.done, rank.left_s, quiet_s = rank.done + 1, self._micro_batch_s(rank), 0.0
        phase = "evaluation" if fault is not None and fault.what == "evaluation" else "backward"
        rank.status = replace(status, phase=phase, quiet_s=quiet_s)

    def _suffer(self, rank: Rank, fault: Fault) -> None:
        status = rank.status
        if fault.at is None:
            fault.at = self.clock.now
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
        step = self.ranks[0].status.step + 1
        if step % 10 == 0 or self.stopping or step == self.steps:
            self.record.saved.append(step)
        state = "finished" if step == self.steps else "stopped" if self.stopping else "running"
        for rank in self.ranks:
            rank.status = replace(rank.status, step=step, state=state, quiet_s=0.0)
            rank.done = 0
        for rank in self.ranks:
            rank.left_s = self._micro_batch_s(rank)

    def _fault(self, rank: Rank) -> Fault | None:
        return self.by_place.get((rank.status.rank, rank.status.step))

    def _micro_batch_s(self, rank: Rank) -> float:
        fault = self._fault(rank)
        usual = self.step_s / MICRO_BATCHES * self.chance.uniform(0.8, 1.2)
        # Five times longer; and what may take far longer than any limit of a step.
        return usual * 5 if fault is not None and fault.what == "slow step" else usual + self._pause_s(rank, fault)

    def _pause_s(self, rank: Rank, fault: Fault | None) -> float:
        pauses = fault is not None and fault.what in ("evaluation", "slow first step") and rank.done == 0
        return 20.0 if pauses else 0.0


def make(seed: int) -> tuple[Simulation, Controller, RecoveryConfig, str | None]:
    chance = random.Random(seed)
    size, steps = chance.randint(1, 3), chance.randint(11, 18)
    faults: dict[int, list[Fault]] = {}
    for attempt in range(1, chance.randint(1, 5)):
        kinds = [*chance.sample(HARMLESS, chance.randint(0, 2)), chance.choice(list(FATAL))]
        # Steps of a fresh start, after the ones that may take as long as they like.
        places = chance.sample(range(4, steps), len(kinds))
        faults[attempt] = [
            Fault(what, chance.randrange(size), 0 if what == "slow first step" else place)
            for what, place in zip(kinds, places, strict=True)
        ]
    clock, record = FakeClock(), FakeRecord()
    group = Simulation(chance, clock, record, faults, size, steps, chance.choice([0.5, 1.0, 2.0, 4.0]))
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


def test_random_schedules_in_simulated_time() -> None:
    seen: dict[str, int] = {}
    for seed in range(SCHEDULES):
        group, controller, recovery, event = make(seed)
        timed: list[tuple[float, dict[str, Any]]] = []
        tell = group.record.event

        def event_at(kind: str, tell: Any = tell, timed: Any = timed, clock: Any = group.clock, **fields: Any) -> None:
            tell(kind, **fields)
            timed.append((clock.now, {"kind": kind, **fields}))

        group.record.event = event_at  # type: ignore[method-assign]
        try:
            controller.prepare()
            ended = controller.run().outcome
        except RunFailed as error:
            ended = "failed"
            controller.fail(error)
        check(seed, group, recovery, event, ended, timed)
        seen[ended] = seen.get(ended, 0) + 1
    assert set(seen) == {"finished", "stopped", "failed"}, seen


def check(
    seed: int,
    group: Simulation,
    recovery: RecoveryConfig,
    event: str | None,
    ended: str,
    timed: list[tuple[float, dict[str, Any]]],
) -> None:
    failed = [(at, row) for at, row in timed if row["kind"] == "failed" and "rank" in row]
    assert not group.alive, seed
    assert timed[-1][1]["kind"] == ended, seed
    assert len(failed) <= recovery.max_restarts + 1, seed
    assert (ended == "stopped") <= (event in ("stop", "abort")), seed
    if ended == "failed":
        assert timed[-1][1].get("final") and (event == "lease" or failed), seed
    for attempt, (at, row) in enumerate(failed, 1):
        true = [fault for fault in group.faults[attempt] if fault.what in FATAL and fault.at is not None]
        assert true, f"seed {seed}: a false alarm in attempt {attempt}: {row}"
        (fault,) = true
        assert (row["rank"], row["cause"]) == (fault.rank, FATAL[fault.what]), f"seed {seed}: {fault}, {row}"
        assert fault.at is not None
        # Noticed within its bound; where ranks only wait, once they do so.
        bound_s = {"kill": 2 * TICK_S, "raise": 2 * TICK_S, "stop": SILENCE_S, "lost node": 0.7 * SILENCE_S + TICK_S}
        if fault.what == "stuck" and fault.step == group.starts[attempt]:
            assert at - fault.at <= COLLECTIVE_S, seed  # an attempt's first step may take long
            continue
        waits_s = max(SILENCE_S, 3 * 1.6 * group.step_s) + 1.2 * group.step_s
        assert at - fault.at <= bound_s.get(fault.what, waits_s) + 2 * TICK_S, f"seed {seed}: {fault}, told at {at}"
