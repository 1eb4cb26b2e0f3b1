"""Why a RayJob has not started: whoever holds it up is found, and quoted with what can be done.

In the order in which they act: Kueue lets the job in, KubeRay makes its pods, the scheduler places them, nodes pull the
image and start it. What only time can mend is told apart from what stays as it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal

from cluster.targets.kuberay_api import Api, Object
from cluster.targets.kuberay_manifest import JOB, QUEUE

KUEUE = "kueue.x-k8s.io"
# So often nodes have failed to pull the image, or the container has ended, when it is not taken for a passing trouble.
TRIES = 4
_IMAGE_REMEDY = "Is the image's name right, is it in the registry, and may the nodes pull it (imagePullSecrets of the \
service account)?"
_CANNOT_START = {
    "InvalidImageName": "Correct the target's image.",
    "ErrImageNeverPull": "The nodes must hold it already; give an image that they may pull.",
    "CreateContainerConfigError": "Make what it names in the namespace, or correct the target's secrets.",
}


@dataclass(frozen=True)
class Reason:
    """stays: it does not go away by itself."""

    text: str
    stays: bool = False


def why_pending(api: Api, job: Object) -> Reason:
    """The first reason that is found, of a RayJob that has not started."""
    if "deletionTimestamp" in job["metadata"]:
        return Reason("it is being deleted, and its pods are going")
    if job["spec"].get("suspend"):
        return _suspended(api, job)
    status, namespace = job.get("status", {}), job["metadata"]["namespace"]
    if not status.get("jobDeploymentStatus"):
        return Reason("KubeRay's operator has not taken it up yet; if this lasts, look whether it runs")
    listed = api.items(f"/api/v1/namespaces/{namespace}/pods", labelSelector=f"{JOB}={job['metadata']['name']}")
    pods = [pod for pod in listed if _lives(pod)]
    for pod in pods:
        for reason in _of_pod(api, pod):
            return reason
    refused = _refused_pods(api, job, len(pods))
    if refused is not None:
        return refused
    ready = sum(_has(pod, "Ready") for pod in pods)
    if status["jobDeploymentStatus"] == "Running":
        return Reason("its Ray cluster is up, and the launcher is being submitted to it")
    return Reason(f"{status['jobDeploymentStatus']}: {ready} of the {_wanted(job)} pods of its Ray cluster are ready")


def _suspended(api: Api, job: Object) -> Reason:
    """By Kueue, whose Workload of the job says why."""
    metadata = job["metadata"]
    queue = metadata.get("labels", {}).get(QUEUE)
    if queue is None:
        return Reason("it is suspended (spec.suspend), by whoever set that")
    version = api.group_version(KUEUE)
    if version is None:
        text = f"the target's queue is {queue}, and the cluster has no Kueue. Take the queue out of the target"
        return Reason(f"{text}, or have Kueue installed.", stays=True)
    path = f"/apis/{version}/namespaces/{metadata['namespace']}/workloads"
    workloads = api.items(path, labelSelector=f"{KUEUE}/job-uid={metadata['uid']}")
    if not workloads:
        return Reason(f"Kueue has not seen it yet (queue {queue}); if this lasts, is its integration ray.io/rayjob on?")
    for kind in ("Evicted", "QuotaReserved", "Admitted"):
        for condition in workloads[0].get("status", {}).get("conditions", ()):
            if condition["type"] == kind and (condition["status"] == "True") == (kind == "Evicted"):
                return _of_kueue(queue, condition)
    return Reason(f"Kueue holds it in queue {queue}, and gives no reason yet")


def _of_kueue(queue: str, condition: Object) -> Reason:
    said = str(condition.get("message") or condition.get("reason")).rstrip(".")
    text = f"Kueue (queue {queue}): {said}."
    if condition["type"] == "Evicted":
        return Reason(f"{text} It saved, and starts again when it is let in.")
    if "maximum capacity" in said:
        return Reason(f"{text} The queue never has so much: use fewer workers, or less for each.", stays=True)
    if re.search(r"LocalQueue .*(doesn't|does not) exist", said):
        remedy = "`kubectl get localqueues` lists the queues; set the target's queue to one of them."
        return Reason(f"{text} {remedy}", stays=True)
    return Reason(f"{text} It starts when there is room.")


def _of_pod(api: Api, pod: Object) -> Iterator[Reason]:
    """What keeps a pod from running, if anything does."""
    name, status = pod["metadata"]["name"], pod.get("status", {})
    for condition in status.get("conditions", ()):
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            yield _unschedulable(name, str(condition.get("message") or condition.get("reason")))
    for container in (*status.get("initContainerStatuses", ()), *status.get("containerStatuses", ())):
        waiting = container.get("state", {}).get("waiting")
        if waiting is None or waiting.get("reason") in (None, "ContainerCreating", "PodInitializing"):
            continue
        why = waiting["reason"]
        said = f"pod {name}, container {container['name']}: {why}: {str(waiting.get('message', '')).rstrip('.')}."
        if why in ("ErrImagePull", "ImagePullBackOff"):
            yield _unpulled(api, pod, said)
        elif why in _CANNOT_START:
            yield Reason(f"{said} {_CANNOT_START[why]}", stays=True)
        elif why == "CrashLoopBackOff":
            ended = container.get("lastState", {}).get("terminated", {})
            text = f"{said} It ended {container.get('restartCount', 0)} times, with exit code {ended.get('exitCode')}."
            remedy = f"Its log: kubectl logs {name} -n {pod['metadata']['namespace']} -c {container['name']} --previous"
            yield Reason(f"{text} {remedy}", stays=container.get("restartCount", 0) >= TRIES)
        else:
            yield Reason(said)
    for event in _warnings(api, pod["metadata"]["namespace"], name) if status.get("phase") == "Pending" else ():
        if event.get("reason") == "FailedMount":
            yield Reason(f"pod {name}: {event['reason']}: {event.get('message', '')}")


def _unschedulable(pod: str, said: str) -> Reason:
    text = f"no node takes pod {pod}: {said.rstrip('.')}."
    if re.search(r'persistentvolumeclaim "[^"]*" not found', said):
        return Reason(f"{text} Make the claim, or correct the target's.", stays=True)
    return Reason(f"{text} It starts when a node has room; if none ever has, ask for less in resources or memory.")


def _unpulled(api: Api, pod: Object, said: str) -> Reason:
    """The registry's own words stand in the node's events, which also count how often it was tried."""
    events = _warnings(api, pod["metadata"]["namespace"], pod["metadata"]["name"])
    failed = [event for event in events if str(event.get("message", "")).startswith("Failed to pull image")]
    tries = sum(_count(event) for event in failed)
    text = f"{said} {str(failed[0]['message']).rstrip('.')}." if failed else said
    return Reason(f"{text} {_IMAGE_REMEDY}", stays=tries >= TRIES)


def _refused_pods(api: Api, job: Object, made: int) -> Reason | None:
    """Why KubeRay cannot make the pods that are missing, from the events of what should have made them."""
    status, metadata = job["status"], job["metadata"]
    if made >= _wanted(job) + (status["jobDeploymentStatus"] == "Running"):
        return None
    for name in filter(None, (status.get("rayClusterName"), metadata["name"])):
        for event in _warnings(api, metadata["namespace"], name):
            said = f"{event.get('reason')}: {str(event.get('message', '')).rstrip('.')}."
            if "exceeded quota" in said:
                return _over_quota(job, said)
            if "is forbidden" in said or " not found" in said:
                return Reason(f"{said} Change what it names, in the target or in the cluster.", stays=True)
            return Reason(said)
    return None


def _over_quota(job: Object, said: str) -> Reason:
    """Nothing but a larger quota helps where the job alone asks for more than is allowed."""
    from kubernetes.utils.quantity import parse_quantity

    demand = _demand(job)
    limited = re.search(r"limited: ([^\s]+?)\.?(?:\s|$)", said)
    for name, _, limit in (part.partition("=") for part in (limited[1] if limited else "").split(",")):
        if name in demand and demand[name] > parse_quantity(limit):
            text = f"{said} The whole job asks for {name}={_shown(demand[name])}, of {limit} allowed in the namespace:"
            return Reason(f"{text} use fewer workers, less for each, or have the quota raised.", stays=True)
    return Reason(f"{said} It starts when others in the namespace have ended, or with less in resources or memory.")


def _demand(job: Object) -> dict[str, Decimal]:
    """What all pods of the job ask for together, by the names that quotas have."""
    from kubernetes.utils.quantity import parse_quantity

    spec = job["spec"]
    cluster = spec["rayClusterSpec"]
    groups = [(group["template"], group["replicas"]) for group in cluster["workerGroupSpecs"]]
    total: dict[str, Decimal] = {}
    for template, count in [(spec["submitterPodTemplate"], 1), (cluster["headGroupSpec"]["template"], 1), *groups]:
        asked = {"pods": Decimal(1)}
        for container in template["spec"]["containers"]:
            for kind, amounts in container["resources"].items():
                for name, amount in amounts.items():
                    for quota in (f"{kind}.{name}", *([name] if kind == "requests" else [])):
                        asked[quota] = asked.get(quota, Decimal(0)) + parse_quantity(amount)
        for quota, amount in asked.items():
            total[quota] = total.get(quota, Decimal(0)) + amount * count
    return total


def _shown(amount: Decimal) -> str:
    return f"{amount / 2**30:g}Gi" if amount >= 2**30 else f"{amount.normalize():f}"


def _warnings(api: Api, namespace: str, name: str) -> list[Object]:
    """Of what has this name, the newest first."""
    events = api.items(
        f"/api/v1/namespaces/{namespace}/events", fieldSelector=f"involvedObject.name={name},type=Warning"
    )
    return sorted(events, key=_last_seen, reverse=True)


def _last_seen(event: Object) -> str:
    series = event.get("series") or {}
    times = (series.get("lastObservedTime"), event.get("lastTimestamp"), event.get("eventTime"))
    return next((str(time) for time in times if time), "")


def _count(event: Object) -> int:
    return int((event.get("series") or {}).get("count") or event.get("count") or 1)


def _wanted(job: Object) -> int:
    """Pods of the Ray cluster."""
    groups = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    return 1 + sum(int(group["replicas"]) for group in groups)


def _lives(pod: Object) -> bool:
    """Not one of an earlier cluster, or of an earlier try to submit."""
    ended = pod.get("status", {}).get("phase") in ("Succeeded", "Failed")
    return not ended and "deletionTimestamp" not in pod["metadata"]


def _has(pod: Object, condition: str) -> bool:
    conditions = pod.get("status", {}).get("conditions", ())
    return any(each["type"] == condition and each["status"] == "True" for each in conditions)
