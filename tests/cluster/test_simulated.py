"""The controller and its policies in simulated time: random faults, random room, and what must always hold."""

from __future__ import annotations

import itertools
import os
import random
from typing import Any

import pytest
import ray

from cluster import policies
from cluster.controller import Controller
from cluster.policies import MAX_GROW_DOUBLINGS, WorkerStatus
from configs.errors import RunFailed, Unreachable
from configs.schema import RecoveryConfig, ResourcesConfig
from tests.cluster.fakes import FakeClock, FakeRecord
from tests.cluster.simulation import (
    COLLECTIVE_S,
    FATAL,
    FIRST_BATCH_S,
    GROW_AFTER_S,
    MICRO_BATCHES,
    SILENCE_S,
    TICK_S,
    Fault,
    Node,
    Places,
    Simulation,
)

# `make test` runs a tenth of the 10,000 that SIMULATED_SCHEDULES=10000 asks for.
SCHEDULES = int(os.environ.get("SIMULATED_SCHEDULES", "1000"))
HARMLESS = ("slow step", "evaluation", "slow first step")


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
