"""`shardyard train --on` a Kubernetes cluster: the test plays the operator, and writes the record as launchers do."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.cli import main
from tests.cluster.kuberay_operator import CLUSTER, QUOTA, Operator, target
from tests.cluster.kubernetes_server import KubernetesServer
from tests.cluster.waiting import wait_for
from trainer.record import RunRecord

JOBS = "/apis/ray.io/v1/namespaces/default/rayjobs"


@pytest.fixture
def command(server: KubernetesServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr("cluster.following.POLL_S", 0.02)
    settings = {"type": "kuberay", "image": "registry/shardyard:1", "claim": "runs", "queue": "team-a"}
    (tmp_path / "targets.yaml").write_text(json.dumps({"prod": settings}))
    recipe = [f"store={tmp_path}/runs", "name=demo", "steps=20"]
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


def seen(server: KubernetesServer, times: int = 6) -> None:
    """Return when the follower has looked again."""
    before = len([request for request in server.requests if f"GET {JOBS}/" in str(request)])
    server.wait_for_requests(f"GET {JOBS}/", before + times)


def test_a_dry_run_needs_no_cluster_and_touches_nothing(
    server: KubernetesServer,
    tmp_path: Path,
    command: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    assert main([*command, "--dry-run", "--json"]) == 0
    printed = capsys.readouterr()
    rendered = json.loads(printed.out)["rendered"]
    assert rendered in printed.err and "kind: RayJob" in rendered and "steps: 20" in rendered
    assert server.requests == [] and not (tmp_path / "runs").exists()


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
        operator.queued({"type": "QuotaReserved", "status": "False", "message": "2 more needed"})
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
    server: KubernetesServer, operator: Operator, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def part() -> None:
        submitted(server)
        operator.says("Failed", "", "Job submission has failed. Reason: BackoffLimitExceeded.", "SubmissionFailed")

    with Playing(part):
        assert main(command) == 1
    said = capsys.readouterr().err
    assert "has ended without the run: SubmissionFailed: Job submission has failed" in said
    assert RunRecord.open(f"{tmp_path}/runs", "demo").status() != "finished"


def test_a_job_that_is_deleted_under_the_follower(
    server: KubernetesServer, operator: Operator, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    def part() -> None:
        submitted(server)
        seen(server, 1)
        server.delete("rayjobs", operator.name)

    with Playing(part):
        assert main(command) == 3
    assert re.search("prod has lost job demo-.*there is no RayJob demo-", capsys.readouterr().err)


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
