"""A Kubernetes cluster with KubeRay: each run is a RayJob with a Ray cluster of its own.

kuberay_manifest.py says what is submitted, kuberay_reasons.py why it has not started, kuberay_api.py asks the server.
Whoever follows a job asks every few seconds: nothing is watched.
"""

from __future__ import annotations

import re
import time
from datetime import datetime
from typing import Any

import yaml

from cluster.targets import Job, Queued, Status, same_store
from cluster.targets.kuberay_api import Api, Object, Taken
from cluster.targets.kuberay_manifest import (
    HEAD,
    JOB,
    MINE,
    RUN,
    STORE,
    SUBMITTER,
    USER,
    job_name,
    rayjob,
)
from cluster.targets.kuberay_reasons import why_pending
from configs.errors import NotFound, TimedOut, UsageError
from configs.targets import KuberayTarget

GONE_S = 30.0
_SELECTOR = ",".join(f"{name}={value}" for name, value in MINE.items())
POLL_S = 1.0


class Target:
    """See cluster/targets/__init__.py."""

    def __init__(self, settings: KuberayTarget) -> None:
        self._settings = settings
        self._api = Api(settings.context)
        self._jobs = f"/apis/ray.io/v1/namespaces/{settings.namespace}/rayjobs"
        self._pods = f"/api/v1/namespaces/{settings.namespace}/pods"

    def render(self, job: Job) -> str:
        """The RayJob, as `kubectl apply` would take it."""
        return yaml.dump(rayjob(job, self._settings), Dumper=_Dumper, sort_keys=False, width=1000)

    def submit(self, job: Job) -> str:
        """Create it, in place of the run's earlier one if that has ended."""
        manifest = rayjob(job, self._settings)
        name: str = manifest["metadata"]["name"]
        self._make_room(job, name)
        try:
            self._api.create(self._jobs, manifest)
        except Taken:  # by an earlier try whose answer was lost, or by somebody who trains the same run
            if self.find(job.run, job.resolved.config.store) is None:
                raise UsageError(
                    f"In namespace {self._settings.namespace} there is a RayJob {name} that is not this run's. Rename "
                    f"the run (name=...), or delete it: kubectl delete rayjob {name} -n {self._settings.namespace}"
                ) from None
        return name

    def find(self, run: str, store: str) -> str | None:
        """By its name, which follows from the run and its store."""
        name = job_name(run, store)
        found = self._api.get(f"{self._jobs}/{name}")
        if found is None or not _is_of(found, run, store) or _ended(found) or "deletionTimestamp" in found["metadata"]:
            return None
        return name

    def status(self, job_id: str) -> Status:
        """From what KubeRay has written into the RayJob."""
        job = self._api.get(f"{self._jobs}/{job_id}")
        if job is None:
            return Status("gone", f"there is no RayJob {job_id} in namespace {self._settings.namespace} any more")
        status = job.get("status", {})
        deployment, launcher = status.get("jobDeploymentStatus", ""), status.get("jobStatus", "")
        if deployment == "ValidationFailed":
            return Status(
                "refused", f"KubeRay: {_said(status)}. The operator there is of another version: see its log."
            )
        if deployment == "Complete" and launcher != "FAILED":
            return Status("stopped", _said(status)) if launcher == "STOPPED" else Status("finished", _said(status), 0)
        if deployment == "Failed" and launcher == "RUNNING" and self._pods_of(job_id, HEAD):
            # KubeRay has given it up, for its time is over or its submitter is gone; its pods go later, and save.
            return Status("running", f"{_said(status)} The run saves, and its pods go.")
        if _ended(job):
            return Status("failed", _said(status), _exit_code(status))
        if not _waits(job):
            return Status("running", _said(status))
        reason = why_pending(self._api, job)
        return Status("refused" if reason.stays else "pending", reason.text)

    def why_pending(self, job_id: str) -> str:
        """In the words of whoever holds it up: KubeRay, Kueue, the scheduler, or a node."""
        return self.status(job_id).reason

    def queue(self) -> list[Queued]:
        """Those of the namespace, by their age: in which order they start is known to Kueue alone."""
        jobs = [job for job in self._api.items(self._jobs, labelSelector=_SELECTOR) if not _ended(job)]
        jobs.sort(key=lambda job: (_waits(job), job["metadata"]["creationTimestamp"]))
        found = []
        for job in jobs:
            metadata, waits = job["metadata"], _waits(job)
            leaves = "deletionTimestamp" in metadata
            notes = metadata.get("annotations", {})
            found.append(
                Queued(
                    job=metadata["name"],
                    run=notes.get(RUN, metadata["name"]),
                    user=notes.get(USER, ""),
                    state="leaving" if leaves else "waiting" if waits else "running",
                    asks=_asks(job),
                    why=why_pending(self._api, job).text if leaves or waits else "",
                    store=notes.get(STORE),
                    submitted_at=datetime.fromisoformat(metadata["creationTimestamp"]).timestamp(),
                )
            )
        return found

    def logs(self, job_id: str) -> str:
        """The submitter's, which repeats what the launcher prints; else the head's; else what KubeRay says of it."""
        for container in (SUBMITTER, HEAD):
            for pod in self._pods_of(job_id, container):
                text = self._api.log(f"{self._pods}/{pod['metadata']['name']}", container)
                if text:
                    return text
        job = self._api.get(f"{self._jobs}/{job_id}") or {}
        message: str = job.get("status", {}).get("message", "")
        if not message:
            raise NotFound(f"Job {job_id} has no log yet: none of its pods has printed anything.")
        return message

    def stop(self, job_id: str) -> None:
        """Delete it. KubeRay sends SIGTERM to the launcher, and the pods wait `grace_s` for its save."""
        self._api.delete(f"{self._jobs}/{job_id}")

    def _pods_of(self, job_id: str, container: str) -> list[Object]:
        """Those of the job that have this container, the newest first."""
        pods = self._api.items(self._pods, labelSelector=f"{JOB}={job_id}")
        found = [pod for pod in pods if any(each["name"] == container for each in pod["spec"]["containers"])]
        return sorted(found, key=lambda pod: str(pod["metadata"]["creationTimestamp"]), reverse=True)

    def _make_room(self, job: Job, name: str) -> None:
        """See that no job of the run that has ended, or is ending, has the name."""
        path, deadline = f"{self._jobs}/{name}", time.monotonic() + GONE_S
        while (found := self._api.get(path)) is not None and _is_of(found, job.run, job.resolved.config.store):
            is_deleted = "deletionTimestamp" in found["metadata"]
            if not is_deleted and not _ended(found):
                return
            if not is_deleted:
                self._api.delete(path, found["metadata"]["uid"])
            if time.monotonic() > deadline:
                raise TimedOut(
                    f"The run's earlier job, RayJob {name} in namespace {self._settings.namespace}, is not gone after "
                    f"{GONE_S:.0f} s; its pods may still be saving. Give the same command again when it is: "
                    f"kubectl wait --for=delete rayjob/{name} -n {self._settings.namespace} --timeout=10m"
                )
            time.sleep(POLL_S)


def _is_of(found: Object, run: str, store: str) -> bool:
    notes = found["metadata"].get("annotations", {})
    return bool(notes.get(RUN) == run and same_store(notes.get(STORE, ""), store))


def _waits(job: Object) -> bool:
    status = job.get("status", {})
    return status.get("jobDeploymentStatus") != "Running" or status.get("jobStatus", "") in ("", "PENDING")


def _asks(job: Object) -> str:
    """In words."""
    (group,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    amounts = group["rayStartParams"]
    each = [f"{amounts[key]} {name}" for key, name in (("num-gpus", "GPU"), ("num-cpus", "CPU")) if key in amounts]
    return f"{group['replicas']} worker{'s' * (group['replicas'] > 1)} of {', '.join(each)}"


def _ended(job: Object) -> bool:
    return job.get("status", {}).get("jobDeploymentStatus") in ("Complete", "Failed", "ValidationFailed")


def _said(status: Object) -> str:
    """KubeRay's reason, and the first line of its message: what follows there is the log."""
    lines = str(status.get("message", "")).strip().splitlines()
    return ": ".join(filter(None, [status.get("reason", ""), *lines[:1]]))


def _exit_code(status: Object) -> int | None:
    """Of the launcher; Ray tells it in words alone."""
    found = re.search(r"exit code (\d+)", str(status.get("message", "")))
    return int(found[1]) if found else None


class _Dumper(yaml.SafeDumper):
    """Texts of several lines as such, and no aliases."""

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002
        """Write it out each time."""
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)
