from __future__ import annotations

import json
import multiprocessing
import os
import socket
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from configs.errors import UsageError
from data_pipelines.storage import Store
from trainer import lease as lease_module
from trainer.lease import STALE_AFTER_S, Claim, Holder, Lease, current_claim


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "runs" / "demo"))


def plant(store: Store, holder: Holder, *, renewed_ago_s: float = 0.0, held: bool = True) -> Claim:
    now = time.time()
    claim = Claim("0" * 32, holder, held, now - 1000, now - renewed_ago_s)
    store.write_atomic(claim.path, json.dumps(asdict(claim)))
    return claim


def test_a_second_launcher_is_told_who_holds_it_and_what_to_do(store: Store) -> None:
    with Lease.acquire(store), pytest.raises(UsageError) as refused:
        Lease.acquire(store)
    message = str(refused.value)
    for part in ("'demo'", socket.gethostname(), f"pid {os.getpid()}", "since", "runs stop demo", "name="):
        assert part in message
    assert "\n" not in message


def test_released_it_is_free_and_nothing_stays(store: Store) -> None:
    for _ in range(2):
        with Lease.acquire(store):
            claim = current_claim(store)
            assert claim is not None and claim.is_live()
    assert current_claim(store) is None
    assert store.list("lease") == []


def test_a_refused_launcher_leaves_no_claim(store: Store) -> None:
    with Lease.acquire(store):
        for _ in range(3):
            with pytest.raises(UsageError):
                Lease.acquire(store)
        assert len(store.list("lease")) == 1


def test_the_lease_of_a_dead_process_is_taken_over(store: Store) -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    import psutil

    holder = Holder(socket.gethostname(), process.pid, psutil.Process(process.pid).create_time())
    plant(store, holder)
    try:
        with pytest.raises(UsageError):
            Lease.acquire(store)
    finally:
        process.kill()
    deadline = time.monotonic() + 10
    while not holder.is_dead() and time.monotonic() < deadline:  # a zombie until it is waited for: dead all the same
        time.sleep(0.01)
    with Lease.acquire(store):
        assert len(store.list("lease")) == 1
    process.wait()


def test_a_later_process_with_the_same_pid_is_another(store: Store) -> None:
    plant(store, replace(Holder.this_process(), process_started_at=1.0))
    Lease.acquire(store).release()


def test_a_holder_on_another_host_is_believed_until_it_falls_silent(store: Store) -> None:
    elsewhere = Holder("another-host", 1, 0.0)
    plant(store, elsewhere, renewed_ago_s=STALE_AFTER_S / 2)
    with pytest.raises(UsageError, match="another-host"):
        Lease.acquire(store)
    plant(store, elsewhere, renewed_ago_s=STALE_AFTER_S + 1)
    claim = current_claim(store)
    assert claim is not None and not claim.is_live()
    Lease.acquire(store).release()


def test_a_contender_that_died_is_no_hindrance(store: Store) -> None:
    plant(store, Holder("another-host", 1, 0.0), renewed_ago_s=STALE_AFTER_S + 1, held=False)
    Lease.acquire(store).release()


def test_it_is_renewed_and_a_takeover_is_noticed(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "RENEW_EVERY_S", 0.01)
    with Lease.acquire(store) as lease:
        first = current_claim(store)
        assert first is not None
        wait_until(lambda: claim_of(store).renewed_at > first.renewed_at)
        assert not lease.lost
        store.delete(first.path)  # what a launcher does that takes a stale lease over
        wait_until(lambda: lease.lost)
        assert store.list("lease") == []


def test_garbage_in_the_folder_is_ignored(store: Store) -> None:
    store.write_atomic("lease/garbage.json", b"{]")
    store.write_atomic("lease/list.json", b"[1]")
    Lease.acquire(store).release()


def contend(uri: str, barrier: Any, results: Any) -> None:
    barrier.wait()
    try:
        lease = Lease.acquire(Store(uri))
    except UsageError as error:
        results.put(("refused", os.getpid(), str(error)))
        barrier.wait()
        return
    results.put(("won", os.getpid(), ""))
    barrier.wait()
    lease.release()


@pytest.mark.parametrize("stale", [False, True])
def test_of_launchers_at_once_exactly_one_wins(store: Store, stale: bool) -> None:
    context = multiprocessing.get_context("fork")
    for _ in range(5):
        if stale:
            plant(store, Holder("another-host", 1, 0.0), renewed_ago_s=STALE_AFTER_S + 1)
        barrier, results = context.Barrier(6), context.Queue()
        processes = [context.Process(target=contend, args=(store.uri, barrier, results)) for _ in range(6)]
        for process in processes:
            process.start()
        outcomes = [results.get(timeout=60) for _ in processes]
        for process in processes:
            process.join(timeout=60)
            assert process.exitcode == 0
        winners = [pid for outcome, pid, _ in outcomes if outcome == "won"]
        assert len(winners) == 1
        assert all(f"pid {winners[0]}" in message for outcome, _, message in outcomes if outcome == "refused")
        assert store.list("lease") == []


def claim_of(store: Store) -> Claim:
    claim = current_claim(store)
    assert claim is not None
    return claim


def wait_until(condition: Any) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)
