"""What is asked of a Ray dashboard beyond its public client: not to wait for ever, the cluster's size, and its queue.

Private API of the pinned Ray: its client has no time limits, and the state API counts nodes and hands out their logs.
"""

from __future__ import annotations

import json
import logging
import re
import time
from typing import Any

from cluster.ray_placement import worker_needs
from cluster.ray_queue import TABLE_FILE
from configs.errors import UsageError
from configs.schema import ResourcesConfig

# A bound on how long a dashboard that listens may say nothing; one that starts a job or takes its files may for longer.
ANSWER_S = 6.0
SUBMIT_S = 30.0
# A table of the queue that is so old is of a queue that is gone.
STALE_S = 30.0


def open_client(address: str) -> Any:
    """A ray.job_submission.JobSubmissionClient with time limits.

    Without them a dashboard that hangs would hang who asks it.
    """
    from ray.job_submission import JobSubmissionClient

    class Client(JobSubmissionClient):  # type: ignore[misc]
        def _do_request(self, method: str, endpoint: str, **rest: Any) -> Any:
            timeout_s = ANSWER_S if method == "GET" else SUBMIT_S
            return super()._do_request(method, endpoint, timeout=timeout_s, **rest)

    for name in ("dashboard.modules.dashboard_sdk", "_private.runtime_env.packaging"):  # they tell of each upload
        logging.getLogger(f"ray.{name}").setLevel(logging.WARNING)
    return Client(address)


def refuse_too_much(client: Any, resources: ResourcesConfig) -> None:
    """See that the run's workers would fit if the cluster were empty; else it would be told so once it has started.

    Raises:
        UsageError: they never fit.
    """
    nodes = [node["resources_total"] for node in alive_nodes(client)]
    wanted = worker_needs(resources)
    room = sum(min(int(node.get(name, 0) // amount) for name, amount in wanted.items()) for node in nodes)
    if room < resources.fewest:
        each = " and ".join(f"{amount:g} {name}" for name, amount in wanted.items())
        amounts = {name: [node.get(name, 0) for node in nodes] for name in wanted}
        has = " and ".join(f"{sum(of):g} {name} (of one node {max(of, default=0):g})" for name, of in amounts.items())
        workers = "workers" if resources.fewest == resources.workers else "min_workers"
        raise UsageError(
            f"The run needs room for {resources.fewest} workers (resources.{workers}) of {each} each, and the whole "
            f"Ray cluster has room for {room}: it has {has}. Lower resources.{workers} or resources.threads, or add "
            "nodes."
        )


def queue_table(client: Any) -> list[dict[str, Any]]:
    """Rows of what cluster/ray_queue.py wrote among the head's logs; none where there is no queue at the moment."""
    head = next((node["node_id"] for node in alive_nodes(client) if node["is_head_node"]), None)
    if head is None:
        return []
    text = client._do_request("GET", f"/api/v0/logs/file?node_id={head}&filename={TABLE_FILE}&lines=1").text
    try:
        table = json.loads(text[text.index("{") :])
    except ValueError:  # no such file, in words
        return []
    return list(table["jobs"]) if time.time() < table["time"] + STALE_S else []


def alive_nodes(client: Any) -> list[dict[str, Any]]:
    """Nodes that are there, with what they have from when they joined."""
    answer = client._do_request("GET", "/api/v0/nodes?detail=1&limit=10000")
    answer.raise_for_status()
    return [node for node in answer.json()["data"]["result"]["result"] if node["state"] == "ALIVE"]


def node_usage(client: Any) -> dict[str, dict[str, float]]:
    """What of each node is taken, by its id: {CPU, GPU: by Ray's count, memory_bytes, used_bytes: of its host}.

    Ray counts every few seconds. Empty, or without an entry, where it does not tell.
    """
    answer = client._do_request("GET", "/nodes?view=summary")
    answer.raise_for_status()
    told = answer.json()["data"]
    found: dict[str, dict[str, float]] = {}
    for node_id, text in told["nodeLogicalResources"].items():
        # Lines as "1.0/2.0 CPU", and "1.0/2.0 CPU (1.0 used of 1.0 reserved in placement groups)".
        counts = re.findall(r"^([\d.]+)/[\d.]+ (CPU|GPU)\b", text, re.MULTILINE)
        found[node_id] = {"CPU": 0.0, "GPU": 0.0} | {name: float(used) for used, name in counts}
    for node in told["summary"]:
        if node.get("mem"):
            total, free = node["mem"][:2]
            found.setdefault(node["raylet"]["nodeId"], {}).update(memory_bytes=total, used_bytes=total - free)
    return found
