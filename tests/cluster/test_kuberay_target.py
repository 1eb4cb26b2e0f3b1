"""Runs on Kubernetes, against a server written from the API's documentation: sent, found, and what becomes of them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import datetime
from typing import Any

import pytest
import yaml

from cluster.dashboard import ask_target
from cluster.targets import Status, kuberay
from configs.errors import NotFound, TimedOut, UsageError
from configs.targets import KuberayTarget
from tests.cluster.kuberay_operator import STORE, Operator, job, target
from tests.cluster.kubernetes_server import KubernetesServer


def holds(whole: Any, part: Any) -> bool:
    """Whether all of the part is in it."""
    if isinstance(part, dict):
        return all(key in whole and holds(whole[key], value) for key, value in part.items())
    if isinstance(part, list):
        return len(part) == len(whole) and all(map(holds, whole, part))
    return bool(whole == part)


# Submitted and found


def test_it_is_created_as_it_is_rendered_and_found_until_it_ends(operator: Operator) -> None:
    prod, sent = target(queue="team-a"), job()
    assert prod.find("demo", STORE) is None
    job_id = prod.submit(sent)
    rendered = yaml.safe_load(prod.render(sent))
    assert job_id == operator.name == rendered["metadata"]["name"]
    assert holds(operator.job, rendered), "and defaults of the schema"
    assert prod.find("demo", STORE) == job_id
    assert prod.find("demo", "s3://other") is None and prod.find("other", STORE) is None
    for deployment, found in (("Initializing", job_id), ("Running", job_id), ("Complete", None), ("Failed", None)):
        operator.says(deployment)
        assert prod.find("demo", STORE) == found


def test_the_run_goes_on_in_place_of_its_job_that_has_ended(operator: Operator) -> None:
    prod = target()
    prod.submit(job())
    first = operator.job["metadata"]["uid"]
    operator.says("Failed")
    prod.submit(job())
    assert operator.job["metadata"]["uid"] != first
    assert "status" not in operator.job


def test_a_job_that_somebody_sends_meanwhile_is_left_alone(
    server: KubernetesServer, operator: Operator, monkeypatch: pytest.MonkeyPatch
) -> None:
    prod = target()
    name = prod.submit(job())
    operator.says("Failed")
    ended = operator.job
    server.delete("rayjobs", name)
    target().submit(job())
    fresh = operator.job["metadata"]["uid"]
    answers = iter([ended])
    real = prod._api.get
    monkeypatch.setattr(prod._api, "get", lambda path: next(answers, None) or real(path))
    assert prod.submit(job()) == name
    assert operator.job["metadata"]["uid"] == fresh


def test_a_job_that_is_still_saving_is_waited_for_and_then_named(
    server: KubernetesServer, operator: Operator, monkeypatch: pytest.MonkeyPatch
) -> None:
    prod = target()
    prod.submit(job())
    operator.pod("head")
    server.patch("pods", f"{operator.name}-head", {"metadata": {"finalizers": ["test/saving"]}})
    prod.stop(operator.name)
    assert prod.find("demo", STORE) is None
    monkeypatch.setattr(kuberay, "GONE_S", 0.1)
    with pytest.raises(TimedOut, match=r"is not gone after.*kubectl wait --for=delete rayjob/demo-"):
        prod.submit(job())
    monkeypatch.setattr(kuberay, "GONE_S", 30.0)
    letting_go = threading.Timer(
        0.2, lambda: server.patch("pods", f"{operator.name}-head", {"metadata": {"finalizers": None}})
    )
    letting_go.start()
    prod.submit(job())
    letting_go.join()
    assert "deletionTimestamp" not in operator.job["metadata"]


def test_nothing_stays_of_a_job_that_is_stopped(server: KubernetesServer, operator: Operator) -> None:
    prod = target()
    prod.submit(job())
    for kind in ("head", "worker", "submitter"):
        operator.pod(kind)
    job_id = operator.name
    prod.stop(job_id)
    prod.stop(job_id)
    assert server.objects("rayjobs") == server.objects("pods") == []
    assert prod.status(job_id).state == "gone"


@pytest.mark.parametrize("fault", ["reset", "truncate", "fail", "throttle", "refuse_write"])
def test_a_submission_whose_answer_is_lost_makes_one_job(
    server: KubernetesServer, operator: Operator, fault: str
) -> None:
    how: dict[str, Callable[[], None]] = {
        "reset": lambda: server.reset(carried_out=True, only="^POST"),
        "truncate": lambda: server.truncate(only="^POST"),
        "fail": lambda: server.fail(code=504, carried_out=True, only="^POST"),
        "throttle": lambda: server.throttle(1, retry_after_s=1, only="^POST"),
        "refuse_write": lambda: server.refuse_write("Conflict"),
    }
    how[fault]()
    assert target().submit(job()) == operator.name
    assert len(server.wait_for_requests("^POST", 2)) == 2


def test_a_job_of_somebody_elses_with_this_name(server: KubernetesServer) -> None:
    prod = target()
    name = prod.submit(job())
    server.patch("rayjobs", name, {"metadata": {"annotations": {"shardyard/run": "other"}}})
    for deployment in ("Running", "Complete"):
        server.patch("rayjobs", name, {"status": {"jobDeploymentStatus": deployment}})
        with pytest.raises(UsageError, match=rf"there is a RayJob {name} that is not this run's\. Rename the run"):
            prod.submit(job())
    assert server.get("rayjobs", name), "it is left alone"


def test_the_queue_shows_who_runs_and_who_waits_for_what(server: KubernetesServer, operator: Operator) -> None:
    prod = target()
    started = prod.submit(job("a", resources={"workers": 2, "gpus_per_worker": 1, "threads": 4}))
    operator.says("Running", "RUNNING")
    server.put("rayjobs", {"metadata": {"name": "of-others"}, "spec": {"entrypoint": "x"}})
    ended = prod.submit(job("b"))
    server.patch("rayjobs", ended, {"status": {"jobDeploymentStatus": "Complete"}})
    waits = prod.submit(job("c"))
    leaves = prod.submit(job("d"))
    server.patch("rayjobs", leaves, {"metadata": {"finalizers": ["test/saving"]}})
    prod.stop(leaves)
    found = {queued.job: queued for queued in prod.queue()}
    assert {name: queued.state for name, queued in found.items()} == {
        started: "running",
        waits: "waiting",
        leaves: "leaving",
    }
    assert next(iter(found)) == started
    first = found[started]
    assert (first.run, first.store, first.user) == ("a", STORE, job().user)
    assert first.asks == "2 workers of 1 GPU, 4 CPU" and found[waits].asks == "1 worker of 1 CPU"
    assert "KubeRay's operator" in found[waits].why and first.why == ""
    created = server.get("rayjobs", started)["metadata"]["creationTimestamp"]
    assert first.submitted_at == datetime.fromisoformat(created).timestamp()


# What becomes of it


@pytest.mark.parametrize(
    ("deployment", "launcher", "message", "expected"),
    [
        ("Running", "RUNNING", "Job is currently running.", Status("running", "Job is currently running.")),
        ("Running", "SUCCEEDED", "", Status("running", "")),  # its submitter has not ended
        ("Complete", "SUCCEEDED", "Job finished.", Status("finished", "Job finished.", 0)),
        ("Complete", "STOPPED", "", Status("stopped", "")),
        ("Complete", "FAILED", "exit code 3", Status("failed", "exit code 3", 3)),
        ("Failed", "FAILED", "exit code 1, logs:\nat 2", Status("failed", "exit code 1, logs:", 1)),
        ("Failed", "", "The RayJob has passed", Status("failed", "The RayJob has passed")),
    ],
)  # fmt: skip
def test_what_kuberay_says_in_our_words(
    operator: Operator, deployment: str, launcher: str, message: str, expected: Status
) -> None:
    prod = target()
    prod.submit(job())
    operator.says(deployment, launcher, message)
    assert prod.status(operator.name) == expected


def test_what_kuberay_has_given_up_runs_until_its_pods_are_gone(server: KubernetesServer, operator: Operator) -> None:
    """So that whoever follows it sees the save."""
    prod = target()
    prod.submit(job())
    head = operator.pod("head")
    operator.pod("submitter")
    operator.says("Failed", "RUNNING", "The RayJob has passed the activeDeadlineSeconds.", "DeadlineExceeded")
    status = prod.status(operator.name)
    assert status.state == "running" and "DeadlineExceeded" in status.reason
    assert prod.find("demo", STORE) is None
    server.delete("pods", head)
    assert prod.status(operator.name).state == "failed"


def test_the_reason_of_a_failure_is_named(operator: Operator) -> None:
    prod = target()
    prod.submit(job())
    operator.says("Failed", "", "The RayJob has passed the activeDeadlineSeconds.", "DeadlineExceeded")
    assert prod.status(operator.name).reason == "DeadlineExceeded: The RayJob has passed the activeDeadlineSeconds."
    operator.says("ValidationFailed", "", "The RayJob spec is invalid: x", "ValidationFailed")
    assert prod.status(operator.name).state == "refused"


# Its log


def test_the_log_is_the_submitters_else_the_heads_else_what_kuberay_says(
    server: KubernetesServer, operator: Operator
) -> None:
    prod = target()
    job_id = prod.submit(job())
    with pytest.raises(NotFound, match="has no log yet"):
        prod.logs(job_id)
    operator.says("Failed", "FAILED", "exit code 1:\nTraceback\nboom")
    assert prod.logs(job_id).endswith("Traceback\nboom")
    server.log(operator.pod("head"), "Ray runtime started.")
    operator.waits("submitter", "ContainerCreating")
    assert prod.logs(job_id) == "Ray runtime started.\n"
    server.log(operator.pod("submitter"), "step 1", "step 2")
    assert prod.logs(job_id) == "step 1\nstep 2\n"


# What the dashboard shows of it


def test_the_dashboard_is_told_of_nodes_where_they_may_be_listed(server: KubernetesServer, operator: Operator) -> None:
    target().submit(job())
    server.put(
        "nodes",
        {
            "metadata": {"name": "gpu-1"},
            "spec": {"unschedulable": True},
            "status": {
                "allocatable": {"cpu": "7500m", "memory": "2Gi", "nvidia.com/gpu": "8"},
                "conditions": [{"type": "DiskPressure", "status": "True"}, {"type": "Ready", "status": "True"}],
            },
        },
    )
    server.put(
        "nodes", {"metadata": {"name": "lost"}, "status": {"conditions": [{"type": "Ready", "status": "Unknown"}]}}
    )
    settings = KuberayTarget(image="registry/shardyard:1")
    gpu, lost = ask_target.ask(settings)["nodes"]
    assert (gpu["node"], gpu["state"], gpu["cpus"], gpu["gpus"]) == ("gpu-1", "ready, cordoned", 7.5, 8)
    assert (gpu["memory_bytes"], gpu["used_gpus"]) == (2 << 30, None)
    assert (lost["node"], lost["state"], lost["gpus"], lost["memory_bytes"]) == ("lost", "not ready", 0, None)
    server.deny("list", "nodes")
    told = ask_target.ask(settings)
    assert told["nodes"] is None and [queued["run"] for queued in told["jobs"]] == ["demo"]
