"""What KubeRay, the scheduler and the nodes do to a RayJob, played on tests/cluster/kubernetes_server.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from cluster.targets import Job, open_target
from configs.load import load, load_resolved
from configs.targets import KuberayTarget
from data_pipelines.storage import Store
from tests.cluster.kubernetes_server import KubernetesServer
from tests.configs.minimal import minimal
from trainer.record import RunRecord

DEFINITIONS = sorted((Path(__file__).parent / "schemas").glob("*.yaml"))
CLUSTER = "cluster-of-the-job"
STORE = "s3://bucket/runs"
# As KubeRay and the Job controller quote the server: of a resource, what a pod asks for and the limit.
QUOTA = 'pods "x" is forbidden: exceeded quota: compute, requested: {0}={1}, used: {0}=1, limited: {0}={2}'


def target(**settings: Any) -> Any:
    """One that the kubeconfig leads to."""
    return open_target(KuberayTarget(**{"image": "registry/shardyard:1", **settings}))


def job(name: str = "demo", store: str = STORE, **changes: Any) -> Job:
    """Of a run that a pod could train."""
    return Job(load(minimal(name=name, store=store, **changes)))


def kubeconfig(server: KubernetesServer, path: Path, **user: Any) -> Path:
    """One of a single context, `test`; user: in place of the server's token."""
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "test", "cluster": {"server": server.url}}],
        "users": [{"name": "me", "user": user or {"token": server.token}}],
        "contexts": [{"name": "test", "context": {"cluster": "test", "user": "me"}}],
        "current-context": "test",
    }
    path.write_text(yaml.safe_dump(config))
    return path


class Operator:
    """Of the one RayJob there is."""

    def __init__(self, server: KubernetesServer) -> None:
        self.server = server

    @property
    def job(self) -> Any:
        (job,) = self.server.objects("rayjobs")
        return job

    @property
    def name(self) -> str:
        name: str = self.job["metadata"]["name"]
        return name

    def owner(self) -> list[dict[str, Any]]:
        of = {"apiVersion": "ray.io/v1", "kind": "RayJob", "name": self.name, "uid": self.job["metadata"]["uid"]}
        return [of | {"blockOwnerDeletion": True, "controller": True}]

    def says(self, deployment: str, job: str = "", message: str = "", reason: str = "") -> None:
        """In the RayJob's status."""
        status = {"jobDeploymentStatus": deployment, "jobStatus": job, "message": message, "reason": reason}
        cluster = {"rayClusterName": CLUSTER} if deployment in ("Initializing", "Running") else {}
        self.server.patch("rayjobs", self.name, {"status": status | cluster})

    def pod(self, kind: str, status: dict[str, Any] | None = None) -> str:
        """Make or change a pod from the job's own template: head, worker, submitter."""
        spec = self.job["spec"]
        groups = spec["rayClusterSpec"]
        templates = {
            "head": groups["headGroupSpec"]["template"],
            "worker": groups["workerGroupSpecs"][0]["template"],
            "submitter": spec["submitterPodTemplate"],
        }
        template, name = templates[kind], f"{self.name}-{kind}"
        running = {"name": template["spec"]["containers"][0]["name"], "state": {"running": {}}}
        status = status or {"phase": "Running", "containerStatuses": [running]}
        metadata = template["metadata"] | {"name": name, "ownerReferences": self.owner()}
        placed = template["spec"] | {"nodeName": "node-1"}
        self.server.put("pods", {"metadata": metadata, "spec": placed, "status": status})
        return name

    def waits(self, kind: str, why: str, message: str = "", **more: Any) -> str:
        """A pod whose container does."""
        spec = {"head": "ray-head", "worker": "ray-worker", "submitter": "submitter"}
        state = {"name": spec[kind], "state": {"waiting": {"reason": why, "message": message}}} | more
        return self.pod(kind, {"phase": "Pending", "containerStatuses": [state]})

    def event(self, about: str, reason: str, message: str, **more: Any) -> None:
        """A warning; more: count, lastTimestamp, series."""
        number = len(self.server.objects("events"))
        what = {"involvedObject": {"name": about, "namespace": "default"}, "reason": reason, "message": message}
        self.server.put("events", {"metadata": {"name": f"event-{number}"}, "type": "Warning"} | what | more)

    def queued(self, *conditions: dict[str, str]) -> None:
        """Kueue's Workload of the job, with these conditions."""
        labels = {"kueue.x-k8s.io/job-uid": self.job["metadata"]["uid"]}
        body = {"metadata": {"name": "w", "labels": labels}, "spec": {}, "status": {"conditions": list(conditions)}}
        self.server.put("workloads", body)

    def record(self) -> RunRecord:
        """The run's, as the launcher opens it: by the recipe that the head's pod sees."""
        template = self.job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]
        resolved = load_resolved(template["metadata"]["annotations"]["shardyard/recipe"])
        return RunRecord.create(Store(resolved.config.store), resolved)
