"""The tasks of a build (data_pipelines/partition.py) on all cores of this machine, or of a Ray cluster."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any

from cluster.embedded_ray import EmbeddedRay
from cluster.ray_cluster import death_of, import_paths, join, raised_by
from cluster.ray_kill import alive_nodes
from configs.errors import RunFailed, ShardyardError, UsageError
from data_pipelines.storage import Store

# A task whose process is killed, or whose node is lost, is run again so many times.
MAX_RETRIES = 3
_AHEAD = 2  # tasks handed out for each CPU
_POLL_S = 0.2
_END_TIMEOUT_S = 10.0

Watch = Callable[[int, int], None]  # tasks done, of how many


class RayTasks:
    """A `run_tasks` for data_pipelines.build. Use it in `with`; Ray is started, or joined, when tasks come.

    workers: processes at once on this machine; None takes all its cores. address: of a running cluster, all of whose
    CPUs are used; every node of it has to see `store`. watch: told after each task, and now and then between.
    """

    def __init__(
        self,
        *,
        workers: int | None = None,
        address: str | None = None,
        store: Store | None = None,
        watch: Watch = lambda _done, _of: None,
    ) -> None:
        self._workers = workers or len(os.sched_getaffinity(0))
        self._address = address
        self._store = store
        self._watch = watch
        self._embedded: EmbeddedRay | None = None
        self._joined = False

    def __enter__(self) -> RayTasks:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        import ray

        if self._embedded is not None:
            self._embedded.stop()
            self._embedded = None
        elif self._joined:
            self._joined = False
            ray.shutdown()

    def __call__(self, function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
        """The results of function(item), as they come.

        Raises:
            Unreachable: no Ray, or it refuses us. UsageError: a node does not see the store.
            RunFailed: a task's process died again and again.
            What a task raises, as it is, when it is a ShardyardError.
        """
        import ray

        self._open()
        task = ray.remote(_guarded).options(num_cpus=1, max_retries=MAX_RETRIES)
        remaining = iter(items)
        running: dict[Any, Any] = {}
        done = 0
        try:
            self._watch(0, len(items))
            while True:
                while len(running) < _AHEAD * self._cpus() and (item := next(remaining, None)) is not None:
                    running[task.remote(function, item, os.getcwd())] = item
                if not running:
                    return
                for ref in ray.wait(list(running), num_returns=1, timeout=_POLL_S)[0]:
                    result = _result(ref, running.pop(ref))
                    done += 1
                    yield result
                self._watch(done, len(items))
        finally:
            if running and self._embedded is not None:
                # Its tasks end with it. Cancelling them may end this process as well: Ray (2.60) checks that a task
                # whose result arrives is still pending, and one that was cancelled in that moment is not.
                self._embedded.stop()
                self._embedded = None
            else:
                _cancel(list(running))

    def _open(self) -> None:
        import ray

        if ray.is_initialized():
            return
        if self._address is None:
            self._embedded = EmbeddedRay(self._workers, False, import_paths())
        else:
            join(self._address)
            self._joined = True
            if self._store is not None:
                _check_store(self._store)

    def _cpus(self) -> int:
        import ray

        return max(1, int(ray.cluster_resources().get("CPU", 1)))


def _check_store(store: Store) -> None:
    """Raise UsageError where a node of the cluster does not find a file that is written into the store here."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    canary = f"canary-{secrets.token_hex(8)}"
    look = ray.remote(num_cpus=0)(_sees)
    store.write_atomic(canary, b"")
    try:
        nodes = sorted(alive_nodes())
        there = [NodeAffinitySchedulingStrategy(node, soft=False) for node in nodes]
        seen = ray.get([look.options(scheduling_strategy=strategy).remote(store, canary) for strategy in there])
    finally:
        store.delete(canary)
    blind = [where for where, sees in seen if not sees]
    if blind:
        raise UsageError(
            f"{', '.join(blind)} of the cluster cannot see the store {store.path()}. Choose a folder that all nodes "
            "share, or a URI such as s3://bucket/path: store=..."
        )


def _sees(store: Store, name: str) -> tuple[str, bool]:
    """(this machine's name, whether the file is there). On each node."""
    try:
        return socket.gethostname(), store.exists(name)
    except ShardyardError:
        return socket.gethostname(), False


def _guarded(function: Callable[[Any], Any], item: Any, folder: str) -> tuple[Any, ShardyardError | None]:
    """(result, None), or (None, the error that is meant for people). In a worker's process."""
    # As many processes as cores work: threads of the tokenizer's library would stand in each other's way.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with contextlib.suppress(OSError):  # another machine need not have it
        os.chdir(folder)
    try:
        return function(item), None
    except ShardyardError as error:
        return None, error


def _result(ref: Any, item: Any) -> Any:
    import ray

    try:
        result, error = ray.get(ref)
    except ray.exceptions.RayTaskError as raised:
        raise RunFailed(
            f"A task of the build failed: {raised_by(raised)} This is an error in the program or in a source's file, "
            "not in the data set: what was finished stays, and the same command goes on from there."
        ) from raised
    except ray.exceptions.RayError as died:
        where = getattr(getattr(item, "partition", None), "name", "a partition")
        cause = death_of(died)
        if isinstance(died, ray.exceptions.WorkerCrashedError):
            cause = "killed by a signal, or by the system because memory ran out"
        raise RunFailed(
            f"The process that worked on {where} of the source died {MAX_RETRIES + 1} times: {cause}. If memory is "
            "short, give the build fewer --workers. What was finished stays: the same command goes on from there."
        ) from died
    if error is not None:
        raise error
    return result


def _cancel(refs: list[Any]) -> None:
    """End tasks, and wait until none of them writes any more."""
    import ray

    for ref in refs:
        with contextlib.suppress(Exception):  # the cluster may be gone, and its tasks with it
            ray.cancel(ref, force=True)
    deadline = time.monotonic() + _END_TIMEOUT_S
    while refs and time.monotonic() < deadline:
        with contextlib.suppress(Exception):
            _, refs = ray.wait(refs, num_returns=len(refs), timeout=_POLL_S)
            continue
        return
