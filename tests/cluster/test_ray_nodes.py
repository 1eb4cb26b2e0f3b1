"""Several nodes in one machine: workers elsewhere are killed too, a node that goes is named, data is built on all."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from cluster import controller, policies
from cluster.controller import Outcome
from cluster.ray_build import RayTasks
from data_pipelines.build import ensure_dataset
from data_pipelines.storage import Store
from data_pipelines.tokenizer import TokenizerConfig
from tests.cluster.test_ray_group import Launched, facts
from tests.cluster.waiting import alive, wait_for
from tests.data_pipelines.lines_source import write_lines
from tests.data_pipelines.test_build import contents, texts

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
    assert run.outcome is not None, run.error
    assert run.outcome.outcome == "finished"
    first, last = run.events("failed")[0], run.events("failed")[-1]
    assert (first["cause"], first["rank"]) == ("died", 1)
    assert "node" in last["error"]


def test_an_elastic_run_goes_on_without_a_lost_node_and_grows_when_one_comes(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(policies, "GROW_AFTER_S", 1.0)
    monkeypatch.setattr(controller, "ROOM_POLL_S", 0.5)
    run = Launched(tmp_path, "endless", {"workers": 2, "min_workers": 1})
    run.wait_for_step(5)
    placed = run.events("placed")[0]["workers"]
    lost = next(node for node in cluster.worker_nodes if node.node_id == placed[1]["node_id"])
    cluster.remove_node(lost, allow_graceful=False)
    wait_for(lambda: len(run.events("resized")) == 1 and run.training(2, 1), "training with one worker")
    assert facts(tmp_path, 2, 0)[1] == "1"
    assert run.events("placed")[1]["workers"][0]["pid"] == placed[0]["pid"], "the one that is left stays warm"
    cluster.add_node(num_cpus=1)
    wait_for(lambda: len(run.events("resized")) == 2 and run.training(3, 2), "training with two workers")
    assert [facts(tmp_path, 3, rank)[1] for rank in range(2)] == ["2", "2"]
    assert [(row["workers_before"], row["workers"]) for row in run.events("resized")] == [(2, 1), (1, 2)]
    run.controller.request_stop("enough")
    run.join()
    assert run.outcome is not None and (run.outcome.outcome, run.outcome.restarts) == ("stopped", 1)


def on_both_nodes(function: Callable[[Any], Any], nodes: Path, item: Any) -> Any:
    """The function's result, when a task has begun on another node too."""
    import ray

    (nodes / ray.get_runtime_context().get_node_id()).touch()
    deadline = time.monotonic() + 60
    while len(list(nodes.iterdir())) < 2:
        assert time.monotonic() < deadline, "no task came to the other node"
        time.sleep(0.02)
    return function(item)


def test_a_build_on_two_nodes_gives_the_same_bytes(cluster: Any, tmp_path: Path) -> None:
    import ray

    ray.shutdown()  # the build joins by itself
    nodes = tmp_path / "nodes"
    nodes.mkdir()
    data = write_lines(tmp_path / "source", [texts(40, seed % 5) for seed in range(7)], duplicates="near")
    tokenizer, store = TokenizerConfig(vocab_size=300), Store(tmp_path / "many")
    ensure_dataset(Store(tmp_path / "alone"), data, tokenizer)
    with RayTasks(address=cluster.address, store=store) as tasks:

        def run_tasks(function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
            yield from tasks(partial(on_both_nodes, function, nodes), items)

        ensure_dataset(store, data, tokenizer, run_tasks=run_tasks)
    assert len(list(nodes.iterdir())) == 2
    assert contents(tmp_path / "many") == contents(tmp_path / "alone")
