"""deploy/kubernetes: every kustomization renders, and API servers that refuse unknown fields would take the result."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from configs.load import load
from tests.deploy.kustomize import containers, render
from tests.deploy.manifests import CUSTOM, faults, pods, restricted, taken_by_kubernetes
from tests.deploy.tools import DEPLOY, ROOT, program, run

FOLDERS = sorted(path.parent for path in (DEPLOY / "kubernetes").rglob("kustomization.yaml"))
KUEUE = {"ResourceFlavor", "ClusterQueue", "LocalQueue"}


def name(folder: Path) -> str:
    return folder.relative_to(DEPLOY / "kubernetes").as_posix()


every_folder = pytest.mark.parametrize("folder", FOLDERS, ids=map(name, FOLDERS))


def test_there_are_bases_and_overlays() -> None:
    assert {path.parent.name for path in FOLDERS} == {"base", "gpu", "small"} and len(FOLDERS) == 9


@every_folder
def test_kuberay_takes_it(folder: Path) -> None:
    for manifest in render(folder):
        if manifest["kind"] in CUSTOM:
            assert faults(manifest) == []


@pytest.mark.parametrize(
    "break_it",
    [
        lambda spec: spec.update(ttlSecondsAfterFinnished=1),
        lambda spec: spec.update(backoffLimit="0"),
        lambda spec: pods(spec)[0]["containers"][0].update(readynessProbe={}),
        lambda spec: pods(spec)[-1]["volumes"][1]["emptyDir"].update(sizeLimits="1Gi"),
        lambda spec: pods(spec)[-1]["containers"][0]["resources"]["limits"].update(cpu=[4]),
    ],
)
def test_a_fault_would_be_seen(break_it: Any) -> None:
    (job,) = [manifest for manifest in render(DEPLOY / "kubernetes/base/job") if manifest["kind"] == "RayJob"]
    break_it(job["spec"])
    assert len(faults(job)) == 1


@every_folder
def test_kubernetes_takes_it(folder: Path) -> None:
    for manifest in render(folder):
        if manifest["kind"] not in KUEUE:
            taken_by_kubernetes(manifest)


@pytest.mark.daemon
@every_folder
def test_kustomize_renders_the_same(folder: Path) -> None:
    kubectl = program("kubectl", "your distribution's, or kubernetes.io's; `kubectl kustomize` is asked")
    found = yaml.safe_load_all(run(kubectl, "kustomize", folder))
    key = lambda manifest: (manifest["kind"], manifest["metadata"]["name"])  # noqa: E731
    assert sorted(found, key=key) == sorted(render(folder), key=key)


@every_folder
def test_pods_are_restricted_and_bounded(folder: Path) -> None:
    for manifest in render(folder):
        restricted(manifest)
        for container in containers(manifest):
            assert re.fullmatch(r"[\w./-]+:\d[\w.-]+", container["image"]), container["image"]


@every_folder
def test_names_are_those_of_something(folder: Path) -> None:
    """Volumes, claims, ports, selectors; the two Secrets are made by hand."""
    manifests = [*render(folder), *render(DEPLOY / "kubernetes/base/platform")]
    made = {(manifest["kind"], manifest["metadata"]["name"]) for manifest in manifests}
    for manifest in manifests:
        if manifest["kind"] == "Secret":
            raise AssertionError("a secret stands in a file")
        for pod in pods(manifest):
            volumes = {volume["name"]: volume for volume in pod.get("volumes", [])}
            templates = manifest["spec"].get("volumeClaimTemplates", [])
            mounts = {mount["name"] for item in pod["containers"] for mount in item.get("volumeMounts", [])}
            assert mounts == volumes.keys() | {template["metadata"]["name"] for template in templates}
            for volume in volumes.values():
                if "persistentVolumeClaim" in volume:
                    assert ("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]) in made
                if "configMap" in volume:
                    assert ("ConfigMap", volume["configMap"]["name"]) in made
                if "secret" in volume:
                    assert volume["secret"]["secretName"] in ("postgres", "metrics")
        if manifest["kind"] in ("Deployment", "StatefulSet"):
            labels = manifest["spec"]["template"]["metadata"]["labels"]
            assert manifest["spec"]["selector"]["matchLabels"].items() <= labels.items()
            (service,) = [
                m for m in manifests if m["kind"] == "Service" and m["spec"]["selector"].items() <= labels.items()
            ][:1]
            (container,) = containers(manifest)
            ports = {port["containerPort"] for port in container["ports"]}
            assert {port["port"] for port in service["spec"]["ports"]} == ports


def test_the_queue_of_the_jobs_is_there() -> None:
    for platform in ("base/kueue", "overlays/gpu/platform"):
        manifests = {
            (manifest["kind"], manifest["metadata"]["name"]): manifest
            for manifest in render(DEPLOY / "kubernetes" / platform)
            if manifest["apiVersion"].startswith("kueue")
        }
        queue = manifests["LocalQueue", "training"]
        assert queue["metadata"]["namespace"] == "shardyard"
        cluster_queue = manifests["ClusterQueue", queue["spec"]["clusterQueue"]]
        covered: list[str] = []
        for group in cluster_queue["spec"]["resourceGroups"]:
            covered += group["coveredResources"]
            for flavor in group["flavors"]:
                assert ("ResourceFlavor", flavor["name"]) in manifests
                assert [resource["name"] for resource in flavor["resources"]] == group["coveredResources"]
        assert len(covered) == len(set(covered))
        assert ("nvidia.com/gpu" in covered) == ("gpu" in platform)
    for folder in FOLDERS:
        for manifest in render(folder):
            if manifest["kind"] in CUSTOM:
                assert manifest["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "training"


def test_a_job_ends() -> None:
    (config_map, job) = sorted(render(DEPLOY / "kubernetes/base/job"), key=lambda manifest: manifest["kind"])
    spec = job["spec"]
    assert spec["activeDeadlineSeconds"] > 0 and spec["ttlSecondsAfterFinished"] > 0
    assert spec["shutdownAfterJobFinishes"] is True and spec["backoffLimit"] > 0
    assert spec["rayClusterSpec"]["authOptions"] == {"mode": "token"}
    recipe = load(yaml.safe_load(config_map["data"]["recipe.yaml"])).config
    (workers,) = spec["rayClusterSpec"]["workerGroupSpecs"]
    assert recipe.resources.workers == workers["replicas"]
    assert recipe.store == "/runs"


@every_folder
def test_rays_shared_memory_is_bounded_memory(folder: Path) -> None:
    """A container's own /dev/shm has 64 MiB."""
    for manifest in render(folder):
        if manifest["kind"] in CUSTOM:
            rays = [pod for pod in pods(manifest) if pod["containers"][0]["name"].startswith("ray-")]
            assert len(rays) == 2
            for pod in rays:
                (mount,) = [m for m in pod["containers"][0]["volumeMounts"] if m["mountPath"] == "/dev/shm"]
                (volume,) = [volume for volume in pod["volumes"] if volume["name"] == mount["name"]]
                assert volume["emptyDir"]["medium"] == "Memory" and volume["emptyDir"]["sizeLimit"].endswith("Gi")


def test_the_cluster_of_a_job_is_the_one_that_stays() -> None:
    def bare(folder: str, kind: str) -> Any:
        (manifest,) = [m for m in render(DEPLOY / "kubernetes" / folder) if m["kind"] == kind]
        spec = manifest["spec"]
        for pod in pods(spec):
            pod["volumes"] = (
                [volume for volume in pod["volumes"] if volume["name"] != "recipe"] if "volumes" in pod else []
            )
            for container in pod["containers"]:
                container["volumeMounts"] = [m for m in container.get("volumeMounts", []) if m["name"] != "recipe"]
        return spec

    for kind in ("base", "overlays/gpu"):
        assert bare(f"{kind}/job", "RayJob")["rayClusterSpec"] == bare(f"{kind}/cluster", "RayCluster")


def test_a_gpu_is_asked_for() -> None:
    for folder in ("job", "cluster"):
        manifests = render(DEPLOY / "kubernetes/overlays/gpu" / folder)
        (worker,) = [c for m in manifests for c in containers(m) if c["name"] == "ray-worker"]
        assert worker["resources"]["limits"]["nvidia.com/gpu"] == worker["resources"]["requests"]["nvidia.com/gpu"] == 1
        assert {c["image"] for m in manifests for c in containers(m)} == {"shardyard:0.1.0-cuda"}


def test_versions_are_those_of_the_constraints() -> None:
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    for folder in FOLDERS:
        for manifest in render(folder):
            if manifest["kind"] in CUSTOM:
                spec = manifest["spec"].get("rayClusterSpec", manifest["spec"])
                assert spec["rayVersion"] == pinned["ray"]
