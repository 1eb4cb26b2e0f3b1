from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest

from cluster import controller, policies
from cluster.controller import SETTLE_S, Outcome, State
from cluster.policies import WorkerStatus
from configs.errors import RunFailed, Unreachable
from tests.cluster.fakes import SAVE_EVERY, SILENCE_S, STEPS, Bench, at_step


def test_a_quiet_run_finishes() -> None:
    bench = Bench()
    assert bench.run() == Outcome("finished", STEPS, 0)
    assert bench.controller.state is State.FINISHED
    assert bench.record.kinds == ["queued", "placed", "finished"]


@pytest.mark.parametrize("stopped_at", [None, 13])
def test_the_end_is_told_right_though_the_workers_reports_are_some_steps_old(stopped_at: int | None) -> None:
    bench = Bench()
    poll = bench.group.poll

    def late_poll(timeout_s: float) -> list[WorkerStatus]:
        return [replace(worker, step=max(0, worker.step - 7)) for worker in poll(timeout_s)]

    bench.group.poll = late_poll  # type: ignore[method-assign]
    if stopped_at is not None:
        at_step(bench, stopped_at, lambda: bench.controller.request_stop("Ctrl-C"))
    outcome = bench.run()
    assert outcome.step == bench.record.saved[-1] == bench.record.rows[-1]["step"]
    assert (outcome.step == STEPS) == (stopped_at is None)


@pytest.mark.parametrize("what", ["kill", "raise", "hang", "hang in python"])
def test_a_failure_is_named_and_the_run_goes_on(what: str) -> None:
    bench = Bench({(1, 27): what})
    assert bench.run() == Outcome("finished", STEPS, 1)
    assert bench.record.kinds == ["queued", "placed", "failed", "restarted", "placed", "finished"]
    failed = bench.record.rows[2]
    kind = {"kill": "died", "raise": "raised"}.get(what, "silent")
    assert failed["cause"] == kind
    assert (failed["node"], failed["phase"], failed["step"]) == ("node-a", "forward", 26)
    if what != "hang in python":  # there both hang in the same way
        assert failed["rank"] == 1
        assert failed["log"] == "rank-00001.log"
    assert failed["summary"].startswith(f"Worker {failed['rank']} on node-a ")
    assert failed["checkpoint"] == "checkpoints/step-00000020"
    assert failed["final"] is False
    assert failed["attempt"] == 1
    assert bench.record.rows[3]["attempt"] == 2
    assert bench.record.rows[3]["step"] == 20
    assert "checkpoint of step 20" in bench.notices[0]
    if kind == "silent":
        assert 0.8 * SILENCE_S < failed["detected_s"] <= SILENCE_S


def test_the_cause_is_awaited_when_only_a_consequence_is_seen() -> None:
    bench = Bench({(1, 27): "peer first"})
    bench.run()
    assert (bench.record.rows[2]["cause"], bench.record.rows[2]["rank"]) == ("died", 0)


def test_a_node_that_does_not_answer_is_awaited_when_only_a_consequence_is_seen() -> None:
    """It is gone, but all that is known for seconds is that its peer has lost a connection."""
    bench = Bench({(1, 27): "a lost node"})
    poll, mute_s = bench.group.poll, 0.0

    def poll_without_node(timeout_s: float) -> list[WorkerStatus]:
        nonlocal mute_s
        first, second = poll(timeout_s)
        if bench.group.befallen is None:
            return [first, second]
        mute_s += timeout_s
        peer = replace(second, state="raised", error="RuntimeError: Connection closed by peer", failed_at=1.0)
        return [replace(first, node_unanswered_s=mute_s, unanswered_s=mute_s, quiet_s=mute_s), peer]

    bench.group.poll = poll_without_node  # type: ignore[method-assign]
    assert bench.run() == Outcome("finished", STEPS, 1)
    failed = bench.record.rows[2]
    assert (failed["cause"], failed["rank"]) == ("silent", 0)
    assert failed["detected_s"] < SILENCE_S


def test_a_worker_that_comes_back_in_time_is_left_alone() -> None:
    bench = Bench({(1, 27): "hang in python"})
    poll = bench.group.poll

    def waking_poll(timeout_s: float) -> list[WorkerStatus]:
        if bench.group.workers[1].quiet_s > 0.9 * SILENCE_S + SETTLE_S / 2:
            bench.group.befallen, bench.group.script = None, {}
            bench.group.workers = [replace(worker, quiet_s=0.0) for worker in bench.group.workers]
        first, second = poll(timeout_s)
        # The first is a step ahead and at work, so that the second one's silence is told, and looked into.
        return [replace(first, step=first.step + 1, quiet_s=0.0), second] if bench.group.befallen else [first, second]

    bench.group.poll = waking_poll  # type: ignore[method-assign]
    assert bench.run() == Outcome("finished", STEPS, 0)


def test_it_gives_up_with_cause_checkpoint_log_and_command() -> None:
    script = {(attempt, 21 + attempt): "kill" for attempt in range(1, 9)}
    bench = Bench(script, max_restarts=2)
    with pytest.raises(RunFailed) as caught:
        bench.run()
    for part in (
        "Worker 1 on node-a died",
        "step 20",
        "rank-00001.log",
        "shardyard runs resume demo",
        "max_restarts=2",
    ):
        assert part in str(caught.value)
    assert bench.group.prepared == 3
    assert bench.controller.state is State.FAILED
    assert bench.record.kinds.count("failed") == 3
    assert [row["final"] for row in bench.record.rows if row["kind"] == "failed"] == [False, False, True]


def test_deaths_whose_steps_were_not_told_do_not_count_as_one_while_checkpoints_come() -> None:
    bench = Bench({(attempt, 5 + 10 * attempt): "kill" for attempt in range(1, 5)}, max_restarts=50)
    poll = bench.group.poll

    def poll_late(timeout_s: float) -> list[WorkerStatus]:
        return [replace(each, step=0) if each.state == "died" else each for each in poll(timeout_s)]

    bench.group.poll = poll_late  # type: ignore[method-assign]
    assert bench.run().outcome == "finished"
    assert [row["step"] for row in bench.record.rows if row["kind"] == "failed"] == [0] * 4


def test_the_same_step_again_and_again() -> None:
    bench = Bench({(attempt, 27): "raise" for attempt in range(1, 99)}, max_restarts=50)
    with pytest.raises(RunFailed, match="3 times in a row after the same step, 26"):
        bench.run()
    assert bench.group.prepared == 3


def test_an_error_of_the_user_ends_the_run_at_once() -> None:
    bench = Bench({(1, 3): "user error"}, max_restarts=50)
    with pytest.raises(RunFailed):
        bench.run()
    assert bench.group.prepared == 1


def test_no_room_is_recorded_as_the_end() -> None:
    bench = Bench({(1, -1): "no room"})
    with pytest.raises(Unreachable):
        bench.run()
    assert bench.record.rows[-1] == {
        "kind": "failed",
        "attempt": 1,
        "error": "needs 4 CPUs, the cluster has 2",
        "final": True,
    }


def test_no_room_after_a_failure() -> None:
    bench = Bench({(1, 27): "kill", (2, -1): "no room"})
    with pytest.raises(Unreachable):
        bench.run()
    assert bench.record.rows[-1]["final"] is True


def test_it_shrinks_with_the_room_and_grows_when_more_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policies, "GROW_AFTER_S", 0.5)
    monkeypatch.setattr(controller, "ROOM_POLL_S", 0.2)
    bench = Bench({(1, 15): "kill"}, max_restarts=1)
    bench.group.rooms = [3]
    at_step(bench, 14, lambda: bench.group.rooms.__setitem__(slice(None), [1, 1, 1, 2]))
    assert bench.run() == Outcome("finished", STEPS, 1)
    sizes = [(row["workers_before"], row["workers"]) for row in bench.record.rows if row["kind"] == "resized"]
    assert sizes == [(3, 1), (1, 2)]
    restarts = [(row["step"], row["reason"]) for row in bench.record.rows if row["kind"] == "restarted"]
    assert restarts[0][0] == 10 and "restart 1 of 1" in restarts[0][1]
    assert restarts[1][0] % SAVE_EVERY != 0 and restarts[1][0] in bench.record.saved  # it saved in order to grow
    assert bench.record.kinds[-1] == "finished"


def test_room_that_is_promised_and_not_to_be_had_costs_fewer_and_fewer_restarts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(policies, "GROW_AFTER_S", 0.5)
    monkeypatch.setattr(controller, "ROOM_POLL_S", 0.1)
    bench = Bench()
    bench.group.rooms, bench.group.to_be_had = [2], 1
    assert bench.run() == Outcome("finished", STEPS, 0)
    grew_at = [row["step"] for row in bench.record.rows if row["kind"] == "restarted"]
    trained = [after - before for before, after in zip([0, *grew_at], grew_at, strict=False)]
    assert len(trained) == 3, "after 5, 10 and 20 steps of 0.1 s"
    assert all(later >= 1.5 * sooner for sooner, later in itertools.pairwise(trained))
    assert "resized" not in bench.record.kinds


def test_steps_of_another_size_do_not_tell_how_long_one_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench({(1, 25): "kill"})
    bench.group.rooms = [4]
    at_step(bench, 24, lambda: bench.group.rooms.__setitem__(0, 1))
    poll = bench.group.poll

    def slow_poll(timeout_s: float) -> list[WorkerStatus]:
        """A step of one worker takes four times as long as one of four, of which it says nothing in between."""
        quiet_s = bench.clock.now - step_began[0]
        if quiet_s < 10.0 / bench.group.size:
            bench.clock.now += timeout_s
            return [replace(worker, quiet_s=quiet_s) for worker in bench.group.workers]
        step_began[0] = bench.clock.now
        return poll(timeout_s)

    step_began = [0.0]
    bench.group.poll = slow_poll  # type: ignore[method-assign]
    assert bench.run() == Outcome("finished", STEPS, 1)


def test_a_save_that_fails_does_not_end_a_run_that_only_wanted_to_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policies, "GROW_AFTER_S", 1.5)
    monkeypatch.setattr(controller, "ROOM_POLL_S", 0.2)
    bench = Bench({(1, -2): "no save"}, max_restarts=1)
    bench.group.rooms = [1, 2]
    assert bench.run() == Outcome("finished", STEPS, 1)
    reasons = [(row["step"], row["reason"]) for row in bench.record.rows if row["kind"] == "restarted"]
    assert reasons[0] == (10, "restart 1 of 1"), reasons
    assert "room" in reasons[1][1], "it is tried again"


def test_a_stop_while_it_grows_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policies, "GROW_AFTER_S", 0.0)
    monkeypatch.setattr(controller, "ROOM_POLL_S", 0.2)
    bench = Bench()
    bench.group.rooms = [1, 2]
    request = bench.group.request_stop

    def stopping() -> None:
        request()
        bench.controller.request_stop("asked for")

    bench.group.request_stop = stopping  # type: ignore[method-assign]
    assert bench.run().outcome == "stopped"
    assert bench.record.kinds == ["queued", "placed", "stopped"]


def test_a_stop_saves_first() -> None:
    bench = Bench()
    at_step(bench, 13, lambda: bench.controller.request_stop("Ctrl-C"))
    outcome = bench.run()
    assert outcome.outcome == "stopped"
    assert outcome.step == bench.record.saved[-1] == 15
    assert bench.record.rows[-1]["kind"] == "stopped"
    assert bench.record.rows[-1]["reason"] == "Ctrl-C"


def test_the_stop_file_is_seen() -> None:
    bench = Bench()
    at_step(bench, 13, lambda: setattr(bench.record, "stop_file", True))
    assert bench.run().outcome == "stopped"
    assert "asked by a file" in bench.record.rows[-1]["reason"]


def test_a_store_that_does_not_answer_stops_no_training() -> None:
    bench = Bench()

    def unreachable() -> bool:
        raise Unreachable("the store does not answer")

    bench.record.stop_requested = unreachable  # type: ignore[method-assign]
    assert bench.run() == Outcome("finished", STEPS, 0)


def test_the_end_is_recorded_and_its_cause_kept_where_the_cluster_is_gone_too() -> None:
    bench = Bench({(1, -1): "no room"})

    def kill() -> None:
        raise RuntimeError("no connection to Ray")

    bench.group.kill = kill  # type: ignore[method-assign]
    with pytest.raises(Unreachable, match="needs 4 CPUs"):
        bench.run()
    assert bench.record.rows[-1]["kind"] == "failed"


def test_an_abort_does_not_wait() -> None:
    bench = Bench()
    at_step(bench, 13, bench.controller.abort)
    outcome = bench.run()
    assert (outcome.outcome, outcome.step) == ("stopped", 10)
    assert bench.record.saved[-1] == 10


def test_a_stop_before_training_began() -> None:
    bench = Bench()
    bench.controller.request_stop("Ctrl-C")
    assert bench.run() == Outcome("stopped", 0, 0)
    assert bench.group.kills == 1


def test_a_stop_during_recovery_does_not_start_over() -> None:
    bench = Bench({(1, 27): "kill"})
    at_step(bench, 26, lambda: bench.controller.request_stop("Ctrl-C"))
    with pytest.raises(RunFailed, match="stopping"):
        bench.run()


def test_a_lost_lease_ends_the_workers() -> None:
    bench = Bench()
    bench.controller._lease_lost = lambda: bench.group.workers[0].step > 20
    with pytest.raises(RunFailed, match="Another launcher"):
        bench.run()


def test_random_schedules_end_as_they_must() -> None:
    for seed in range(300):
        chance = random.Random(seed)
        what = ["kill", "raise", "hang", "hang in python", "peer first"]
        script = {(a, chance.randint(1, STEPS)): chance.choice(what) for a in range(1, chance.randint(1, 6))}
        max_restarts = chance.randint(0, 5)
        bench = Bench(script, max_restarts=max_restarts)
        try:
            outcome = bench.run()
            assert outcome.outcome == "finished"
            assert outcome.restarts == bench.group.prepared - 1 <= max_restarts
        except RunFailed:
            assert bench.record.kinds.count("failed") == bench.group.prepared <= max_restarts + 1
            assert bench.record.rows[-1]["final"] is True
