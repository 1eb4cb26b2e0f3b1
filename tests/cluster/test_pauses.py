"""Real workers that pause: no alarm where healthy ones do, however long, and one where a worker hangs."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster import policies
from cluster.controller import Outcome
from cluster.embedded_ray import EmbeddedRay
from cluster.ray_group import import_paths
from tests.cluster.pauses import EVALUATE_EVERY, NEVER_S, Pause, Plan
from tests.cluster.test_ray_group import RUN, Launched
from tests.cluster.waiting import alive, wait_for

pytestmark = pytest.mark.ray

MOST_WORKERS = 3
SILENCE_S = 2.5
LONG_S = 1.2 * SILENCE_S
STEP_S = 1.5  # so that 2.5 of them are longer than SILENCE_S and the second in which a controller looks again


@pytest.fixture(scope="module", autouse=True)
def ray_here() -> Iterator[None]:
    """One Ray for all tests of this file; groups use the one that is connected."""
    embedded = EmbeddedRay(MOST_WORKERS, False, import_paths())
    yield
    embedded.stop()


def launch(store: Path, plan: Plan, workers: int = 2) -> Launched:
    plan.write(store / RUN)
    return Launched(store, "pausing", {"workers": workers}, "trainer.distributed", silence_s=SILENCE_S)


def of_seed(seed: int, workers: int, *pauses: tuple[int, str, float]) -> list[Pause]:
    """Pauses (step, phase, seconds), each of a random rank."""
    chance = random.Random(seed)
    return [Pause(chance.randrange(workers), *pause) for pause in pauses]


def test_a_long_first_step_and_a_long_save_raise_no_alarm(tmp_path: Path) -> None:
    pauses = of_seed(0, 2, (0, "forward", LONG_S), (EVALUATE_EVERY - 1, "checkpoint", LONG_S))
    run = launch(tmp_path, Plan(EVALUATE_EVERY + 2, 0.05, pauses))
    run.join()
    assert run.outcome == Outcome("finished", EVALUATE_EVERY + 2, 0), run.events("failed")


@pytest.mark.slow
@pytest.mark.parametrize("hangs", [False, True])
def test_stragglers_raise_no_alarm_unless_one_hangs(tmp_path: Path, hangs: bool) -> None:
    last = EVALUATE_EVERY + 1
    pauses = of_seed(
        1,
        MOST_WORKERS,
        (0, "data", LONG_S),
        (0, "forward", LONG_S),  # as one that compiles
        (4, "forward", 2.5 * STEP_S),  # by then a usual step is known
        (EVALUATE_EVERY - 1, "evaluation", LONG_S),
        (EVALUATE_EVERY - 1, "checkpoint", LONG_S),
        (EVALUATE_EVERY, "data", 0.6 * SILENCE_S),
        (last, "backward", NEVER_S if hangs else 0.0),
    )
    run = launch(tmp_path, Plan(last + 1, STEP_S, pauses), MOST_WORKERS)
    run.join(240)
    failed = [(row["cause"], row["rank"], row["step"]) for row in run.events("failed")]
    assert failed == ([("silent", pauses[-1].rank, last)] if hangs else [])
    assert run.outcome == Outcome("finished", last + 1, len(failed))


@pytest.mark.slow
def test_a_worker_that_is_stopped_before_its_first_step_is_named(tmp_path: Path) -> None:
    run = launch(tmp_path, Plan(3, 0.05, [Pause(0, 0, "restore", NEVER_S), Pause(1, 0, "restore", NEVER_S)]))
    written = tmp_path / RUN / "pid-1-1"
    wait_for(lambda: written.exists() and written.read_text(), "the beginning of a restore")
    pid = int(written.read_text())
    os.kill(pid, signal.SIGSTOP)
    run.join()
    assert run.outcome == Outcome("finished", 3, 1)
    (failed,) = run.events("failed")
    assert (failed["cause"], failed["rank"], failed["step"]) == ("silent", 1, 0)
    assert failed["detected_s"] < 2 * SILENCE_S  # and not recovery.collective_timeout_s
    assert not alive(pid)


@pytest.mark.slow
def test_a_first_batch_that_does_not_come_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policies, "FIRST_BATCH_FACTOR", 1.0)
    run = launch(tmp_path, Plan(3, 0.05, [Pause(1, 0, "data", NEVER_S)]))
    run.join()
    assert run.outcome == Outcome("finished", 3, 1)
    (failed,) = run.events("failed")
    assert (failed["cause"], failed["rank"], failed["phase"]) == ("silent", 1, "data")
    assert "in work (" in failed["summary"]
