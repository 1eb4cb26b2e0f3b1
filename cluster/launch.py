"""From a recipe to a trained run: `train()` checks and launches, the Run that it returns can be awaited and stopped."""

from __future__ import annotations

import atexit
import contextlib
import logging
import queue
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from cluster.controller import Controller, Outcome, State
from cluster.mlflow_copy import MlflowCopy
from cluster.progress_bar import Narrator, View
from cluster.ray_group import BODY, IMPORTS, RayWorkerGroup
from cluster.record_tail import RecordTail
from configs.errors import Interrupted, UsageError
from configs.load import load
from configs.schema import RunConfig
from data_pipelines.build import ensure_dataset
from data_pipelines.shards import Dataset
from data_pipelines.storage import Store
from trainer.record import RunRecord
from trainer.validate import Plan, validate

POLL_S = 0.2
END_TIMEOUT_S = 10.0
MLFLOW_TIMEOUT_S = 30.0
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
_one_at_a_time = threading.Lock()


def train(
    recipe: str | Path | Mapping[str, Any] | RunConfig,
    overrides: Sequence[str] = (),
    *,
    address: str | None = None,
    json: bool = False,
    quiet: bool = False,
    body: str = BODY,
) -> Run:
    """Launch a run, or go on with the one of this name; it trains in the background until it is awaited or stopped.

    address: of a running Ray cluster ("auto", "host:6379"); None starts one on this machine for this run.
    json: narrate on stderr, since stdout belongs to the caller. quiet: do not narrate.
    body: "module:function" that each worker runs.

    Raises:
        ConfigError: with everything that is wrong. NotFound: no such recipe.
        UsageError: the run belongs to another config, or another launcher holds it.
        What goes wrong later comes out of `Run.wait`.
    """
    resolved = load(recipe, overrides)
    plan = validate(resolved)
    record = RunRecord.create(Store(resolved.config.store), resolved)
    stream = None if quiet else sys.stderr if json else sys.stdout
    return Run(record, plan, address=address, body=body, narrator=None if stream is None else Narrator(stream))


class Run:
    """A launched run. Its record outlives it; what is read here can be read later with RunRecord.open, too."""

    def __init__(
        self, record: RunRecord, plan: Plan, *, address: str | None, body: str, narrator: Narrator | None
    ) -> None:
        import ray  # noqa: F401 - in this thread: signal handlers can only be set in the main one

        # It warns that it leaves our signal handlers alone, which is what we want.
        logging.getLogger("ray._private.worker").setLevel(logging.ERROR)

        self.record = record
        self.plan = plan
        self.outcome: Outcome | None = None
        self._config: RunConfig = record.config
        self._narrator = narrator
        self._notices: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._activity = "starting Ray"
        self._error: BaseException | None = None
        self._interrupts = 0
        self._copying = False
        self._lease = record.acquire_lease()
        if not _one_at_a_time.acquire(blocking=False):
            self._lease.release()
            raise UsageError(
                "This process is training another run: Ray serves one at a time in a process. Wait for it first, or "
                "launch this one from a process of its own."
            )
        store_uri = Store(self._config.store).uri
        self._group = RayWorkerGroup(
            self._config.resources,
            store_uri,
            self.name,
            address=address,
            body=body,
            imports=_imports(plan) if body == BODY else [],
            notice=self._notices.put,
        )
        self._controller = Controller(
            self._group,
            record,
            self._config.recovery,
            resume_command=self.resume_command,
            lease_lost=lambda: self._lease.lost,
            notice=self._notices.put,
        )
        self._notices.put(plan.headline())
        for warning in plan.warnings():
            self._notices.put(warning)
        atexit.register(self._end_now)
        # Ray's processes end with the thread that starts them (see EmbeddedRay), so this one stays until they are gone.
        self._thread = threading.Thread(target=self._drive, name="run", daemon=True)
        self._thread.start()

    @property
    def name(self) -> str:
        """The run's name."""
        return self._config.name

    @property
    def resume_command(self) -> str:
        """What to type to go on with the run."""
        store = [] if self._config.store == RunConfig.model_fields["store"].default else ["--store", self._config.store]
        return shlex.join(["shardyard", "runs", "resume", self.name, *store])

    def status(self) -> str:
        """queued, placing, running, restarting, stopping, finished, stopped or failed."""
        return self._controller.state.value

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

    def dataset(self) -> Dataset:
        """The data set that the run trains on, built now if it is not there yet."""
        return ensure_dataset(Store(self._config.store), self._config.data, self.plan.tokenizer)

    def stop(self, reason: str = "asked by the launching program") -> None:
        """Let the run save a checkpoint and stop; `wait` returns then."""
        self._controller.request_stop(reason)

    def wait(self) -> dict[str, Any]:
        """Wait for the run's end, telling how it goes meanwhile; returns how it ended.

        The first Ctrl-C (or SIGTERM) saves and stops, the second ends at once; only the main thread gets them.

        Raises:
            RunFailed: names the first failure, the last checkpoint and the next command.
            Interrupted: stopped by a signal. Unreachable: Ray, or room for the workers, was not to be had.
        """
        tail = RecordTail(self.record)
        try:
            with self._signals():
                while self._thread.is_alive() and self._interrupts < 2:
                    self._thread.join(POLL_S)
                    self._narrate(tail)
                if self._interrupts >= 2:
                    self._end_now()
                self._narrate(tail, last=True)
        finally:
            if self._narrator is not None:
                self._narrator.close()
        if self._error is not None:
            raise self._error
        if self._interrupts:
            raise Interrupted(self._farewell())
        assert self.outcome is not None
        return self._summary(self.outcome)

    # --- in the run's own thread

    def _drive(self) -> None:
        copy = MlflowCopy(self.record)
        try:
            if self.record.status() == "finished":
                self._notices.put(f"Run '{self.name}' has finished already; there is nothing left to train.")
                self.outcome = Outcome("finished", self._config.steps, 0)
                return
            with self._group_of_workers():
                self.outcome = self._train(copy)
                self._activity = "ending the workers"
        except BaseException as error:
            self._error = error
        finally:
            self.record.close()
            if self._copying:
                self._activity = "sending the rest to MLflow"
                if not copy.drain(MLFLOW_TIMEOUT_S):
                    self._notices.put(f"MLflow has not got everything yet: shardyard runs sync {self.name}")
            with contextlib.suppress(Exception):  # it goes stale by itself, and must not hide how the run ended
                self._lease.release()
            _one_at_a_time.release()
            atexit.unregister(self._end_now)

    @contextlib.contextmanager
    def _group_of_workers(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            self._controller.fail(error)
            raise
        finally:
            self._group.close()

    def _train(self, copy: MlflowCopy) -> Outcome:
        # The data set is built while Ray starts and the workers import.
        build = _Background(self._build)
        self._group.open()
        self._controller.prepare()
        while not build.done.wait(POLL_S) and not self._controller.stopping:
            pass
        if build.error is not None:
            raise build.error
        self._activity = "importing in the workers"
        if not self._controller.stopping:  # MLflow's imports take seconds, which nobody waits for who stops it now
            copy.start()
            self._copying = True
        return self._controller.run()

    def _build(self) -> None:
        def progress(stage: str, documents: int) -> None:
            self._activity = f"building the data set: {stage}, {documents:,} documents"

        tokenizer = self.plan.tokenizer
        dataset = ensure_dataset(Store(self._config.store), self._config.data, tokenizer, progress)
        self.record.update_lineage(data_fingerprint=dataset.fingerprint)
        self._activity = "starting workers"

    # --- in the waiting thread

    def _narrate(self, tail: RecordTail, last: bool = False) -> None:
        if self._narrator is None:
            return
        while not self._notices.empty():
            self._narrator.notice(self._notices.get())
        evaluations, warnings = tail.read(now=last)
        for warning in warnings:
            self._narrator.notice(warning)
        for step, values in evaluations:
            self._narrator.evaluation(step, values)
        workers = self._controller.workers
        state = self._controller.state
        if workers and state in (State.RUNNING, State.STOPPING) and not last:
            rank_0 = workers[0]
            activity = PHASES.get(rank_0.phase, rank_0.phase)
            if rank_0.step > 0 and rank_0.phase not in ("evaluation", "checkpoint"):
                activity = ""
            activity = "stopping" if state is State.STOPPING else activity
            self._narrator.show(View(activity, rank_0.step, rank_0.steps, rank_0.loss, rank_0.tokens_per_s))
        elif not last:
            self._narrator.show(View("restarting" if state is State.RESTARTING else self._activity))

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Count Ctrl-C and SIGTERM instead of being torn out of what is done at the moment."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def handle(number: int, _frame: FrameType | None) -> None:
            self._interrupts += 1
            if self._interrupts == 1:
                self.stop("Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name)
            else:
                self._controller.abort()

        previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _end_now(self) -> None:
        """End at once and wait, within reason, until nothing of the run is left."""
        self._controller.abort()
        self._thread.join(END_TIMEOUT_S)

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


def _imports(plan: Plan) -> list[str]:
    return [*IMPORTS, *(part.__name__ for part in (plan.task.module, plan.model.module, plan.source))]


class _Background:
    """One call in a thread of its own. done: it has ended; error: what it raised."""

    def __init__(self, call: Callable[[], None]) -> None:
        self.done = threading.Event()
        self.error: BaseException | None = None
        self._call = call
        # A daemon: a build that is no longer wanted must not keep the program alive, and leaves nothing half-made.
        threading.Thread(target=self._run, name="background", daemon=True).start()

    def _run(self) -> None:
        try:
            self._call()
        except BaseException as error:
            self.error = error
        finally:
            self.done.set()
