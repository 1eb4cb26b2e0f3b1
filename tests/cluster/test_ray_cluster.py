"""Joining a Ray that is not there, or says nothing; no Ray is started. With a real one: test_local_target.py."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster import drive, ray_cluster, train
from cluster.ray_cluster import join
from cluster.targets import ray_dashboard
from cluster.targets.ray import Target
from configs.errors import Unreachable
from configs.targets import RayTarget
from tests.tiny import tiny_config


@pytest.fixture
def mute() -> Any:
    """Port of a server that takes connections, and answers nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_a_head_that_says_nothing(mute: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_cluster, "CONNECT_TIMEOUT_S", 0.2)
    with pytest.raises(Unreachable, match=f"No Ray answers at 127.0.0.1:{mute}: timed out. Start one there with"):
        join(f"127.0.0.1:{mute}")


def test_a_dashboard_that_says_nothing(mute: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_dashboard, "ANSWER_S", 0.2)
    with pytest.raises(Unreachable, match=f"No Ray dashboard answers at http://127.0.0.1:{mute}: .*timed out"):
        Target(RayTarget(address=f"http://127.0.0.1:{mute}")).find("demo", "/runs")


def test_a_data_set_that_nobody_wants_any_more_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    began, ended = threading.Event(), threading.Event()

    def build(_record: Any, _plan: Any, _notice: Any, progress: Callable[[str, int], None]) -> None:
        began.set()
        try:
            while True:
                time.sleep(0.01)
                progress("reading", 0)
        finally:
            time.sleep(0.3)  # as long as a step of a build may take
            ended.set()

    monkeypatch.setattr(drive, "decide_datasets", build)
    run = train(tiny_config(tmp_path), address="127.0.0.1:9", quiet=True)
    with pytest.raises(Unreachable, match=r"No Ray answers at 127\.0\.0\.1:9"):
        run.wait()
    assert began.is_set() and ended.is_set()
