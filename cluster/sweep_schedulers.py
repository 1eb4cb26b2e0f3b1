"""How Ray Tune's schedulers decide about trials, with each decision written down before it takes effect.

They are told of evaluations that were made before a kill as well (`replayed`): these count in comparisons, but what
follows from them was decided then. (Of one that was recorded, but not judged yet, nothing follows: the trial is judged
at its next rung.)
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler

from cluster.search_space import Space, explore
from cluster.sweep_folder import Branch, SweepFolder
from cluster.sweep_watch import Unsaved
from configs.errors import ShardyardError
from trainer.record import RunRecord

# Of its trials ASHA lets the best third go on from each rung to the next, which is three times as far.
REDUCTION_FACTOR = 3
# The share of a population that goes on from the weights of the best, who are as many.
REPLACED_SHARE = 0.25


class SuccessiveHalving(Unsaved, ASHAScheduler):  # type: ignore[misc]
    """ASHA (Li et al. 2020, A System for Massively Parallel Hyperparameter Tuning).

    A trial carries the verdict out: it reads it in the sweep's folder, saves its run, and reports its end.
    """

    def __init__(self, folder: SweepFolder, *, first_rung: int, steps: int) -> None:
        super().__init__(
            time_attr="step",
            metric=folder.spec.metric,
            mode=folder.spec.goal,
            max_t=steps,
            grace_period=first_rung,
            reduction_factor=REDUCTION_FACTOR,
        )
        self._folder = folder

    def on_trial_result(self, controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Compare it with the others at its rung."""
        decision = super().on_trial_result(controller, trial, result)
        if decision == TrialScheduler.STOP and not result["replayed"]:
            self._folder.stop_trial(trial.config["number"], result["step"])
        return str(TrialScheduler.CONTINUE)


class Population(Unsaved, FIFOScheduler):  # type: ignore[misc]
    """Population based training (Jaderberg et al. 2017): all wait for each other after each evaluation, then the worst
    go on from the best ones' weights with values near theirs.

    A member that waits has given up its places, so that a population larger than the cluster takes turns. The decision
    depends on the evaluations, the seed and its number alone, not on who was first. Tune's own
    PopulationBasedTraining hands pickled checkpoints on, and waits for ever where the last member to arrive fails.
    """

    def __init__(self, folder: SweepFolder, space: Space, notice: Callable[[str], None]) -> None:
        super().__init__()
        self._folder = folder
        self._space = space
        self._notice = notice
        self._arrived: dict[Any, dict[str, Any]] = {}

    def on_trial_result(self, _controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Wait for the others."""
        self._arrived[trial] = result
        return str(TrialScheduler.PAUSE)

    def choose_trial_to_run(self, controller: Any) -> Any:
        """A member that has not arrived; where all have, they are let go on first."""
        members = controller.get_trials()
        training = [member for member in members if not member.is_finished()]
        waiting = [member for member in training if member.status == "PAUSED" and member in self._arrived]
        all_wait = len(members) == len(self._folder.spec.trials) and training and len(waiting) == len(training)
        # In a sweep that stops, who has ended has not failed: the next launch waits for everybody's evaluation.
        if all_wait and self._folder.stop_requested() is None:
            self._decide({member.config["number"]: self._arrived[member] for member in training})
            self._arrived.clear()
        ready = [member for member in training if member.status in ("PENDING", "PAUSED")]
        return next((member for member in ready if member not in self._arrived), None)

    def _decide(self, results: dict[int, dict[str, Any]]) -> None:
        metric, sign = self._folder.spec.metric, 1 if self._folder.spec.goal == "min" else -1
        number, step = len(self._folder.generations()) + 1, max(result["step"] for result in results.values())
        ranked = sorted(results, key=lambda member: (sign * results[member][metric], member))
        replaced = min(math.ceil(len(ranked) * REPLACED_SHARE), len(ranked) // 2)
        rng = random.Random(f"{self._folder.spec.seed}/generation {number}")
        branches = []
        for loser in ranked[len(ranked) - replaced :]:
            best = self._folder.trial(rng.choice(ranked[:replaced]))
            values = explore(self._space, best.values, rng)
            if _has_checkpoint(self._folder, best.run, step):
                run = f"{self._folder.name}-{loser:04d}-g{number + 1}"
                branches.append(Branch(loser, run, best.run, values))
            else:
                self._notice(
                    f"Trial {loser} does not go on from {best.run}@{step}, which is not there any more: evaluations "
                    "are too close together for this. Raise evaluation.every."
                )
        self._folder.add_generation(step, branches)
        for branch in branches:
            self._folder.create_run(self._folder.trial(branch.number))
            self._notice(f"Trial {branch.number} goes on from {branch.parent}@{step} as {branch.run}: {branch.values}")


def _has_checkpoint(folder: SweepFolder, run: str, step: int) -> bool:
    try:
        return any(found["step"] == step for found in RunRecord.open(folder.root.uri, run).checkpoints())
    except ShardyardError:
        return False
