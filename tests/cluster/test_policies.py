from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.policies import (
    GROW_AFTER_S,
    MAX_GROW_DOUBLINGS,
    PORT_RETRIES,
    Failure,
    GiveUp,
    Restart,
    WorkerStatus,
    find_silent,
    first_failure,
    is_consequence,
    mark_silent,
    next_action,
    next_size,
)
from configs.schema import RecoveryConfig

PEER_ERROR = "RuntimeError: [../gloo/transport/tcp/pair.cc:598] Connection closed by peer [127.0.0.1]:1234"


def failure(step: int = 10, kind: str = "died", error: str = "gone", user_error: bool = False) -> Failure:
    return Failure(kind, 0, "node-a", "forward", step, error, "rank-00000.log", 0.1, user_error)  # type: ignore[arg-type]


def worker(rank: int = 0, state: str = "running", **fields: object) -> WorkerStatus:
    return WorkerStatus(rank, f"node-{rank}", state, **fields)  # type: ignore[arg-type]


def decide(failures: list[Failure], max_restarts: int = 3) -> Restart | GiveUp:
    return next_action(failures, RecoveryConfig(max_restarts=max_restarts))


@pytest.mark.parametrize("max_restarts", [0, 1, 3, 7])
def test_restarts_as_often_as_allowed(max_restarts: int) -> None:
    failures: list[Failure] = []
    for i in range(max_restarts):
        failures.append(failure(step=100 * i))
        assert isinstance(decide(failures, max_restarts), Restart)
    failures.append(failure(step=9999))
    decision = decide(failures, max_restarts)
    assert isinstance(decision, GiveUp)
    assert f"max_restarts={max_restarts}" in decision.reason


def test_the_same_step_three_times_in_a_row_ends_the_run_early() -> None:
    assert isinstance(decide([failure(7), failure(7)], 100), Restart)
    decision = decide([failure(7), failure(7), failure(7)], 100)
    assert isinstance(decision, GiveUp)
    assert "same step, 7" in decision.reason
    assert isinstance(decide([failure(7), failure(7), failure(8)], 100), Restart)
    assert isinstance(decide([failure(7), failure(8), failure(7), failure(7)], 100), Restart)


def test_a_run_that_saves_between_its_failures_is_not_stuck() -> None:
    """Whatever step was told last: who is killed has not told its newest."""
    failures = [replace(failure(0), saved=saved) for saved in (8, 12, 20)]
    assert isinstance(decide(failures, 100), Restart)
    assert isinstance(decide([replace(failure(0), saved=8)] * 3, 100), GiveUp)


def test_an_error_of_the_user_is_not_retried() -> None:
    assert isinstance(decide([failure(user_error=True)], 100), GiveUp)


def test_a_port_taken_in_between_costs_no_restart() -> None:
    taken = failure(0, "raised", "DistNetworkError: The server socket has failed ... EADDRINUSE")
    assert isinstance(decide([taken] * PORT_RETRIES, 0), Restart)
    assert isinstance(decide([taken] * (PORT_RETRIES + 1), 0), GiveUp)
    assert isinstance(decide([taken, failure(5)], 1), Restart)
    assert isinstance(decide([taken, failure(5), taken, failure(9)], 1), GiveUp)


def test_the_first_cause_is_the_one_that_was_not_caused() -> None:
    peer = worker(0, "raised", error=PEER_ERROR, failed_at=1.0)
    cause = worker(1, "raised", error="ValueError: boom", failed_at=2.0, phase="forward", step=5)
    later = worker(2, "raised", error="ValueError: later", failed_at=3.0)
    dead = worker(3, "died", error="the process is gone")
    running = worker(4)
    assert is_consequence(peer)
    assert not is_consequence(cause)
    assert first_failure([peer, running, cause, later]).rank == 1
    assert first_failure([peer, cause, dead]).rank == 3
    assert first_failure([peer]).rank == 0


def test_the_rank_that_knows_the_cause_is_reported_though_others_raised_earlier() -> None:
    told = worker(1, "raised", error="The last checkpoint was not saved", failed_at=1.0, peer_failed=True)
    cause = worker(0, "raised", error="The disk is full", failed_at=2.0, user_error=True)
    assert is_consequence(told)
    assert first_failure([told, cause]).rank == 0


def test_of_hung_workers_the_one_that_does_not_answer_is_named() -> None:
    waiting = worker(0, "silent", unanswered_s=0.2, quiet_s=60.5, error="no progress")
    stopped = worker(1, "silent", unanswered_s=61.0, quiet_s=61.0, error="no answer")
    found = first_failure([waiting, stopped])
    assert (found.rank, found.kind, found.detected_s) == (1, "silent", 61.0)


@given(st.permutations(range(4)))
def test_the_order_of_the_workers_does_not_matter(order: list[int]) -> None:
    workers = [
        worker(0, "raised", error=PEER_ERROR, failed_at=1.0),
        worker(1, "died", error="gone"),
        worker(2),
        worker(3, "raised", error="late", failed_at=9.0),
    ]
    assert first_failure([workers[i] for i in order]).rank == 1


def test_of_ranks_that_hang_together_the_one_outside_of_the_collective_is_named() -> None:
    waits = """  File "/x/trainer/distributed.py", line 120 in all_sum\n  File "/x/trainer/loop.py", line 50 in train"""
    stuck = """  File "/x/slow_disk.py", line 7 in read_forever\n  File "/x/trainer/loop.py", line 47 in train"""
    hung = [
        worker(0, "silent", quiet_s=5.2, step=9, phase="forward", stack=waits, error="no progress"),
        worker(1, "silent", quiet_s=4.9, step=9, phase="data", stack=stuck, error="no progress"),
    ]
    found = first_failure(hung)
    assert (found.rank, found.phase, found.stack) == (1, "data", stuck)
    assert found.describe() == (
        "Worker 1 on node-1 hung during data, after step 9: no progress, in read_forever (/x/slow_disk.py:7)"
    )
    # Where all wait it is the one that is behind, or the first that did.
    found = first_failure([replace(hung[0], step=10), replace(hung[1], stack=waits)])
    assert (found.rank, found.phase) == (1, "collective")
    assert first_failure([hung[0], replace(hung[1], stack=waits)]).rank == 0


def silent_ranks(*workers: WorkerStatus, median_step_s: float | None = 1.0, **recovery: float) -> list[int]:
    settings = RecoveryConfig(**{"silence_s": 5.0, "collective_timeout_s": 100.0, **recovery})  # type: ignore[arg-type]
    marked = mark_silent(workers, settings, lambda _: median_step_s)
    return [status.rank for status in marked if status.state == "silent"]


def test_who_waits_for_a_slow_rank_does_not_hang() -> None:
    waiting = worker(0, phase="optimizer", quiet_s=30.0, step=4)
    slow = worker(1, phase="backward", quiet_s=1.0, step=4)
    assert silent_ranks(waiting, slow) == []
    assert silent_ranks(waiting, replace(slow, quiet_s=5.0)) == [0, 1]
    assert silent_ranks(replace(waiting, quiet_s=1.0, step=5), replace(slow, quiet_s=5.0)) == [1], "one is behind"
    assert silent_ranks(waiting, replace(slow, phase="checkpoint", quiet_s=90.0)) == [], "it may still save"
    assert silent_ranks(waiting, replace(slow, state="finished")) == [0]


def test_a_first_batch_that_does_not_come_is_told_though_the_others_wait_for_it() -> None:
    waiting = worker(0, phase="forward", quiet_s=55.0, step=4, steps=9)
    stuck = worker(1, phase="data", quiet_s=55.0, step=4, steps=9)
    assert silent_ranks(waiting, stuck, median_step_s=None) == [1]
    assert silent_ranks(waiting, replace(stuck, quiet_s=53.0), median_step_s=None) == []
    assert silent_ranks(waiting, replace(stuck, phase="backward"), median_step_s=None) == [], "it may compile"
    assert silent_ranks(waiting, replace(stuck, steps=None), median_step_s=None) == [], "it opens the data set"
    assert silent_ranks(replace(waiting, phase="restore"), stuck, median_step_s=None) == [], "the other may restore"
    assert silent_ranks(replace(waiting, quiet_s=1.0), stuck, median_step_s=None) == [], "the other is at work"
    assert silent_ranks(waiting, stuck, median_step_s=None, collective_timeout_s=30.0) == [0, 1]


def test_who_does_not_answer_hangs_whatever_the_others_do() -> None:
    at_work = worker(0, phase="forward", quiet_s=0.1)
    for phase in ("forward", "checkpoint", "restore", "starting"):
        assert silent_ranks(at_work, worker(1, phase=phase, unanswered_s=4.6, quiet_s=4.6)) == [1]
        assert silent_ranks(at_work, worker(1, phase=phase, unanswered_s=4.4, quiet_s=4.4)) == []
        lost = worker(1, phase=phase, node_unanswered_s=3.6, unanswered_s=3.6, quiet_s=3.6)
        assert silent_ranks(at_work, lost) == [1]
        assert silent_ranks(at_work, replace(lost, node_unanswered_s=3.4)) == []


def test_a_lost_node_is_told_from_a_stopped_process() -> None:
    recovery = RecoveryConfig(silence_s=5.0)
    lost = find_silent(worker(node_unanswered_s=3.6, unanswered_s=3.6), recovery, 1.0)
    stopped = find_silent(worker(node_unanswered_s=0.2, unanswered_s=4.6), recovery, 1.0)
    assert "network" in str(lost)
    assert "stopped" in str(stopped)
    assert "network" not in str(stopped)


def test_silence() -> None:
    recovery = RecoveryConfig(silence_s=10.0, collective_timeout_s=100.0)

    def silent(median_step_s: float | None = 1.0, phase: str = "forward", **fields: float) -> bool:
        status = replace(worker(phase=phase), **fields)  # type: ignore[arg-type]
        return find_silent(status, recovery, median_step_s) is not None

    assert not silent(unanswered_s=8.9, quiet_s=8.9)
    assert silent(unanswered_s=9.1)
    assert silent(quiet_s=9.1)
    assert not silent(quiet_s=26.0, median_step_s=10.0), "its steps are slow"
    assert silent(quiet_s=28.0, median_step_s=10.0)
    assert not silent(quiet_s=89.0, median_step_s=None), "before the first step it may load"
    assert silent(quiet_s=91.0, median_step_s=None)
    assert not silent(quiet_s=89.0, phase="evaluation"), "an evaluation has no usual length"
    assert find_silent(worker(state="starting", unanswered_s=1e9), recovery, None) is None


@given(size=st.integers(1, 9), room=st.integers(0, 9), trained_s=st.floats(0, 100))
def test_a_run_grows_into_room_once_it_has_trained_for_a_while_and_never_shrinks_by_itself(
    size: int, room: int, trained_s: float
) -> None:
    assert next_size(size, room, trained_s) == (size if trained_s < GROW_AFTER_S or room <= size else room)


@pytest.mark.parametrize("futile", [1, 2, 9])
def test_a_promise_of_room_that_was_not_kept_is_tried_less_and_less_often(futile: int) -> None:
    wait_s = GROW_AFTER_S * 2 ** min(futile, MAX_GROW_DOUBLINGS)
    assert next_size(2, 3, 0.99 * wait_s, futile) == 2
    assert next_size(2, 3, wait_s, futile) == 3
