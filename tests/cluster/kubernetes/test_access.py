"""What its documentation says of logs, rights and faults, the Kubernetes API server of the tests does."""

from __future__ import annotations

import http.client
import json
import socket
import time
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from tests.cluster.kubernetes.client import (
    MERGE,
    PODS,
    RAYJOBS,
    Client,
    pod,
    rayjob,
)
from tests.cluster.kubernetes.objects import ApiError
from tests.cluster.kubernetes_server import KubernetesServer

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
