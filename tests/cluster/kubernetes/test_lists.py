"""What its documentation says of lists and watches, the Kubernetes API server of the tests does."""

from __future__ import annotations

import http.client
import json
import time

import pytest

from tests.cluster.kubernetes.client import (
    PODS,
    RAYJOBS,
    Client,
    names,
    pod,
    rayjob,
    seen,
)
from tests.cluster.kubernetes_server import KubernetesServer

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
