"""Places for all workers of a run on a Ray cluster, reserved at once."""

from __future__ import annotations

import secrets
import time
from collections.abc import Collection
from typing import Any

from cluster.ray_kill import alive_nodes
from configs.errors import Unreachable
from configs.schema import ResourcesConfig

PLACE_TIMEOUT_S = 10.0
# How long an elastic run waits for room for more than its fewest workers.
ROOM_TIMEOUT_S = 2.0


class Placement:
    """A placement group: all workers or none, so that two runs never wait for each other's half.

    A slot is a worker's place in it. An elastic run that loses a node goes on in the slots that are left: Ray places
    the others again where there is room, and so they come back.

    name: whose it is, for who looks at the cluster's groups. generation: changes whenever the places are others than
    before.
    """

    def __init__(self, resources: ResourcesConfig, name: str = "") -> None:
        self._resources = resources
        self._name = name
        self._group: Any = None
        self.generation = 0

    def reserve(self, lost: Collection[str] = (), *, grow: bool = False) -> list[int]:
        """Reserve the places, or see which are still ours; returns their slots.

        lost: nodes that do not answer, though Ray may not know it yet. grow: give up ours where there is room for more.

        Raises:
            Unreachable: the cluster has not got enough of them, or does not free them within PLACE_TIMEOUT_S.
        """
        if self._group is not None:
            slots = self._usable(lost)
            enough = self._resources.most if grow else self._resources.fewest
            if len(slots) >= min(enough, self.room(lost)) and len(slots) >= self._resources.fewest:
                return slots
            self.release()
        return self._reserve_anew(lost)

    def room(self, lost: Collection[str]) -> int:
        """How many workers have a place, or would find one, at most as many as the run takes."""
        return min(self._resources.most, len(self._usable(lost)) + self._free(lost))

    def strategy(self, slot: int) -> Any:
        """Where the worker in a slot goes, for Ray's scheduling_strategy."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        return PlacementGroupSchedulingStrategy(self._group, slot)

    def release(self) -> None:
        """Give the places back. Safe to call twice."""
        import ray

        group, self._group = self._group, None
        if group is not None and ray.is_initialized():
            ray.util.remove_placement_group(group)

    def _reserve_anew(self, lost: Collection[str]) -> list[int]:
        """As many as fit; fewer where the places that Ray believes to be free are not to be had."""
        self.generation += 1
        size, fewest = self._size(lost), self._resources.fewest
        self.refuse_impossible(size)
        while not self._try(size, lost):
            if size == fewest:
                raise Unreachable(self._shortage(size, f"did not come free within {PLACE_TIMEOUT_S:g} s"))
            size -= 1
        return list(range(size))

    def refuse_impossible(self, size: int) -> None:
        """Raises Unreachable where the whole cluster has not got enough for so many workers."""
        import ray

        has = ray.cluster_resources()
        if any(has.get(name, 0) < size * amount for name, amount in worker_needs(self._resources).items()):
            raise Unreachable(self._shortage(size, "is more than the whole cluster has"))

    def _try(self, size: int, lost: Collection[str]) -> bool:
        import ray
        from ray.util.placement_group import placement_group

        elsewhere = [{"ray.io/node-id": f"!in({','.join(sorted(lost))})"}] * size if lost else None
        bundles = [worker_needs(self._resources)] * size
        name = f"{self._name}#{secrets.token_hex(4)}"  # the one before may not be gone yet
        self._group = placement_group(bundles, strategy="PACK", name=name, bundle_label_selector=elsewhere)
        try:
            ray.get(self._group.ready(), timeout=PLACE_TIMEOUT_S)
        except ray.exceptions.GetTimeoutError:
            self.release()
            return False
        return True

    def _size(self, lost: Collection[str]) -> int:
        """The most workers that there is room for; what was just given back takes a moment to be free."""
        fewest, most = self._resources.fewest, self._resources.most
        deadline = time.monotonic() + ROOM_TIMEOUT_S
        while (free := self._free(lost)) < most and fewest < most and time.monotonic() < deadline:
            time.sleep(0.1)
        return max(fewest, min(most, free))

    def _usable(self, lost: Collection[str]) -> list[int]:
        """The slots that are placed on nodes that answer."""
        import ray

        if self._group is None:
            return []
        nodes = ray.util.placement_group_table(self._group)["bundles_to_node_id"]
        answering = alive_nodes() - set(lost)
        return sorted(slot for slot, node_id in nodes.items() if node_id in answering)

    def _free(self, lost: Collection[str]) -> int:
        """How many workers' places are free. Private API of the pinned Ray: there is no public one by node."""
        from ray._private.state import available_resources_per_node

        answering, needs = alive_nodes() - set(lost), worker_needs(self._resources)
        return sum(
            min(int(free.get(name, 0) // amount) for name, amount in needs.items())
            for node_id, free in available_resources_per_node().items()
            if node_id in answering
        )

    def _shortage(self, size: int, what: str) -> str:
        import ray

        resources = self._resources
        has, free = ray.cluster_resources(), ray.available_resources()
        one = worker_needs(resources)
        needs = " and ".join(count(size * amount, name) for name, amount in one.items())
        found = " and ".join(f"{count(has.get(name, 0), name)}, of which {free.get(name, 0):g} free" for name in one)
        each = count(resources.threads, "CPU") + (" and 1 GPU" if resources.gpus_per_worker else "")
        workers = "workers" if resources.fewest == resources.workers else "min_workers"
        return (
            f"The run needs {needs} (resources.{workers}={size}, each with {each}), which {what}: it has "
            f"{found}, on {count(sum(node['Alive'] for node in ray.nodes()), 'node')}. Lower resources.{workers} or "
            "resources.threads, wait until other work has ended, or add nodes."
        )


class GivenPlacement(Placement):
    """Places in the placement group that this process itself was started in: a sweep's trial is given all at once.

    They are kept to the end. Those on a lost node come back where Ray finds room for them again. The workers' bundles
    are the group's last ones.
    """

    def __init__(self, resources: ResourcesConfig, group: Any) -> None:
        super().__init__(resources)
        self._group = group
        self._first = len(group.bundle_specs) - resources.workers

    def reserve(self, lost: Collection[str] = (), *, grow: bool = False) -> list[int]:  # noqa: ARG002
        """The slots that are there, once they are enough.

        Raises:
            Unreachable: some went with their node, and Ray finds no room for them.
        """
        deadline = time.monotonic() + PLACE_TIMEOUT_S
        while len(slots := self._usable(lost)) < self._resources.fewest:
            if time.monotonic() > deadline:
                raise Unreachable(self._shortage(self._resources.fewest, f"were not back in {PLACE_TIMEOUT_S:g} s"))
            time.sleep(0.1)
        return slots

    def room(self, lost: Collection[str]) -> int:
        """How many workers have a place."""
        return len(self._usable(lost))

    def release(self) -> None:
        """Who gave the places takes them back."""

    def _usable(self, lost: Collection[str]) -> list[int]:
        return [slot for slot in super()._usable(lost) if slot >= self._first]


def worker_needs(resources: ResourcesConfig) -> dict[str, float]:
    """What one worker takes of Ray's resources."""
    needs = {"CPU": float(resources.threads), "GPU": float(resources.gpus_per_worker)}
    return {name: amount for name, amount in needs.items() if amount}


def count(amount: float, thing: str) -> str:
    """1 CPU, 2 CPUs."""
    return f"{amount:g} {thing}" + ("" if amount == 1 else "s")


def group_name(store_uri: str, run: str) -> str:
    """Name of a run's placement groups, less what makes each unique."""
    return f"{store_uri.rstrip('/')}/{run}"
