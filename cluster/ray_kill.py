"""Ending worker processes for sure, on this node and on others."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Collection

from cluster.embedded_ray import end_processes
from cluster.reaper import start_ticks

# A pid, and when that process started in clock ticks since boot: seconds since the epoch change with the clock.
Process = tuple[int, int | None]

KILL_TIMEOUT_S = 10.0
MUTE_TIMEOUT_S = 2.0


def kill_everywhere(by_node: dict[str, list[Process]], mute: Collection[str] = ()) -> None:
    """SIGKILL processes and wait until they are gone, or their nodes are.

    by_node: by the node's id. mute: nodes that did not answer, and so are told, but not waited for as long.

    By a task on each other node: Ray's own kill asks the process, which a stopped (SIGSTOP) one does not hear.
    """
    if not by_node:
        return  # Ray may not be there, and would be started by asking it
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = ray.get_runtime_context().get_node_id()
    kill_processes(by_node.get(here, []))
    kill = ray.remote(num_cpus=0, max_retries=0)(kill_processes)
    waiting = {}
    for node_id in by_node.keys() & alive_nodes() - {here}:
        there = NodeAffinitySchedulingStrategy(node_id, soft=False)
        waiting[kill.options(scheduling_strategy=there).remote(by_node[node_id])] = node_id
    told_at = time.monotonic()
    while waiting:
        timeout_s = KILL_TIMEOUT_S if set(waiting.values()) - set(mute) else MUTE_TIMEOUT_S
        if time.monotonic() > told_at + timeout_s:
            break
        done, _ = ray.wait(list(waiting), num_returns=len(waiting), timeout=0.2)
        # A node that goes meanwhile takes its workers with it.
        alive = alive_nodes()
        waiting = {ref: node_id for ref, node_id in waiting.items() if ref not in done and node_id in alive}


def alive_nodes() -> set[str]:
    """Ids of the nodes that Ray believes to be there."""
    import ray

    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


def kill_processes(processes: list[Process]) -> None:
    """SIGKILL processes of this machine and wait until they are gone."""
    import psutil

    found = []
    for pid, started_ticks in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            if start_ticks(pid) == started_ticks:  # not a later process with the same pid
                found.append(psutil.Process(pid))
    end_processes(found)
