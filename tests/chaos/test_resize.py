"""Nodes that go and come at random: an elastic run goes on with those that are there, on the same examples."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cluster import controller, policies, train
from tests.chaos.harm import HELD, HOLD
from tests.chaos.runs import (
    WORKERS,
    assert_each_once,
    curve_of,
    differing,
    examples_of,
    noted_steps,
    recipe,
    seeds,
    state_of,
    train_undisturbed,
)
from tests.cluster.waiting import wait_for
from trainer.record import RunRecord

pytestmark = [pytest.mark.ray, pytest.mark.distributed, pytest.mark.slow]

STEPS = 50
FP32_TOLERANCE = 1e-5  # of the loss, relative: sums over another number of ranks are rounded otherwise
END_S = 240.0
SCHEDULES_A_RESIZE = 10  # so many schedules of test_harm.py for one more of these, since new workers import for long


@dataclass(frozen=True)
class Removal:
    """The node of `rank` goes, `delay_s` after that rank has begun the step after `done` completed ones."""

    done: int
    rank: int
    delay_s: float


@dataclass(frozen=True)
class Schedule:
    """One node goes. back_after: completed steps after which another comes, None if none does; then `second` may go."""

    first: Removal
    back_after: int | None
    second: Removal | None


def make_schedule(seed: int) -> Schedule:
    """Removals well before the end, so that the run cannot end before it loses the node."""
    chance = random.Random(seed)

    def removal(low: int, high: int) -> Removal:
        return Removal(chance.randrange(low, high), chance.randrange(WORKERS), chance.uniform(0, 0.05))

    first = removal(5, 15)
    if chance.random() < 0.25:
        return Schedule(first, None, None)
    back_after = chance.randrange(first.done + 3, 22)
    return Schedule(first, back_after, removal(back_after + 3, 30) if chance.random() < 0.5 else None)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head without room for workers; nodes with room for one each are added to it."""
    import ray
    from ray.cluster_utils import Cluster

    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    ray.init(address=nodes.address, log_to_driver=False)
    yield nodes
    ray.shutdown()
    nodes.shutdown()


@pytest.fixture
def nodes(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The cluster with a node for each worker; runs grow as soon as they can."""
    monkeypatch.setattr(policies, "GROW_AFTER_S", 0.0)
    monkeypatch.setattr(controller, "ROOM_POLL_S", 0.5)
    while len(cluster.worker_nodes) < WORKERS:
        cluster.add_node(num_cpus=1)
    return cluster


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], str]:
    """Stores of the runs that nobody disturbs, by precision and determinism; filled as they are asked for."""
    return Undisturbed(tmp_path_factory)


class Undisturbed(dict[tuple[str, str], str]):
    """Trains what is missing."""

    def __init__(self, folders: pytest.TempPathFactory) -> None:
        self._folders = folders

    def __missing__(self, key: tuple[str, str]) -> str:
        precision, determinism = key
        settings = recipe(self._folders.mktemp("undisturbed"), STEPS)
        train_undisturbed(settings | {"precision": precision, "determinism": determinism})
        assert_each_once(examples_of(settings["store"]))
        self[key] = settings["store"]
        return self[key]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Some seeds; test_harm.py says what the options mean."""
    exact = metafunc.function is test_exact_mode_ends_in_the_same_bits
    metafunc.parametrize("seed", seeds(metafunc.config, SCHEDULES_A_RESIZE)[: None if exact else 1])


def test_exact_mode_ends_in_the_same_bits(
    seed: int, nodes: Any, tmp_path: Path, undisturbed: dict[tuple[str, str], str]
) -> None:
    stage = random.Random(seed).randrange(4)
    settings = elastic(tmp_path) | {"determinism": "exact", "zero": {"stage": stage}}
    expected = undisturbed["fp32", "exact"]
    resized(nodes, settings, make_schedule(seed), f"exact, stage {stage}, seed {seed}")
    assert differing(state_of(settings["store"], STEPS), state_of(expected, STEPS)) == []
    assert curve_of(settings["store"]) == curve_of(expected)
    assert examples_of(settings["store"]) == examples_of(expected)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_the_loss_stays_close(
    seed: int, precision: str, nodes: Any, tmp_path: Path, undisturbed: dict[tuple[str, str], str]
) -> None:
    settings = elastic(tmp_path) | {"precision": precision}
    expected = undisturbed[precision, "cluster"]
    resized(nodes, settings, make_schedule(seed), f"{precision}, seed {seed}")
    assert examples_of(settings["store"]) == examples_of(expected)
    pairs = zip(curve_of(settings["store"]), curve_of(expected), strict=True)
    difference = max(abs(loss - wanted) / wanted for (loss, _), (wanted, _) in pairs)
    print(f"{precision}: over {STEPS} steps the loss differs by {difference:.2g}, relative")
    assert precision != "fp32" or difference <= FP32_TOLERANCE


def elastic(folder: Path) -> dict[str, Any]:
    """A recipe for one worker or two."""
    return recipe(folder, STEPS) | {"resources": {"workers": WORKERS, "min_workers": 1}}


def resized(cluster: Any, settings: dict[str, Any], schedule: Schedule, name: str) -> None:
    """The run to its end while nodes go and come; proves that they did between two steps."""
    began = time.monotonic()
    store = Path(settings["store"])
    store.mkdir()
    sizes = [WORKERS, 1]
    if schedule.back_after is not None:
        (store / HOLD).write_text(str(schedule.back_after))
    run = train(settings, quiet=True, body="tests.chaos.harm:train_and_hold")
    try:
        removed = [remove(cluster, run.record, schedule.first)]
        if schedule.back_after is not None:
            wait_for((store / HELD).exists, "a run with one worker", END_S)
            cluster.add_node(num_cpus=1)
            sizes += [WORKERS]
        if schedule.second is not None:
            removed += [remove(cluster, run.record, schedule.second)]
            sizes += [1]
        assert run.wait()["outcome"] == "finished"
    finally:
        run._drive.end_now()
    events = run.record.events()
    started = [event["world_size"] for event in events if event["kind"] == "started"]
    assert [size for size, before in zip(started, [0, *started], strict=False) if size != before] == sizes
    for attempt, rank in removed:
        prove_removal(run.record, attempt, rank)
    print(f"{name}: {schedule}, {time.monotonic() - began:.1f} s", flush=True)


def remove(cluster: Any, record: RunRecord, removal: Removal) -> tuple[int, int]:
    """Remove a node at its time, with all its processes; returns the attempt and the rank that it takes along."""
    store = record.config.store

    def reached() -> int | None:
        whole = [each for each in record.events() if each["kind"] == "placed" and len(each["workers"]) == WORKERS]
        attempt = whole[-1]["attempt"] if whole else 0
        steps = noted_steps(store, attempt, removal.rank)
        return attempt if steps and steps[-1]["done"] >= removal.done else None

    attempt = int(wait_for(reached, f"step {removal.done}", END_S))
    (placed,) = [each for each in record.events() if (each["kind"], each["attempt"]) == ("placed", attempt)]
    node_id = placed["workers"][removal.rank]["node_id"]
    node = next(node for node in cluster.worker_nodes if node.node_id == node_id)
    time.sleep(removal.delay_s)  # where in the step it falls is the schedule's
    cluster.remove_node(node, allow_graceful=False)
    return attempt, removal.rank


def prove_removal(record: RunRecord, attempt: int, rank: int) -> None:
    """The rank had completed steps of the attempt, it never began a later one, and its end was the attempt's cause."""
    events = [event for event in record.events() if event["attempt"] == attempt]
    (start,) = [event["step"] for event in events if event["kind"] == "started"]
    (failed,) = [event for event in events if event["kind"] == "failed"]
    last = noted_steps(record.config.store, attempt, rank)[-1]["done"]
    resumed = next(event for event in record.events() if event["kind"] == "started" and event["attempt"] > attempt)
    assert start < last < STEPS and resumed["step"] <= last + 1, (start, last, resumed)
    assert (failed["rank"], failed["cause"]) in ((rank, "died"), (rank, "silent")), failed
    assert failed["step"] <= last < STEPS, (failed, last)
