"""Several nodes in one machine: workers elsewhere are killed too, and a node that goes is named."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.controller import Outcome
from tests.cluster.test_ray_group import Launched, alive, facts

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture
def cluster() -> Iterator[Any]:
    """A head without room for workers, and two nodes with room for one each."""
    import ray
    from ray.cluster_utils import Cluster

    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    nodes.add_node(num_cpus=1)
    nodes.add_node(num_cpus=1)
    ray.init(address=nodes.address, log_to_driver=False)
    yield nodes
    ray.shutdown()
    nodes.shutdown()


def test_a_stopped_worker_on_another_node_is_killed(cluster: Any, tmp_path: Path) -> None:
    run = Launched(tmp_path, "endless_first_attempt", silence_s=3.0)
    run.wait_for_step(5)
    os.kill(run.pids()[1], signal.SIGSTOP)
    run.join()
    assert run.outcome == Outcome("finished", 20, 1)
    nodes = {where["node_id"] for where in run.events("placed")[0]["workers"]}
    assert len(nodes) == 2
    assert [facts(tmp_path, 1, rank)[2] for rank in range(2)] == ["0", "0"]  # local ranks
    assert (run.events("failed")[0]["cause"], run.events("failed")[0]["rank"]) == ("silent", 1)
    assert not any(alive(pid) for pid in run.pids(1))


def test_a_lost_node_is_named_and_replaced(cluster: Any, tmp_path: Path) -> None:
    run = Launched(tmp_path, "endless_first_attempt")
    run.wait_for_step(5)
    cluster.add_node(num_cpus=1)
    lost = run.events("placed")[0]["workers"][1]["node_id"]
    node = next(node for node in cluster.worker_nodes if node.node_id == lost)
    cluster.remove_node(node, allow_graceful=False)
    run.join()
    # Ray may take a while to notice, so that the next attempt may be placed on the lost node once more.
    assert run.outcome is not None
    assert run.outcome.outcome == "finished"
    first, last = run.events("failed")[0], run.events("failed")[-1]
    assert (first["cause"], first["rank"]) == ("died", 1)
    assert "node" in last["error"]
