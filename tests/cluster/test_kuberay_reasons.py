"""Why a run on Kubernetes waits, in the words of whoever holds it up, and whether it waits for ever."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.targets import Status
from tests.cluster.kuberay_operator import CLUSTER, QUOTA, Operator, job, target
from tests.cluster.kubernetes_server import KubernetesServer


def waiting(operator: Operator, deployment: str = "Initializing", **settings: Any) -> Any:
    """A target whose one job waits."""
    prod = target(**settings)
    prod.submit(job(resources={"workers": 2, "threads": 4}))
    if deployment:
        operator.says(deployment)
    return prod


def test_an_operator_that_is_not_there(operator: Operator) -> None:
    prod = waiting(operator, "")
    assert prod.status(operator.name).state == "pending"
    assert "KubeRay's operator has not taken it up yet" in prod.why_pending(operator.name)


@pytest.mark.parametrize("kind", ["head", "worker", "submitter"])
def test_an_image_that_cannot_be_pulled(operator: Operator, kind: str) -> None:
    prod = waiting(operator, "Running" if kind == "submitter" else "Initializing")
    pod = operator.waits(kind, "ImagePullBackOff", 'Back-off pulling image "registry/shardyard:1"')
    said = 'Failed to pull image "registry/shardyard:1": not found'
    operator.event(pod, "Failed", said, count=2)
    operator.event(pod, "Failed", "Error: ErrImagePull", count=9)
    status = prod.status(operator.name)
    assert status.state == "pending", "it may be passing"
    assert said in status.reason and "Is the image's name right" in status.reason
    operator.event(pod, "Failed", said, count=2)
    assert prod.status(operator.name).state == "refused"


@pytest.mark.parametrize(
    ("why", "message", "more", "state", "remedy"),
    [
        ("InvalidImageName", "couldn't parse", {}, "refused", "Correct the target's image"),
        ("ErrImageNeverPull", "", {}, "refused", "nodes must hold it already"),
        ("CreateContainerConfigError", 'secret "s3" not found', {}, "refused", 'not found. Make what it names'),
        ("CreateContainerError", "boom", {}, "pending", "CreateContainerError: boom"),
        ("CrashLoopBackOff", "back-off 10s", {"restartCount": 3, "lastState": {"terminated": {"exitCode": 127}}},
         "pending", "with exit code 127. Its log: kubectl logs"),
        ("CrashLoopBackOff", "back-off 5m", {"restartCount": 4, "lastState": {"terminated": {"exitCode": 127}}},
         "refused", "It ended 4 times"),
        ("ContainerCreating", "", {}, "pending", "Initializing: 0 of the 3 pods"),
    ],
)  # fmt: skip
def test_a_container_that_does_not_start(
    operator: Operator, why: str, message: str, more: Any, state: str, remedy: str
) -> None:
    prod = waiting(operator)
    operator.waits("head", why, message, **more)
    status = prod.status(operator.name)
    assert status.state == state
    assert remedy in status.reason


@pytest.mark.parametrize(
    ("message", "state", "remedy"),
    [
        ("0/3 nodes are available: 3 Insufficient nvidia.com/gpu.", "pending", "It starts when a node has room"),
        ('persistentvolumeclaim "runs" not found', "refused", "Make the claim, or correct the target's"),
    ],
)
def test_a_pod_that_no_node_takes(operator: Operator, message: str, state: str, remedy: str) -> None:
    prod = waiting(operator)
    condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message}
    operator.pod("worker", {"phase": "Pending", "conditions": [condition]})
    status = prod.status(operator.name)
    assert status.state == state
    assert message.rstrip(".") in status.reason and remedy in status.reason


def test_a_volume_that_cannot_be_mounted(operator: Operator) -> None:
    prod = waiting(operator)
    operator.event(operator.waits("head", "ContainerCreating"), "FailedMount", "MountVolume.SetUp failed")
    assert "FailedMount: MountVolume.SetUp failed" in prod.why_pending(operator.name)


@pytest.mark.parametrize(
    ("resource", "each", "limit", "state"),
    [
        # The job: a submitter of 100m CPU and 1Gi, a head of 1 and 4Gi, two workers of 4 and 8Gi; no CPU limits.
        ("requests.cpu", "4", "9", "refused"),
        ("requests.cpu", "4", "9100m", "pending"),
        ("limits.memory", "8Gi", "20Gi", "refused"),
        ("limits.memory", "8Gi", "21Gi", "pending"),
        ("cpu", "4", "9", "refused"),
        ("pods", "1", "3", "refused"),
        ("pods", "1", "4", "pending"),
        ("limits.cpu", "4", "1", "pending"),
    ],
)
@pytest.mark.parametrize("reason", ["FailedToCreateWorkerPod", "FailedCreate"])
def test_a_quota_that_is_exceeded(
    operator: Operator, resource: str, each: str, limit: str, state: str, reason: str
) -> None:
    """For good only where the job alone asks for more than there is."""
    prod = waiting(operator)
    about = CLUSTER if reason.startswith("FailedTo") else operator.name
    operator.event(about, reason, QUOTA.format(resource, each, limit))
    status = prod.status(operator.name)
    assert status.state == state
    assert "exceeded quota: compute" in status.reason
    assert ("have the quota raised" in status.reason) == (state == "refused")


@pytest.mark.parametrize(
    ("message", "state"),
    [
        ('pods "x" is forbidden: violates PodSecurity "restricted:latest": runAsNonRoot != true', "refused"),
        ('pods "x" is forbidden: error looking up service account ml/a: serviceaccount "a" not found', "refused"),
        ("Internal error occurred: failed calling webhook", "pending"),
    ],
)
def test_pods_that_cannot_be_made(operator: Operator, message: str, state: str) -> None:
    prod = waiting(operator)
    operator.event(CLUSTER, "FailedToCreateHeadPod", message)
    status = prod.status(operator.name)
    assert (status.state, message.rstrip(".") in status.reason) == (state, True)


def test_the_newest_event_counts_and_none_once_all_pods_are_there(operator: Operator) -> None:
    prod = waiting(operator)
    operator.event(CLUSTER, "CreatedRayCluster", "all is well", type="Normal", lastTimestamp="2031-01-01T00:00:00Z")
    operator.event(CLUSTER, "FailedToCreateHeadPod", "is forbidden: old", lastTimestamp="2030-01-01T00:00:00Z")
    series = {"count": 2, "lastObservedTime": "2030-01-01T00:00:02.000000Z"}
    operator.event(CLUSTER, "FailedToCreateHeadPod", "newest", series=series)
    operator.event(CLUSTER, "FailedToCreateHeadPod", "is forbidden: new", eventTime="2030-01-01T00:00:01.000000Z")
    assert prod.status(operator.name) == Status("pending", "FailedToCreateHeadPod: newest.")
    ready = {"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]}
    for number in range(3):
        template = operator.job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]
        metadata = {"name": f"p{number}", "labels": template["metadata"]["labels"]}
        operator.server.put("pods", {"metadata": metadata, "spec": template["spec"], "status": ready})
    assert prod.why_pending(operator.name) == "Initializing: 3 of the 3 pods of its Ray cluster are ready"
    operator.says("Running", "PENDING")
    operator.pod("submitter")
    assert prod.status(operator.name).state == "pending"
    assert "the launcher is being submitted" in prod.why_pending(operator.name)


def test_pods_of_a_cluster_that_was_given_up_do_not_count(operator: Operator) -> None:
    prod = waiting(operator)
    pod = operator.waits("head", "InvalidImageName")
    assert prod.status(operator.name).state == "refused"
    operator.server.patch("pods", pod, {"metadata": {"finalizers": ["test/going"]}})
    operator.server.delete("pods", pod)
    operator.pod("submitter", {"phase": "Failed"})
    operator.event(CLUSTER, "FailedToCreateHeadPod", "why there is none")
    assert prod.status(operator.name) == Status("pending", "FailedToCreateHeadPod: why there is none.")


@pytest.mark.parametrize(
    ("condition", "state", "words"),
    [
        ({"type": "QuotaReserved", "status": "False", "reason": "Pending",
          "message": "insufficient unused quota for nvidia.com/gpu in flavor h100, 2 more needed"},
         "pending", "2 more needed. It starts when there is room"),
        ({"type": "QuotaReserved", "status": "False", "reason": "Pending",
          "message": "insufficient quota for cpu in flavor a, current podset request (9) > maximum capacity (4)"},
         "refused", "The queue never has so much"),
        ({"type": "QuotaReserved", "status": "False", "reason": "Inadmissible",
          "message": "LocalQueue team-a doesn't exist"},
         "refused", "kubectl get localqueues"),
        ({"type": "Admitted", "status": "False", "reason": "NoChecks", "message": "a check has not passed"},
         "pending", "Kueue (queue team-a): a check has not passed."),
        ({"type": "Evicted", "status": "True", "reason": "Preempted", "message": "Preempted to accommodate a workload"},
         "pending", "It saved, and starts again when it is let in"),
    ],
)  # fmt: skip
def test_what_kueue_waits_for(operator: Operator, condition: dict[str, str], state: str, words: str) -> None:
    prod = waiting(operator, "Suspended", queue="team-a")
    assert "Kueue has not seen it yet (queue team-a)" in prod.why_pending(operator.name)
    operator.queued({"type": "Admitted", "status": "True"}, condition)
    status = prod.status(operator.name)
    assert status.state == state
    assert words in status.reason


def test_a_queue_without_kueue_is_refused(server: KubernetesServer, operator: Operator) -> None:
    server.uninstall("kueue.x-k8s.io")
    prod = waiting(operator, "Suspended", queue="team-a")
    status = prod.status(operator.name)
    assert status.state == "refused"
    assert "the cluster has no Kueue. Take the queue out of the target" in status.reason
