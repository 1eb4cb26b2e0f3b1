"""A run's workers as Ray actors in a placement group: placed together, watched one by one, killed for sure.

Actors stay for the whole run, with their imports done. An attempt is a child process of each (cluster/worker.py).
"""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Callable, Collection, Iterable
from typing import Any

from cluster.embedded_ray import EmbeddedRay
from cluster.lost_nodes import LostNodes
from cluster.policies import WorkerStatus
from cluster.ray_cluster import CONNECT_TIMEOUT_S, import_paths, join
from cluster.ray_kill import Process, alive_nodes, kill_everywhere
from cluster.ray_member import Member, create_actor
from cluster.ray_placement import PLACE_TIMEOUT_S, GivenPlacement, Placement, group_name
from configs.errors import ShardyardError, Unreachable
from configs.schema import ResourcesConfig
from data_pipelines.storage import Store

BODY = "trainer.worker:run_worker"
# Imported by every worker while it waits, once for all attempts. After the first three: what the first model, and
# DeepSpeed around it, would import later, which takes as long.
IMPORTS = (
    *("trainer.loop", "trainer.engine", "deepspeed"),
    *("torch._dynamo", "deepspeed.runtime.zero.stage3", "deepspeed.runtime.zero.muon.muon_optimizer"),
    *("trainer.worker", "data_pipelines.loader"),
)
# A bound on imports from a slow shared disk; a process that dies meanwhile is noticed at once.
IMPORT_TIMEOUT_S = 600.0
PING_EVERY_S = 0.5
# A bound on how long an actor takes to see that its child is gone.
END_TIMEOUT_S = 3.0
# A bound on how long actors take to have their child's stack written down.
STACK_TIMEOUT_S = 1.0
# An actor that has not answered for so long is not asked to do anything more.
MUTE_S = 2.0
# How long a node that did not answer is given before its places are taken to be lost.
PROBE_TIMEOUT_S = 2.0
# Of the time between two polls, what counts as listening.
MAX_LISTENED_S = 0.5


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
        self._placement = Placement(resources, group_name(self._store.uri, run))
        self._members: list[Member] = []
        self._spare: list[Member] = []  # without a child, between attempts
        self._warm_refs: dict[Any, Member] = {}
        self._lost = LostNodes()
        self._attempt = 0
        self._listened_at = time.monotonic()

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
            if (given := ray.util.get_current_placement_group()) is not None:
                self._placement = GivenPlacement(self._resources, given)
            return
        if self._address is None:
            wanted = self._resources.most * self._resources.threads
            cpus = len(os.sched_getaffinity(0))
            if wanted > cpus:
                self._notice(
                    f"{self._resources.most} workers of {self._resources.threads} threads share {cpus} CPUs here: "
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
                self._dismiss(self._spare)
                self._spare = []
                self._placement.release()
        finally:
            if self._embedded is not None:
                self._embedded.stop()
                self._embedded = None
            elif self._joined:
                self._joined = False
                ray.shutdown()

    # --- WorkerGroup

    def prepare(self, attempt: int, *, grow: bool = False) -> dict[str, Any]:
        """Place the workers and let them import. grow: also in places other than those of the attempt before.

        Raises:
            Unreachable: the cluster has no room for them.
        """
        started = time.monotonic()
        self._attempt = attempt
        places = self._placement.generation
        lost = self._lost.ask(PROBE_TIMEOUT_S)
        if lost and self._placement.room(lost) < self._resources.fewest:  # it cannot go on without: they may be busy
            lost = self._lost.ask(PLACE_TIMEOUT_S)
        slots = self._placement.reserve(lost, grow=grow)
        kept = {member.slot: member for member in self._spare if member.slot in slots}
        if self._placement.generation != places:
            kept = {}  # they went with their places
        self._dismiss([member for member in self._spare if kept.get(member.slot) is not member])
        self._spare = []
        self._members = [
            kept.get(slot) or Member(create_actor(self._resources, self._placement.strategy(slot)), slot)
            for slot in slots
        ]
        new = [member for member in self._members if not member.where]
        described = self._collect({member.actor.describe.remote(): member for member in new}, IMPORT_TIMEOUT_S)
        for member, where in described:
            member.where = where
        # Ranks of one node are neighbours, whatever order Ray placed the bundles in.
        self._members.sort(key=lambda member: (str(member.where.get("node_id")), member.slot))
        self._warm_refs = {
            member.actor.warm.remote(self._imports): member for member in new if member.state == "starting"
        }
        return {
            "workers": [member.where for member in self._members],
            "placed_s": round(time.monotonic() - started, 3),
        }

    def room(self) -> int:
        """How many workers could train now, at most as many as the run takes."""
        if self._resources.fewest == self._resources.most:
            return len(self._members)
        room = self._placement.room(self._lost.ask())
        if room > len(self._members):  # a node may be cut off without Ray's knowing
            self._lost.add(alive_nodes() - {member.where["node_id"] for member in self._members})
            room = self._placement.room(self._lost.ask(PROBE_TIMEOUT_S))
        return room

    def start(self, cancelled: Callable[[], bool]) -> None:
        """Wait for the imports and tell every worker to train; returns early when one failed, or when cancelled."""
        if all(member.state == "starting" for member in self._members):
            for member, warm in self._collect(self._warm_refs, IMPORT_TIMEOUT_S, cancelled):
                member.warm = warm
                if "outcome" in warm:
                    member.end(warm)
        if cancelled() or any(member.state != "starting" for member in self._members):
            return
        init_method = self._meeting_point()
        folder = f"attempts/{self._attempt:04d}"
        run = self._store.child(self._run)
        canary = secrets.token_hex(16)
        run.write_atomic(f"{folder}/canary", canary.encode())
        gpus = self._gpus_by_node()
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
            # GPUs of all workers of its node, so that they can reach each other's memory.
            environment = {"CUDA_VISIBLE_DEVICES": gpus[node_id]} if gpus else {}
            member.train_ref = member.actor.train.remote(
                body=self._body, canary=canary, log=log, environment=environment, arguments=arguments
            )
            member.state = "running"
        self._listened_at = time.monotonic()

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
        return [member.status(rank) for rank, member in enumerate(self._members)]

    def request_stop(self) -> None:
        """Ask every worker to save a checkpoint and return. Does not wait."""
        for member in self._members:
            if member.state == "running":
                member.actor.stop.remote(self._attempt)

    def stacks(self) -> dict[int, str]:
        """Python stacks of the training threads by rank, of those that can be had within a second.

        All threads' go to `rank-00003.stack` beside the log.
        """
        import ray

        asked = {m.actor.stack.remote(): rank for rank, m in enumerate(self._members) if m.state == "running"}
        done, _ = ray.wait(list(asked), num_returns=len(asked), timeout=STACK_TIMEOUT_S) if asked else ([], [])
        found = {}
        for ref in done:
            with contextlib.suppress(ray.exceptions.RayError, ShardyardError):
                training, all_threads = ray.get(ref)
                path = f"attempts/{self._attempt:04d}/rank-{asked[ref]:05d}.stack"
                found[asked[ref]] = training
                self._store.child(self._run).write_atomic(path, all_threads.encode())
        return {rank: stack for rank, stack in found.items() if stack}

    def kill(self) -> None:
        """End training at once; when it returns its processes are gone, also stopped (SIGSTOP) ones.

        Actors that can serve another attempt are kept for it.
        """
        import ray

        if not self._members:
            return
        mute = {member.where["node_id"] for member in self._members if member.where and member.unanswered_s > MUTE_S}
        serving = [member for member in self._members if member.warm and member.where["node_id"] not in mute]
        asked = {member.actor.end.remote(): member for member in serving}
        done, _ = ray.wait(list(asked), num_returns=len(asked), timeout=END_TIMEOUT_S) if asked else ([], [])
        kept = []
        for ref in done:
            with contextlib.suppress(ray.exceptions.RayError):  # it is dead, or its node is
                kept += [asked[ref]] if ray.get(ref) else []
        gone = [member for member in self._members if member not in kept]
        # Where an actor died its node may be gone as well, and Ray may take a while to notice.
        suspects = mute | {member.where["node_id"] for member in gone if member.where and member.state == "died"}
        self._lost.add(suspects)
        self._dismiss(gone, suspects)
        with contextlib.suppress(ShardyardError):
            self._store.child(self._run).delete(f"attempts/{self._attempt:04d}/canary")
        self._spare = [member.again() for member in kept]
        self._members = []
        self._warm_refs = {}

    def _dismiss(self, members: list[Member], mute: Collection[str] = ()) -> None:
        """End actors with all that they started. mute: nodes that do not answer."""
        import ray

        by_node: dict[str, list[Process]] = {}
        for member in members:
            with contextlib.suppress(Exception):  # it is dead already, or its node is
                ray.kill(member.actor, no_restart=True)
            if member.where:
                by_node.setdefault(member.where["node_id"], []).extend(member.processes())
        kill_everywhere(by_node, mute)

    def _gpus_by_node(self) -> dict[Any, str]:
        if not self._resources.gpus_per_worker:
            return {}
        gpus: dict[Any, list[str]] = {}
        for member in self._members:
            gpus.setdefault(member.where.get("node_id"), []).extend(member.where.get("gpus", []))
        return {node_id: ",".join(ids) for node_id, ids in gpus.items()}

    # --- calls

    def _collect(
        self, refs: dict[Any, Member], timeout_s: float, cancelled: Callable[[], bool] = lambda: False
    ) -> list[tuple[Member, Any]]:
        """Results of one call to each of some members, where it did not fail; stops waiting at the first failure."""
        import ray

        deadline = time.monotonic() + timeout_s
        results: list[tuple[Member, Any]] = []
        waiting = dict(refs)
        while waiting and not cancelled() and not any(member.state == "died" for member in self._members):
            done, _ = ray.wait(list(waiting), num_returns=1, timeout=0.1)
            for ref in done:
                member = waiting.pop(ref)
                try:
                    results.append((member, ray.get(ref)))
                except ray.exceptions.RayError as error:
                    member.bury(error)
            if time.monotonic() > deadline:
                for member in waiting.values():
                    member.state = "silent"
                    member.error = f"it did not start within {timeout_s:g} s"
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
        # Where this process stood still itself, nobody else is to blame.
        listened_s, self._listened_at = min(now - self._listened_at, MAX_LISTENED_S), now
        for member in self._members:
            member.unanswered_s += listened_s
        pinged = {member.ping_ref: member for member in self._members if member.ping_ref is not None}
        if pinged:
            done, _ = ray.wait(list(pinged), num_returns=len(pinged), timeout=0)
            for ref in done:
                member = pinged[ref]
                member.ping_ref = None
                with contextlib.suppress(ray.exceptions.RayError):  # its death shows in train_ref
                    member.hear(ray.get(ref))
        for member in self._members:
            if member.state == "running" and member.ping_ref is None and now - member.pinged_at >= PING_EVERY_S:
                member.ping_ref, member.pinged_at = member.actor.ping.remote(), now
