"""Workers that are killed in a rollback, or after it: the run ends as one that only rolled back, bit for bit."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from tests.chaos.runs import seeds
from tests.pool import WorkerFailed, run_workers
from tests.trainer.attempts import curve, launched, work
from tests.trainer.test_divergence import NAN, config, events, same_weights
from trainer.distributed import World
from trainer.progress import Progress
from trainer.record import RunRecord
from trainer.session import Session

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

STEPS = 18
KILLS = 3  # of a schedule
SCHEDULES_A_ROLLBACK = 5  # so many schedules of test_harm.py for one more of these


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Some seeds; test_harm.py says what the options mean."""
    metafunc.parametrize("seed", seeds(metafunc.config, SCHEDULES_A_ROLLBACK))


@dataclass(frozen=True)
class Kill:
    """SIGKILL to `rank` in the first rollback of its attempt, at its `call`-th call of a function; or behind that one,
    `delay_s` after `steps` more steps, if the run is so long.
    """

    rank: int
    call: int | None = None
    steps: int = 0
    delay_s: float = 0.0


def counted(world: World, *args: Any) -> list[int]:
    """An attempt to its end; how many functions this rank called in each rollback."""
    counts: list[int] = []
    roll_back = Session.roll_back

    def counting(session: Session, step: int) -> int:
        counts.append(0)

        def count(_frame: FrameType, event: str, _argument: Any) -> None:
            counts[-1] += event == "call"

        sys.setprofile(count)
        try:
            return roll_back(session, step)
        finally:
            sys.setprofile(None)

    Session.roll_back = counting  # type: ignore[method-assign]
    work(world, *args, None)
    return counts


def killed(world: World, store: str, run: str, attempt: int, kill: Kill) -> None:
    """An attempt until it is killed."""
    roll_back = Session.roll_back

    def harmed(session: Session, step: int) -> int:
        if kill.call is None:
            to = roll_back(session, step)
            threading.Thread(target=kill_later, args=(session.progress, to), daemon=True).start()
            return to
        left = kill.call

        def call_down(_frame: FrameType, event: str, _argument: Any) -> None:
            nonlocal left
            left -= event == "call"
            if left < 0:
                kill_now(session.progress, step)

        sys.setprofile(call_down)
        try:
            return roll_back(session, step)
        finally:
            sys.setprofile(None)

    def kill_later(progress: Progress, to: int) -> None:
        while progress.step < min(to + kill.steps, STEPS - 3):
            time.sleep(0.0005)
        time.sleep(kill.delay_s)
        kill_now(progress, None)

    def kill_now(progress: Progress, diverged: int | None) -> None:
        landed = {**asdict(kill), "diverged": diverged, "step": progress.step, "phase": progress.phase}
        Path(store, f"landed-{run}-{attempt}").write_text(json.dumps(landed))
        os.kill(os.getpid(), signal.SIGKILL)

    if world.rank == kill.rank:
        Session.roll_back = harmed  # type: ignore[method-assign]
    work(world, store, run, attempt, None)


@pytest.mark.parametrize("determinism", ["exact", "cluster"])
def test_a_rollback_survives_kills(seed: int, determinism: str, tmp_path: Path) -> None:
    settings = {"determinism": determinism, "zero": {"stage": 3}, "steps": STEPS}
    plain = config(tmp_path, "plain", "rollback", NAN, **settings)
    expected = launched(plain)
    counts = run_workers(counted, 2, plain["store"], "plain", expected.next_attempt())
    assert len(events(expected, "rolled_back")) >= 2
    record = survived(config(tmp_path, "killed", "rollback", NAN, **settings), seed, counts)
    assert same_weights(record, expected, STEPS)
    assert curve(record) == curve(expected)


def survived(settings: dict[str, Any], seed: int, counts: list[list[int]]) -> RunRecord:
    """The run, killed KILLS times and then let go on to its end; in exact mode with one worker and with two.

    counts: of the calls in each rollback, by rank.
    """
    chance = random.Random(seed)
    exact = settings["determinism"] == "exact"
    record = launched(settings)
    for number in range(KILLS):
        workers = chance.choice((1, 2)) if exact else 2
        rank = chance.randrange(workers)
        kill = Kill(rank, call=chance.randrange(counts[rank][0] * 3 // 4))  # fewer calls where it is alone
        if number % 2:
            kill = Kill(rank, steps=chance.randrange(1, 10), delay_s=chance.uniform(0, 0.01))
        attempt = record.next_attempt()
        with pytest.raises(WorkerFailed):
            run_workers(killed, workers, settings["store"], settings["name"], attempt, kill)
        prove_kill(record, kill, attempt)
    workers = chance.choice((1, 2)) if exact else 2
    run_workers(work, workers, settings["store"], settings["name"], record.next_attempt(), None)
    return record


def prove_kill(record: RunRecord, kill: Kill, attempt: int) -> None:
    """It fell into a rollback, or between two steps behind one."""
    landed = json.loads(Path(record.config.store, f"landed-{record.name}-{attempt}").read_text())
    own = [event for event in record.events() if event["attempt"] == attempt]
    diverged = [event["step"] for event in own if event["kind"] == "diverged"]
    back = [event for event in own if event["kind"] == "rolled_back"]
    if kill.call is not None:
        assert diverged == [landed["diverged"]] and landed["step"] <= diverged[0], (landed, own)
    else:
        assert back and back[0]["to"] < landed["step"] < STEPS, (landed, own)
