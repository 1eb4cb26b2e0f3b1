"""Runs on Kubernetes, against a server written from the API's documentation: submitted, found, followed, ended."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.cli import main
from cluster.targets import Job, Status, kuberay, kuberay_api, open_target
from configs.errors import NotFound, ShardyardError, TimedOut, Unreachable, UsageError
from configs.load import load
from configs.targets import KuberayTarget
from tests.cluster.kuberay_operator import CLUSTER, DEFINITIONS, Operator, kubeconfig
from tests.cluster.kubernetes_server import KubernetesServer
from tests.cluster.waiting import wait_for
from tests.configs.minimal import minimal
from trainer.record import RunRecord

STORE = "s3://bucket/runs"
JOBS = "/apis/ray.io/v1/namespaces/default/rayjobs"


@pytest.fixture
def server() -> Iterator[KubernetesServer]:
    with KubernetesServer(*DEFINITIONS) as running:
        yield running


@pytest.fixture(autouse=True)
def here(server: KubernetesServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a kubeconfig for the server, outside any cluster."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KUBECONFIG", str(kubeconfig(server, tmp_path / "kubeconfig")))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    monkeypatch.setattr(kuberay, "POLL_S", 0.02)
    monkeypatch.setattr(kuberay_api, "_RETRY_S", 0.02)
    return tmp_path


@pytest.fixture
def operator(server: KubernetesServer) -> Operator:
    return Operator(server)


def target(**settings: Any) -> Any:
    return open_target(KuberayTarget(**{"image": "registry/shardyard:1", **settings}))


def job(name: str = "demo", store: str = STORE, **changes: Any) -> Job:
    return Job(load(minimal(name=name, store=store, **changes)))


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


def test_the_reason_of_a_failure_is_named(operator: Operator) -> None:
    prod = target()
    prod.submit(job())
    operator.says("Failed", "", "The RayJob has passed the activeDeadlineSeconds.", "DeadlineExceeded")
    assert prod.status(operator.name).reason == "DeadlineExceeded: The RayJob has passed the activeDeadlineSeconds."
    operator.says("ValidationFailed", "", "The RayJob spec is invalid: x", "ValidationFailed")
    assert prod.status(operator.name).state == "refused"


# Why it waits


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


QUOTA = 'pods "x" is forbidden: exceeded quota: compute, requested: {0}={1}, used: {0}=1, limited: {0}={2}'


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


def workload(operator: Operator, *conditions: dict[str, str]) -> None:
    metadata = operator.job["metadata"]
    labels = {"kueue.x-k8s.io/job-uid": metadata["uid"]}
    body = {"metadata": {"name": "w", "labels": labels}, "spec": {}, "status": {"conditions": list(conditions)}}
    operator.server.put("workloads", body)


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
    workload(operator, {"type": "Admitted", "status": "True"}, condition)
    status = prod.status(operator.name)
    assert status.state == state
    assert words in status.reason


def test_a_queue_without_kueue_is_refused(server: KubernetesServer, operator: Operator) -> None:
    server.uninstall("kueue.x-k8s.io")
    prod = waiting(operator, "Suspended", queue="team-a")
    status = prod.status(operator.name)
    assert status.state == "refused"
    assert "the cluster has no Kueue. Take the queue out of the target" in status.reason


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


# What goes wrong between here and there


def deny_everything(server: KubernetesServer) -> None:
    server.deny("*", "*")


def wrong_token(server: KubernetesServer) -> None:
    server.token = "another"


def page(server: KubernetesServer) -> None:
    server.fail(99, html=True)


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (wrong_token, r"does not accept the credentials \(401\): Unauthorized\. They are wrong or have expired"),
        (deny_everything, r'cannot get resource "rayjobs" in API group "ray\.io" in .* "default".*Have that verb'),
        (lambda server: server.uninstall("ray.io"), r"has no API at .*rayjobs.*Install KubeRay's operator"),
        (lambda server: server.throttle(99, retry_after_s=60), r"cannot answer now \(429\): Too many .*in 60 s"),
        (lambda server: server.fail(99), r"cannot answer now \(503\).*try again in 10 s"),
        (page, r"cannot answer now \(503\): 503\."),
        (lambda server: server.stall(99), r"it has been silent for .* s\. Is the network or VPN"),
        (lambda server: server.reset(99), r"the connection broke: .*Try again"),
        (lambda server: server.truncate(99), r"the connection broke: .*Try again"),
    ],
)  # fmt: skip
def test_a_server_that_does_not_serve_us(
    server: KubernetesServer, monkeypatch: pytest.MonkeyPatch, harm: Callable[[KubernetesServer], None], words: str
) -> None:
    monkeypatch.setattr(kuberay_api, "ANSWER_S", 1.0)
    harm(server)
    with pytest.raises(Unreachable, match=words) as caught:
        target().find("demo", STORE)
    assert caught.value.exit_code == 3 and server.url in str(caught.value)


def test_it_waits_less_than_ten_seconds_for_an_answer() -> None:
    assert kuberay_api.ANSWER_S < 10


@pytest.mark.parametrize(
    "harm",
    [
        lambda server: server.throttle(1, retry_after_s=1),
        lambda server: server.throttle(1, retry_after_s=1, status=True),
        lambda server: server.fail(2),
        lambda server: server.fail(1, code=500),
        lambda server: server.reset(2),
        lambda server: server.truncate(1),
    ],
)
def test_what_passes_is_not_noticed(server: KubernetesServer, harm: Callable[[KubernetesServer], None]) -> None:
    prod = target()
    job_id = prod.submit(job())
    harm(server)
    assert prod.find("demo", STORE) == job_id


@pytest.mark.parametrize(
    ("settings", "deny", "error", "words"),
    [
        ({"namespace": "none"}, None, UsageError, r'namespaces "none" not found'),
        ({}, ("create", "rayjobs"), Unreachable, r'cannot create resource "rayjobs" in API group "ray\.io"'),
        ({}, ("list", "pods"), Unreachable, r'cannot list resource "pods" in API group "" in the namespace "default"'),
        ({}, ("list", "events"), Unreachable, r'cannot list resource "events"'),
        ({}, ("delete", "rayjobs"), Unreachable, r'cannot delete resource "rayjobs"'),
        ({}, ("get", "pods/log"), Unreachable, r'cannot get resource "pods/log"'),
    ],
)
def test_each_permission_that_is_missing_is_named(
    server: KubernetesServer, operator: Operator, settings: Any, deny: Any, error: type[ShardyardError], words: str
) -> None:
    if deny:
        server.deny(*deny)
    prod = target(**settings)
    with pytest.raises(error, match=words):
        job_id = prod.submit(job())
        operator.says("Initializing")
        server.log(operator.pod("head"), "Ray runtime started.")
        prod.status(job_id)
        prod.logs(job_id)
        prod.stop(job_id)


def test_older_custom_resources_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fields that they do not know would be dropped in silence, the token among them."""
    text = next(path for path in DEFINITIONS if "rayjobs" in path.name).read_text()
    (tmp_path / "rayjobs.yaml").write_text(text.replace("authOptions:", "otherOptions:"))
    with KubernetesServer(tmp_path / "rayjobs.yaml") as older:
        monkeypatch.setenv("KUBECONFIG", str(kubeconfig(older, tmp_path / "kubeconfig")))
        with pytest.raises(UsageError, match=r'unknown field "spec\.rayClusterSpec\.authOptions".*updated'):
            target().submit(job())
        assert older.objects("rayjobs") == []


# Logging in


def test_a_plugin_logs_in_and_again_when_its_token_is_refused(server: KubernetesServer, here: Path) -> None:
    (here / "token").write_text(server.token)
    plugin = (
        "import json, pathlib; print(json.dumps({'apiVersion': 'client.authentication.k8s.io/v1', "
        "'kind': 'ExecCredential', 'status': {'token': pathlib.Path('token').read_text()}}))"
    )
    command = {"command": sys.executable, "args": ["-c", plugin], "interactiveMode": "Never"}
    kubeconfig(server, here / "kubeconfig", exec=command | {"apiVersion": "client.authentication.k8s.io/v1"})
    prod = target()
    assert prod.find("demo", STORE) is None
    server.token = "the-next"
    with pytest.raises(Unreachable, match="401"):
        prod.find("demo", STORE)
    (here / "token").write_text("the-next")
    assert prod.find("demo", STORE) is None


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ([sys.executable, "-c", "raise SystemExit('token expired, run login')"], "token expired, run login"),
        (["/nonexistent/plugin"], "No such file"),
    ],
)
def test_a_plugin_that_fails(
    server: KubernetesServer, here: Path, capfd: pytest.CaptureFixture[str], command: list[str], words: str
) -> None:
    settings = {"apiVersion": "client.authentication.k8s.io/v1", "command": command[0], "args": command[1:]}
    kubeconfig(server, here / "kubeconfig", exec=settings)
    with pytest.raises(Unreachable, match=rf"plugin gives no credentials.*{words}.*kubectl get pods"):
        target().find("demo", STORE)
    assert capfd.readouterr() == ("", "")


def test_contexts_and_kubeconfigs(server: KubernetesServer, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert target(context="test").find("demo", STORE) is None
    with pytest.raises(UsageError, match=r"\(context 'tset'\) gives no way.*get-contexts"):
        target(context="tset").find("demo", STORE)
    for text in ("", "a: [", "contexts: 3\n", "\x00"):
        (here / "kubeconfig").write_text(text)
        with pytest.raises(UsageError, match="gives no way to a Kubernetes cluster"):
            target().find("demo", STORE)
    monkeypatch.setenv("KUBECONFIG", str(here / "none"))
    with pytest.raises(Unreachable, match=r"There is no kubeconfig at .*none"):
        target().find("demo", STORE)


def test_a_server_that_is_not_there(server: KubernetesServer, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = here / "kubeconfig"
    path.write_text(path.read_text().replace(server.url, "http://127.0.0.1:9"))
    with pytest.raises(Unreachable, match=r"at http://127.0.0.1:9 does not answer: .*Connection refused\. Is it up"):
        target().find("demo", STORE)
    path.write_text(path.read_text().replace("http://127.0.0.1:9", "http://nowhere.invalid"))
    with pytest.raises(Unreachable, match="its name is not known here"):
        target().find("demo", STORE)
    path.write_text(path.read_text().replace("http://nowhere.invalid", server.url.replace("http:", "https:")))
    with pytest.raises(Unreachable, match="the connection is not secure"):
        target().find("demo", STORE)


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kubernetes", None)
    target().render(job())
    with pytest.raises(UsageError, match=r"pip install 'shardyard\[kube\]'"):
        target().find("demo", STORE)


# On the command line


@pytest.fixture
def command(here: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr("cluster.following.POLL_S", 0.02)
    settings = {"type": "kuberay", "image": "registry/shardyard:1", "claim": "runs", "queue": "team-a"}
    (here / "targets.yaml").write_text(json.dumps({"prod": settings}))
    recipe = [f"store={here}/runs", "name=demo", "steps=20"]
    return ["train", "language_modeling-gpt-tiny", *recipe, "--on", "prod"]


class Playing:
    """The operator's part, in a thread; what it raises is raised at the end."""

    def __init__(self, part: Callable[[], None]) -> None:
        self._error: BaseException | None = None
        self._part = part
        self._thread = threading.Thread(target=self._play)

    def _play(self) -> None:
        try:
            self._part()
        except BaseException as error:
            self._error = error

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._thread.join()
        if self._error is not None:
            raise self._error


def submitted(server: KubernetesServer) -> None:
    wait_for(lambda: bool(server.objects("rayjobs")), "a RayJob", 30)


def seen(server: KubernetesServer, times: int = 3) -> None:
    """Return when the follower has looked again."""
    before = len([request for request in server.requests if f"GET {JOBS}/" in str(request)])
    server.wait_for_requests(f"GET {JOBS}/", before + times)


def test_a_dry_run_needs_no_cluster_and_touches_nothing(
    server: KubernetesServer,
    here: Path,
    command: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("KUBECONFIG", str(here / "none"))
    assert main([*command, "--dry-run", "--json"]) == 0
    printed = capsys.readouterr()
    rendered = json.loads(printed.out)["rendered"]
    assert rendered in printed.err and "kind: RayJob" in rendered and "steps: 20" in rendered
    assert server.requests == [] and not (here / "runs").exists()


def test_it_is_left_and_come_back_to(
    server: KubernetesServer, operator: Operator, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, "-d", "--json"]) == 0
    sent = json.loads(capsys.readouterr().out)
    assert sent == {"run": "demo", "target": "prod", "job": operator.name}
    assert main([*command, "-d", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == sent
    assert len(server.objects("rayjobs")) == 1


def test_it_is_followed_from_the_queue_to_its_end(
    server: KubernetesServer, operator: Operator, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    def part() -> None:
        submitted(server)
        operator.says("Suspended")
        workload(operator, {"type": "QuotaReserved", "status": "False", "message": "2 more needed"})
        seen(server)
        server.patch("rayjobs", operator.name, {"spec": {"suspend": False}})
        operator.says("Running", "RUNNING")
        record = operator.record()
        record.event("started", step=0)
        for step in range(1, 21):
            record.metrics(step, {"loss": 3.0 / step})
        record.event("finished", step=20)
        record.close()
        seen(server)
        operator.says("Complete", "SUCCEEDED")

    with Playing(part):
        assert main(command) == 0
    said = capsys.readouterr().out
    assert "waiting at prod: Kueue (queue team-a): 2 more needed" in said
    assert "Run 'demo' has finished after step 20" in said


def test_an_image_that_cannot_be_pulled_ends_it(
    server: KubernetesServer, operator: Operator, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    def part() -> None:
        submitted(server)
        server.patch("rayjobs", operator.name, {"spec": {"suspend": False}})
        operator.says("Initializing")
        pod = operator.waits("head", "ErrImagePull", "rpc error")
        operator.event(pod, "Failed", 'Failed to pull image "registry/shardyard:1": not found', count=4)

    with Playing(part):
        assert main(command) == 2
    said = capsys.readouterr().err
    assert "prod will never start the job, which was taken back" in said and "not found" in said
    assert server.objects("rayjobs") == server.objects("pods") == []


def test_a_quota_that_is_too_small_ends_it(
    server: KubernetesServer, operator: Operator, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    def part() -> None:
        submitted(server)
        server.patch("rayjobs", operator.name, {"spec": {"suspend": False}})
        operator.says("Initializing")
        operator.event(CLUSTER, "FailedToCreateHeadPod", QUOTA.format("requests.memory", "4Gi", "2Gi"))

    with Playing(part):
        assert main(command) == 2
    assert "The whole job asks for requests.memory=21Gi, of 2Gi allowed" in capsys.readouterr().err
    assert server.objects("rayjobs") == []


def test_a_job_that_dies_before_its_log_exists_says_what_kuberay_says(
    server: KubernetesServer, operator: Operator, command: list[str], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def part() -> None:
        submitted(server)
        operator.says("Failed", "", "Job submission has failed. Reason: BackoffLimitExceeded.", "SubmissionFailed")

    with Playing(part):
        assert main(command) == 1
    said = capsys.readouterr().err
    assert "has ended without the run: SubmissionFailed: Job submission has failed" in said
    assert RunRecord.open(f"{here}/runs", "demo").status() != "finished"


def test_a_job_that_is_deleted_under_the_follower(
    server: KubernetesServer, operator: Operator, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    def part() -> None:
        submitted(server)
        seen(server, 1)
        server.delete("rayjobs", operator.name)

    with Playing(part):
        assert main(command) == 1
    assert "there is no RayJob demo-" in capsys.readouterr().err


def test_stopping_while_it_trains_is_told_as_such(
    server: KubernetesServer, operator: Operator, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """The job is there until its pods are gone, so that the follower sees the save."""

    def part() -> None:
        submitted(server)
        server.patch("rayjobs", operator.name, {"spec": {"suspend": False}})
        server.patch("pods", operator.pod("head"), {"metadata": {"finalizers": ["test/saving"]}})
        operator.says("Running", "RUNNING")
        record = operator.record()
        record.metrics(7, {"loss": 3.0})
        seen(server)
        name = operator.name
        target().stop(name)
        seen(server)
        record.event("stopped", step=7)
        record.close()
        server.patch("pods", f"{name}-head", {"metadata": {"finalizers": None}})

    with Playing(part):
        assert main(command) == 0
    assert "Run 'demo' has stopped after step 7" in capsys.readouterr().out
