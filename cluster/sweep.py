"""A sweep from its folder to its end: Ray, Tune, the trials, and what is told of them meanwhile.

Tune decides which trial runs when and which is given up; what it writes goes to a folder of this process that is
removed at the end, and is never read back. The trials' runs, and the sweep's folder, are what remains.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import queue
import signal
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from cluster.embedded_ray import EmbeddedRay
from cluster.progress_bar import Narrator, View
from cluster.ray_cluster import import_paths, join
from cluster.ray_placement import Placement, worker_needs
from cluster.search_space import split_space
from cluster.sweep_folder import SweepFolder
from cluster.sweep_mlflow import SweepInMlflow
from configs.errors import RunFailed, ShardyardError, Unreachable
from trainer.lease import Lease
from trainer.record import RunRecord

POLL_S = 0.2
END_TIMEOUT_S = 10.0
RAY_UNITS = 10_000  # Ray's fractions of a resource are ten-thousandths
_ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "RAY_AIR_NEW_OUTPUT": "0",  # which prints on stdout however quiet it is told to be
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS": "0",
    "TUNE_FORCE_TRIAL_CLEANUP_S": "86400",  # a trial that waits for its places to be left saves for as long as it takes
}


class Sweep:
    """A launched sweep; `wait` until its end. parallel: trials at a time at most, None: as many as have room.

    first_signal: what ended it early, None if nothing did. was_cut_off: not all trials could save. in_mlflow: whether
    MLflow has all of it.

    Raises:
        UsageError: another process runs this sweep, or a run has a trial's name.
    """

    def __init__(self, folder: SweepFolder, *, address: str | None, parallel: int | None, narrator: Narrator) -> None:
        import ray  # noqa: F401 - in this thread: signal handlers can only be set in the main one

        self.folder = folder
        self.first_signal: int | None = None
        self.was_cut_off = False
        self.in_mlflow = folder.base.config.tracking.mlflow is None
        self._address = address
        self._parallel = parallel
        self._narrator = narrator
        self._signals_seen = 0
        self._ended = threading.Event()  # Tune has; Ray is let go
        self._error: BaseException | None = None
        self._embedded: EmbeddedRay | None = None
        self._activity = "sweep: starting Ray"
        self._notices: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._lease = Lease.acquire(folder.store)
        try:
            folder.forget_stop()
            for trial in folder.trials():
                folder.create_run(trial)
            self._mlflow = SweepInMlflow(folder)
        except BaseException:
            self._lease.release()
            raise
        # Ray's processes end with the thread that starts them (see EmbeddedRay), so this one stays until they are gone.
        self._thread = threading.Thread(target=self._drive, name="sweep", daemon=True)

    def wait(self) -> None:
        """Run it to its end, telling how it goes. The first Ctrl-C saves and stops all trials, the second ends at once.

        Raises:
            Unreachable: Ray, or room for one trial, is not to be had.
            RunFailed: another process took the sweep over.
        """
        try:
            with self._signals():
                self._thread.start()
                while self._goes_on():
                    self._thread.join(POLL_S)
                    self._hand_on_signal()
                    self._narrate()
                if self._thread.is_alive():
                    self.was_cut_off = True
                    self._end_now()
                self._narrate()
        finally:
            self._narrator.close()
            with contextlib.suppress(ShardyardError):  # it goes stale by itself, and must not hide how the sweep ended
                self._lease.release()
        if self._lease.lost:
            raise RunFailed(
                "Another process took the sweep over, because this one was not heard of for too long. The trials here "
                "were ended; follow the other one."
            )
        if self._error is not None and not self.was_cut_off:
            raise self._error
        if self.was_cut_off and self.first_signal is None:
            raise Unreachable(
                "The Ray of this sweep is gone: its processes were killed, by hand or because memory ran out. Call the "
                "sweep again: its trials go on from their newest checkpoints."
            )

    def _hand_on_signal(self) -> None:
        """Let the trials know of it; a store that does not answer is asked again."""
        with contextlib.suppress(ShardyardError):
            if self.first_signal is not None and self.folder.stop_requested() is None:
                self.folder.request_stop(signal.Signals(self.first_signal).name)

    def _goes_on(self) -> bool:
        ray_is_alive = self._embedded is None or self._ended.is_set() or self._embedded.is_alive()
        return self._thread.is_alive() and ray_is_alive and self._signals_seen < 2 and not self._lease.lost

    def _end_now(self) -> None:
        if self._embedded is not None:
            self._embedded.stop()
        self._thread.join(END_TIMEOUT_S)

    def _narrate(self) -> None:
        while not self._notices.empty():
            self._narrator.notice(self._notices.get())
        if self._thread.is_alive():
            self._narrator.show(View("sweep: saving and stopping" if self._signals_seen else self._activity))

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Count Ctrl-C, SIGTERM and SIGUSR1 instead of being torn out of what is done at the moment."""

        def handle(number: int, _frame: FrameType | None) -> None:
            self._signals_seen += 1
            self.first_signal = self.first_signal or number

        previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    # --- in its thread

    def _drive(self) -> None:
        try:
            self._mlflow.start()
            with self._ray() as folder, tempfile.TemporaryDirectory(prefix="shardyard-tune-", dir=folder) as scratch:
                self._mlflow.wait_for_first_try()
                with _environment():
                    self._tune(scratch)
            self._activity = "sweep: sending the rest to MLflow"
            self.in_mlflow = self._mlflow.finish("KILLED" if self._signals_seen else "FINISHED", best(self.folder))
        except BaseException as error:
            self._error = error

    @contextlib.contextmanager
    def _ray(self) -> Iterator[Path | None]:
        """Ray, and a folder that goes with it, even after a kill; None where it is not our own."""
        import ray

        resources = self.folder.base.config.resources
        if self._address is not None:
            join(self._address)
        elif not ray.is_initialized():
            wanted = resources.workers * resources.threads
            cpus = max(wanted * (self._parallel or 1), os.cpu_count() or 1)
            self._embedded = EmbeddedRay(cpus, resources.gpus_per_worker > 0, import_paths())
        try:
            Placement(resources).refuse_impossible(resources.workers)
            yield None if self._embedded is None else self._embedded.folder
        finally:
            self._ended.set()
            if self._embedded is not None:
                self._embedded.stop()
            elif self._address is not None:
                ray.shutdown()

    def _tune(self, scratch: str) -> None:
        from ray import tune

        from cluster.sweep_trial import SweepTrial
        from cluster.sweep_watch import Stopping, Watch

        for name in ("ray.tune", "ray.train", "ray.air"):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # what it has to say is said here, once
        spec = self.folder.spec
        watch = Watch(self.folder, self._notices.put, self._tell_activity)
        resources = self.folder.base.config.resources
        # The launcher takes nothing, or its share of the head node's one token: then so many find room and no more.
        # Rounded down to what Ray counts in, or the last one would not.
        share = None if self._parallel is None else math.floor(RAY_UNITS / self._parallel) / RAY_UNITS
        launcher = {} if share is None else {"node:__internal_head__": share}
        places = tune.PlacementGroupFactory([launcher, *[worker_needs(resources)] * resources.workers])
        tune.Tuner(
            tune.with_resources(SweepTrial, places),
            param_space={
                "store": self.folder.root.uri,
                "sweep": self.folder.name,
                "cwd": os.getcwd(),
                "number": tune.grid_search(list(range(1, len(spec.trials) + 1))),
            },
            tune_config=tune.TuneConfig(scheduler=self._scheduler()),
            run_config=tune.RunConfig(
                name="tune",
                storage_path=scratch,
                verbose=0,
                callbacks=[watch],
                stop=Stopping(watch, lambda: self._signals_seen > 0),
            ),
        ).fit()

    def _scheduler(self) -> Any:
        from ray.tune.schedulers import FIFOScheduler

        from cluster.sweep_schedulers import Population, SuccessiveHalving

        spec, config = self.folder.spec, self.folder.base.config
        if spec.algorithm == "asha":
            assert config.evaluation.every is not None
            steps = max(values.get("steps", config.steps) for values in spec.trials)
            return SuccessiveHalving(self.folder, first_rung=config.evaluation.every, steps=steps)
        if spec.algorithm == "pbt":
            return Population(self.folder, split_space(spec.space)[1], self._notices.put)
        return FIFOScheduler()

    def _tell_activity(self, text: str) -> None:
        self._activity = text


def best(folder: SweepFolder) -> tuple[str, float] | None:
    """The run with the best last evaluation, and that; None where none has one."""
    sign = 1 if folder.spec.goal == "min" else -1
    found = [(sign * row["value"], row["run"]) for row in results(folder) if row["value"] is not None]
    return None if not found else (min(found)[1], sign * min(found)[0])


def results(folder: SweepFolder) -> list[dict[str, Any]]:
    """How each trial stands, the best first: {trial, run, status, step, value, values, error}.

    value: the metric at its last evaluation, None before the first, and where it is not a number.
    """
    rows = []
    for trial in folder.trials():
        record = RunRecord.open(folder.root.uri, trial.run)
        evaluated = [row for row in record.stitched() if folder.spec.metric in row]
        value = evaluated[-1][folder.spec.metric] if evaluated else None
        status, error = record.status(), folder.failure(trial.number)
        given_up = trial.stopped_at is not None and status != "finished"
        rows.append(
            {
                "trial": trial.number,
                "run": trial.run,
                "status": "failed" if error else f"given up after {trial.stopped_at:,}" if given_up else status,
                "step": evaluated[-1]["step"] if evaluated else 0,
                "value": value if value is not None and value == value else None,
                "values": trial.values,
                "error": error,
            }
        )
    sign = 1 if folder.spec.goal == "min" else -1
    return sorted(rows, key=lambda row: (row["value"] is None, sign * (row["value"] or 0.0), row["trial"]))


@contextlib.contextmanager
def _environment() -> Iterator[None]:
    previous = {name: os.environ.get(name) for name in _ENVIRONMENT}
    os.environ.update(_ENVIRONMENT)
    try:
        yield
    finally:
        for name, value in previous.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
