"""What a job on a Ray cluster does, with the real queue and seat, and a launcher that does what a test says."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.job_queue import SILENT_S, Cluster, JobQueue, Report
from cluster.ray_queue import Seat
from cluster.scheduling import Request
from cluster.targets import ray_job
from cluster.targets.ray_job import MAKES_ROOM, Waiter
from configs.errors import Preempted, UsageError
from configs.load import load
from data_pipelines.storage import Store
from tests.configs.minimal import minimal
from trainer.record import RunRecord

Launcher = Callable[[RunRecord], Generator[None, None, int]]
"""It yields for as long as it works, and returns its exit code."""

CPU = {"CPU": 1.0}


class Here(Seat):
    """A seat in a queue of this process. A second goes by with each question, and at some something happens."""

    def __init__(self, request: Request, queue: JobQueue, clock: list[float]) -> None:
        super().__init__(request, "/store/small")
        self.asked = 0
        self.at: dict[int, Callable[[], None]] = {}
        self.away: range = range(0)
        self.reports: list[Report] = []
        self.queue = queue
        self._clock = clock

    def _call(self, method: str, *arguments: Any) -> Any:
        self.asked += 1
        assert self.asked < 100, "it asks for ever"
        self._clock[0] += 1
        self.queue.tick()
        self.at.get(self.asked, lambda: None)()
        self.reports += [each for each in arguments if isinstance(each, Report)]
        return None if self.asked in self.away else getattr(self.queue, method)(*arguments)


class Site:
    """A cluster of one CPU, its queue, and a job that waits, launches and makes room."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.clock = [1000.0]
        self.quota: dict[str, int] = {}
        self.queue = self.start()
        resolved = load(minimal(store=str(folder), steps=100))
        self.record = RunRecord.create(Store(str(folder)), resolved)
        self.seat = Here(Request("job", "ada", CPU, 1, 1, submitted_at=1000.0), self.queue, self.clock)
        self.waiter = Waiter(self.seat, resolved.config)
        self.launchers: list[Launcher] = []
        self.launched = 0
        monkeypatch.setattr(subprocess, "Popen", lambda command: Process(self._next(command)))

    def _next(self, command: list[str]) -> Generator[None, None, int]:
        assert command[1:] == ["-m", "cluster.cli", "train", "run.yaml", "--address", "auto"]
        self.launched += 1
        return self.launchers[self.launched - 1](self.record)

    def start(self, *, restarted: bool = False) -> JobQueue:
        cluster = Cluster({"n1": CPU}, {"n1": CPU}, {})
        return JobQueue(lambda: cluster, lambda: self.quota, restarted=restarted, clock=lambda: self.clock[0])

    def urgent(self, priority: int = 5) -> None:
        """Somebody else's job comes, and is never heard of again: the queue forgets it after a while."""
        request = Request("urgent", "bob", CPU, 1, 1, priority=priority, submitted_at=999.0)
        self.queue.report(Report(request, "waiting", "/store/urgent"))

    def kinds(self) -> list[str]:
        return [event["kind"] for event in self.record.events()][1:]


class Process:
    def __init__(self, works: Generator[None, None, int]) -> None:
        self._works = works

    def wait(self, timeout_s: float) -> int:
        try:
            next(self._works)
        except StopIteration as end:
            return int(end.value)
        raise subprocess.TimeoutExpired("the launcher", timeout_s)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(ray_job, "POLL_S", 0.0)
    yield Site(tmp_path, monkeypatch)
    signal.signal(signal.SIGTERM, before)


def until_asked(record: RunRecord) -> Generator[None, None, str]:
    """Trains; returns why it was asked to stop."""
    record.event("started", step=0)
    for _ in range(30):
        yield
        if (reason := record.stop_requested()) is not None:
            return reason
    raise AssertionError("nobody asked it to stop")


def saves(record: RunRecord) -> Generator[None, None, int]:
    reason = yield from until_asked(record)
    yield
    record.event("stopped", step=7, reason=reason)
    return 0


def finishes(record: RunRecord) -> Generator[None, None, int]:
    record.event("started", step=7)
    yield
    record.event("finished", step=100)
    return 0


def test_it_makes_room_waits_in_the_queue_and_goes_on(site: Site) -> None:
    site.seat.at = {5: site.urgent}
    site.launchers = [saves, finishes]
    assert site.waiter.serve() == 0
    assert site.kinds() == ["started", "stopped", "queued", "started", "finished"]
    events = site.record.events()
    assert (events[2]["reason"], events[3]["reason"]) == (MAKES_ROOM, MAKES_ROOM)
    assert site.seat.asked > SILENT_S, "the urgent one went first"
    states = dict.fromkeys((report.state, report.turn) for report in site.seat.reports)
    assert list(states) == [("waiting", 0), ("admitted", 0), ("leaving", 0), ("waiting", 1), ("admitted", 1)]
    since = {(report.turn, report.since) for report in site.seat.reports if report.state == "admitted"}
    assert len(since) == 2, "it was let in twice, and each time has its time"


def test_a_launcher_that_begins_after_it_was_asked_is_asked_again(site: Site) -> None:
    def begins_late(record: RunRecord) -> Generator[None, None, int]:
        while record.stop_requested() is None:
            yield
        record.acquire_lease().release()  # forgets what was asked before
        assert record.stop_requested() is None
        return (yield from saves(record))

    site.seat.at = {3: site.urgent}
    site.launchers = [begins_late, finishes]
    assert site.waiter.serve() == 0
    assert site.launched == 2


def finishes_when_asked(record: RunRecord) -> Generator[None, None, int]:
    yield from until_asked(record)
    record.event("finished", step=100)
    return 0


def fails_when_asked(record: RunRecord) -> Generator[None, None, int]:
    yield from until_asked(record)
    record.event("failed", error="no room on the disk", final=True)
    return 1


def is_stopped_by_a_user_too(record: RunRecord) -> Generator[None, None, int]:
    yield from until_asked(record)
    record.request_stop("asked by ada")
    record.event("stopped", step=7)
    return 0


def is_being_stopped_by_a_user(record: RunRecord) -> Generator[None, None, int]:
    record.event("started", step=0)
    record.request_stop("asked by ada")
    for _ in range(10):
        yield
    assert record.stop_requested() == "asked by ada"
    record.event("stopped", step=7)
    return 0


def fails_after_it_saved(record: RunRecord) -> Generator[None, None, int]:
    yield from saves(record)
    return 1


@pytest.mark.parametrize(
    ("launcher", "code"),
    [
        (finishes_when_asked, 0),
        (fails_when_asked, 1),
        (fails_after_it_saved, 1),
        (is_stopped_by_a_user_too, 0),
        (is_being_stopped_by_a_user, 0),
    ],
)
def test_a_run_that_ended_for_another_reason_does_not_wait_again(site: Site, launcher: Launcher, code: int) -> None:
    site.seat.at = {5: site.urgent}
    site.launchers = [launcher]
    assert site.waiter.serve() == code
    assert "queued" not in site.kinds()


def test_a_run_whose_node_had_to_go_waits_again(site: Site) -> None:
    def preempted(record: RunRecord) -> Generator[None, None, int]:
        record.event("stopped", step=7)
        return Preempted.exit_code
        yield

    site.launchers = [preempted, finishes]
    assert site.waiter.serve() == 0
    assert site.kinds() == ["stopped", "queued", "started", "finished"]


def test_who_is_told_to_end_while_it_trains_saves_and_does_not_wait_again(site: Site) -> None:
    def ends(record: RunRecord) -> Generator[None, None, int]:
        os.kill(os.getpid(), signal.SIGTERM)
        yield from saves(record)
        return Preempted.exit_code

    site.launchers = [ends]
    assert site.waiter.serve() == Preempted.exit_code
    assert site.kinds() == ["started", "stopped"]


def test_who_is_told_to_end_while_it_waits_is_stopped_where_it_was_saved(site: Site) -> None:
    site.urgent()
    site.record.store.write_atomic("checkpoints/step-00000007/manifest.json", "{}")
    site.seat.at = {3: lambda: os.kill(os.getpid(), signal.SIGTERM)}
    assert site.waiter.serve() == Preempted.exit_code
    assert (site.launched, site.seat.asked) == (0, 3)
    assert [(event["kind"], event["step"]) for event in site.record.events()[1:]] == [("stopped", 7)]


def test_what_never_starts_fails_with_the_reason(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    site.quota = {"ada": 0}
    assert site.waiter.serve() == UsageError.exit_code
    (failed,) = site.record.events()[1:]
    assert (failed["kind"], failed["final"]) == ("failed", True)
    assert "the quota of ada is 0" in failed["error"]
    assert failed["error"] in capsys.readouterr().out
    assert site.record.status() == "failed"


def test_who_was_answered_once_is_not_refused_by_a_queue_that_was_restarted(site: Site) -> None:
    def restart() -> None:
        site.seat.queue, site.quota = site.start(restarted=True), {"ada": 0}

    site.urgent()
    site.seat.at = {3: restart, 12: lambda: site.quota.clear()}
    site.launchers = [finishes]
    assert site.waiter.serve() == 0


def test_a_queue_that_is_away_starts_nobody_and_disturbs_nobody(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    site.seat.away = range(1, 4)

    def trains(record: RunRecord) -> Generator[None, None, int]:
        assert site.seat.asked == 5, "three questions without an answer, and two to be let in"
        site.seat.away = range(6, 10)
        for _ in range(6):
            yield
            assert record.stop_requested() is None
        return (yield from finishes(record))

    site.launchers = [trains]
    assert site.waiter.serve() == 0
    assert capsys.readouterr().out.count("the queue does not answer") == 1


def test_who_makes_room_does_so_though_the_queue_goes_away(site: Site) -> None:
    site.seat.at = {5: site.urgent}
    site.seat.away = range(8, 60)

    def begins_late(record: RunRecord) -> Generator[None, None, int]:
        while site.seat.asked < 12:
            yield
        record.acquire_lease().release()
        return (yield from saves(record))

    site.launchers = [begins_late, finishes]
    assert site.waiter.serve() == 0
    assert "queued" in site.kinds()


def test_the_queue_is_told_what_is_left_by_the_newest_step(site: Site) -> None:
    def trains(record: RunRecord) -> Generator[None, None, int]:
        record.metrics(40, {"loss": 1.0, "step_s": 2.0})
        record.flush()
        yield
        yield
        assert site.queue.table()["jobs"][0]["expected_s"] == 120
        return 0

    site.launchers = [trains]
    assert site.waiter.serve() == 0
    assert site.launched == 1
