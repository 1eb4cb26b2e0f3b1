"""What a spike is; and whole runs with poisoned examples that skip them, or roll back and leave them out."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from configs.errors import RunFailed
from configs.schema import RecoveryConfig
from tests.pool import WorkerFailed, run_workers
from tests.trainer.attempts import curve, data_state, launched, state, train, work
from tests.trainer.test_ragged_runs import config as signals
from trainer.distributed import World
from trainer.divergence import Divergence
from trainer.engine import StepStats
from trainer.record import RunRecord

# --- what diverges


def stats(loss: float, norm: float | None = 1.0, skipped: bool = False) -> StepStats:
    return StepStats(loss, norm, 8, 8, skipped, (), 0.0, 0.0, 0.0, 0.0)


values = st.floats(0.01, 100) | st.sampled_from([math.nan, math.inf])


@given(st.lists(st.tuples(values, values | st.none()), max_size=120), st.sampled_from([None, 1.5, 10.0]))
def test_a_step_is_compared_with_the_median_of_those_before(steps: list[Any], factor: float | None) -> None:
    found = Divergence(RecoveryConfig(divergence="skip", spike_factor=factor))
    losses: list[float] = []
    norms: list[float] = []
    for done, (loss, norm) in enumerate(steps, start=1):
        wrong = None
        for what, value, before in (("gradient's norm", norm, norms), ("loss", loss, losses)):
            spikes = factor is not None and len(before) >= 16
            if value is not None and (
                not math.isfinite(value) or (spikes and value > factor * statistics.median(before[-64:]))
            ):
                wrong = what
        finding = found.judge(done, stats(loss, norm))
        assert (finding and finding.what) == wrong
        if wrong is None:
            losses.append(loss)
            norms += [] if norm is None else [norm]
        found = Divergence.of(found.config, json.loads(json.dumps(found.state())))


def test_a_falling_loss_and_a_negative_one_are_no_spikes() -> None:
    found = Divergence(RecoveryConfig(spike_factor=1.01))
    for done in range(1, 200):
        assert found.judge(done, stats(100 * 0.97**done)) is None
    found = Divergence(RecoveryConfig(spike_factor=2.0))
    for done in range(1, 200):
        assert found.judge(done, stats(-1.0 if done % 2 else -5.0)) is None


def test_what_fp16_takes_back_is_not_remembered() -> None:
    found = Divergence(RecoveryConfig(spike_factor=2.0))
    for done in range(1, 40):
        assert found.judge(done, stats(math.inf, math.inf, skipped=True)) is None
    assert found.losses == []


def test_a_run_that_keeps_returning_to_the_same_step_ends() -> None:
    """What it repeats on the way there goes well each time, and says nothing."""
    found = Divergence(RecoveryConfig(divergence="rollback"))
    with pytest.raises(RunFailed, match=r"The loss of step 5 is nan: the 10th divergence in a row"):
        for _ in range(20):
            for done in range(1, 5):
                assert found.judge(done, stats(1.0)) is None
            finding = found.judge(5, stats(math.nan))
            assert finding is not None
            found.count(finding)


def test_a_good_step_beyond_the_last_divergence_ends_the_count() -> None:
    found = Divergence(RecoveryConfig(divergence="skip"))
    for done in range(1, 100):
        finding = found.judge(done, stats(math.nan if done % 2 else 1.0))
        if finding is not None:
            found.count(finding)
    assert found.in_a_row == 1  # of step 99


# --- whole runs

NAN = {"poison": None, "poisoned": (17,)}
SPIKE = {"poison": -1e4, "poisoned": (17,)}
STEPS = 31
TASK = {"name": "tests.trainer.ragged_task", "from_random_moments": False}


def config(folder: Path, name: str, policy: str, data: dict[str, Any], **changes: Any) -> dict[str, Any]:
    recovery = {"divergence": policy, "spike_factor": 50.0 if data is SPIKE else None}
    settings = {"steps": STEPS, "checkpoint": {"every": 7, "keep": None}, "evaluation": {"every": None}} | changes
    return signals(folder, data, name=name, task=TASK, recovery=recovery, **settings)


def events(record: RunRecord, kind: str) -> list[dict[str, Any]]:
    return [event for event in record.events() if event["kind"] == kind]


def same_weights(one: RunRecord, other: RunRecord, step: int) -> bool:
    return same_state(state(one, step), state(other, step))


def same_state(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


class Without:
    """An order that has never held some positions [start, stop)."""

    end = None

    def __init__(self, order: Any, left_out: list[list[int]]) -> None:
        gone = {position for start, stop in left_out for position in range(start, stop)}
        self._kept = np.array([position for position in range(2000) if position not in gone])
        self._order = order
        self.num_examples = order.num_examples

    def sample_ids(self, positions: np.ndarray) -> np.ndarray:
        ids: np.ndarray = self._order.sample_ids(self._kept[positions])
        return ids


def oracle_work(world: World, left_out: list[list[int]], *args: Any) -> Any:
    from trainer import run_data

    in_buckets = run_data._in_buckets
    run_data._in_buckets = lambda *given: Without(in_buckets(*given), left_out)  # type: ignore[assignment]
    return work(world, *args)


def oracle(settings: dict[str, Any], left_out: list[list[int]]) -> RunRecord:
    record = launched(settings)
    run_workers(oracle_work, 2, left_out, settings["store"], settings["name"], record.next_attempt(), None)
    record.close()
    return record


def stopped(settings: dict[str, Any], after: int) -> None:
    """An attempt that is asked to stop when it has first completed so many steps."""
    record = launched(settings)
    outcomes = run_workers(work, 2, settings["store"], settings["name"], record.next_attempt(), after)
    assert {outcome for outcome, _ in outcomes} == {"stopped"}
    record.close()


@pytest.mark.distributed
def test_stop_names_the_step_and_saves_nothing_of_it(tmp_path: Path) -> None:
    with pytest.raises(WorkerFailed, match=r"The loss of step \d+ is nan\. .* recovery.divergence=skip"):
        train(config(tmp_path, "stops", "stop", NAN), world_size=1)
    record = RunRecord.open(str(tmp_path / "runs"), "stops")
    (event,) = events(record, "diverged")
    assert event["policy"] == "stop" and event["value"] == "NaN" and len(event["sample_ids"]) == 5
    assert all(each["step"] < event["step"] for each in record.checkpoints())


@pytest.mark.slow
@pytest.mark.distributed
def test_stop_at_a_spike(tmp_path: Path) -> None:
    with pytest.raises(WorkerFailed, match=r"The loss of step \d+ is .*, above its limit of"):
        train(config(tmp_path, "spikes", "stop", SPIKE), world_size=1)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("data", "steps"),
    [(NAN, 18), pytest.param(NAN, 31, marks=pytest.mark.slow), pytest.param(SPIKE, 31, marks=pytest.mark.slow)],
)
def test_rollback_is_a_run_without_those_examples(tmp_path: Path, data: dict[str, Any], steps: int) -> None:
    record = train(config(tmp_path, "rolls", "rollback", data, steps=steps), world_size=2)
    diverged, back = events(record, "diverged"), events(record, "rolled_back")
    assert len(diverged) >= 2 and [event["step"] for event in back] == [event["step"] for event in diverged]
    assert all(event["to"] == (event["step"] - 1) // 7 * 7 for event in back)
    assert [event["left_out"] for event in back] == [event["positions"] for event in diverged]
    assert data_state(record, steps)["examples_seen"] == 5 * (steps + len(back))

    plain = oracle(config(tmp_path, "plain", "stop", data, steps=steps), [event["left_out"] for event in back])
    assert [row["step"] for row in curve(record)] == list(range(1, steps + 1))
    assert same_weights(record, plain, steps)
    for row, other in zip(curve(record), curve(plain), strict=True):
        assert row["loss"] == other["loss"] and row["grad_norm"] == other["grad_norm"]

    # Stopped in the step that diverges, behind a rollback before the next checkpoint, or later; and resumed.
    first = back[0]["step"]
    for at in (first,) if steps < 20 else (first - 1, first, first + 7):
        settings = config(tmp_path, f"stopped-{at}", "rollback", data, steps=steps)
        stopped(settings, at)
        assert same_weights(train(settings, world_size=2), record, steps), at


@pytest.mark.distributed
def test_skip_makes_no_update(tmp_path: Path) -> None:
    record = train(config(tmp_path, "skips", "skip", SPIKE, checkpoint={"every": 1, "keep": None}), world_size=2)
    diverged = events(record, "diverged")
    assert diverged
    for event in diverged:
        assert event["policy"] == "skip" and event["value"] > event["limit"] and event["examples"] == 5
        assert same_state(state(record, event["step"] - 1), state(record, event["step"]))


@pytest.mark.slow
@pytest.mark.distributed
def test_skip_resumed_remembers_what_a_spike_is(tmp_path: Path) -> None:
    record = train(config(tmp_path, "skips", "skip", SPIKE), world_size=2)
    diverged = events(record, "diverged")
    again = config(tmp_path, "again", "skip", SPIKE)
    stopped(again, diverged[0]["step"] - 2)
    assert same_weights(train(again, world_size=2), record, STEPS)
