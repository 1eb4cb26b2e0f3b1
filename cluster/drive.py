"""A launched run from its lease to its end, in a thread of its own: Ray, data set, workers, the copy in MLflow."""

from __future__ import annotations

import atexit
import contextlib
import queue
import threading
from collections.abc import Iterator

from cluster.ahead import Ahead
from cluster.commands.output import run_arguments
from cluster.controller import Controller, Outcome
from cluster.mlflow_copy import MlflowCopy
from cluster.ray_group import BODY, IMPORTS, RayWorkerGroup
from configs.errors import Interrupted, UsageError
from data_pipelines.storage import Store
from trainer.background import Background
from trainer.record import RunRecord
from trainer.run_data import fingerprint
from trainer.run_datasets import decide_datasets
from trainer.validate import Plan

POLL_S = 0.2
END_TIMEOUT_S = 10.0
BUILD_END_TIMEOUT_S = 3.0
MLFLOW_TIMEOUT_S = 30.0
_one_at_a_time = threading.Lock()


class Drive:
    """Drives a run, from the moment that it is made; what happens is seen from another thread.

    outcome: how it ended; error: what it failed of (both None before). activity: what is done before and after
    training, in words. notices: sentences for who watches. controller: the workers' states; it can be asked to stop.

    Raises:
        UsageError: another launcher holds the run, or this process trains another.
    """

    def __init__(
        self, record: RunRecord, plan: Plan, ahead: Ahead, *, address: str | None, body: str, resume_command: str
    ) -> None:
        self.outcome: Outcome | None = None
        self.error: BaseException | None = None
        self.activity = "starting Ray"
        self.notices: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._record = record
        self._plan = plan
        self._ahead = ahead
        self._config = record.config
        self._copying = False
        self._unwanted = threading.Event()  # the data set
        self._lease = record.acquire_lease()
        if not _one_at_a_time.acquire(blocking=False):
            self._lease.release()
            raise UsageError(
                "This process is training another run: Ray serves one at a time in a process. Wait for it first, or "
                "launch this one from a process of its own."
            )
        self._group = RayWorkerGroup(
            self._config.resources,
            Store(self._config.store).uri,
            record.name,
            address=address,
            body=body,
            imports=_imports(plan) if body == BODY else [body.partition(":")[0]],
            notice=self.notices.put,
        )
        self.controller = Controller(
            self._group,
            record,
            self._config.recovery,
            resume_command=resume_command,
            lease_lost=lambda: self._lease.lost,
            notice=self.notices.put,
        )
        self.notices.put(plan.headline())
        for warning in plan.warnings():
            self.notices.put(warning)
        atexit.register(self.end_now)
        # Ray's processes end with the thread that starts them (see EmbeddedRay), so this one stays until they are gone.
        self._thread = threading.Thread(target=self._run, name="run", daemon=True)
        self._thread.start()

    def is_alive(self) -> bool:
        """Whether anything of it is still going on."""
        return self._thread.is_alive()

    def join(self, timeout_s: float) -> None:
        """Wait for its end, but no longer than that."""
        self._thread.join(timeout_s)

    def end_now(self) -> None:
        """End at once and wait, within reason, until nothing of the run is left."""
        self.controller.abort()
        self._thread.join(END_TIMEOUT_S)

    # --- in its thread

    def _run(self) -> None:
        copy = MlflowCopy(self._record)
        planning: Background | None = None
        try:
            if self._record.status() == "finished":
                self.notices.put(f"Run '{self._record.name}' has finished already; there is nothing left to train.")
                ends = [event["step"] for event in self._record.events() if event["kind"] == "finished"]
                self.outcome = Outcome("finished", ends[-1], 0)
                return
            planning = Background(self._tell_ahead)  # while Ray starts
            with self._group_of_workers():
                self.outcome = self._train(copy)
                self.activity = "ending the workers"
        except BaseException as error:
            self.error = error
        finally:
            if planning is not None:
                planning.done.wait(END_TIMEOUT_S)
            self._record.close()
            if self._copying:
                self.activity = "sending the rest to MLflow"
                if not copy.drain(MLFLOW_TIMEOUT_S):
                    named = run_arguments(self._record.name, self._config.store)
                    self.notices.put(f"MLflow has not got everything yet: shardyard runs sync {named}")
            with contextlib.suppress(Exception):  # it goes stale by itself, and must not hide how the run ended
                self._lease.release()
            _one_at_a_time.release()
            atexit.unregister(self.end_now)

    @contextlib.contextmanager
    def _group_of_workers(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            self.controller.fail(error)
            raise
        finally:
            self._group.close()

    def _train(self, copy: MlflowCopy) -> Outcome:
        # The data set is built while Ray starts and the workers import.
        build = Background(self._build)
        try:
            self._group.open()
            self.controller.prepare()
            while not build.done.wait(POLL_S) and not self.controller.stopping:
                pass
            if build.error is not None:
                raise build.error
            self.activity = "importing in the workers"
            if not self.controller.stopping:  # MLflow's imports take seconds, which nobody waits for who stops it now
                copy.start()
                self._copying = True
            return self.controller.run()
        finally:
            # Python aborts where it ends while another thread is in the libraries that a build uses.
            self._unwanted.set()
            build.done.wait(BUILD_END_TIMEOUT_S)

    def _tell_ahead(self) -> None:
        found = self._ahead.find()
        if found is None:
            return
        self.notices.put(found.headline())
        self._record.event("planned", **found.describe())

    def _build(self) -> None:
        def progress(stage: str, rows: int) -> None:
            if self._unwanted.is_set():
                raise Interrupted("The run has ended before its data set was built.")
            self.activity = f"building the data set: {stage}, {rows:,} rows"

        datasets = decide_datasets(self._record, self._plan, self.notices.put, progress)
        self._record.update_lineage(data_fingerprint=fingerprint(datasets))
        self.activity = "starting workers"


def _imports(plan: Plan) -> list[str]:
    return [*IMPORTS, *(part.__name__ for part in (plan.task.module, plan.model.module, plan.source))]
