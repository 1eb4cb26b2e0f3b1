"""One trial of a sweep: an actor of Ray Tune that launches the trial's run, and reports its evaluations one by one.

It trains nothing itself: a run has workers of its own, in the places that Tune reserved for the trial. What the trial
is, and whether it is to go on, stands in the sweep's folder (cluster/sweep_folder.py); what it has reached, in its
run's record. So an evaluation from before a kill is reported again, without training, and the run is launched only
where the record ends.

A trial ends by its own report, with its run saved. Tune would give an actor that it ends 15 s for that at most.
"""

from __future__ import annotations

import math
import os
import time
from typing import Any

from ray.train._internal.session import _TrainingResult  # what Tune's own Trainable.save returns
from ray.tune import Trainable

from cluster.ahead import Ahead
from cluster.launch import Run
from cluster.ray_group import BODY
from cluster.sweep_folder import SweepFolder
from configs.errors import Preempted, UsageError
from data_pipelines.storage import Store
from trainer.background import Background
from trainer.lease import STALE_AFTER_S
from trainer.record import RunRecord
from trainer.record_rows import Cursor, decode_value, read_rows
from trainer.validate import validate

POLL_S = 0.5
# Worse than all; an infinite number would make Tune's percentiles NaN.
_WORST = 1e300


class SweepTrial(Trainable):  # type: ignore[misc]
    """config: {store, sweep, number, cwd}. A report: {step, <metric>, replayed, done}.

    replayed: the evaluation is of an earlier launch, in which what follows from it was decided.
    """

    def setup(self, config: dict[str, Any]) -> None:
        """Look up what the trial is."""
        if os.path.isdir(config["cwd"]):  # paths in a recipe are relative to where the command was given
            os.chdir(config["cwd"])
        self._folder = SweepFolder.open(Store(config["store"]), config["sweep"])
        self._spec = self._folder.spec
        self._trial = self._folder.trial(config["number"])
        self._record = RunRecord.open(config["store"], self._trial.run)
        self._reported = self._trial.after
        self._evaluations: dict[int, float] = {}
        self._metrics: Cursor | None = None
        self._run: Run | None = None
        self._ending: Background | None = None

    def step(self) -> dict[str, Any]:
        """The next evaluation, once the run has it; the last report says done.

        Raises what the run failed of.
        """
        try:
            return self._next_report()
        except Exception as error:
            self._folder.fail_trial(self._trial.number, str(error) or type(error).__name__)
            raise

    def save(self, checkpoint_dir: str | None = None) -> _TrainingResult:  # noqa: ARG002
        """Stop the run, which saves itself: Tune is about to give the trial's places to another. Tune keeps nothing."""
        self._stop_run()
        return _TrainingResult(checkpoint=None, metrics=dict(self._last_result or {}))

    def cleanup(self) -> None:
        """Leave nothing running."""
        self._stop_run()

    def _next_report(self) -> dict[str, Any]:
        while True:
            if self._folder.stop_requested():
                self._stop_run()
                return self._report(self._reported, done=True)
            given_up_at = self._folder.trial(self._trial.number).stopped_at
            if given_up_at is not None:
                self._stop_run()
            ended = given_up_at is not None or self._ended()  # before the record is read: what it says then is all
            self._read_evaluations()
            counted = [step for step in self._evaluations if given_up_at is None or step <= given_up_at]
            last = max(counted, default=0)
            for step in sorted(counted):
                is_final = step == last and (ended or step >= self._record.config.steps)
                if step > self._reported and not is_final and self._may_report(step, ended):
                    return self._report(step)
            if ended:
                self._folder.fail_trial(self._trial.number, None)  # of a launcher that was killed after its run's end
                return self._report(last, done=True)
            if self._run is None:
                self._launch()
            time.sleep(POLL_S)

    def _report(self, step: int, *, done: bool = False) -> dict[str, Any]:
        self._reported = step
        value = self._evaluations.get(step, math.nan)
        worst = _WORST if self._spec.goal == "min" else -_WORST
        score = value if math.isfinite(value) else worst
        return {"step": step, self._spec.metric: score, "replayed": self._run is None, "done": done}

    def _may_report(self, step: int, ended: bool) -> bool:
        """In a population another may go on from an evaluated step: it is told of once it is saved."""
        if self._spec.algorithm != "pbt" or ended:
            return True
        return max((checkpoint["step"] for checkpoint in self._record.checkpoints()), default=0) >= step

    def _read_evaluations(self) -> None:
        """Evaluations that are new in the record; of a step that was repeated the latest."""
        rows, self._metrics = read_rows(self._record.store, "metrics", self._metrics)
        for row in rows:
            names = [name for name in row["values"] if name.startswith("validation/")]
            if names and self._spec.metric not in row["values"]:
                raise UsageError(
                    f"Run '{self._record.name}' has no {self._spec.metric}: its evaluation gives {', '.join(names)}. "
                    "Start another sweep with --metric one of these."
                )
            if names:
                self._evaluations[row["step"]] = decode_value(row["values"][self._spec.metric])

    # --- its run

    def _ended(self) -> bool:
        """Whether the run has nothing left to train, or was stopped by somebody else; raises what it failed of."""
        if self._ending is None:
            return self._record.status() == "finished"
        if not self._ending.done.is_set():
            return False
        if self._ending.error is not None and not isinstance(self._ending.error, Preempted):
            raise self._ending.error
        return True

    def _launch(self) -> None:
        deadline = time.monotonic() + STALE_AFTER_S
        while self._record.holder() is not None and time.monotonic() < deadline:
            time.sleep(POLL_S)  # its launcher was killed on another machine, and is still taken to be at work
        self._folder.fail_trial(self._trial.number, None)
        plan = validate(self._record.resolved)
        run = self._run = Run(self._record, plan, Ahead(plan, None, None), address=None, body=BODY, narrator=None)
        self._ending = Background(lambda: _wait(run))

    def _stop_run(self) -> None:
        if self._run is not None and self._ending is not None:
            self._run.stop("its sweep goes on without it")
            self._ending.done.wait()


def _wait(run: Run) -> None:
    run.wait()
