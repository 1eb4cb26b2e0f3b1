"""Places for all workers of a run on a Ray cluster, reserved at once."""

from __future__ import annotations

from typing import Any

from configs.errors import Unreachable
from configs.schema import ResourcesConfig

PLACE_TIMEOUT_S = 10.0


class Placement:
    """A placement group: all workers or none, so that two runs never wait for each other's half."""

    def __init__(self, resources: ResourcesConfig) -> None:
        self._resources = resources
        self._group: Any = None

    def reserve(self) -> None:
        """Reserve the places, or see that they are still ours after a restart.

        Raises:
            Unreachable: the cluster has not got them, or does not free them within PLACE_TIMEOUT_S.
        """
        import ray
        from ray.util.placement_group import placement_group

        if self._group is None:
            has = ray.cluster_resources()
            if any(has.get(name, 0) < wanted for name, wanted in self._needs().items()):
                raise Unreachable(self._shortage("is more than the whole cluster has"))
            bundle = {"CPU": float(self._resources.threads)}
            if self._resources.gpus_per_worker:
                bundle["GPU"] = float(self._resources.gpus_per_worker)
            self._group = placement_group([bundle] * self._resources.workers, strategy="PACK")
        try:
            ray.get(self._group.ready(), timeout=PLACE_TIMEOUT_S)
        except ray.exceptions.GetTimeoutError as error:
            shortage = self._shortage(f"did not come free within {PLACE_TIMEOUT_S:g} s")
            self.release()
            raise Unreachable(shortage) from error

    def strategy(self, index: int) -> Any:
        """Where worker `index` goes, for Ray's scheduling_strategy."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        return PlacementGroupSchedulingStrategy(self._group, index)

    def release(self) -> None:
        """Give the places back. Safe to call twice."""
        import ray

        group, self._group = self._group, None
        if group is not None and ray.is_initialized():
            ray.util.remove_placement_group(group)

    def _needs(self) -> dict[str, int]:
        resources = self._resources
        needs = {"CPU": resources.workers * resources.threads, "GPU": resources.workers * resources.gpus_per_worker}
        return {name: amount for name, amount in needs.items() if amount}

    def _shortage(self, what: str) -> str:
        import ray

        resources = self._resources
        has, free = ray.cluster_resources(), ray.available_resources()
        needs = " and ".join(count(amount, name) for name, amount in self._needs().items())
        found = " and ".join(
            f"{count(has.get(name, 0), name)}, of which {free.get(name, 0):g} free" for name in self._needs()
        )
        each = count(resources.threads, "CPU") + (" and 1 GPU" if resources.gpus_per_worker else "")
        return (
            f"The run needs {needs} (resources.workers={resources.workers}, each with {each}), which {what}: it has "
            f"{found}, on {count(sum(node['Alive'] for node in ray.nodes()), 'node')}. Lower resources.workers or "
            "resources.threads, wait until other work has ended, or add nodes."
        )


def count(amount: float, thing: str) -> str:
    """1 CPU, 2 CPUs."""
    return f"{amount:g} {thing}" + ("" if amount == 1 else "s")
