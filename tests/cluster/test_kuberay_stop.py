"""Launchers in a pod that has to go: told once, waited for, and nobody else is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from cluster.targets import kuberay_stop
from cluster.worker import Worker
from tests.cluster.waiting import wait_for

# Stands for cluster/cli.py and for the script: on SIGTERM it saves, which takes a moment, and ends with 75.
LAUNCHER = """
import pathlib, signal, sys, time
def save(*_):
    time.sleep(0.3)
    pathlib.Path(sys.argv[-1]).write_text("saved")
    sys.exit(75)
signal.signal(signal.SIGTERM, save)
pathlib.Path(sys.argv[-1]).write_text("trains")
while True:
    time.sleep(60)
"""


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Processes of this test; only they are looked at, so that launchers of others are left alone."""
    (tmp_path / "cluster").mkdir()
    (tmp_path / "cluster" / "cli.py").write_text(LAUNCHER)
    (tmp_path / "shardyard").write_text(LAUNCHER)
    processes: list[subprocess.Popen[bytes]] = []
    monkeypatch.setattr(
        psutil,
        "process_iter",
        lambda _: [_with_command(psutil.Process(process.pid)) for process in processes],
    )
    yield processes
    for process in processes:
        process.kill()
        process.wait()


def _with_command(process: psutil.Process) -> psutil.Process:
    process.info = {"cmdline": process.cmdline()}  # type: ignore[attr-defined]
    return process


def start(folder: Path, *command: str) -> subprocess.Popen[bytes]:
    """With a file of its own for what it does."""
    state = folder / f"state-{len(list(folder.iterdir()))}"
    environment = os.environ | {"PYTHONPATH": str(folder)}
    process = subprocess.Popen([sys.executable, *command, str(state)], cwd=folder, env=environment)
    wait_for(lambda: state.exists() and state.read_text() == "trains", "it runs", 30)
    return process


def test_launchers_save_and_are_waited_for(tmp_path: Path, started: list[subprocess.Popen[bytes]]) -> None:
    started.append(start(tmp_path, "-m", "cluster.cli", "train", "run.yaml", "--address", "auto"))
    started.append(start(tmp_path, str(tmp_path / "shardyard"), "train", "run.yaml"))
    started.append(start(tmp_path, "-m", "cluster.cli", "logs", "train"))
    started.append(start(tmp_path, str(tmp_path / "cluster" / "cli.py"), "train"))
    kuberay_stop.main()
    assert [psutil.pid_exists(process.pid) for process in started] == [False, False, True, True]
    assert sorted(path.read_text() for path in tmp_path.glob("state-*")) == ["saved", "saved", "trains", "trains"]


def test_a_worker_is_waited_for_and_not_told(tmp_path: Path, started: list[subprocess.Popen[bytes]]) -> None:
    """Ray names its process after the class of its actor; the launcher in another pod ends it once all is saved."""
    command = [f"ray::{Worker.__name__}", "-c", f"exec({LAUNCHER!r})", str(tmp_path / "state")]
    worker = subprocess.Popen(command, executable=sys.executable)
    started.append(worker)
    wait_for(lambda: (tmp_path / "state").exists(), "it runs", 30)
    waiting = threading.Thread(target=kuberay_stop.main)
    waiting.start()
    waiting.join(0.5)
    assert waiting.is_alive() and (tmp_path / "state").read_text() == "trains"
    worker.kill()
    waiting.join(30)
    assert not waiting.is_alive()


def test_where_nobody_launches_it_returns_at_once(started: list[subprocess.Popen[bytes]]) -> None:
    kuberay_stop.main()


def test_a_launcher_that_ends_meanwhile(
    tmp_path: Path, started: list[subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    process = start(tmp_path, "-m", "cluster.cli", "train", "run.yaml")
    gone = _with_command(psutil.Process(process.pid))
    process.send_signal(signal.SIGKILL)
    process.wait()
    monkeypatch.setattr(psutil, "process_iter", lambda _: [gone])
    kuberay_stop.main()
