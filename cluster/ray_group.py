"""A run's workers as Ray actors in a placement group: placed together, watched one by one, killed for sure."""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Callable, Iterable
from typing import Any

from cluster.embedded_ray import EmbeddedRay
from cluster.policies import WorkerStatus
from cluster.ray_cluster import CONNECT_TIMEOUT_S, import_paths, join
from cluster.ray_kill import alive_nodes, kill_everywhere
from cluster.ray_member import Member
from cluster.ray_placement import Placement
from configs.errors import ShardyardError, Unreachable
from configs.schema import ResourcesConfig
from data_pipelines.storage import Store

BODY = "trainer.worker:run_worker"
# Imported by every worker while it waits: seconds that would otherwise come after the data set is built.
IMPORTS = ("trainer.loop", "trainer.engine", "deepspeed")
# A bound on imports from a slow shared disk; a process that dies meanwhile is noticed at once.
IMPORT_TIMEOUT_S = 600.0
PING_EVERY_S = 0.5


class RayWorkerGroup:
    """The WorkerGroup of cluster/controller.py on Ray. `open()` comes first, `close()` last.

    address: of a running cluster ("auto", "host:6379"); None starts a Ray of our own on this machine, in the calling
    thread, which has to live until close(). body: "module:function", what each worker runs.
    """

    def __init__(
        self,
        resources: ResourcesConfig,
        store_uri: str,
        run: str,
        *,
        address: str | None = None,
        body: str = BODY,
        imports: Iterable[str] = IMPORTS,
        notice: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._resources = resources
        self._store = Store(store_uri)
        self._run = run
        self._address = address
        self._body = body
        self._imports = list(imports)
        self._notice = notice
        self._embedded: EmbeddedRay | None = None
        self._joined = False
        self._placement = Placement(resources)
        self._members: list[Member] = []
        self._warm_refs: list[Any] = []
        self._nodes: set[str] = set()
        self._attempt = 0

    # --- the cluster

    def open(self) -> None:
        """Start or join Ray.

        Raises:
            Unreachable: no Ray there, or it refuses us.
        """
        import ray

        if ray.is_initialized():
            if self._address is not None:
                raise Unreachable(
                    f"This process is connected to a Ray already, so it cannot join {self._address}. Call "
                    "ray.shutdown() first, or leave the address out to use the one that is connected."
                )
            return
        if self._address is None:
            wanted = self._resources.workers * self._resources.threads
            cpus = len(os.sched_getaffinity(0))
            if wanted > cpus:
                self._notice(
                    f"{self._resources.workers} workers of {self._resources.threads} threads share {cpus} CPUs here: "
                    "right, but slow. Lower resources.workers or resources.threads, or join a cluster with --address."
                )
            use_gpus = self._resources.gpus_per_worker > 0
            self._embedded = EmbeddedRay(max(wanted, os.cpu_count() or 1), use_gpus, import_paths())
        else:
            join(self._address)
            self._joined = True

    def close(self) -> None:
        """End the workers and leave no process behind. Safe to call twice."""
        import ray

        try:
            with contextlib.suppress(Exception):  # the cluster may be gone; what is ours here is ended below
                self.kill()
                self._placement.release()
        finally:
            if self._embedded is not None:
                self._embedded.stop()
                self._embedded = None
            elif self._joined:
                self._joined = False
                ray.shutdown()

    # --- WorkerGroup

    def prepare(self, attempt: int) -> dict[str, Any]:
        """Place the workers and let them import.

        Raises:
            Unreachable: the cluster has no room for them.
        """
        started = time.monotonic()
        self._attempt = attempt
        if not self._nodes <= alive_nodes():
            self._placement.release()  # part of it is gone, which Ray may not have told it yet
        self._placement.reserve()
        self._members = [Member(self._create_actor(index)) for index in range(self._resources.workers)]
        refs = [member.actor.describe.remote() for member in self._members]
        for member, where in zip(self._members, self._collect(refs, IMPORT_TIMEOUT_S), strict=True):
            member.where = where or {}
        # Ranks of one node are neighbours, whatever order Ray placed the bundles in.
        self._members.sort(key=lambda member: str(member.where.get("node_id")))
        self._nodes = {member.where["node_id"] for member in self._members if member.where}
        gpus = self._gpus_by_node()
        self._warm_refs = [
            member.actor.warm.remote(self._imports, gpus.get(member.where.get("node_id")))
            for member in self._members
            if member.state == "starting"
        ]
        return {
            "workers": [member.where for member in self._members],
            "placed_s": round(time.monotonic() - started, 3),
        }

    def start(self, cancelled: Callable[[], bool]) -> None:
        """Wait for the imports and tell every worker to train; returns early when one failed, or when cancelled."""
        starting = [member for member in self._members if member.state == "starting"]
        if len(starting) == len(self._members):
            self._collect(self._warm_refs, IMPORT_TIMEOUT_S, cancelled)
        if cancelled() or any(member.state != "starting" for member in self._members):
            return
        init_method = self._meeting_point()
        folder = f"attempts/{self._attempt:04d}"
        run = self._store.child(self._run)
        canary = secrets.token_hex(16).encode()
        run.write_atomic(f"{folder}/canary", canary)
        local_ranks: dict[str, int] = {}
        for rank, member in enumerate(self._members):
            node_id = member.where["node_id"]
            local_ranks[node_id] = local_ranks.get(node_id, -1) + 1
            log = f"{folder}/rank-{rank:05d}.log"
            member.log = run.path(log)
            arguments = {
                "store_uri": self._store.uri,
                "run": self._run,
                "attempt": self._attempt,
                "rank": rank,
                "world_size": len(self._members),
                "local_rank": local_ranks[node_id],
                "init_method": init_method,
            }
            member.train_ref = member.actor.train.remote(self._body, canary, log, arguments)
            member.state, member.answered_at = "running", time.monotonic()

    def _meeting_point(self) -> str:
        """Where the ranks find each other: a file where there is but this machine (no port to lose or to guard)."""
        import ray

        if self._embedded is not None:
            return f"file://{self._embedded.folder}/attempt-{self._attempt:04d}"
        port = ray.get(self._members[0].actor.free_port.remote(), timeout=CONNECT_TIMEOUT_S)
        return f"tcp://{self._members[0].where['address']}:{port}"

    def poll(self, timeout_s: float) -> list[WorkerStatus]:
        """Every worker's status, by rank; waits up to timeout_s for one to end."""
        self._read_ends(timeout_s)
        self._read_pings()
        now = time.monotonic()
        return [member.status(rank, now) for rank, member in enumerate(self._members)]

    def request_stop(self) -> None:
        """Ask every worker to save a checkpoint and return. Does not wait."""
        for member in self._members:
            if member.state == "running":
                member.actor.stop.remote()

    def kill(self) -> None:
        """End every worker at once; when it returns their processes are gone, also stopped (SIGSTOP) ones."""
        import ray

        if not self._members:
            return
        for member in self._members:
            with contextlib.suppress(Exception):  # it is dead already, or its node is
                ray.kill(member.actor, no_restart=True)
        kill_everywhere([member.where for member in self._members if member.where])
        with contextlib.suppress(ShardyardError):
            self._store.child(self._run).delete(f"attempts/{self._attempt:04d}/canary")
        self._members = []
        self._warm_refs = []

    # --- actors

    def _create_actor(self, index: int) -> Any:
        import ray

        from cluster.worker import Worker

        resources = self._resources
        environment = {
            "OMP_NUM_THREADS": str(resources.threads),  # Ray's own default is 1
            "DS_ACCELERATOR": "cuda" if resources.gpus_per_worker else "cpu",
            "TORCHDYNAMO_DISABLE": "1",  # compiling is not used; its imports take seconds
        }
        actor = ray.remote(Worker).options(
            num_cpus=resources.threads,
            num_gpus=resources.gpus_per_worker,
            max_concurrency=4,  # train, ping, stop, and one to spare
            max_restarts=0,
            max_task_retries=0,
            scheduling_strategy=self._placement.strategy(index),
        )
        return actor.remote(os.getcwd(), environment)

    def _gpus_by_node(self) -> dict[Any, str]:
        if not self._resources.gpus_per_worker:
            return {}
        gpus: dict[Any, list[str]] = {}
        for member in self._members:
            gpus.setdefault(member.where.get("node_id"), []).extend(member.where.get("gpus", []))
        return {node_id: ",".join(ids) for node_id, ids in gpus.items()}

    # --- calls

    def _collect(self, refs: list[Any], timeout_s: float, cancelled: Callable[[], bool] = lambda: False) -> list[Any]:
        """Results of one call to every member, None where it failed; stops waiting at the first failure."""
        import ray

        deadline = time.monotonic() + timeout_s
        results: list[Any] = [None] * len(refs)
        waiting = dict(zip(refs, range(len(refs)), strict=True))
        while waiting and not cancelled() and not any(member.state == "died" for member in self._members):
            done, _ = ray.wait(list(waiting), num_returns=1, timeout=0.1)
            for ref in done:
                index = waiting.pop(ref)
                try:
                    results[index] = ray.get(ref)
                    self._members[index].answered_at = time.monotonic()
                except ray.exceptions.RayError as error:
                    self._members[index].bury(error)
            if time.monotonic() > deadline:
                for index in waiting.values():
                    self._members[index].state = "silent"
                    self._members[index].error = f"it did not start within {timeout_s:g} s"
                break
        return results

    def _read_ends(self, timeout_s: float) -> None:
        import ray

        waiting = {member.train_ref: member for member in self._members if member.train_ref is not None}
        if not waiting:
            time.sleep(timeout_s)
            return
        done, _ = ray.wait(list(waiting), num_returns=1, timeout=timeout_s)
        if done:  # others may have ended in the same moment
            done, _ = ray.wait(list(waiting), num_returns=len(waiting), timeout=0)
        for ref in done:
            member = waiting[ref]
            member.train_ref = None
            try:
                result = ray.get(ref)
            except ray.exceptions.RayError as error:
                member.bury(error)
                continue
            member.end(result)

    def _read_pings(self) -> None:
        import ray

        now = time.monotonic()
        pinged = {member.ping_ref: member for member in self._members if member.ping_ref is not None}
        if pinged:
            done, _ = ray.wait(list(pinged), num_returns=len(pinged), timeout=0)
            for ref in done:
                member = pinged[ref]
                member.ping_ref = None
                with contextlib.suppress(ray.exceptions.RayError):  # its death shows in train_ref
                    member.progress = {**member.progress, **ray.get(ref)}
                    member.answered_at = now
        for member in self._members:
            if member.state == "running" and member.ping_ref is None and now - member.pinged_at >= PING_EVERY_S:
                member.ping_ref, member.pinged_at = member.actor.ping.remote(), now
