"""The Kubernetes API server of the tests, asked over plain HTTP: what its documentation says, it does."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest

from tests.cluster.kubernetes.objects import ApiError
from tests.cluster.kubernetes.schema import check, fill, prune, read_definition
from tests.cluster.kubernetes_server import KubernetesServer

DEFINITIONS = sorted((Path(__file__).parent / "schemas").glob("*.yaml"))
PODS, MAPS = "/api/v1/namespaces/default/pods", "/api/v1/namespaces/default/configmaps"
RAYJOBS = "/apis/ray.io/v1/namespaces/default/rayjobs"
MERGE, APPLY = "application/merge-patch+json", "application/apply-patch+yaml"
POD_SPEC = {"containers": [{"name": "main", "image": "i"}], "nodeName": "node-1"}
TEMPLATE = {"spec": {"containers": [{"name": "head", "image": "i"}]}}


@pytest.fixture
def server() -> Iterator[KubernetesServer]:
    with KubernetesServer(*DEFINITIONS) as running:
        yield running


class Client:
    """A connection of its own for each request."""

    def __init__(self, server: KubernetesServer) -> None:
        self.server = server

    def open(
        self, method: str, path: str, body: Any = None, media: str = "application/json", **query: Any
    ) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=30)
        headers = {"Authorization": f"Bearer {self.server.token}", "Content-Type": media, "User-Agent": "tester/1"}
        text = body if isinstance(body, str | None) else json.dumps(body)
        connection.request(method, path + ("?" + urlencode(query) if query else ""), text, headers)
        return connection.getresponse()

    def __call__(
        self, method: str, path: str, body: Any = None, media: str = "application/json", **query: Any
    ) -> tuple[int, Any]:
        response = self.open(method, path, body, media, **query)
        text = response.read()
        return response.status, json.loads(text) if response.getheader("Content-Type") == "application/json" else text

    @contextlib.contextmanager
    def watch(self, path: str, **query: Any) -> Iterator[Iterator[tuple[str, Any]]]:
        """The events, as (type, object)."""
        response = self.open("GET", path, watch="true", **query)
        assert response.status == 200
        with response:
            yield ((event["type"], event["object"]) for event in map(json.loads, response))


@pytest.fixture
def ask(server: KubernetesServer) -> Client:
    return Client(server)


def rayjob(name: str = "a", **spec: Any) -> dict[str, Any]:
    metadata = {"name": name} if name else {}
    return {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": metadata, "spec": {"entrypoint": "x"} | spec}


def config_map(name: str, **data: Any) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": data}


def pod(name: str, **labels: str) -> dict[str, Any]:
    return {"metadata": {"name": name, "labels": labels}, "spec": POD_SPEC}


def names(found: dict[str, Any]) -> list[str]:
    return [item["metadata"]["name"] for item in found["items"]]


def seen(event: tuple[str, Any]) -> tuple[str, str]:
    return event[0], event[1]["metadata"]["name"]


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


# Lists


def test_kinds_in_lists(server: KubernetesServer, ask: Client) -> None:
    server.put("rayjobs", rayjob())
    server.put("pods", pod("p"))
    jobs, pods = ask("GET", RAYJOBS)[1], ask("GET", PODS)[1]
    assert (jobs["kind"], jobs["apiVersion"], jobs["items"][0]["kind"]) == ("RayJobList", "ray.io/v1", "RayJob")
    assert (pods["kind"], "kind" in pods["items"][0]) == ("PodList", False)


def test_pages_show_one_moment(server: KubernetesServer, ask: Client) -> None:
    for name in "abcde":
        server.put("pods", pod(name))
    _, first = ask("GET", PODS, limit=2)
    server.delete("pods", "c")
    server.put("pods", pod("d2"))
    _, second = ask("GET", PODS, limit=2, **{"continue": first["metadata"]["continue"]})
    _, third = ask("GET", PODS, limit=2, **{"continue": second["metadata"]["continue"]})
    assert [names(page) for page in (first, second, third)] == [["a", "b"], ["c", "d"], ["e"]]
    assert first["metadata"]["remainingItemCount"] == 3
    assert "continue" not in third["metadata"]
    assert len({page["metadata"]["resourceVersion"] for page in (first, second, third)}) == 1


def test_an_old_continue_token_is_gone(server: KubernetesServer, ask: Client) -> None:
    for name in "abc":
        server.put("pods", pod(name))
    token = ask("GET", PODS, limit=1)[1]["metadata"]["continue"]
    server.expire()
    status, answer = ask("GET", PODS, limit=1, **{"continue": token})
    assert (status, answer["reason"]) == (410, "Expired")
    assert names(ask("GET", PODS, **{"continue": answer["metadata"]["continue"]})[1]) == ["b", "c"]
    assert ask("GET", PODS, **{"continue": "nonsense"})[0] == 400


@pytest.mark.parametrize(
    ("selector", "found"),
    [
        ("app=x", "a"),
        ("app==x,tier=1", "a"),
        ("app!=x", "bc"),
        ("app in (x, y)", "ab"),
        ("app notin (x)", "bc"),
        ("app", "ab"),
        ("!app", "c"),
        ("tier>1", "b"),
        ("", "abc"),
    ],
)
def test_label_selectors(server: KubernetesServer, ask: Client, selector: str, found: str) -> None:
    server.put("pods", pod("a", app="x", tier="1"))
    server.put("pods", pod("b", app="y", tier="2"))
    server.put("pods", pod("c"))
    assert names(ask("GET", PODS, labelSelector=selector)[1]) == list(found)


def test_field_selectors(server: KubernetesServer, ask: Client) -> None:
    server.put("pods", pod("a") | {"status": {"phase": "Running"}})
    server.put("pods", pod("b"))
    for selector, found in (("status.phase=Running", "a"), ("status.phase!=Running", "b"), ("metadata.name=b", "b")):
        assert names(ask("GET", PODS, fieldSelector=selector)[1]) == [found]
    event = {"metadata": {"name": "e"}, "involvedObject": {"kind": "Pod", "name": "a"}, "reason": "FailedScheduling"}
    server.put("events", event)
    events = PODS.replace("pods", "events")
    assert names(ask("GET", events, fieldSelector="involvedObject.name=a,involvedObject.kind=Pod")[1]) == ["e"]


@pytest.mark.parametrize("query", [{"fieldSelector": "spec.entrypoint=x"}, {"labelSelector": "a=!"}, {"limit": "x"}])
def test_wrong_parameters_of_a_list(ask: Client, query: dict[str, str]) -> None:
    status, answer = ask("GET", RAYJOBS, **query)
    assert (status, answer["reason"]) == (400, "BadRequest")


def test_versions_of_a_list(server: KubernetesServer, ask: Client) -> None:
    before = ask("GET", PODS)[1]["metadata"]["resourceVersion"]
    server.put("pods", pod("a"))
    assert names(ask("GET", PODS, resourceVersion=before, resourceVersionMatch="Exact")[1]) == []
    assert names(ask("GET", PODS, resourceVersion=before)[1]) == ["a"]
    assert ask("GET", PODS, resourceVersionMatch="Exact")[0] == 422
    response = ask.open("GET", PODS, resourceVersion="999999")
    assert (response.status, response.getheader("Retry-After")) == (504, "1")
    server.expire()
    assert ask("GET", PODS, resourceVersion=before, resourceVersionMatch="Exact")[0] == 410


def test_all_namespaces_are_listed_together(server: KubernetesServer, ask: Client) -> None:
    server.put("pods", pod("a"))
    server.put("pods", pod("b"), "kube-system")
    assert names(ask("GET", "/api/v1/pods")[1]) == ["a", "b"]
    assert ask("POST", "/api/v1/pods", pod("c"))[0] == 405


# Watches


def test_a_watch_from_a_version_shows_what_came_after(server: KubernetesServer, ask: Client) -> None:
    server.put("rayjobs", rayjob("old"))
    version = ask("GET", RAYJOBS)[1]["metadata"]["resourceVersion"]
    server.put("rayjobs", rayjob("new"))
    with ask.watch(RAYJOBS, resourceVersion=version) as events:
        assert seen(next(events)) == ("ADDED", "new")
        changed = server.patch("rayjobs", "new", {"status": {"jobStatus": "RUNNING"}})
        assert next(events) == ("MODIFIED", changed)
        server.delete("rayjobs", "new")
        kind, last = next(events)
        assert (kind, last["status"]) == ("DELETED", changed["status"])
        assert int(last["metadata"]["resourceVersion"]) > int(changed["metadata"]["resourceVersion"])


@pytest.mark.parametrize("query", [{}, {"resourceVersion": "0"}])
def test_a_watch_without_a_version_begins_with_what_is_there(
    server: KubernetesServer, ask: Client, query: dict[str, str]
) -> None:
    server.put("pods", pod("a"))
    with ask.watch(PODS, **query) as events:
        assert seen(next(events)) == ("ADDED", "a")
        server.put("pods", pod("b"))
        assert seen(next(events)) == ("ADDED", "b")


def test_a_watch_with_a_selector_sees_objects_come_and_go(server: KubernetesServer, ask: Client) -> None:
    server.put("pods", pod("a"))
    with ask.watch(PODS, labelSelector="on=1") as events:
        server.patch("pods", "a", {"metadata": {"labels": {"on": "1"}}})
        server.patch("pods", "a", {"metadata": {"labels": {"more": "1"}}})
        server.patch("pods", "a", {"metadata": {"labels": {"on": None}}})
        assert [next(events)[0] for _ in range(3)] == ["ADDED", "MODIFIED", "DELETED"]


def test_a_watch_ends_in_time_with_a_bookmark(server: KubernetesServer, ask: Client) -> None:
    version = server.put("pods", pod("a"))["metadata"]["resourceVersion"]
    newest = server.put("rayjobs", rayjob())["metadata"]["resourceVersion"]
    began = time.monotonic()
    with ask.watch(PODS, resourceVersion=version, timeoutSeconds=1, allowWatchBookmarks="true") as events:
        bookmark = {"kind": "Pod", "apiVersion": "v1", "metadata": {"resourceVersion": newest}}
        assert list(events) == [("BOOKMARK", bookmark)]
    assert time.monotonic() - began > 0.9


def test_bookmarks_are_for_those_who_asked(server: KubernetesServer, ask: Client) -> None:
    with ask.watch(PODS, allowWatchBookmarks="true") as asked, ask.watch(PODS) as other:
        server.wait_for_streams(count=2)
        server.bookmark()
        assert next(asked)[0] == "BOOKMARK"
        server.put("pods", pod("a"))
        assert seen(next(other)) == ("ADDED", "a")


def test_an_expired_version_ends_open_watches_and_refuses_later_ones(server: KubernetesServer, ask: Client) -> None:
    version = server.put("pods", pod("a"))["metadata"]["resourceVersion"]
    with ask.watch(PODS, resourceVersion=version) as events:
        server.wait_for_streams(count=1)
        server.expire()
        (kind, status), *more = events
    assert (kind, status["code"], status["reason"], more) == ("ERROR", 410, "Expired", [])
    with ask.watch(PODS, resourceVersion=version) as events:
        (kind, status), *more = events
    assert (kind, status["code"], status["message"][:27], more) == (
        "ERROR",
        410,
        "too old resource version: " + version[0],
        [],
    )
    server.expire(in_stream=False)
    status_code, answer = ask("GET", PODS, watch="true", resourceVersion=version)
    assert (status_code, answer["reason"]) == (410, "Expired")
    version = ask("GET", PODS)[1]["metadata"]["resourceVersion"]
    with ask.watch(PODS, resourceVersion=version) as events:
        server.put("pods", pod("b"))
        assert seen(next(events)) == ("ADDED", "b")


def test_a_cut_watch_ends_in_mid_air_after_what_had_happened(server: KubernetesServer, ask: Client) -> None:
    with ask.open("GET", PODS, watch="true") as response:
        server.wait_for_streams(count=1)
        server.put("pods", pod("a"))
        server.cut()
        server.put("pods", pod("b"))
        with pytest.raises(http.client.IncompleteRead) as cut:
            response.read()
    assert [json.loads(line)["object"]["metadata"]["name"] for line in cut.value.partial.splitlines()] == ["a"]


def test_a_clean_cut_is_an_end(server: KubernetesServer, ask: Client) -> None:
    with ask.watch(PODS) as events:
        server.wait_for_streams(count=1)
        server.cut(clean=True)
        assert list(events) == []


def test_a_client_that_leaves_is_noticed(server: KubernetesServer, ask: Client) -> None:
    with ask.watch(PODS):
        server.wait_for_streams("watch=true", 1)
    server.wait_for_streams(count=0)


def test_initial_events_are_refused(ask: Client) -> None:
    assert ask("GET", PODS, watch="true", sendInitialEvents="true")[0] == 422


# Validation


@pytest.mark.parametrize(
    ("spec", "field", "reason", "message"),
    [
        (
            {"backoffLimit": "many"},
            "spec.backoffLimit",
            "FieldValueTypeInvalid",
            'Invalid value: "string": spec.backoffLimit in body must be of type integer: "string"',
        ),
        (
            {"rayClusterSpec": {"headGroupSpec": {"rayStartParams": {}}}},
            "spec.rayClusterSpec.headGroupSpec.template",
            "FieldValueRequired",
            "Required value",
        ),
        (
            {"deletionStrategy": {"onSuccess": {"policy": "No"}, "onFailure": {"policy": "DeleteSelf"}}},
            "spec.deletionStrategy.onSuccess.policy",
            "FieldValueNotSupported",
            'Unsupported value: "No": supported values: "DeleteCluster", "DeleteWorkers", "DeleteSelf", "DeleteNone"',
        ),
        (
            {"managedBy": "me"},
            "spec.managedBy",
            "FieldValueInvalid",
            "Invalid value: \"string\": the managedBy field value must be either 'ray.io/kuberay-operator' or"
            " 'kueue.x-k8s.io/multikueue'",
        ),
        (
            {"backoffLimit": 2**31},
            "spec.backoffLimit",
            "FieldValueInvalid",
            "Invalid value: 2147483648: spec.backoffLimit in body must be of type int32: 2147483648",
        ),
    ],
)
def test_what_the_definition_refuses(ask: Client, spec: Any, field: str, reason: str, message: str) -> None:
    status, answer = ask("POST", RAYJOBS, rayjob(**spec))
    assert (status, answer["reason"]) == (422, "Invalid")
    assert {"reason": reason, "message": message, "field": field} in answer["details"]["causes"]
    assert answer["message"].startswith('RayJob.ray.io "a" is invalid: ')
    assert f"{field}: {message}" in answer["message"]


def test_quantities_and_ports_in_a_pod_template(ask: Client) -> None:
    def with_cpu(cpu: Any) -> dict[str, Any]:
        container = {"name": "head", "resources": {"limits": {"cpu": cpu}}, "ports": [{"containerPort": 1}]}
        head = {"template": {"spec": {"containers": [container]}}}
        return rayjob("b", rayClusterSpec={"headGroupSpec": head | {"rayStartParams": {}}})

    assert ask("POST", RAYJOBS, with_cpu("much"))[0] == 422
    assert ask("POST", RAYJOBS, with_cpu(True))[0] == 422
    status, made = ask("POST", RAYJOBS, with_cpu(2))
    assert status == 201
    containers = made["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"]
    assert containers[0]["ports"] == [{"containerPort": 1, "protocol": "TCP"}]
    assert made["spec"]["submissionMode"] == "K8sJobMode"


def test_an_immutable_field_stays(ask: Client) -> None:
    ask("POST", RAYJOBS, rayjob(managedBy="ray.io/kuberay-operator"))
    status, answer = ask("PATCH", f"{RAYJOBS}/a", {"spec": {"managedBy": "kueue.x-k8s.io/multikueue"}}, MERGE)
    assert (status, "the managedBy field is immutable" in answer["message"]) == (422, True)


def test_unknown_fields_are_refused_warned_of_or_dropped(ask: Client) -> None:
    body = rayjob(entrypiont="x", rayClusterSpec={"headGroupSpec": {"template": TEMPLATE | {"x": 1}}})
    status, answer = ask("POST", RAYJOBS, body, fieldValidation="Strict")
    assert (status, answer["reason"]) == (400, "BadRequest")
    assert answer["message"] == (
        'RayJob in version "v1" cannot be handled as a RayJob: strict decoding error: unknown field "spec.entrypiont",'
        ' unknown field "spec.rayClusterSpec.headGroupSpec.template.x"'
    )
    response = ask.open("POST", RAYJOBS, body)
    assert response.status == 201
    assert (response.headers.get_all("Warning") or [""])[0] == r'299 - "unknown field \"spec.entrypiont\""'
    assert "entrypiont" not in json.loads(response.read())["spec"]
    assert ask("POST", RAYJOBS, body, fieldValidation="Some")[0] == 422
    assert ask("POST", MAPS, config_map("c") | {"dta": {}}, fieldValidation="Strict")[0] == 400


def test_a_field_that_stands_there_twice(ask: Client) -> None:
    text = json.dumps(rayjob()).replace('"entrypoint": "x"', '"entrypoint": "x", "entrypoint": "y"')
    status, answer = ask("POST", RAYJOBS, text, fieldValidation="Strict")
    assert (status, answer["message"].endswith('duplicate field "spec.entrypoint"')) == (400, True)


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ("{", 400),
        ("[]", 400),
        ({"metadata": {"name": "a"}}, 400),
        (rayjob() | {"kind": "RayCluster"}, 400),
        (rayjob() | {"apiVersion": "ray.io/v1alpha1"}, 400),
        (rayjob() | {"metadata": {"name": "a", "namespace": "other"}}, 400),
        (rayjob() | {"metadata": {"name": "a", "labels": {"step": 5}}}, 400),
        (rayjob() | {"metadata": {"name": "a", "labels": {"run": "my run"}}}, 422),
        (rayjob() | {"metadata": {"name": "a", "labels": {"run": "r" * 64}}}, 422),
        (rayjob("My_Run"), 422),
        (rayjob(""), 422),
    ],
)
def test_bodies_that_are_refused(ask: Client, body: Any, code: int) -> None:
    status, answer = ask("POST", RAYJOBS, body)
    assert (status, answer["code"]) == (code, code)


def test_what_a_schema_says_of_each_value() -> None:
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {
            "set": {"type": "array", "items": {"type": "string"}, "x-kubernetes-list-type": "set", "maxItems": 2},
            "share": {"type": "number", "minimum": 0, "maximum": 1},
            "name": {"type": "string", "minLength": 2, "maxLength": 3, "pattern": "^a"},
            "when": {"type": "string", "format": "date-time", "nullable": True},
            "free": {"type": "object", "x-kubernetes-preserve-unknown-fields": True},
            "texts": {"type": "object", "additionalProperties": {"type": "string"}},
            "count": {"type": "integer", "default": 3},
        },
    }
    right = {"set": ["a", "b"], "share": 1, "name": "ab", "when": None, "free": {"x": {}}, "texts": {"k": "v"}}
    assert check(right, schema) == []
    wrong = {"set": ["a", "a", "a"], "share": 2, "name": "b", "when": "now", "free": 1, "texts": {"k": 1}, "count": 0.5}
    fields = [cause.field for cause in check(wrong, schema)]
    assert fields == ["set", "set[1]", "set[2]", "share", "name", "when", "free", "texts.k", "count"]
    assert [cause.reason for cause in check({"name": "abcd"}, schema)] == ["FieldValueTooLong"]
    nulls: dict[str, Any] = {"set": None, "when": None, "count": None}
    fill(nulls, schema)
    assert nulls == {"when": None, "count": 3}
    loose: dict[str, Any] = {"x": 1, "free": {"y": 1}, "texts": {"z": "1"}}
    assert prune(loose, schema) == ["x"]
    assert loose == {"free": {"y": 1}, "texts": {"z": "1"}}


def test_a_definition_beyond_this_validator_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "crd.yaml"
    file.write_text("spec: {versions: [{schema: {openAPIV3Schema: {oneOf: []}}}]}")
    with pytest.raises(ValueError, match="oneOf"):
        read_definition(file)


# Server-side apply


def test_apply_creates_then_changes_and_forgets_what_it_no_longer_names(ask: Client) -> None:
    status, made = ask("PATCH", f"{MAPS}/c", config_map("c", a="1", b="2"), APPLY, fieldManager="one")
    assert (status, made["metadata"]["managedFields"][0]["fieldsV1"]) == (201, {"f:data": {"f:a": {}, "f:b": {}}})
    yaml = "{apiVersion: v1, kind: ConfigMap, metadata: {name: c}, data: {a: '3'}}"
    status, after = ask("PATCH", f"{MAPS}/c", yaml, APPLY, fieldManager="one")
    assert (status, after["data"]) == (200, {"a": "3"})
    assert ask("PATCH", f"{MAPS}/c", yaml, APPLY)[0] == 422


def test_apply_needs_the_right_to_create_where_there_is_nothing(server: KubernetesServer, ask: Client) -> None:
    server.deny("create", "configmaps")
    status, answer = ask("PATCH", f"{MAPS}/c", config_map("c"), APPLY, fieldManager="one")
    assert (status, "cannot create resource" in answer["message"]) == (403, True)


def test_apply_conflicts_with_other_managers_unless_forced(server: KubernetesServer, ask: Client) -> None:
    ask("PATCH", f"{MAPS}/c", config_map("c", a="1", b="1"), APPLY, fieldManager="one")
    server.patch("configmaps", "c", {"data": {"b": "2"}})
    theirs = config_map("c", a="2")
    status, answer = ask("PATCH", f"{MAPS}/c", theirs, APPLY, fieldManager="two")
    assert (status, answer["reason"]) == (409, "Conflict")
    assert answer["message"] == 'Apply failed with 1 conflict: conflict with "one": .data.a'
    cause = {"reason": "FieldManagerConflict", "message": 'conflict with "one"', "field": ".data.a"}
    assert answer["details"]["causes"] == [cause]
    both = ask("PATCH", f"{MAPS}/c", config_map("c", a="2", b="3"), APPLY, fieldManager="two")[1]["message"]
    assert both == (
        'Apply failed with 2 conflicts: conflicts with "controller" using v1:\n- .data.b\n'
        'conflicts with "one":\n- .data.a'
    )
    assert ask("PATCH", f"{MAPS}/c", theirs, APPLY, fieldManager="two", force="true")[1]["data"] == {"a": "2", "b": "2"}
    same = config_map("c", a="2", b="2")
    assert ask("PATCH", f"{MAPS}/c", same, APPLY, fieldManager="three")[0] == 200


def test_other_patches_are_not_known(ask: Client) -> None:
    status, answer = ask("PATCH", f"{MAPS}/c", {}, "application/strategic-merge-patch+json")
    assert (status, answer["reason"]) == (415, "UnsupportedMediaType")


# Logs


def test_a_log_and_its_parameters(server: KubernetesServer, ask: Client) -> None:
    server.put("pods", pod("p"))
    then = datetime(2024, 5, 6, 7, 8, 9, 250000, tzinfo=UTC)
    for second in range(3):
        server.log("p", f"line {second}", at=then + timedelta(seconds=second))
    log = f"{PODS}/p/log"
    assert ask("GET", log) == (200, b"line 0\nline 1\nline 2\n")
    assert ask("GET", log, tailLines=1) == (200, b"line 2\n")
    assert ask("GET", log, tailLines=0) == (200, b"")
    assert ask("GET", log, limitBytes=4) == (200, b"line")
    assert ask("GET", log, sinceTime="2024-05-06T07:08:10Z") == (200, b"line 1\nline 2\n")
    assert ask("GET", log, sinceTime="2024-05-06T07:08:10.9Z") == (200, b"line 1\nline 2\n")
    assert ask("GET", log, sinceSeconds=10) == (200, b"")
    assert ask("GET", log, timestamps="true", tailLines=1) == (200, b"2024-05-06T07:08:11.250000000Z line 2\n")


def test_a_log_is_followed_to_its_end(server: KubernetesServer, ask: Client) -> None:
    server.put("pods", pod("p"))
    server.log("p", "one", "two")
    with ask.open("GET", f"{PODS}/p/log", follow="true", tailLines=1) as response:
        assert response.readline() == b"two\n"
        server.log("p", "three")
        assert response.readline() == b"three\n"
        server.end_log("p")
        assert response.read() == b""


def test_a_followed_log_ends_with_its_pod_and_can_be_cut(server: KubernetesServer, ask: Client) -> None:
    server.put("pods", pod("p"))
    with ask.open("GET", f"{PODS}/p/log", follow="true") as response:
        server.wait_for_streams("/log", 1)
        server.cut()
        with pytest.raises((http.client.IncompleteRead, ConnectionError)):
            response.read()
    with ask.open("GET", f"{PODS}/p/log", follow="true") as response:
        server.delete("pods", "p")
        assert response.read() == b""


def test_logs_that_cannot_be_read(server: KubernetesServer, ask: Client) -> None:
    server.put("pods", {"metadata": {"name": "two"}, "spec": {"containers": [{"name": "a"}, {"name": "b"}]}})
    waiting = {"containerStatuses": [{"name": "main", "state": {"waiting": {"reason": "ImagePullBackOff"}}}]}
    server.put("pods", pod("w") | {"status": waiting})
    for path, query, message in (
        ("two", {}, "a container name must be specified for pod two, choose one of: [a b]"),
        ("two", {"container": "c"}, "container c is not valid for pod two"),
        ("w", {}, 'container "main" in pod "w" is waiting to start: ImagePullBackOff'),
        ("w", {"previous": "true"}, 'previous terminated container "main" in pod "w" not found'),
    ):
        status, answer = ask("GET", f"{PODS}/{path}/log", **query)
        assert (status, answer["message"]) == (400, message)
    assert ask("GET", f"{PODS}/two/log", container="a") == (204, b"")
    server.log("two", "of b", container="b")
    assert ask("GET", f"{PODS}/two/log", container="b") == (200, b"of b\n")


# Who may, and what goes wrong


def test_who_has_no_token_is_refused(server: KubernetesServer, ask: Client) -> None:
    server.token, old = "another", server.token
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    connection.request("GET", PODS, headers={"Authorization": f"Bearer {old}"})
    response = connection.getresponse()
    answer = json.loads(response.read())
    assert (response.status, answer["reason"], answer["message"]) == (401, "Unauthorized", "Unauthorized")
    connection.request("GET", PODS, headers={"Authorization": f"bearer {server.token}"})
    assert connection.getresponse().status == 200, "schemes are in either case"
    connection.close()


@pytest.mark.parametrize(
    ("verb", "resource", "request_", "message"),
    [
        (
            *("create", "rayjobs", ("POST", RAYJOBS, rayjob())),
            'rayjobs.ray.io is forbidden: User "system:serviceaccount:default:shardyard" cannot create resource'
            ' "rayjobs" in API group "ray.io" in the namespace "default"',
        ),
        (
            *("get", "pods/log", ("GET", f"{PODS}/p/log")),
            'pods "p" is forbidden: User "system:serviceaccount:default:shardyard" cannot get resource'
            ' "pods/log" in API group "" in the namespace "default"',
        ),
        (
            *("list", "*", ("GET", "/api/v1/nodes")),
            'nodes is forbidden: User "system:serviceaccount:default:shardyard" cannot list resource'
            ' "nodes" in API group "" at the cluster scope',
        ),
    ],
)
def test_denied_verbs(
    server: KubernetesServer, ask: Client, verb: str, resource: str, request_: tuple[Any, ...], message: str
) -> None:
    server.deny(verb, resource)
    status, answer = ask(*request_)
    assert (status, answer["reason"], answer["message"]) == (403, "Forbidden", message)
    server.allow_all()
    assert ask(*request_)[0] != 403


def test_a_review_says_what_is_allowed(server: KubernetesServer, ask: Client) -> None:
    server.deny("create", "rayjobs", "default")

    def review(**attributes: str) -> Any:
        body = {"apiVersion": "authorization.k8s.io/v1", "kind": "SelfSubjectAccessReview"}
        spec = {"spec": {"resourceAttributes": attributes}} if attributes else {}
        return ask("POST", "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews", body | spec)

    asked = {"verb": "create", "group": "ray.io", "resource": "rayjobs"}
    status, answer = review(**asked, namespace="default")
    assert (status, answer["status"]) == (201, {"allowed": False})
    assert review(**asked, namespace="other")[1]["status"] == {"allowed": True}
    assert review()[0] == 422
    assert ask("POST", "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews", "{")[0] == 400


def test_throttled_requests_say_when_to_come_back(server: KubernetesServer, ask: Client) -> None:
    server.throttle(1, retry_after_s=7)
    response = ask.open("GET", PODS)
    assert (response.status, response.getheader("Retry-After")) == (429, "7")
    assert response.read() == b"Too many requests, please try again later.\n"
    server.throttle(1, status=True)
    status, answer = ask("GET", PODS)
    assert (status, answer["reason"], answer["details"]) == (429, "TooManyRequests", {"retryAfterSeconds": 1})
    assert ask("GET", PODS)[0] == 200


def test_failures_of_the_server(server: KubernetesServer, ask: Client) -> None:
    server.fail(2, 503, only="^GET")
    server.fail(1, 500, carried_out=True, only="^POST")
    assert ask("POST", RAYJOBS, rayjob())[1]["reason"] == "InternalError"
    assert [ask("GET", f"{RAYJOBS}/a")[0] for _ in range(3)] == [503, 503, 200]
    server.fail(1, 504, html=True)
    assert ask("GET", PODS) == (504, b"<html><body><h1>504</h1></body></html>")


def test_a_write_that_is_refused(server: KubernetesServer, ask: Client) -> None:
    server.refuse_write("AlreadyExists")
    assert ask("GET", RAYJOBS)[0] == 200
    assert ask("POST", RAYJOBS, rayjob())[1]["message"] == 'rayjobs.ray.io "a" already exists'
    assert ask("POST", RAYJOBS, rayjob())[0] == 201
    server.refuse_write("Conflict")
    assert ask("PATCH", f"{RAYJOBS}/a", {}, MERGE)[1]["reason"] == "Conflict"


def test_connections_that_break(server: KubernetesServer, ask: Client) -> None:
    server.reset(carried_out=True, only="^POST")
    with pytest.raises((ConnectionError, http.client.RemoteDisconnected)):
        ask("POST", RAYJOBS, rayjob())
    assert ask("GET", f"{RAYJOBS}/a")[0] == 200
    server.truncate()
    with pytest.raises(http.client.IncompleteRead):
        ask("GET", RAYJOBS)
    server.reset(carried_out=True)
    with pytest.raises((ConnectionError, http.client.RemoteDisconnected)):
        ask("GET", PODS, watch="true")
    server.wait_for_streams(count=0)


def test_no_answer_until_it_is_mended(server: KubernetesServer) -> None:
    server.stall()
    with socket.create_connection(("127.0.0.1", server.port), timeout=0.2) as connection:
        text = f"GET {PODS} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {server.token}\r\n\r\n"
        connection.sendall(text.encode())
        with pytest.raises(TimeoutError):
            connection.recv(1)
        connection.settimeout(30)
        server.mend()
        with pytest.raises(ConnectionResetError):
            connection.recv(1)


def test_answers_are_delayed(server: KubernetesServer, ask: Client) -> None:
    server.delay_s = 0.2
    began = time.monotonic()
    assert ask("GET", PODS)[0] == 200
    assert time.monotonic() - began >= 0.2


# What is there, and what came


def test_discovery(server: KubernetesServer, ask: Client) -> None:
    assert ask("GET", "/version")[1]["gitVersion"].startswith("v1.")
    assert ask("GET", "/api")[1]["versions"] == ["v1"]
    groups = [group["name"] for group in ask("GET", "/apis")[1]["groups"]]
    assert {"ray.io", "kueue.x-k8s.io", "batch", "authorization.k8s.io"} == set(groups)
    assert ask("GET", "/apis/ray.io")[1]["preferredVersion"] == {"groupVersion": "ray.io/v1", "version": "v1"}
    found = {one["name"] for one in ask("GET", "/apis/ray.io/v1")[1]["resources"]}
    assert found == {"rayjobs", "rayjobs/status", "rayclusters", "rayclusters/status"}
    assert "pods/log" in {one["name"] for one in ask("GET", "/api/v1")[1]["resources"]}
    assert ask("GET", "/readyz") == (200, b"ok")
    server.uninstall("ray.io")
    assert "ray.io" not in {group["name"] for group in ask("GET", "/apis")[1]["groups"]}
    assert ask("GET", "/apis/ray.io/v1")[0] == 404


def test_requests_are_recorded_without_the_token(server: KubernetesServer, ask: Client) -> None:
    ask("POST", RAYJOBS, rayjob(), dryRun="All")
    (request,) = server.wait_for_requests("^POST .*rayjobs")
    assert str(request) == f"POST {RAYJOBS}?dryRun=All"
    assert (request.query, request.json) == ({"dryRun": "All"}, rayjob())
    assert request.headers["user-agent"] == "tester/1"
    assert server.token not in str(request.headers)


def test_a_test_cannot_store_what_the_definition_refuses(server: KubernetesServer) -> None:
    with pytest.raises(ApiError, match="unknown field"):
        server.put("rayjobs", rayjob() | {"status": {"jobStats": "RUNNING"}})


def test_put_replaces(server: KubernetesServer) -> None:
    first = server.put("workloads", {"metadata": {"name": "w"}, "spec": {"a": 1}, "status": {"b": 1}})
    second = server.put("workloads", {"metadata": {"name": "w"}, "spec": {"a": 2}})
    assert (second["spec"], second["status"]) == ({"a": 2}, {"b": 1})
    assert second["metadata"]["uid"] == first["metadata"]["uid"]
    assert int(second["metadata"]["resourceVersion"]) > int(first["metadata"]["resourceVersion"])
