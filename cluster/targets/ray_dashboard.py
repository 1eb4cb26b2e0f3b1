"""What is asked of a Ray dashboard beyond its public client: not to wait for ever, and how large the cluster is."""

from __future__ import annotations

import logging
from typing import Any

from configs.errors import UsageError
from configs.schema import ResourcesConfig

# A bound on how long a dashboard that listens may say nothing; one that starts a job or takes its files may for longer.
ANSWER_S = 6.0
SUBMIT_S = 30.0


def open_client(address: str) -> Any:
    """A ray.job_submission.JobSubmissionClient with time limits.

    Private API of the pinned Ray: its client has none, and a dashboard that hangs would hang who asks it.
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

    Private API of the pinned Ray: the dashboard's state API, which counts what nodes have from when they join.

    Raises:
        UsageError: they never fit.
    """
    answer = client._do_request("GET", "/api/v0/nodes?detail=1&limit=10000")
    answer.raise_for_status()
    nodes = [node["resources_total"] for node in answer.json()["data"]["result"]["result"] if node["state"] == "ALIVE"]
    needs = {"CPU": resources.threads, "GPU": resources.gpus_per_worker}
    wanted = {name: amount for name, amount in needs.items() if amount}
    room = sum(min(int(node.get(name, 0) // amount) for name, amount in wanted.items()) for node in nodes)
    if room < resources.fewest:
        each = " and ".join(f"{amount} {name}" for name, amount in wanted.items())
        amounts = {name: [node.get(name, 0) for node in nodes] for name in wanted}
        has = " and ".join(f"{sum(of):g} {name} (of one node {max(of, default=0):g})" for name, of in amounts.items())
        workers = "workers" if resources.fewest == resources.workers else "min_workers"
        raise UsageError(
            f"The run needs room for {resources.fewest} workers (resources.{workers}) of {each} each, and the whole "
            f"Ray cluster has room for {room}: it has {has}. Lower resources.{workers} or resources.threads, or add "
            "nodes."
        )
