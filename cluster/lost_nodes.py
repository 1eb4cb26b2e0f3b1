"""Nodes that may be gone, though Ray does not know it yet: asked before they are used again."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any

from cluster.ray_kill import alive_nodes, kill_processes


class LostNodes:
    """Ids of nodes that did not answer when they were needed last."""

    def __init__(self) -> None:
        self._ids: set[str] = set()
        self._probes: dict[str, Any] = {}

    def add(self, node_ids: Iterable[str]) -> None:
        """Suspect these as well."""
        self._ids.update(node_ids)

    def ask(self, timeout_s: float = 0.0) -> set[str]:
        """Forget those that Ray has given up, and those that answer, or do within timeout_s; returns the others."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        if not self._ids:
            return set()
        self._ids &= alive_nodes()
        for node_id in self._ids - self._probes.keys():
            there = NodeAffinitySchedulingStrategy(node_id, soft=False)
            probe = ray.remote(num_cpus=0, max_retries=0)(kill_processes).options(scheduling_strategy=there)
            self._probes[node_id] = probe.remote([])
        waiting = {self._probes[node_id]: node_id for node_id in self._ids}
        done, _ = ray.wait(list(waiting), num_returns=len(waiting), timeout=timeout_s) if waiting else ([], [])
        for ref in done:
            del self._probes[waiting[ref]]
            with contextlib.suppress(ray.exceptions.RayError):
                ray.get(ref)
                self._ids.discard(waiting[ref])
        return set(self._ids)
