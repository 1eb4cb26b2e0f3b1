"""A warm process and its children: what they say, how they end, and that nothing of them stays."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster.channel import Channel
from cluster.warm_process import WarmProcess
from cluster.worker import Worker
from tests.cluster.waiting import alive, wait_for

ROOT = Path(__file__).resolve().parents[2]


def arguments(store: Path, body: str, rank: int = 0, attempt: int = 1) -> dict[str, Any]:
    folder = store / "demo" / f"attempts/{attempt:04d}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "canary").write_text("seen")
    given = {"store_uri": str(store), "run": "demo", "attempt": attempt, "rank": rank, "world_size": 2}
    return {
        "body": f"tests.cluster.bodies:{body}",
        "canary": "seen",
        "log": f"attempts/{attempt:04d}/rank-{rank:05d}.log",
        "environment": {"OMP_NUM_THREADS": "1"},
        "arguments": {**given, "local_rank": 0, "init_method": "file:///nowhere"},
    }


@pytest.fixture
def warm() -> Iterator[WarmProcess]:
    process = WarmProcess()
    assert "imported_s" in process.import_modules(["trainer.progress", "cluster.child"])
    yield process
    process.close()
    wait_for(process.gone.is_set, "its end")


def test_children_come_and_go_while_the_warm_process_stays(warm: WarmProcess, tmp_path: Path) -> None:
    pids = set()
    for attempt in range(1, 4):
        child = warm.fork(arguments(tmp_path, "steps", attempt=attempt))
        outcome = child.wait()
        assert (outcome["outcome"], outcome["step"], outcome["steps"]) == ("finished", 20, 20)
        assert warm.can_fork()
        pids.add(child.pid)
        assert f"of attempt {attempt}" in (tmp_path / f"demo/attempts/{attempt:04d}/rank-00000.log").read_text()
    assert len(pids) == 3


@pytest.mark.parametrize("stopped", [False, True])
def test_a_killed_child_is_told_by_its_signal_and_replaced(warm: WarmProcess, tmp_path: Path, stopped: bool) -> None:
    child = warm.fork(arguments(tmp_path, "endless"))
    wait_for(lambda: child.report().get("step", 0) > 2, "training")
    if stopped:
        assert child.pid is not None
        os.kill(child.pid, signal.SIGSTOP)
        wait_for(lambda: child.report()["unheard_s"] > 1.0, "its silence")
    child.kill()
    outcome = child.wait()
    assert outcome["outcome"] == "died"
    assert "killed by SIGKILL (signal 9)" in outcome["error"]
    assert warm.can_fork()
    assert warm.fork(arguments(tmp_path, "steps", attempt=2)).wait()["outcome"] == "finished"


def test_a_stopped_child_stays_stopped_when_it_has_told_where_it_is(warm: WarmProcess, tmp_path: Path) -> None:
    child = warm.fork(arguments(tmp_path, "endless"))
    wait_for(lambda: child.report().get("step", 0) > 2, "training")
    assert child.pid is not None
    process = psutil.Process(child.pid)
    process.suspend()
    wait_for(lambda: process.status() == psutil.STATUS_STOPPED, "its stop")
    shortened, whole = child.stack()
    assert "bodies.py" in shortened and shortened in whole
    wait_for(lambda: process.status() == psutil.STATUS_STOPPED, "its stop once more")
    child.kill()
    assert child.wait()["outcome"] == "died"


def test_a_child_that_leaves_is_told_by_its_exit_code(warm: WarmProcess, tmp_path: Path) -> None:
    outcome = warm.fork(arguments(tmp_path, "leaving", rank=1)).wait()
    assert outcome == {"outcome": "died", "error": "the process is gone: it exited with code 3"}


def test_a_child_stops_when_asked_and_when_its_node_is_about_to_go(warm: WarmProcess, tmp_path: Path) -> None:
    for attempt, ask in enumerate([lambda child: child.stop(), lambda child: os.kill(child.pid, signal.SIGTERM)], 1):
        child = warm.fork(arguments(tmp_path, "endless", attempt=attempt))
        wait_for(lambda child=child: child.report().get("step", 0) > 2, "training")
        ask(child)
        assert child.wait()["outcome"] == "stopped"


def test_a_child_that_holds_pythons_lock_is_heard_of_while_it_works(warm: WarmProcess, tmp_path: Path) -> None:
    child = warm.fork(arguments(tmp_path, "holding_the_lock"))
    wait_for(lambda: child.report().get("phase") == "evaluation", "its work")
    unheard_s = []
    deadline = time.monotonic() + 2.5
    while time.monotonic() < deadline:
        unheard_s.append(child.report()["unheard_s"])
        time.sleep(0.1)
    child.kill()
    assert child.wait()["outcome"] == "died"
    assert 0.7 < max(unheard_s) < 2.0  # it says nothing, and yet it lives


def test_a_child_does_not_outlive_its_warm_process(warm: WarmProcess, tmp_path: Path) -> None:
    child = warm.fork(arguments(tmp_path, "endless"))
    wait_for(lambda: child.report().get("step", 0) > 2, "training")
    assert child.pid is not None
    os.kill(child.pid, signal.SIGSTOP)
    os.kill(psutil.Process(child.pid).ppid(), signal.SIGKILL)
    outcome = child.wait()
    assert outcome["outcome"] == "died"
    assert "forked from is gone: killed by SIGKILL" in outcome["error"]
    wait_for(lambda: not alive(child.pid), "the child's end")  # type: ignore[arg-type]
    assert not warm.can_fork()
    assert "forked from is gone" in warm.fork(arguments(tmp_path, "steps")).wait()["error"]


def test_a_stopped_warm_process_is_replaced(warm: WarmProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.warm_process.FORK_TIMEOUT_S", 0.5)
    child = warm.fork(arguments(tmp_path, "steps"))
    child.wait()
    os.kill(warm.pid, signal.SIGSTOP)
    assert warm.fork(arguments(tmp_path, "steps")).wait()["outcome"] == "died"
    wait_for(lambda: not warm.can_fork(), "its end")


def test_what_cannot_be_imported_is_named() -> None:
    process = WarmProcess()
    reply = process.import_modules(["no_such_module"])
    process.close()
    assert reply["error"] == "ModuleNotFoundError: No module named 'no_such_module'"
    assert reply["user_error"]


def test_a_child_computes_in_threads_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    process = WarmProcess()
    assert "imported_s" in process.import_modules(["torch", "pyarrow", "numpy", "trainer.distributed"])
    for attempt in (1, 2):
        given = arguments(tmp_path, "computing", attempt=attempt)
        outcome = process.fork(given | {"environment": {}}).wait()
        assert outcome["outcome"] == "finished", outcome
        assert outcome["step"] > 1  # threads at work
    process.close()


OWNER = """
    import sys, threading, time
    from pathlib import Path
    from cluster.warm_process import WarmProcess
    from tests.cluster.test_warm_process import arguments
    warm = WarmProcess()
    warm.import_modules([])
    children = []
    # In a thread that ends: the warm process must not end with it.
    thread = threading.Thread(target=lambda: children.append(warm.fork(arguments(Path(sys.argv[1]), "endless"))))
    thread.start()
    thread.join()
    while not children[0].report().get("step"):
        time.sleep(0.01)
    print(warm.pid, children[0].pid, flush=True)
    time.sleep(600)
"""


def test_nothing_outlives_a_killed_owner(tmp_path: Path) -> None:
    command = [sys.executable, "-c", textwrap.dedent(OWNER), str(tmp_path)]
    owner = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert owner.stdout is not None
        pids = [int(pid) for pid in owner.stdout.readline().split()]
        assert len(pids) == 2 and all(alive(pid) for pid in pids)
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)  # not even those that cannot notice
    finally:
        owner.kill()
        owner.communicate(timeout=30)
    wait_for(lambda: not any(map(alive, pids)), "the end of all")


def test_messages_arrive_whole_and_in_order_from_many_threads() -> None:
    import socket

    ours, theirs = (Channel(end) for end in socket.socketpair())
    size = 100_000  # larger than the socket's buffer

    def send(thread: int) -> None:
        for number in range(5):
            ours.send({"thread": thread, "number": number, "text": "x" * size})

    threads = [threading.Thread(target=send, args=(thread,)) for thread in range(3)]
    for thread in threads:
        thread.start()
    got: list[dict[str, Any]] = []
    while len(got) < 15:
        got += theirs.receive()
    assert all(len(message["text"]) == size for message in got)
    for number in range(3):
        assert [message["number"] for message in got if message["thread"] == number] == [0, 1, 2, 3, 4]
    ours.close()
    with pytest.raises(EOFError):
        theirs.receive()
    theirs.close()


# --- the actor that owns it


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Iterator[Worker]:
    monkeypatch.setattr("cluster.worker.die_with", lambda: None)  # this process is nobody's actor
    worker = Worker(os.getcwd(), {})
    assert "imported_s" in worker.warm(["trainer.progress", "cluster.child"])
    yield worker
    assert worker._warm is not None
    worker._warm.close()


def test_the_silence_of_the_attempt_before_is_not_the_next_ones(worker: Worker, tmp_path: Path) -> None:
    """A ping may come before the next child is forked."""
    training = threading.Thread(target=lambda: worker.train(**arguments(tmp_path, "endless")))
    training.start()
    wait_for(lambda: worker.ping().get("step", 0) > 2, "training")
    assert worker.end()
    assert worker.ping() == {}
    training.join()


def test_a_stop_that_comes_before_the_child_is_kept_for_it_alone(worker: Worker, tmp_path: Path) -> None:
    worker.stop(1)
    outcomes: list[str] = []
    training = threading.Thread(
        target=lambda: outcomes.append(worker.train(**arguments(tmp_path, "endless"))["outcome"])
    )
    training.start()
    training.join(60)
    assert worker.end()
    assert outcomes == ["stopped"]
    assert worker.train(**arguments(tmp_path, "steps", attempt=2))["outcome"] == "finished"
