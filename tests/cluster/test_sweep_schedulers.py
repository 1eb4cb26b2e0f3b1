"""Who goes on, who is given up, and who goes on from another, by what trials report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cluster.sweep_folder import SweepFolder
from tests.cluster.sweeps import evaluated, made
from trainer.record import RunRecord

ROOT = Path(__file__).resolve().parents[2]


# --- a population, with members that only say what they are told


class Member:
    def __init__(self, number: int) -> None:
        self.trial_id = str(number)
        self.config = {"number": number}
        self.status = "PENDING"

    def is_finished(self) -> bool:
        return self.status in ("TERMINATED", "ERROR")


class Members:
    def __init__(self, count: int) -> None:
        self.members = [Member(number) for number in range(1, count + 1)]

    def get_trials(self) -> list[Member]:
        return self.members


def generation(sweep: SweepFolder, losses: dict[int, float | None]) -> list[dict[str, Any]]:
    """Everyone arrives at step 20 in this order with this loss (None: fails); what is decided then."""
    from cluster.search_space import split_space
    from cluster.sweep_schedulers import Population

    scheduler = Population(sweep, split_space(sweep.spec.space)[1], lambda _: None)
    controller = Members(len(losses))
    for number, loss in losses.items():
        member = controller.members[number - 1]
        assert not sweep.generations()
        assert scheduler.choose_trial_to_run(controller) not in (
            None,
            *(m for m in controller.members if m.status != "PENDING"),
        )
        if loss is None:
            member.status = "ERROR"
        else:
            assert scheduler.on_trial_result(controller, member, {"step": 20, "validation/loss": loss}) == "PAUSE"
            member.status = "PAUSED"
    assert scheduler.choose_trial_to_run(controller) in [m for m in controller.members if m.status == "PAUSED"]
    return sweep.generations()


@pytest.mark.parametrize("order", [(1, 2, 3, 4), (4, 3, 2, 1), (2, 4, 1, 3)])
def test_the_worst_of_a_population_goes_on_from_the_best_whoever_is_first(
    tmp_path: Path, order: tuple[int, ...]
) -> None:
    sweep = made(tmp_path, "pbt", 1e-3, 2e-3, 3e-3, 4e-3)
    losses = {1: 0.5, 2: 0.1, 3: 0.9, 4: 0.4}
    for number, loss in losses.items():
        evaluated(sweep, f"s-{number:04d}", {20: loss})
    (decided,) = generation(sweep, {number: losses[number] for number in order})
    (branch,) = decided["branches"]
    assert (decided["step"], branch["number"], branch["run"], branch["parent"]) == (20, 3, "s-0003-g2", "s-0002")
    assert branch["values"]["optimizer.lr"] == 1.6e-3
    assert RunRecord.open(sweep.root.uri, "s-0003-g2").config.optimizer.lr == branch["values"]["optimizer.lr"]


def test_a_population_does_not_wait_for_a_member_that_failed(tmp_path: Path) -> None:
    sweep = made(tmp_path, "pbt", 1e-3, 2e-3, 3e-3)
    for number in (1, 2):
        evaluated(sweep, f"s-{number:04d}", {20: 1.0 / number})
    (decided,) = generation(sweep, {1: 1.0, 2: 0.5, 3: None})
    assert [(branch["number"], branch["parent"]) for branch in decided["branches"]] == [(1, "s-0002")]


def test_a_population_decides_nothing_once_the_sweep_is_to_stop(tmp_path: Path) -> None:
    """Who saves and ends by that has not failed: at the next launch the others wait for it."""
    from cluster.sweep_schedulers import Population

    sweep = made(tmp_path, "pbt", 1e-3, 2e-3, 3e-3)
    scheduler, controller = Population(sweep, {}, lambda _: None), Members(3)
    for member in controller.members[:2]:
        assert scheduler.on_trial_result(controller, member, {"step": 20, "validation/loss": 1.0}) == "PAUSE"
        member.status = "PAUSED"
    sweep.request_stop("SIGINT")
    controller.members[2].status = "TERMINATED"
    assert scheduler.choose_trial_to_run(controller) is None
    assert sweep.generations() == []


def test_nobody_goes_on_from_a_checkpoint_that_is_gone(tmp_path: Path) -> None:
    sweep = made(tmp_path, "pbt")
    for number in (1, 2):
        evaluated(sweep, f"s-{number:04d}", {20: 1.0 / number}, saved=False)
    (decided,) = generation(sweep, {1: 1.0, 2: 0.5})
    assert decided == {"step": 20, "branches": []}


# --- successive halving


class Reports:
    """Tells a scheduler of evaluations; who is given up is written in the sweep's folder."""

    def __init__(self, sweep: SweepFolder) -> None:
        from cluster.sweep_schedulers import SuccessiveHalving

        self.sweep = sweep
        self.scheduler = SuccessiveHalving(sweep, first_rung=20, steps=180)
        self.members = [Member(number) for number in range(1, len(sweep.spec.trials) + 1)]
        for member in self.members:
            self.scheduler.on_trial_add(None, member)

    def tell(self, number: int, step: int, loss: float, *, replayed: bool = False) -> None:
        result = {"step": step, "validation/loss": loss, "replayed": replayed}
        assert self.scheduler.on_trial_result(None, self.members[number - 1], result) == "CONTINUE"

    def given_up(self) -> dict[int, int | None]:
        return {trial.number: trial.stopped_at for trial in self.sweep.trials() if trial.stopped_at is not None}


def test_who_is_not_among_the_best_third_at_a_rung_is_given_up(tmp_path: Path) -> None:
    told = Reports(made(tmp_path, "asha", 1e-3, 2e-3, 3e-3))
    told.tell(1, 20, 0.5)
    told.tell(2, 20, 0.4)
    told.tell(3, 20, 0.9)
    assert told.given_up() == {3: 20}
    told.tell(1, 40, 0.9)  # no rung
    assert told.given_up() == {3: 20}
    told.tell(1, 60, 0.3)
    told.tell(2, 60, 0.4)
    assert told.given_up() == {3: 20, 2: 60}


def test_what_was_decided_before_a_kill_is_not_decided_again_but_counts(tmp_path: Path) -> None:
    told = Reports(made(tmp_path, "asha", 1e-3, 2e-3, 3e-3))
    told.tell(1, 20, 0.4, replayed=True)
    told.tell(2, 20, 0.9, replayed=True)  # was the first there, so it went on
    assert told.given_up() == {}
    told.tell(3, 20, 0.6)
    assert told.given_up() == {3: 20}
