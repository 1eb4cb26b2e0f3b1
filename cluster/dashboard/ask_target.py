"""`python -m cluster.dashboard.ask_target NAME`: the queue and the nodes of a target, as JSON.

A process of its own, since some targets need libraries that take hundreds of megabytes (ray), and any may hang.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import asdict
from typing import Any

from cluster.targets import open_target
from configs.errors import ShardyardError
from configs.targets import KuberayTarget, RayTarget, SlurmTarget, Target, load_target
from trainer.redact import Redactor

_SINFO = "NodeHost:200,StateCompact:30,CPUsState:60,Memory:30,FreeMem:30,Gres:200,GresUsed:200"


def main() -> None:
    """Ask, and print {"jobs", "nodes", "error"}."""
    print(json.dumps(ask(load_target(sys.argv[1]))))


def ask(settings: Target) -> dict[str, Any]:
    """{jobs, nodes}, or {error}.

    jobs: see cluster.targets.Queued. nodes: {node, state, cpus, used_cpus, gpus, used_gpus, memory_bytes, used_bytes},
    None where a target cannot be asked for them; None is what is not known.
    """
    try:
        jobs = [asdict(job) for job in open_target(settings).queue()]
        nodes = _nodes(settings)
    except (ShardyardError, OSError) as error:
        return {"error": Redactor(os.environ).text(str(error))}
    return {"jobs": jobs, "nodes": nodes}


def _nodes(settings: Target) -> list[dict[str, Any]] | None:
    if isinstance(settings, RayTarget):
        return _of_ray(settings)
    if isinstance(settings, SlurmTarget):
        return _of_slurm(settings)
    return _of_kubernetes(settings) if isinstance(settings, KuberayTarget) else None


def _of_ray(settings: RayTarget) -> list[dict[str, Any]]:
    from cluster.targets.ray_dashboard import alive_nodes, node_usage, open_client

    client = open_client(settings.address)
    taken = node_usage(client)
    return [ray_node(node, taken.get(node["node_id"], {})) for node in alive_nodes(client)]


def ray_node(node: dict[str, Any], taken: dict[str, float]) -> dict[str, Any]:
    """A node of the state API, and what node_usage says of it."""
    has = node["resources_total"]
    return {
        "node": node.get("node_ip") or node["node_id"][:12],
        "state": node["state"].lower(),
        "cpus": has.get("CPU", 0),
        "used_cpus": taken.get("CPU"),
        "gpus": has.get("GPU", 0),
        "used_gpus": taken.get("GPU"),
        "memory_bytes": taken.get("memory_bytes", has.get("memory")),
        "used_bytes": taken.get("used_bytes"),
    }


def _of_kubernetes(settings: KuberayTarget) -> list[dict[str, Any]] | None:
    from cluster.targets.kuberay_api import Api

    try:
        nodes = Api(settings.context).items("/api/v1/nodes")
    except ShardyardError:  # they are not the namespace's: whoever may see its jobs may not see them
        return None
    return [kubernetes_node(node) for node in nodes]


def kubernetes_node(node: dict[str, Any]) -> dict[str, Any]:
    """A v1.Node. What is taken of it only its pods of all namespaces would tell."""
    from kubernetes.utils.quantity import parse_quantity

    has = {name: float(parse_quantity(amount)) for name, amount in node["status"].get("allocatable", {}).items()}
    conditions = {each["type"]: each["status"] for each in node["status"].get("conditions", [])}
    cordoned = ", cordoned" if node.get("spec", {}).get("unschedulable") else ""
    return {
        "node": node["metadata"]["name"],
        "state": ("ready" if conditions.get("Ready") == "True" else "not ready") + cordoned,
        "cpus": has.get("cpu", 0.0),
        "used_cpus": None,
        "gpus": has.get("nvidia.com/gpu", 0.0),
        "used_gpus": None,
        "memory_bytes": has.get("memory"),
        "used_bytes": None,
    }


def _of_slurm(settings: SlurmTarget) -> list[dict[str, Any]]:
    partition = [] if settings.partition is None else ["--partition", settings.partition]
    command = ["sinfo", "--Node", "--noheader", f"--Format={_SINFO}", *partition]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []  # the queue was told, which is more
    nodes = [slurm_node(line) for line in listed.splitlines()]
    return list({node["node"]: node for node in nodes}.values())  # one of several partitions is listed for each


def slurm_node(line: str) -> dict[str, Any]:
    """A line of sinfo, as it prints _SINFO."""
    cells, start = [], 0
    for field in _SINFO.split(","):
        width = int(field.partition(":")[2])
        cells.append(line[start : start + width].strip())
        start += width
    name, state, cpus, memory, free, gres, used = cells
    allocated, _, _, total = (int(number) for number in cpus.split("/"))
    megabytes, free_megabytes = _number(memory), _number(free)
    known = megabytes is not None and free_megabytes is not None
    return {
        "node": name,
        "state": state,
        "cpus": total,
        "used_cpus": allocated,
        "gpus": _gpus(gres),
        "used_gpus": _gpus(used),
        "memory_bytes": None if megabytes is None else megabytes << 20,
        "used_bytes": (megabytes - free_megabytes) << 20 if known else None,  # type: ignore[operator]
    }


def _gpus(gres: str) -> int:
    """In `gpu:h100:8(S:0-1),shard:16`, 8."""
    return sum(int(number) for number in re.findall(r"\bgpu(?::[^:,(]+)?:(\d+)", gres))


def _number(text: str) -> int | None:
    return int(text) if text.isdigit() else None


if __name__ == "__main__":
    main()
