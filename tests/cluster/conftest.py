"""A Kubernetes cluster that the current folder's kubeconfig leads to."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.targets import kuberay, kuberay_api
from tests.cluster.kuberay_operator import DEFINITIONS, Operator, kubeconfig
from tests.cluster.kubernetes_server import KubernetesServer


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[KubernetesServer]:
    """Its API server; this process is in no pod, and in no hurry."""
    with KubernetesServer(*DEFINITIONS) as running:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("KUBECONFIG", str(kubeconfig(running, tmp_path / "kubeconfig")))
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
        monkeypatch.setattr(kuberay, "POLL_S", 0.02)
        monkeypatch.setattr(kuberay_api, "_RETRY_S", 0.02)
        yield running


@pytest.fixture
def operator(server: KubernetesServer) -> Operator:
    """Of its one RayJob."""
    return Operator(server)
