"""The server, and who asks it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cluster.kubernetes.client import (
    DEFINITIONS,
    Client,
)
from tests.cluster.kubernetes_server import KubernetesServer


@pytest.fixture
def server() -> Iterator[KubernetesServer]:
    with KubernetesServer(*DEFINITIONS) as running:
        yield running


@pytest.fixture
def ask(server: KubernetesServer) -> Client:
    return Client(server)
