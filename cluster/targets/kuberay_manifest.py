"""The one object that a run is on Kubernetes: a RayJob, with the recipe in it.

One object is created or it is not, and everything that comes of it belongs to it: nothing is left where a submission
breaks off in the middle, and `kubectl delete` takes all. The recipe is an annotation of the head's pod, which the pod
sees as a file (Kubernetes' downward API).
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import re
from typing import Any

from cluster.targets import Job, spelled
from configs.errors import UsageError
from configs.targets import KuberayTarget

Manifest = dict[str, Any]

RUN, STORE, USER, JOB = "shardyard/run", "shardyard/store", "shardyard/user", "shardyard/job"
MINE = {"app.kubernetes.io/name": "shardyard"}
QUEUE = "kueue.x-k8s.io/queue-name"
SUBMITTER, HEAD, WORKER = "submitter", "ray-head", "ray-worker"
FOLDER = "/etc/shardyard"
ENTRYPOINT = f"python -m cluster.cli train {FOLDER}/run.yaml --address auto"
# All annotations of an object together may have 256 KiB; `kubectl apply` writes the whole object into one of its own.
MOST_RECIPE_BYTES = 64 * 1024
MOST_NAME = 47  # KubeRay's, since it makes longer names of it
# How long an idle cluster stays after the end: long enough that its last metrics are read. The log is the submitter's.
TTL_S = 60
AGENT_PORT = 52365  # of the agent on each node of a Ray, which the probes ask
HEAD_MEMORY = "4Gi"
_RUN_AS = {
    "runAsNonRoot": True,
    "runAsUser": 1000,
    "runAsGroup": 1000,
    "fsGroup": 1000,
    "seccompProfile": {"type": "RuntimeDefault"},
}
_NO_PRIVILEGES = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


def rayjob(job: Job, settings: KuberayTarget) -> Manifest:
    """What is submitted.

    Raises:
        UsageError: the pods could not see the store, or the recipe is too long.
    """
    store = job.resolved.config.store
    if folder(store) is not None and settings.claim is None:
        raise UsageError(
            f"store={store} is a folder, which pods do not see. Use an object store (store=s3://bucket/runs), or give "
            "the target a claim: the PersistentVolumeClaim that is mounted there, and here too."
        )
    size = len(job.recipe.encode())
    if size > MOST_RECIPE_BYTES:
        raise UsageError(
            f"The recipe has {size:,} bytes, and a job on Kubernetes carries at most {MOST_RECIPE_BYTES:,}. Put what "
            "is long into a file of the image or of the store, and name it in the recipe."
        )
    name = job_name(job.run, store)
    labels = MINE | {RUN: job.run.rstrip("._-"), STORE: digest(spelled(store))}
    queue = {QUEUE: settings.queue} if settings.queue else {}
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {
            "name": name,
            "namespace": settings.namespace,
            "labels": labels | queue,
            "annotations": {RUN: job.run, STORE: store, USER: job.user},
        },
        "spec": _spec(job, settings, labels | {JOB: name}),
    }


def job_name(run: str, store: str) -> str:
    """Of the run's RayJob: the same at each submission, so that two at once cannot both be there.

    KubeRay wants a label of DNS that begins with a letter (RFC 1035).
    """
    words = re.sub(r"[^a-z0-9]+", "-", run).strip("-")
    words = words if words[:1].isalpha() else f"run-{words}"
    end = digest(f"{run}\n{spelled(store)}")[:8]
    return f"{words[: MOST_NAME - 1 - len(end)].rstrip('-')}-{end}"


def folder(store: str) -> str | None:
    """The store's path, where it is a folder."""
    path = spelled(store)
    return None if "://" in path else path


def digest(text: str) -> str:
    """A label's value for any text."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _spec(job: Job, settings: KuberayTarget, labels: dict[str, str]) -> Manifest:
    workers = job.resolved.config.resources.workers
    environment = f'env_vars: {{RAY_JOB_STOP_WAIT_TIME_S: "{settings.grace_s}"}}'  # Ray kills after 3 s otherwise
    return {
        "entrypoint": ENTRYPOINT,
        "runtimeEnvYAML": environment,
        # A pod beside the cluster submits the launcher and prints its log, which can be read when the cluster is gone.
        # Where the head has to start anew it submits the launcher again, and the run goes on.
        "submissionMode": "K8sJobMode",
        "submitterConfig": {"backoffLimit": 2},
        "submitterPodTemplate": {"metadata": {"labels": labels}, "spec": _submitter(settings)},
        **({"suspend": True} if settings.queue else {}),  # until Kueue lets it in
        **({"activeDeadlineSeconds": settings.time_s} if settings.time_s is not None else {}),
        # A cluster that has lost a node for good has no room for the run; the next one waits for all its pods.
        "backoffLimit": settings.retries,
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": TTL_S,
        "rayClusterSpec": {
            "rayVersion": importlib.metadata.version("ray"),
            "authOptions": {"mode": "token"},  # the operator makes a Secret with the token
            "headGroupSpec": {
                "rayStartParams": {"num-cpus": "0", "dashboard-host": "0.0.0.0", **_ray_ports()},
                "template": {
                    "metadata": {"labels": labels, "annotations": {"shardyard/recipe": job.recipe}},
                    "spec": _head(job, settings),
                },
            },
            "workerGroupSpecs": [
                {
                    "groupName": "workers",
                    "replicas": workers,
                    "minReplicas": workers,
                    "maxReplicas": workers,
                    "rayStartParams": _worker_resources(job) | _ray_ports(),
                    "template": {"metadata": {"labels": labels}, "spec": _worker(job, settings)},
                }
            ],
        },
    }


def _submitter(settings: KuberayTarget) -> Manifest:
    container = {
        "name": SUBMITTER,
        "image": settings.image,
        "securityContext": _NO_PRIVILEGES,
        "resources": _bounds("100m", "1Gi"),
    }
    return {"restartPolicy": "Never", **_pod(settings), "containers": [container]}


def _head(job: Job, settings: KuberayTarget) -> Manifest:
    """GCS, dashboard and launcher; no rank runs here."""
    container = _ray_container(HEAD, job, settings, "/api/gcs_healthz", 8265) | {
        "ports": [_port("gcs", 6379), _port("dashboard", 8265), _port("metrics", 8080)],
        "resources": _bounds("1", HEAD_MEMORY),
    }
    recipe = {"path": "run.yaml", "fieldRef": {"fieldPath": "metadata.annotations['shardyard/recipe']"}}
    container["volumeMounts"].append({"name": "recipe", "mountPath": FOLDER, "readOnly": True})
    volumes = [*_volumes(job, settings), {"name": "recipe", "downwardAPI": {"items": [recipe]}}]
    grace = {"terminationGracePeriodSeconds": settings.grace_s}
    return {**_pod(settings), **grace, "containers": [container], "volumes": volumes}


def _worker(job: Job, settings: KuberayTarget) -> Manifest:
    """For one worker, which is all of Ray's CPUs and GPUs there."""
    resources = job.resolved.config.resources
    container = _ray_container(WORKER, job, settings, "/api/local_raylet_healthz", AGENT_PORT) | {
        "ports": [_port("metrics", 8080)],
        "resources": _bounds(str(resources.threads), settings.memory),
    }
    pod = {**_pod(settings), "terminationGracePeriodSeconds": settings.grace_s}
    if settings.node_selector:
        pod["nodeSelector"] = settings.node_selector
    if resources.gpus_per_worker:
        for bounds in container["resources"].values():
            bounds["nvidia.com/gpu"] = resources.gpus_per_worker
        pod["tolerations"] = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    return {**pod, "containers": [container], "volumes": _volumes(job, settings)}


def _ray_container(name: str, job: Job, settings: KuberayTarget, path: str, port: int) -> Manifest:
    """With probes of its own: those that KubeRay puts in need a wget in the image (before 1.6)."""
    mounts: list[Manifest] = [{"name": "shm", "mountPath": "/dev/shm"}]
    store = folder(job.resolved.config.store)
    if settings.claim is not None and store is not None:
        mounts.append({"name": "store", "mountPath": store})
    return {
        "name": name,
        "image": settings.image,
        "securityContext": _NO_PRIVILEGES,
        "envFrom": [{"secretRef": {"name": secret}} for secret in settings.secrets],
        "readinessProbe": _probe(path, port, first_s=10, every_s=5, failures=10),
        "livenessProbe": _probe("/api/local_raylet_healthz", AGENT_PORT, first_s=60, every_s=10, failures=12),
        # Whoever deletes pods (Kueue, a drained node) tells the first process in each alone, and all at once.
        "lifecycle": {"preStop": {"exec": {"command": ["python", "-m", "cluster.targets.kuberay_stop"]}}},
        "volumeMounts": mounts,
    }


def _pod(settings: KuberayTarget) -> Manifest:
    """What all pods share; they pass the pod security standard `restricted`."""
    account = {"serviceAccountName": settings.service_account} if settings.service_account else {}
    return {"automountServiceAccountToken": False, **account, "securityContext": _RUN_AS}


def _volumes(job: Job, settings: KuberayTarget) -> list[Manifest]:
    """A container's own /dev/shm has 64 MiB: too little for Ray's object store and for batches from the loader."""
    volumes: list[Manifest] = [{"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": settings.shm}}]
    if settings.claim is not None and folder(job.resolved.config.store) is not None:
        volumes.append({"name": "store", "persistentVolumeClaim": {"claimName": settings.claim}})
    return volumes


def _worker_resources(job: Job) -> dict[str, str]:
    resources = job.resolved.config.resources
    gpus = {"num-gpus": str(resources.gpus_per_worker)} if resources.gpus_per_worker else {}
    return {"num-cpus": str(resources.threads), **gpus}


def _ray_ports() -> dict[str, str]:
    return {"dashboard-agent-listen-port": str(AGENT_PORT), "metrics-export-port": "8080"}


def _port(name: str, port: int) -> Manifest:
    return {"name": name, "containerPort": port}


def _bounds(cpu: str, memory: str) -> Manifest:
    """A CPU may be lent to others while it is idle, memory may not."""
    return {"requests": {"cpu": cpu, "memory": memory}, "limits": {"memory": memory}}


def _probe(path: str, port: int, *, first_s: int, every_s: int, failures: int) -> Manifest:
    wait = {"initialDelaySeconds": first_s, "periodSeconds": every_s, "timeoutSeconds": 5}
    return {"httpGet": {"path": path, "port": port}, **wait, "failureThreshold": failures}
