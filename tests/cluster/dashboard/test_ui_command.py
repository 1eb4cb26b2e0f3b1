"""`shardyard ui` as a process: what it refuses, how it begins and how it ends."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.cluster.dashboard.records import new_run, train, wait_until

ROOT = Path(__file__).resolve().parents[3]
UI = [sys.executable, "-m", "cluster.cli", "ui"]
HEAVY = "torch|ray|mlflow|transformers|pandas|deepspeed"


def environment(tmp_path: Path, **more: str) -> dict[str, str]:
    return os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")} | more


def refused(tmp_path: Path, *arguments: str) -> tuple[int, str]:
    ended = subprocess.run(
        [*UI, "--store", str(tmp_path / "store"), *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=ROOT,
        env=environment(tmp_path),
    )
    assert "Traceback" not in ended.stderr and ended.stdout == ""
    return ended.returncode, ended.stderr


@contextmanager
def served(tmp_path: Path, *arguments: str, **variables: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """The process and its port."""
    command = [*UI, "--store", str(tmp_path / "store"), "--port", "0", *arguments]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=environment(tmp_path, **variables),
    )
    try:
        assert process.stdout is not None
        match = re.search(r"http://\S+:(\d+)/", line := process.stdout.readline())
        assert match, (line, process.stderr and process.stderr.read())
        yield process, int(match[1])
    finally:
        process.kill()
        process.communicate()


def ask(port: int, path: str, host: str = "127.0.0.1") -> tuple[int, Any]:
    connection = http.client.HTTPConnection(host, port, timeout=20)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        text = answer.read().decode()
        return answer.status, json.loads(text) if text.startswith(("{", "[")) else text
    finally:
        connection.close()


def stream(port: int, path: str, kind: str, found: list[Any]) -> threading.Thread:
    """Adds the data of each message of a kind to `found`, with the time."""

    def read() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        connection.request("GET", path)
        now = ""
        try:
            for raw in connection.getresponse():
                line = raw.decode().strip()
                if line.startswith("event: "):
                    now = line.removeprefix("event: ")
                if line.startswith("data: ") and now == kind:
                    found.append((time.time(), json.loads(line.removeprefix("data: "))))
        except (OSError, http.client.HTTPException):
            pass
        finally:
            connection.close()

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    return thread


def test_a_port_that_is_taken_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, text = refused(tmp_path, "--port", str(port))
    assert code == 3 and f"127.0.0.1:{port}" in text and "--port" in text


def test_an_address_of_another_machine_is_refused(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("secret")
    code, text = refused(tmp_path, "--host", "192.0.2.1", "--token-file", str(tmp_path / "token"))
    assert code == 3 and "--host" in text
    code, text = refused(tmp_path, "--host", "no such host", "--token-file", str(tmp_path / "token"))
    assert code == 3


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org"])
def test_other_machines_need_a_token(tmp_path: Path, host: str) -> None:
    code, text = refused(tmp_path, "--host", host)
    assert code == 2 and "--token-file" in text


@pytest.mark.parametrize("content", [None, b"", b" \n", b"\xff\xfe"])
def test_a_token_file_that_holds_none_is_refused(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "token").write_bytes(content)
    code, text = refused(tmp_path, "--token-file", str(tmp_path / "token"))
    assert code in {1, 2, 4} and str(tmp_path / "token") in text and "error in the program" not in text


def test_it_goes_by_the_names_that_it_is_given(tmp_path: Path) -> None:
    with served(tmp_path, "--name", "runs.example") as (_, port):
        for host, status in (("runs.example", 200), ("localhost", 200), ("evil.example", 421)):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
            connection.request("GET", "/api/runs", headers={"host": host})
            assert connection.getresponse().status == status
            connection.close()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_with_its_streams_and_leaves_nobody(tmp_path: Path, number: signal.Signals) -> None:
    new_run(tmp_path / "store").close()
    with served(tmp_path) as (process, port):
        found: list[Any] = []
        threads = [
            stream(port, path, kind, found)
            for path, kind in (("/api/stream", "runs"), ("/api/runs/run/stream", "summary"))
        ]
        wait_until(lambda: len(found) >= 2)
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(number)
        began = time.monotonic()
        _, errors = process.communicate(timeout=20)
        assert (process.returncode, errors) == (0, "")
        assert time.monotonic() - began < 3
        assert not [child for child in children if child.is_running()]
        for thread in threads:
            thread.join(10)
            assert not thread.is_alive()


def test_a_store_that_is_not_there_yet_and_what_comes_and_goes_in_it(tmp_path: Path) -> None:
    with served(tmp_path) as (_, port):
        assert ask(port, "/api/runs") == (200, [])
        assert ask(port, "/")[0] == 200
        told: list[Any] = []
        stream(port, "/api/stream", "runs", told)
        record = new_run(tmp_path / "store")
        train(record, 1, 3)
        wait_until(lambda: told and [row["run"] for row in told[-1][1]] == ["run"])
        troubles: list[Any] = []
        stream(port, "/api/runs/run/stream", "trouble", troubles)
        assert ask(port, "/api/runs/run/series?metric=loss")[1]["x"] == [1, 2, 3]
        record.close()
        shutil.rmtree(tmp_path / "store" / "run")
        wait_until(lambda: troubles and told[-1][1] == [])
        assert ask(port, "/api/runs/run")[0] == ask(port, "/runs/run")[0] == 404
        shutil.rmtree(tmp_path / "store")
        assert ask(port, "/api/runs") == (200, [])


@pytest.mark.parametrize("zone", ["", "Nowhere/Nothing", "UTC"])
def test_it_needs_no_time_zone(tmp_path: Path, zone: str) -> None:
    new_run(tmp_path / "store").close()
    with served(tmp_path, TZ=zone) as (_, port):
        assert ask(port, "/")[0] == ask(port, "/runs/run")[0] == 200


def test_a_step_is_told_within_a_second(tmp_path: Path) -> None:
    record = new_run(tmp_path / "store")
    train(record, 1, 3)
    with served(tmp_path) as (_, port):
        found: list[Any] = []
        summaries: list[Any] = []
        stream(port, "/api/runs/run/stream", "rows", found)
        stream(port, "/api/runs/run/stream", "summary", summaries)
        wait_until(lambda: summaries)
        late = []
        for step in range(4, 9):
            train(record, step, step)
            written = time.time()
            wait_until(lambda: found and found[-1][1][-1]["step"] == step)  # noqa: B023
            late.append(found[-1][0] - written)
        assert sorted(late)[len(late) // 2] < 1.0


def test_nothing_heavy_is_imported_and_it_stays_small(tmp_path: Path) -> None:
    record = new_run(tmp_path / "store")
    train(record, 1, 500)
    with served(tmp_path) as (process, port):
        for path in ("/", "/runs/run", "/api/runs/run/series?metric=loss", "/api/runs/run/sparkline"):
            assert ask(port, path)[0] == 200
        mapped = {Path(each.path).name for each in psutil.Process(process.pid).memory_maps()}
        assert not [name for name in mapped if re.match(rf"lib({HEAVY})|_raylet|pandas", name)]
        assert psutil.Process(process.pid).memory_info().rss < 105e6
