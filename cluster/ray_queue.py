"""The queue (cluster/job_queue.py) as an actor on the head of a Ray cluster, and a launcher's seat in it.

What the queue holds is published as a file among Ray's logs on the head, which the dashboard hands out: whoever may
submit jobs can see it, from anywhere.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
import traceback
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

from cluster.job_queue import Cluster, JobQueue, Reply, Report, State
from cluster.ray_kill import alive_nodes
from cluster.scheduling import Amounts, Request
from configs.quota import load_quota, quota_file

NAME, NAMESPACE = "shardyard-queue", "shardyard"
TABLE_FILE = "shardyard-queue.json"
TICK_S = 0.5
# The table is written anew after so long though nothing has changed: an old one is of a queue that is gone.
PUBLISH_EVERY_S = 5.0
ANSWER_TIMEOUT_S = 5.0


class QueueActor:
    """The queue on the cluster. One of them, made by the first launcher, and again by Ray if it is killed."""

    def __init__(self) -> None:
        import ray

        restarted = ray.get_runtime_context().was_current_actor_reconstructed
        self._queue = JobQueue(cluster_state, lambda: load_quota(quota_file()), restarted=restarted)
        logs = ray._private.worker.global_worker.node.get_logs_dir_path()  # no public way to it in the pinned Ray
        self._file = Path(logs, TABLE_FILE)
        self._published: tuple[dict[str, Any], float] = ({}, 0.0)
        threading.Thread(target=self._run, name="queue", daemon=True).start()

    def report(self, report: Report) -> Reply:
        """See JobQueue."""
        return self._queue.report(report)

    def leave(self, job: str) -> None:
        """See JobQueue."""
        self._queue.leave(job)

    def _run(self) -> None:
        import ray

        while not self._queue.idle:
            try:
                self._queue.tick()
                self._publish()
            except Exception:  # Ray's state or the disk was not to be had: the next time, perhaps
                traceback.print_exc()
            time.sleep(TICK_S)
        self._file.unlink(missing_ok=True)
        ray.kill(ray.get_actor(NAME, NAMESPACE), no_restart=True)

    def _publish(self) -> None:
        table, (before, at) = self._queue.table(), self._published
        if table == before and time.time() < at + PUBLISH_EVERY_S:
            return
        self._published = (table, time.time())
        new = self._file.with_suffix(".new")
        new.write_text(json.dumps(table | {"time": time.time()}) + "\n")
        os.replace(new, self._file)


def cluster_state() -> Cluster:
    """As Ray tells it. Groups go by their names, less what follows #."""
    import ray
    from ray._private.state import available_resources_per_node
    from ray.util import placement_group_table

    taken: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    places: dict[str, dict[str, int]] = {}
    for group in placement_group_table().values():
        if group["state"] not in ("CREATED", "RESCHEDULING"):
            continue
        for bundle, node in group["bundles_to_node_id"].items():
            if not node:
                continue
            for name, amount in group["bundles"][bundle].items():
                taken[node][name] += amount
            held = places.setdefault(group["name"].partition("#")[0], {})
            held[node] = held.get(node, 0) + 1
    available, alive = available_resources_per_node(), alive_nodes()
    nodes, free = dict[str, Amounts](), dict[str, Amounts]()
    for node in ray.nodes():
        node_id, totals = node["NodeID"], node["Resources"]
        if node_id not in alive:
            continue
        # Not all that is missing is in groups: other programs use the cluster too. What Ray says is a moment old, so
        # that a group made just now is missing in it: then it is more than what the groups leave.
        left = {name: totals[name] - taken[node_id][name] for name in totals}
        now = available.get(node_id, {})
        nodes[node_id] = totals
        free[node_id] = {name: min(left[name], now.get(name, 0.0)) for name in totals}
    return Cluster(nodes, free, places)


class Seat:
    """A launcher's place in the queue, from the job's submission to its end.

    request: what the job asks for. group: name of its placement groups. Connected to the cluster already.
    """

    def __init__(self, request: Request, group: str) -> None:
        self._request = request
        self._group = group
        self._state: State = "waiting"
        self._turn = 0
        self._since = 0.0
        self._is_new = True
        self._actor: Any = None

    def ask(self, expected_s: float | None = None) -> Reply:
        """What to do now. expected_s: what is left of the run, where it is known better than before."""
        if expected_s is not None:
            self._request = replace(self._request, expected_s=expected_s)
        report = Report(self._request, self._state, self._group, self._is_new, self._turn, self._since)
        reply = self._call("report", report)
        if reply is None:  # which changes nothing, for one that has its places either
            return Reply("wait", "the queue does not answer; it is started again")
        self._is_new = False
        if reply.verdict == "start" and self._state == "waiting":
            self._state, self._since = "admitted", time.time()
        if reply.verdict == "leave":
            self._state = "leaving"
        return reply

    def wait_again(self) -> None:
        """Give the places back, and go back to the place in the queue that the submission gave."""
        self._state, self._turn = "waiting", self._turn + 1

    def leave(self) -> None:
        """The job has ended."""
        self._call("leave", self._request.job)

    def _call(self, method: str, *arguments: Any) -> Any:
        """The queue's answer; None where it does not answer."""
        import ray

        with contextlib.suppress(ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):
            if self._actor is None:
                self._actor = _find_or_start()
            return ray.get(getattr(self._actor, method).remote(*arguments), timeout=ANSWER_TIMEOUT_S)
        self._actor = None
        return None


def _find_or_start() -> Any:
    import ray

    options = {"name": NAME, "namespace": NAMESPACE, "lifetime": "detached", "get_if_exists": True}
    options |= {"max_restarts": -1, "max_concurrency": 16, "num_cpus": 0}
    options["resources"] = {"node:__internal_head__": 0.001}
    return ray.remote(QueueActor).options(**options).remote()
