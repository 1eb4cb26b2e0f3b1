"""From a recipe to a trained run: `train()` checks and launches, the Run that it returns can be awaited and stopped."""

from __future__ import annotations

import contextlib
import logging
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from cluster.ahead import Ahead
from cluster.commands.output import run_arguments
from cluster.controller import Outcome, State
from cluster.drive import POLL_S, Drive
from cluster.progress_bar import Narrator, View
from cluster.ray_group import BODY
from cluster.record_tail import RecordTail
from configs.errors import Interrupted, Preempted
from configs.schema import RunConfig
from data_pipelines.shards import Dataset
from data_pipelines.storage import Store
from trainer.record import RunRecord, recorded_datasets
from trainer.run_data import open_datasets
from trainer.run_datasets import open_recorded
from trainer.validate import Plan, load_recipe, validate

# What a worker's phases (trainer/progress.py) are called where no step is completed yet, or between steps.
PHASES = {
    "starting": "joining the other workers",
    "data": "opening the data set",
    "model": "building the model",
    "restore": "looking for a checkpoint to go on from",
    "forward": "in the first step",
    "backward": "in the first step",
    "optimizer": "in the first step",
    "evaluation": "evaluating",
    "checkpoint": "saving a checkpoint",
}


def train(
    recipe: str | Path | Mapping[str, Any] | RunConfig,
    overrides: Sequence[str] = (),
    *,
    address: str | None = None,
    json: bool = False,
    quiet: bool = False,
    body: str = BODY,
    device: str | None = None,
) -> Run:
    """Launch a run, or go on with the one of this name; it trains in the background until it is awaited or stopped.

    address: of a running Ray cluster ("auto", "host:6379"); None starts one on this machine for this run.
    json: narrate on stderr, since stdout belongs to the caller. quiet: do not narrate.
    body: "module:function" that each worker runs.
    device: of each worker, for the plan, by its name in devices.yaml; None is what this machine has.

    Raises:
        ConfigError: with everything that is wrong. NotFound: no such recipe or device.
        UsageError: it cannot fit the memory; with the cheapest change that does.
        UsageError: the run belongs to another config, or another launcher holds it.
        What goes wrong later comes out of `Run.wait`.
    """
    resolved = load_recipe(recipe, overrides)
    plan = validate(resolved)
    ahead = Ahead.of(plan, device, here=address is None)
    record = RunRecord.create(Store(resolved.config.store), resolved)
    stream = None if quiet else sys.stderr if json else sys.stdout
    narrator = None if stream is None else Narrator(stream)
    return Run(record, plan, ahead, address=address, body=body, narrator=narrator)


class Run:
    """A launched run. Its record outlives it; what is read here can be read later with RunRecord.open, too."""

    def __init__(
        self,
        record: RunRecord,
        plan: Plan,
        ahead: Ahead,
        *,
        address: str | None,
        body: str,
        narrator: Narrator | None,
    ) -> None:
        import ray  # noqa: F401 - in this thread: signal handlers can only be set in the main one

        # It warns that it leaves our signal handlers alone, which is what we want.
        logging.getLogger("ray._private.worker").setLevel(logging.ERROR)

        self.record = record
        self.plan = plan
        self._narrator = narrator
        self._interrupts = 0
        self._first_signal: int | None = None
        self._drive = Drive(record, plan, ahead, address=address, body=body, resume_command=self.resume_command)

    @property
    def name(self) -> str:
        """The run's name."""
        return self.record.name

    @property
    def outcome(self) -> Outcome | None:
        """How it ended; None before, and where it failed."""
        return self._drive.outcome

    @property
    def resume_command(self) -> str:
        """What to type to go on with the run."""
        return f"shardyard runs resume {run_arguments(self.name, self.record.config.store)}"

    def status(self) -> str:
        """queued, placing, running, restarting, stopping, finished, stopped or failed."""
        return self._drive.controller.state.value

    def metrics(self) -> list[dict[str, Any]]:
        """The curve of the weights that survive, one row a step: {attempt, step, time, <metric>: value}."""
        return self.record.stitched()

    def checkpoint(self) -> str | None:
        """Folder or URI of the newest checkpoint, None before the first."""
        checkpoints = self.record.checkpoints()
        return str(checkpoints[-1]["path"]) if checkpoints else None

    def sample(self) -> str | None:
        """The text that the model generated last, None if there is none."""
        samples = [event["text"] for event in self.record.events() if event["kind"] == "sample"]
        return samples[-1] if samples else None

    def datasets(self) -> list[Dataset]:
        """What the run trains on (several for a mixture), built now if it is not there yet."""
        known = recorded_datasets(self.record.store)
        return open_recorded(self.record, self.plan) if known else open_datasets(self.plan)

    def stop(self, reason: str = "asked by the launching program") -> None:
        """Let the run save a checkpoint and stop; `wait` returns then."""
        self._drive.controller.request_stop(reason)

    def wait(self) -> dict[str, Any]:
        """Wait for the run's end, telling how it goes meanwhile; returns how it ended.

        The first Ctrl-C (or SIGTERM, SIGUSR1) saves and stops, a further Ctrl-C ends at once; only the main thread gets
        them.

        Raises:
            RunFailed: names the first failure, the last checkpoint and the next command.
            Interrupted: stopped by Ctrl-C. Preempted: by SIGTERM or SIGUSR1, here or at a worker.
            Unreachable: Ray, or room for the workers, was not to be had.
        """
        tail = RecordTail(self.record)
        try:
            with self._signals():
                while self._drive.is_alive() and self._interrupts < 2:
                    self._drive.join(POLL_S)
                    self._narrate(tail)
                if self._interrupts >= 2:
                    self._drive.end_now()
                self._narrate(tail, last=True)
        finally:
            if self._narrator is not None:
                self._narrator.close()
        if self._drive.error is not None:
            raise self._drive.error
        if self._interrupts:
            kind = Interrupted if self._first_signal == signal.SIGINT else Preempted
            raise kind(self._farewell())
        assert self.outcome is not None
        if self.outcome.outcome == "stopped" and not self._drive.controller.stopping:
            raise Preempted(self._farewell())
        return self._summary(self.outcome)

    def _narrate(self, tail: RecordTail, last: bool = False) -> None:
        if self._narrator is None:
            return
        while not self._drive.notices.empty():
            self._narrator.notice(self._drive.notices.get())
        evaluations, warnings = tail.read(now=last)
        for warning in warnings:
            self._narrator.notice(warning)
        for step, values in evaluations:
            self._narrator.evaluation(step, values)
        workers = self._drive.controller.workers
        state = self._drive.controller.state
        if workers and state in (State.RUNNING, State.STOPPING) and not last:
            rank_0 = workers[0]
            activity = PHASES.get(rank_0.phase, rank_0.phase)
            if rank_0.step > 0 and rank_0.phase not in ("evaluation", "checkpoint"):
                activity = ""
            activity = "stopping" if state is State.STOPPING else activity
            self._narrator.show(View(activity, rank_0.step, rank_0.steps, rank_0.loss, rank_0.tokens_per_s))
        elif not last:
            self._narrator.show(View("restarting" if state is State.RESTARTING else self._drive.activity))

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Count Ctrl-C, SIGTERM and SIGUSR1 instead of being torn out of what is done at the moment."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def handle(number: int, _frame: FrameType | None) -> None:
            self._interrupts += 1
            self._first_signal = self._first_signal or number
            if self._interrupts == 1:
                self.stop("Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name)
            elif number == signal.SIGINT:  # a person, who means it; whoever schedules may tell us in several ways
                self._drive.controller.abort()

        previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _farewell(self) -> str:
        saved = self.record.checkpoints()
        where = f"saved after step {saved[-1]['step']}" if saved else "before its first checkpoint"
        return f"Run '{self.name}' was stopped, {where}. Go on with: {self.resume_command}"

    def _summary(self, outcome: Outcome) -> dict[str, Any]:
        rows = self.metrics()
        return {
            "run": self.name,
            "outcome": outcome.outcome,
            "step": outcome.step,
            "restarts": outcome.restarts,
            "metrics": {key: value for key, value in rows[-1].items() if key != "time"} if rows else {},
            "checkpoint": self.checkpoint(),
            "record": self.record.store.uri,
        }
