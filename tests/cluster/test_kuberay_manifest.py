"""The RayJob of a run: taken by KubeRay's and Kubernetes' schemas, and it says what the recipe and the target say."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cluster.targets import Job, kuberay_stop, open_target
from cluster.targets.kuberay_manifest import MOST_RECIPE_BYTES, RUN, STORE, USER, job_name, rayjob
from configs.errors import UsageError
from configs.load import load, load_resolved
from configs.schema import RUN_NAME
from configs.targets import KuberayTarget
from tests.configs.minimal import minimal
from tests.deploy.kustomize import containers, render
from tests.deploy.manifests import faults, pods, restricted, taken_by_kubernetes
from tests.deploy.tools import DEPLOY

S3 = "s3://bucket/runs"


def job(name: str = "demo", store: str = S3, **changes: Any) -> Job:
    return Job(load(minimal(name=name, store=store, **changes)))


def rendered(sent: Job, **target: Any) -> Any:
    """By way of the text that a person would read and apply."""
    return yaml.safe_load(open_target(KuberayTarget(**{"image": "r/shardyard:1", **target})).render(sent))


def container(manifest: Any, name: str) -> Any:
    (found,) = [each for each in containers(manifest) if each["name"] == name]
    return found


def pod_of(manifest: Any, name: str) -> Any:
    (found,) = [pod for pod in pods(manifest) if pod["containers"][0]["name"] == name]
    return found


SETTINGS: list[dict[str, Any]] = [
    {},
    {"namespace": "ml", "queue": "team-a", "service_account": "trainer", "secrets": ("s3", "mlflow.token")},
    {"claim": "runs", "time_s": 86400, "grace_s": 30, "retries": 0, "memory": "64Gi", "shared_memory": "16Gi"},
    {"node_selector": {"nvidia.com/gpu.product": "H100"}, "memory": "1Ti", "context": "prod"},
]
RESOURCES: list[dict[str, Any]] = [
    {},
    {"workers": 8, "gpus_per_worker": 1, "threads": 12},
    {"workers": 3, "min_workers": 2},
]


@pytest.mark.parametrize("target", SETTINGS)
@pytest.mark.parametrize("resources", RESOURCES)
def test_servers_that_refuse_unknown_fields_take_it(target: dict[str, Any], resources: dict[str, Any]) -> None:
    store = "/shared/runs" if "claim" in target else S3
    manifest = rendered(job(store=store, resources=resources), **target)
    assert faults(manifest) == []
    taken_by_kubernetes(manifest)
    restricted(manifest)
    assert len(pods(manifest)) == 3


@settings(max_examples=25, deadline=None)
@given(
    workers=st.integers(1, 4096),
    threads=st.integers(1, 128),
    gpus=st.integers(0, 1),
    gibibytes=st.integers(1, 512),
    shared=st.one_of(st.none(), st.integers(1, 512)),
)
def test_each_worker_has_a_pod_with_what_it_asks_for(
    workers: int, threads: int, gpus: int, gibibytes: int, shared: int | None
) -> None:
    resources = {"workers": workers, "threads": threads, "gpus_per_worker": gpus}
    target = KuberayTarget(
        image="i", memory=f"{gibibytes}Gi", shared_memory=None if shared is None else f"{min(shared, gibibytes)}Gi"
    )
    manifest = rayjob(job(resources=resources), target)
    (group,) = manifest["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert group["replicas"] == group["minReplicas"] == group["maxReplicas"] == workers
    assert group["rayStartParams"]["num-cpus"] == str(threads), "so that Ray finds room for a worker in each pod"
    assert group["rayStartParams"].get("num-gpus", "0") == str(gpus)
    worker = container(manifest, "ray-worker")
    assert worker["resources"]["requests"]["cpu"] == str(threads)
    assert worker["resources"]["requests"]["memory"] == worker["resources"]["limits"]["memory"] == f"{gibibytes}Gi"
    for bounds in worker["resources"].values():
        assert bounds.get("nvidia.com/gpu", 0) == gpus
    assert bool(pod_of(manifest, "ray-worker").get("tolerations")) == bool(gpus)
    assert "nvidia.com/gpu" not in container(manifest, "ray-head")["resources"]["limits"]
    volumes = {volume["name"]: volume for volume in pod_of(manifest, "ray-worker")["volumes"]}
    expected = f"{gibibytes * 256}Mi" if shared is None else f"{min(shared, gibibytes)}Gi"
    assert volumes["shm"]["emptyDir"] == {"medium": "Memory", "sizeLimit": expected}


@settings(max_examples=60, deadline=None)
@example("a" * 63, "s")
@example("0" + "-" * 62, "s")
@given(st.from_regex(RUN_NAME, fullmatch=True), st.text(min_size=1, max_size=300))
def test_any_runs_name_makes_names_that_kubernetes_takes(run: str, store: str) -> None:
    name = job_name(run, store)
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name), "a label of DNS, as KubeRay asks for"
    assert len(name) <= 47
    assert name == job_name(run, store) != job_name(run, store + "x")
    assert job_name(run, "/runs") == job_name(run, "file:///runs/"), "two spellings of one store"
    assert name != job_name(run[:62] + "x", store) or run[:62] + "x" == run
    labels = rayjob(job(run), KuberayTarget(image="i"))["metadata"]["labels"]
    for value in labels.values():
        assert re.fullmatch(r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?", value)


def test_the_head_sees_the_whole_recipe_and_nothing_else_is_made() -> None:
    sent = job(seed=3, data={"name": "text", "paths": ["$(HOME)/a: b # c\t'\"é\n"]})
    manifest = rendered(sent)
    assert manifest["kind"] == "RayJob"
    template = manifest["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]
    assert load_resolved(template["metadata"]["annotations"]["shardyard/recipe"]) == sent.resolved
    (volume,) = [volume for volume in template["spec"]["volumes"] if volume["name"] == "recipe"]
    (item,) = volume["downwardAPI"]["items"]
    (mount,) = [m for m in container(manifest, "ray-head")["volumeMounts"] if m["name"] == "recipe"]
    assert item["fieldRef"]["fieldPath"] == "metadata.annotations['shardyard/recipe']"
    assert f"{mount['mountPath']}/{item['path']}" in manifest["spec"]["entrypoint"]
    assert manifest["metadata"]["annotations"] == {RUN: "demo", STORE: S3, USER: sent.user}


def test_a_recipe_that_is_too_long_is_refused() -> None:
    longest = job(data={"name": "text", "paths": ["x" * MOST_RECIPE_BYTES]})
    with pytest.raises(
        UsageError, match=r"The recipe has 6\d,\d+ bytes, and a job on Kubernetes carries at most 65,536"
    ):
        rendered(longest)


@pytest.mark.parametrize(
    ("store", "mounted"), [("/shared/runs", "/shared/runs"), ("file:///shared/runs", "/shared/runs"), (S3, None)]
)
def test_the_store_is_one_that_the_pods_see(store: str, mounted: str | None) -> None:
    if mounted is not None:
        with pytest.raises(UsageError, match=r"is a folder, which pods do not see\..*give the target a claim"):
            rendered(job(store=store))
    manifest = rendered(job(store=store), claim="runs")
    for name in ("ray-head", "ray-worker"):
        mounts = {mount["name"]: mount["mountPath"] for mount in container(manifest, name)["volumeMounts"]}
        assert mounts.get("store") == mounted
        volumes = {volume["name"]: volume for volume in pod_of(manifest, name)["volumes"]}
        claimed = volumes.get("store", {}).get("persistentVolumeClaim")
        assert claimed == (None if mounted is None else {"claimName": "runs"})


def test_what_has_to_go_leaves_the_run_time_to_save() -> None:
    """Whichever way it is ended: Ray's stop, the pods' deletion."""
    manifest = rendered(job(), grace_s=77)
    environment = yaml.safe_load(manifest["spec"]["runtimeEnvYAML"])["env_vars"]
    assert environment == {"RAY_JOB_STOP_WAIT_TIME_S": "77"}
    for name in ("ray-head", "ray-worker"):
        assert pod_of(manifest, name)["terminationGracePeriodSeconds"] == 77
        stop = container(manifest, name)["lifecycle"]["preStop"]["exec"]["command"]
        assert stop == ["python", "-m", kuberay_stop.__name__]


def test_what_the_target_says() -> None:
    manifest = rendered(job(), queue="team-a", secrets=("s3",), service_account="trainer", time_s=60, retries=1)
    spec = manifest["spec"]
    assert manifest["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team-a" and spec["suspend"] is True
    assert (spec["activeDeadlineSeconds"], spec["backoffLimit"]) == (60, 1)
    assert {pod["serviceAccountName"] for pod in pods(manifest)} == {"trainer"}
    for name in ("ray-head", "ray-worker"):
        assert container(manifest, name)["envFrom"] == [{"secretRef": {"name": "s3"}}]
    plain = rendered(job(), node_selector={"a": "b"})
    assert not {"suspend", "activeDeadlineSeconds"} & plain["spec"].keys()
    assert "kueue.x-k8s.io/queue-name" not in plain["metadata"]["labels"]
    assert pod_of(plain, "ray-worker")["nodeSelector"] == {"a": "b"}
    assert "nodeSelector" not in pod_of(plain, "ray-head")


def test_it_is_the_job_that_deploy_shows() -> None:
    """What is of one mind in both: how Ray starts and is watched, who a pod is, how a job ends."""
    (by_hand,) = [each for each in render(DEPLOY / "kubernetes/base/job") if each["kind"] == "RayJob"]
    sent = rendered(job(store="/runs", resources={"workers": 2, "threads": 4}), claim="runs")
    same = ("submissionMode", "submitterConfig", "backoffLimit", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished")
    assert {key: by_hand["spec"][key] for key in same} == {key: sent["spec"][key] for key in same}
    assert by_hand["spec"]["runtimeEnvYAML"] == sent["spec"]["runtimeEnvYAML"]
    clusters = [manifest["spec"]["rayClusterSpec"] for manifest in (by_hand, sent)]
    for key in ("rayVersion", "authOptions"):
        assert clusters[0][key] == clusters[1][key]
    assert clusters[0]["headGroupSpec"]["rayStartParams"] == clusters[1]["headGroupSpec"]["rayStartParams"]
    for name in ("ray-head", "ray-worker", "submitter"):
        theirs, ours = container(by_hand, name), container(sent, name)
        assert theirs["securityContext"] == ours["securityContext"]
        for probe in ("readinessProbe", "livenessProbe"):
            assert _probe(theirs, probe) == _probe(ours, probe)
        ports = [{port["name"]: port["containerPort"] for port in each.get("ports", [])} for each in (theirs, ours)]
        assert ports[0] == ports[1]
        for key in ("terminationGracePeriodSeconds", "automountServiceAccountToken"):
            assert pod_of(by_hand, name).get(key) == pod_of(sent, name).get(key)
    for name in ("ray-head", "ray-worker"):
        assert container(by_hand, name)["lifecycle"] == container(sent, name)["lifecycle"]


def _probe(container: Any, name: str) -> Any:
    """With its port by number."""
    probe = container.get(name)
    if probe is None:
        return None
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    get = probe["httpGet"]
    return probe | {"httpGet": get | {"port": ports.get(get["port"], get["port"])}}
