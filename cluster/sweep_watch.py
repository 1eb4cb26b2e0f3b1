"""What a sweep is told by Ray Tune: for its user to read, and to know when nothing trains any more."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

from ray.tune import Callback, Stopper

from cluster.sweep_folder import SweepFolder


class Unsaved:
    """Tune copies and pickles what it is given, to go on from after a crash. A sweep goes on from its own folder."""

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __deepcopy__(self, _memo: dict[int, Any]) -> Self:
        return self


class Watch(Unsaved, Callback):  # type: ignore[misc]
    """Says each evaluation and each end once, and how many trials train. training: how many do now."""

    def __init__(self, folder: SweepFolder, notice: Callable[[str], None], activity: Callable[[str], None]) -> None:
        self.training = 0
        self._folder = folder
        self._notice = notice
        self._activity = activity

    def on_step_begin(self, iteration: int, trials: list[Any], **_: Any) -> None:  # noqa: ARG002
        """Several times a second."""
        self.training = sum(trial.status == "RUNNING" for trial in trials)
        ended = sum(trial.is_finished() for trial in trials)
        self._activity(f"sweep: {ended} of {len(self._folder.spec.trials)} trials have ended, {self.training} at work")

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any) -> None:  # noqa: ARG002
        """An evaluation that is new."""
        if result["replayed"] or result["done"]:
            return
        stands = self._folder.trial(trial.config["number"])
        given_up = "; far behind the others, so it is given up" if stands.stopped_at == result["step"] else ""
        metric = self._folder.spec.metric
        self._notice(f"{stands.run} step {result['step']:,}: {metric} {result[metric]:.4g}{given_up}")

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:  # noqa: ARG002
        """It reported its end."""
        result, metric = trial.last_result, self._folder.spec.metric
        if not result["replayed"]:
            run = self._folder.trial(trial.config["number"]).run
            self._notice(f"{run} has ended after step {result['step']:,}: {metric} {result[metric]:.4g}")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:  # noqa: ARG002
        """It raised, or its process is gone: then nothing but this is left to say why."""
        number = trial.config["number"]
        if self._folder.failure(number) is None:
            self._folder.fail_trial(number, "Its launcher's process is gone: killed, or its node with it.")
        self._notice(f"{self._folder.trial(number).run} has failed: {self._folder.failure(number)}")


class Stopping(Unsaved, Stopper):  # type: ignore[misc]
    """Ends Tune once it was asked to stop and no trial is at work: those that are save and end by themselves."""

    def __init__(self, watch: Watch, asked: Callable[[], bool]) -> None:
        self._watch = watch
        self._asked = asked

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:  # noqa: ARG002
        """Whether one trial is to stop."""
        return False

    def stop_all(self) -> bool:
        """Whether all are to stop."""
        return self._asked() and self._watch.training == 0
