"""The loop's own decisions, with a session of fakes; what it makes of a real one is in test_session.py."""

from __future__ import annotations

import contextlib
import math
import threading
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.duration import parse_interval
from configs.errors import RunFailed
from configs.load import load
from configs.schema import RunConfig
from tests.configs.minimal import minimal
from trainer import loop
from trainer.divergence import Divergence, Finding, Limits
from trainer.engine import StepStats
from trainer.progress import Progress


@dataclass
class FakeSession:
    """Keeps what the loop did, in order."""

    config: RunConfig
    start_step: int = 0
    losses: dict[int, float] = field(default_factory=dict)
    norms: dict[int, float] = field(default_factory=dict)
    skipped: tuple[int, ...] = ()
    heals: bool = False  # a step that is repeated goes well
    stop_at: int | None = None
    done: list[Any] = field(default_factory=list)
    metrics: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    rank_rows: dict[int, dict[str, float]] = field(default_factory=dict)
    progress: Progress = field(default_factory=Progress)
    task: None = None
    early_stopping: None = None
    resumed: bool = False

    def __post_init__(self) -> None:
        self.divergence = Divergence(self.config.recovery)
        self.loader = SimpleNamespace(wait_s=0.0)
        self.engine = self
        self.world = SimpleNamespace(rank=0, size=1, device=torch.device("cpu"))

    def micro_batches(self, step: int) -> list[Any]:
        return []

    def train_step(
        self, task: None, micro_batches: Any, *, lr: float, step: int, votes: tuple[bool, ...], limits: Limits | None
    ) -> StepStats:
        assert (limits is not None) == (self.config.recovery.divergence == "skip")
        self.done.append(("step", step))
        votes = (votes[0] or step == self.stop_at, votes[1])  # another rank may be the one that stops
        loss = self.losses.pop(step, 1.0) if self.heals else self.losses.get(step, 1.0)
        norm = self.norms.get(step, 1.0)
        return StepStats(loss, norm, 8, 8, step in self.skipped, votes, 0.0, 0.0, 0.0, 0.0)

    def log_metrics(self, step: int, values: dict[str, float]) -> None:
        self.metrics.append((step, values))
        self.done.append(("validation" if "validation/loss" in values else "metrics", step))

    def log_rank(self, step: int, values: dict[str, float]) -> None:
        self.rank_rows[step] = values

    def log_divergence(self, finding: Finding) -> None:
        self.done.append(("diverged", finding.done))

    def roll_back(self, step: int) -> int:
        self.done.append(("rolled back", step))
        return max(at for at in steps_of("save", self) if at < step)

    def log_sample(self, step: int) -> None:
        self.done.append(("sample", step))

    def log_pictures(self, step: int) -> None:
        self.done.append(("pictures", step))

    def save(self, step: int, evaluation: Any = None) -> None:
        self.done.append(("save", step))

    def log_memory(self) -> None:
        pass

    def wait_until_saved(self, step: int) -> None:
        self.done.append(("saved", step))

    def device_metrics(self, step_s: float) -> dict[str, float]:
        return {}


@pytest.fixture(autouse=True)
def evaluations(monkeypatch: pytest.MonkeyPatch) -> list[int | None]:
    """How many examples each evaluation took."""
    sizes: list[int | None] = []

    def evaluate(session: FakeSession, num_examples: int | None) -> dict[str, float]:
        sizes.append(num_examples)
        return {"validation/loss": 1.0}

    monkeypatch.setattr(loop, "evaluate", evaluate)
    return sizes


def session(**changes: Any) -> Any:
    names = ("start_step", "losses", "norms", "skipped", "stop_at", "heals", "resumed")
    fakes = {key: changes.pop(key) for key in names if key in changes}
    return FakeSession(load(minimal(**changes)).config, **fakes)


def steps_of(kind: str, found: FakeSession) -> list[int]:
    return [step for name, step in found.done if name == kind]


def test_everything_is_done_when_it_is_due_and_all_of_it_at_the_end(evaluations: list[int | None]) -> None:
    found = session(steps=10, evaluation={"every": 4, "examples": 3}, checkpoint={"every": 3}, tracking={"every": 5})
    assert loop.train(found, threading.Event()) == loop.Outcome("finished", 10)
    assert steps_of("step", found) == list(range(10))
    assert steps_of("metrics", found) == [3, 5, 6, 9, 10], "at saves, too: what came before is not repeated"
    assert [*found.rank_rows] == [5, 10]
    assert steps_of("validation", found) == [4, 8, 10]
    assert evaluations == [3, 3, None]
    assert steps_of("save", found) == [3, 6, 9, 10]
    assert found.done[-4:] == [("save", 10), ("saved", 10), ("sample", 10), ("pictures", 10)]


def test_it_begins_where_the_session_stands() -> None:
    found = session(steps=10, start_step=7)
    loop.train(found, threading.Event())
    assert steps_of("step", found) == [7, 8, 9]
    finished = session(steps=10, start_step=10)
    assert loop.train(finished, threading.Event()) == loop.Outcome("finished", 10)
    assert steps_of("step", finished) == []
    assert steps_of("sample", finished) == [10]  # a run that ended between its last save and its sample still shows it


@pytest.mark.parametrize("asked_here", [True, False])
def test_a_stop_that_any_rank_asks_for_is_saved_after_the_step(asked_here: bool) -> None:
    stop = threading.Event()
    if asked_here:
        stop.set()
    found = session(steps=10, stop_at=None if asked_here else 4, checkpoint={"every": 100})
    done = 1 if asked_here else 5
    assert loop.train(found, stop) == loop.Outcome("stopped", done)
    assert found.done[-3:] == [("metrics", done), ("save", done), ("saved", done)]
    assert steps_of("validation", found) == []


def test_a_stop_in_the_last_step_is_the_end() -> None:
    found = session(steps=5, stop_at=4)
    assert loop.train(found, threading.Event()) == loop.Outcome("finished", 5)
    assert steps_of("save", found) == [5]


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_no_number_ends_the_run_before_it_is_saved(loss: float) -> None:
    found = session(steps=10, losses={3: loss}, checkpoint={"every": 2})
    with pytest.raises(RunFailed, match=r"loss of step 4 .*Lower optimizer\.lr"):
        loop.train(found, threading.Event())
    assert steps_of("save", found) == [2]


def test_a_gradient_that_is_no_number_ends_the_run() -> None:
    found = session(steps=10, norms={3: math.inf})
    with pytest.raises(RunFailed, match=r"gradient's norm of step 4 is inf"):
        loop.train(found, threading.Event())


def test_a_step_that_fp16_took_back_may_have_any_loss() -> None:
    found = session(steps=4, losses={1: math.inf}, norms={1: math.inf}, skipped=(1,))
    assert loop.train(found, threading.Event()).outcome == "finished"


def test_skip_goes_on_and_the_step_is_as_any_other() -> None:
    found = session(steps=6, losses={3: math.nan}, recovery={"divergence": "skip"}, checkpoint={"every": 2})
    assert loop.train(found, threading.Event()) == loop.Outcome("finished", 6)
    assert steps_of("diverged", found) == [4]
    assert steps_of("metrics", found) == [1, 2, 3, 4, 5, 6]
    assert steps_of("save", found) == [2, 4, 6]


@pytest.mark.parametrize("resumed", [True, False])
def test_rollback_repeats_from_the_checkpoint_and_logs_no_step_that_is_given_up(resumed: bool) -> None:
    found = session(
        steps=6,
        losses={4: math.nan, 1: math.inf} if not resumed else {4: math.nan},
        heals=True,
        resumed=resumed,
        recovery={"divergence": "rollback"},
        checkpoint={"every": 2},
    )
    assert loop.train(found, threading.Event()) == loop.Outcome("finished", 6)
    assert steps_of("rolled back", found) == ([5] if resumed else [2, 5])
    assert steps_of("metrics", found) == ([1, 2, 3, 4, 5, 6] if resumed else [1, 1, 2, 3, 4, 5, 6])
    assert steps_of("save", found) == ([2, 4, 6] if resumed else [0, 2, 4, 6])


@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_it_is_not_tried_for_ever(policy: str) -> None:
    found = session(
        steps=100,
        norms={step: math.inf for step in range(20, 40)},
        recovery={"divergence": policy},
        checkpoint={"every": 5},
    )
    with pytest.raises(RunFailed, match="10th divergence in a row, so it is not a few bad examples"):
        loop.train(found, threading.Event())
    assert len(steps_of("diverged", found)) == 10
    found = session(
        steps=100,
        norms={step: math.inf for step in range(20, 60) if step % 4},
        recovery={"divergence": "skip"},
    )
    loop.train(found, threading.Event())
    assert len(steps_of("diverged", found)) == 30


def test_saving_by_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(loop.time, "monotonic", lambda: now[0])
    clock = loop.SaveClock(parse_interval("90s"))
    for passed, expected in ((89.0, False), (1.0, True), (5.0, True)):
        now[0] += passed
        assert clock.due(1) is expected
    clock.saved()
    assert clock.due(2) is False


# --- what lies between two readings

VALUES = st.one_of(st.floats(-1e9, 1e9), st.sampled_from([math.nan, math.inf, -math.inf]))


@given(data=st.data(), every=st.integers(1, 12), save_every=st.integers(1, 15), skip=st.booleans())
@settings(deadline=None, max_examples=200)
def test_no_reading_hides_an_extreme(data: st.DataObject, every: int, save_every: int, skip: bool) -> None:
    """However rarely it is read, a metric's extremes are those of a run that records each step."""
    steps = data.draw(st.integers(1, 30))
    losses = dict(enumerate(data.draw(st.lists(VALUES, min_size=steps, max_size=steps))))
    norms = dict(enumerate(data.draw(st.lists(VALUES, min_size=steps, max_size=steps))))
    found = session(
        steps=steps,
        tracking={"every": every},
        checkpoint={"every": save_every},
        recovery={"divergence": "skip"},
        losses=losses if skip else {},
        norms={} if skip else norms,
    )
    with contextlib.suppress(RunFailed):  # too many in a row
        loop.train(found, threading.Event())
    for name, values in (("loss", losses), ("grad_norm", norms)):
        start = 0
        for step, row in found.metrics:
            if "loss" not in row:
                continue
            wanted = [values[each] if skip == (name == "loss") else 1.0 for each in range(start, step)]
            finite = [value for value in wanted if math.isfinite(value)]
            start = step
            if len(wanted) == 1:
                assert name + "_min" not in row
                continue
            assert row.get(name + "_min") == min(finite, default=None)
            assert row.get(name + "_max") == max(finite, default=None)
            assert row.get(name + "_bad", 0) == len(wanted) - len(finite)


def test_what_a_rollback_takes_back_is_no_extreme() -> None:
    found = session(
        steps=20,
        tracking={"every": 10},
        checkpoint={"every": 4},
        recovery={"divergence": "rollback"},
        losses={5: 5.0, 12: 7.0, 14: math.inf, 17: 3.0},
        heals=True,  # what was 7.0 is 1.0 the second time
    )
    loop.train(found, threading.Event())
    assert ("rolled back", 15) in found.done
    highs = {step: row.get("loss_max") for step, row in found.metrics if "loss" in row}
    assert highs == {4: 1.0, 8: 5.0, 10: 1.0, 12: 1.0, 16: 1.0, 20: 3.0}
    assert not any("loss_bad" in row for _, row in found.metrics)
