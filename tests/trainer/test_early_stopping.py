"""Runs that end once evaluations show no gain, with the weights of their best one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from configs.errors import UsageError
from configs.load import load
from configs.problems import ConfigError
from configs.schema import EarlyStoppingConfig
from tests.pool import run_workers
from tests.tiny import tiny_config
from tests.trainer.attempts import launched, state, work
from trainer.checkpoint import saved_steps
from trainer.early_stopping import EarlyStopping
from trainer.record import RunRecord

STEPS = 40


def counted(values: list[float], **settings: Any) -> tuple[list[bool], EarlyStopping]:
    stopping = EarlyStopping(EarlyStoppingConfig(**({"patience": 2} | settings)))
    better = [
        stopping.add(step, stopping.value_in({"validation/loss": value})) for step, value in enumerate(values, start=1)
    ]
    return better, stopping


@pytest.mark.parametrize(
    ("values", "settings", "better", "best_step", "ended"),
    [
        ([3.0, 2.0, 2.5, 2.0], {}, [True, True, False, False], 2, True),
        ([3.0, 2.0, 2.5, 1.0, 2.0], {}, [True, True, False, True, False], 4, False),
        ([0.1, 0.2, 0.3], {"goal": "max"}, [True, True, True], 3, False),
        ([1.0, 0.95, 0.91, 0.5], {"min_gain": 0.1}, [True, False, False, True], 4, False),
        ([float("nan"), float("inf")], {}, [False, False], 0, True),
        ([2.0, float("nan"), 1.0], {}, [True, False, True], 3, False),
    ],
)
def test_what_counts_as_a_gain(
    values: list[float], settings: Any, better: list[bool], best_step: int, ended: bool
) -> None:
    found, stopping = counted(values, **settings)
    assert found == better and stopping.best_step == best_step and stopping.ended == ended
    assert EarlyStopping.of(stopping.config, stopping.state()) == stopping


def test_another_metric_begins_anew_and_an_unknown_one_is_told_with_those_there_are() -> None:
    _, stopping = counted([3.0, 2.0, 2.5])
    other = EarlyStoppingConfig(metric="accuracy", goal="max", patience=1)
    assert EarlyStopping.of(other, stopping.state()) == EarlyStopping(other)
    with pytest.raises(UsageError, match=r"accuracy.*no such value. It has loss, perplexity"):
        EarlyStopping(other).value_in({"validation/loss": 1.0, "validation/perplexity": 2.0})


def test_it_needs_evaluations(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"early_stopping\.patience.*Set evaluation\.every"):
        load(tiny_config(tmp_path, early_stopping={"patience": 2}, evaluation={"every": None}))


# --- runs: a learning rate that soon makes it worse


def run_config(folder: Path, **changes: Any) -> dict[str, Any]:
    options = {
        "steps": STEPS,
        "optimizer": {"name": "sgd", "lr": 3.0, "momentum": 0.9, "clip_grad_norm": None},
        "schedule": {"name": "linear", "warmup_steps": STEPS, "min_lr_ratio": 0.0},
        "evaluation": {"every": 2, "examples": 8, "sample_tokens": 0},
        "early_stopping": {"patience": 2},
        "checkpoint": {"every": 3, "keep": 1},
    }
    return tiny_config(folder, **(options | changes))


def attempt(config: dict[str, Any], *, world_size: int = 1, stop_after: int | None = None) -> tuple[RunRecord, Any]:
    record = launched(config)
    number = record.next_attempt()
    outcomes = run_workers(work, world_size, config["store"], config["name"], number, stop_after)
    record.close()
    assert len(set(outcomes)) == 1
    return record, outcomes[0]


def best_of(record: RunRecord, patience: int = 2) -> tuple[int, int]:
    """The step of the best evaluation in the loop, and the step that should be the last, by the metrics on record."""
    losses = {}
    for row in record.metrics_table():
        if "validation/loss" in row and row["step"] not in losses:  # the last step has two: the first is the loop's
            losses[row["step"]] = row["validation/loss"]
    best, waited = min(losses), 0
    for step, loss in losses.items():
        if step == min(losses):
            continue
        if loss < losses[best]:
            best, waited = step, 0
        else:
            waited += 1
        if waited == patience:
            return best, step
    return best, max(losses)


@pytest.mark.distributed
def test_it_ends_with_the_best_weights_and_keeps_their_checkpoint(tmp_path: Path) -> None:
    record, outcome = attempt(run_config(tmp_path), world_size=2)
    best, last = best_of(record)
    assert best < last < STEPS and outcome == ("finished", last)
    assert saved_steps(record.store.child("checkpoints")) == [last, best]
    (told,) = [event for event in record.events() if event["kind"] == "best_evaluation"]
    assert (told["step"], told["best_step"]) == (last, best)
    kept, ended = state(record, best), state(record, last)
    assert kept.keys() == ended.keys()
    assert all(torch.equal(kept[name], values) for name, values in ended.items())


@pytest.mark.distributed
def test_stopped_anywhere_it_ends_the_same_and_once_ended_it_stays(tmp_path: Path) -> None:
    whole, outcome = attempt(run_config(tmp_path / "whole"))
    _, last = outcome
    config = run_config(tmp_path / "cut")
    for step in range(0, last - 2, 3):
        cut, found = attempt(config, stop_after=step)
        assert found == ("stopped", step + 1)
    cut, found = attempt(config)
    assert found == outcome
    expected, values = state(whole, last), state(cut, last)
    assert all(torch.equal(expected[name], value) for name, value in values.items())
    again, found = attempt(config)
    assert found == outcome
    assert all(torch.equal(expected[name], value) for name, value in state(again, last).items())


@pytest.mark.distributed
def test_a_run_that_reaches_its_last_step_ends_with_its_best_weights_too(tmp_path: Path) -> None:
    record, outcome = attempt(run_config(tmp_path, early_stopping={"patience": STEPS}, optimizer={"lr": 0.3}))
    assert outcome == ("finished", STEPS)
    best, _ = best_of(record, STEPS)
    kept, ended = state(record, best), state(record, STEPS)
    assert all(torch.equal(kept[name], values) for name, values in ended.items())
