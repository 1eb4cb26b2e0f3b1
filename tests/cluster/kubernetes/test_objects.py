"""What its documentation says of objects and their deletion, the Kubernetes API server of the tests does."""

from __future__ import annotations

from typing import Any

import pytest

from tests.cluster.kubernetes.client import (
    MAPS,
    MERGE,
    POD_SPEC,
    PODS,
    RAYJOBS,
    Client,
    config_map,
    names,
    pod,
    rayjob,
    seen,
)
from tests.cluster.kubernetes_server import KubernetesServer

# Objects


def test_a_created_object_gets_what_the_server_gives(ask: Client) -> None:
    status, made = ask("POST", RAYJOBS, rayjob() | {"status": {"jobStatus": "RUNNING"}})
    assert status == 201
    assert "status" not in made
    metadata = made["metadata"]
    assert metadata["namespace"] == "default"
    assert metadata["generation"] == 1
    assert metadata["uid"]
    assert metadata["creationTimestamp"].endswith("Z")
    assert ask("GET", f"{RAYJOBS}/a") == (200, made)


def test_a_taken_name_is_refused(ask: Client) -> None:
    ask("POST", RAYJOBS, rayjob())
    assert ask("POST", RAYJOBS, rayjob()) == (
        409,
        {
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Failure",
            "message": 'rayjobs.ray.io "a" already exists',
            "reason": "AlreadyExists",
            "details": {"name": "a", "group": "ray.io", "kind": "rayjobs"},
            "code": 409,
        },
    )


def test_names_are_generated(ask: Client) -> None:
    body = rayjob("") | {"metadata": {"generateName": "run-"}}
    made = [ask("POST", RAYJOBS, body)[1]["metadata"]["name"] for _ in range(2)]
    assert made[0] != made[1]
    assert all(name.startswith("run-") and len(name) == 9 for name in made)


@pytest.mark.parametrize(
    ("method", "path", "body", "message"),
    [
        ("GET", f"{RAYJOBS}/a", None, 'rayjobs.ray.io "a" not found'),
        ("PUT", f"{RAYJOBS}/a", rayjob(), 'rayjobs.ray.io "a" not found'),
        ("DELETE", f"{PODS}/a", None, 'pods "a" not found'),
        ("POST", RAYJOBS.replace("default", "none"), rayjob(), 'namespaces "none" not found'),
    ],
)
def test_what_is_not_there(ask: Client, method: str, path: str, body: Any, message: str) -> None:
    status, answer = ask(method, path, body)
    assert (status, answer["reason"], answer["message"]) == (404, "NotFound", message)


def test_a_path_that_nobody_serves_is_plain_text(server: KubernetesServer, ask: Client) -> None:
    server.uninstall("kueue.x-k8s.io")
    for path in ("/apis/kueue.x-k8s.io/v1beta1/localqueues", "/apis/ray.io/v2/rayjobs", "/api/v1/things", "/x"):
        assert ask("GET", path) == (404, b"404 page not found\n")


def test_a_stale_update_is_a_conflict(server: KubernetesServer, ask: Client) -> None:
    _, made = ask("POST", RAYJOBS, rayjob())
    server.patch("rayjobs", "a", {"status": {"jobStatus": "RUNNING"}})
    status, answer = ask("PUT", f"{RAYJOBS}/a", made)
    assert (status, answer["reason"]) == (409, "Conflict")
    assert answer["message"] == (
        'Operation cannot be fulfilled on rayjobs.ray.io "a": the object has been modified; please apply your changes'
        " to the latest version and try again"
    )


def test_an_update_names_its_version_for_custom_resources_only(ask: Client) -> None:
    ask("POST", RAYJOBS, rayjob())
    ask("POST", MAPS, config_map("c", a="1"))
    status, answer = ask("PUT", f"{RAYJOBS}/a", rayjob())
    assert (status, answer["reason"]) == (422, "Invalid")
    assert "metadata.resourceVersion: Invalid value: 0x0: must be specified for an update" in answer["message"]
    assert ask("PUT", f"{MAPS}/c", config_map("c", a="2"))[0] == 200


def test_an_update_keeps_the_status_and_counts_generations(server: KubernetesServer, ask: Client) -> None:
    ask("POST", RAYJOBS, rayjob())
    now = server.patch("rayjobs", "a", {"status": {"jobStatus": "RUNNING"}})
    assert now["metadata"]["generation"] == 1
    now["spec"]["suspend"], now["status"] = True, {"jobStatus": "FAILED"}
    status, after = ask("PUT", f"{RAYJOBS}/a", now)
    assert (status, after["status"]["jobStatus"], after["metadata"]["generation"]) == (200, "RUNNING", 2)


def test_a_status_has_a_path_of_its_own(ask: Client) -> None:
    ask("POST", RAYJOBS, rayjob())
    patch = {"status": {"jobStatus": "RUNNING"}, "spec": {"suspend": True}}
    status, after = ask("PATCH", f"{RAYJOBS}/a/status", patch, MERGE)
    assert (status, after["status"]["jobStatus"], "suspend" in after["spec"]) == (200, "RUNNING", False)


def test_a_merge_patch_removes_with_null(ask: Client) -> None:
    ask("POST", RAYJOBS, rayjob(suspend=True, jobId="j"))
    _, after = ask("PATCH", f"{RAYJOBS}/a", {"spec": {"suspend": None, "jobId": "k"}}, MERGE)
    assert ("suspend" in after["spec"], after["spec"]["jobId"], after["spec"]["entrypoint"]) == (False, "k", "x")


def test_an_unchanged_object_keeps_its_version(ask: Client) -> None:
    _, made = ask("POST", RAYJOBS, rayjob())
    assert ask("PATCH", f"{RAYJOBS}/a", {"spec": {"entrypoint": "x"}}, MERGE) == (200, made)


def test_a_dry_run_leaves_nothing(server: KubernetesServer, ask: Client) -> None:
    status, made = ask("POST", RAYJOBS, rayjob(), dryRun="All")
    assert (status, "resourceVersion" in made["metadata"], server.objects("rayjobs")) == (201, False, [])
    ask("POST", RAYJOBS, rayjob())
    assert ask("DELETE", f"{RAYJOBS}/a", dryRun="All")[0] == 200
    assert ask("GET", f"{RAYJOBS}/a")[0] == 200
    assert ask("POST", RAYJOBS, rayjob(), dryRun="Some")[0] == 422


def test_secrets_are_encoded_and_limited(ask: Client) -> None:
    path = MAPS.replace("configmaps", "secrets")
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "s"}, "stringData": {"k": "v"}}
    assert ask("POST", path, secret)[1]["data"] == {"k": "dg=="}
    status, answer = ask("POST", MAPS, config_map("c", a="x" * 1024**2 + "y"))
    assert (status, answer["details"]["causes"][0]["reason"]) == (422, "FieldValueTooLong")
    status, answer = ask("POST", MAPS, config_map("c", a="x" * 3 * 1024**2))
    assert (status, answer["reason"]) == (413, "RequestEntityTooLarge")


# Deletion


def test_a_deletion_answers_with_a_status(ask: Client) -> None:
    _, made = ask("POST", RAYJOBS, rayjob())
    status, answer = ask("DELETE", f"{RAYJOBS}/a", {"kind": "DeleteOptions", "apiVersion": "v1"})
    assert (status, answer["status"]) == (200, "Success")
    assert answer["details"] == {"name": "a", "group": "ray.io", "kind": "rayjobs", "uid": made["metadata"]["uid"]}
    assert ask("GET", f"{RAYJOBS}/a")[0] == 404


def test_finalizers_keep_an_object(server: KubernetesServer, ask: Client) -> None:
    server.put("rayjobs", rayjob() | {"metadata": {"name": "a", "finalizers": ["ray.io/f"]}})
    status, answer = ask("DELETE", f"{RAYJOBS}/a")
    assert (status, answer["kind"]) == (200, "RayJob")
    assert answer["metadata"]["deletionTimestamp"]
    assert ask("DELETE", f"{RAYJOBS}/a") == (200, answer)
    assert server.patch("rayjobs", "a", {"metadata": {"finalizers": None}}) == {}
    assert ask("GET", f"{RAYJOBS}/a")[0] == 404


def owned(server: KubernetesServer) -> None:
    uid = server.put("rayjobs", rayjob())["metadata"]["uid"]
    owner = {"apiVersion": "ray.io/v1", "kind": "RayJob", "name": "a", "uid": uid, "blockOwnerDeletion": True}
    server.put("pods", {"metadata": {"name": "p", "ownerReferences": [owner]}, "spec": POD_SPEC})


@pytest.mark.parametrize(
    ("policy", "events"),
    [
        ("Background", [("DELETED", "a")]),
        ("Foreground", [("MODIFIED", "a"), ("DELETED", "a")]),
    ],
)
def test_what_belongs_to_an_object_goes_with_it(
    server: KubernetesServer, ask: Client, policy: str, events: list[tuple[str, str]]
) -> None:
    owned(server)
    version = ask("GET", RAYJOBS)[1]["metadata"]["resourceVersion"]
    assert ask("DELETE", f"{RAYJOBS}/a", {"propagationPolicy": policy})[0] == 200
    assert server.objects("pods") == []
    with ask.watch(RAYJOBS, resourceVersion=version) as found:
        assert [seen(event) for _, event in zip(events, found, strict=False)] == events


def test_a_foreground_deletion_waits_for_what_blocks_it(server: KubernetesServer, ask: Client) -> None:
    owned(server)
    server.patch("pods", "p", {"metadata": {"finalizers": ["f"]}})
    ask("DELETE", f"{RAYJOBS}/a", propagationPolicy="Foreground")
    assert server.get("rayjobs", "a")["metadata"]["finalizers"] == ["foregroundDeletion"]
    assert server.get("pods", "p")["metadata"]["finalizers"] == ["f"]
    server.patch("pods", "p", {"metadata": {"finalizers": []}})
    assert server.objects("rayjobs") == server.objects("pods") == []


def test_orphans_stay(server: KubernetesServer, ask: Client) -> None:
    owned(server)
    ask("DELETE", f"{RAYJOBS}/a", propagationPolicy="Orphan")
    assert server.get("pods", "p")["metadata"]["ownerReferences"] == []


def test_a_job_leaves_its_pods_unless_told_otherwise(server: KubernetesServer, ask: Client) -> None:
    uid = server.put("jobs", {"metadata": {"name": "j"}, "spec": {}})["metadata"]["uid"]
    server.put("pods", {"metadata": {"name": "p", "ownerReferences": [{"uid": uid}]}, "spec": POD_SPEC})
    response = ask.open("DELETE", "/apis/batch/v1/namespaces/default/jobs/j")
    assert "child pods are preserved by default" in str(response.getheader("Warning"))
    assert len(server.objects("pods")) == 1


def test_preconditions_of_a_deletion(server: KubernetesServer, ask: Client) -> None:
    version = server.put("rayjobs", rayjob())["metadata"]["resourceVersion"]
    for wanted in ({"uid": "other"}, {"resourceVersion": "1"}):
        status, answer = ask("DELETE", f"{RAYJOBS}/a", {"preconditions": wanted})
        assert (status, answer["reason"]) == (409, "Conflict")
    assert ask("DELETE", f"{RAYJOBS}/a", {"preconditions": {"resourceVersion": version}})[0] == 200


def test_a_collection_is_deleted_by_its_labels(server: KubernetesServer, ask: Client) -> None:
    for name, app in (("a", "x"), ("b", "y"), ("c", "x")):
        server.put("pods", pod(name, app=app))
    assert names(ask("DELETE", PODS, labelSelector="app=x")[1]) == ["a", "c"]
    assert names(ask("GET", PODS)[1]) == ["b"]


def test_a_namespace_takes_what_is_in_it(server: KubernetesServer, ask: Client) -> None:
    server.put("pods", pod("a"))
    assert ask("DELETE", "/api/v1/namespaces/default")[0] == 200
    assert ask("GET", "/api/v1/pods")[1]["items"] == []
