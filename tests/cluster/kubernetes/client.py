"""Who asks the Kubernetes API server of the tests, over plain HTTP, and for what."""

from __future__ import annotations

import contextlib
import http.client
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from tests.cluster.kubernetes_server import KubernetesServer

DEFINITIONS = sorted((Path(__file__).parents[1] / "schemas").glob("*.yaml"))
PODS, MAPS = "/api/v1/namespaces/default/pods", "/api/v1/namespaces/default/configmaps"
RAYJOBS = "/apis/ray.io/v1/namespaces/default/rayjobs"
MERGE, APPLY = "application/merge-patch+json", "application/apply-patch+yaml"
POD_SPEC = {"containers": [{"name": "main", "image": "i"}], "nodeName": "node-1"}
TEMPLATE = {"spec": {"containers": [{"name": "head", "image": "i"}]}}


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
