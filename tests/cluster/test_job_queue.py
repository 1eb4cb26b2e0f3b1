"""The queue between launchers that report: who may start, who makes room, and what a restart of it changes."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.job_queue import IDLE_S, LISTEN_S, SILENT_S, Cluster, JobQueue, Reply, Report
from cluster.scheduling import Request, fit
from configs.errors import UsageError
from configs.quota import load_quota


@dataclass
class Site:
    """A cluster of GPUs by node, a clock, and launchers as they report."""

    gpus: dict[str, int]
    quota: dict[str, int] = field(default_factory=dict)
    now: float = 1000.0

    def __post_init__(self) -> None:
        self.groups: dict[str, dict[str, int]] = {}
        self.launchers: dict[str, Report] = {}
        self.quota_error: UsageError | None = None
        self.queue = self.start()

    def start(self, *, restarted: bool = False) -> JobQueue:
        self.queue = JobQueue(self.cluster, self.read_quota, restarted=restarted, clock=lambda: self.now)
        return self.queue

    def cluster(self) -> Cluster:
        free = dict(self.gpus)
        for held in self.groups.values():
            for node, count in held.items():
                free[node] -= count
        nodes, left = ({node: {"GPU": float(count)} for node, count in each.items()} for each in (self.gpus, free))
        return Cluster(nodes, left, self.groups)

    def read_quota(self) -> dict[str, int]:
        if self.quota_error is not None:
            raise self.quota_error
        return self.quota

    def come(self, job: str, workers: int, **more) -> Reply:
        values = {"user": "ada", "worker": {"GPU": 1.0}, "fewest": workers, "most": workers, "submitted_at": self.now}
        self.launchers[job] = Report(Request(job=job, **values | more), "waiting", f"/store/{job}")
        return self.ask(job)

    def ask(self, job: str) -> Reply:
        report = self.launchers[job]
        reply = self.queue.report(report)
        self.launchers[job] = report = replace(report, is_new=False)
        if reply.verdict == "start" and report.state == "waiting":
            self.launchers[job] = replace(report, state="admitted", since=self.now)
        if reply.verdict == "leave":
            self.launchers[job] = replace(report, state="leaving")
        return reply

    def place(self, job: str, **held: int) -> None:
        """The launcher's placement group is there."""
        self.groups[f"/store/{job}"] = held

    def wait_again(self, job: str) -> None:
        del self.groups[f"/store/{job}"]
        report = self.launchers[job]
        self.launchers[job] = replace(report, state="waiting", turn=report.turn + 1)

    def pass_time(self, seconds: float) -> dict[str, Reply]:
        """All launchers report, and the queue decides, as seconds go by."""
        replies: dict[str, Reply] = {}
        for _ in range(int(seconds)):
            self.now += 1
            self.queue.tick()
            replies = {job: self.ask(job) for job in self.launchers}
        return replies

    def states(self) -> dict[str, str]:
        return {row["job"]: row["state"] for row in self.queue.table()["jobs"]}


COMING = st.fixed_dictionaries(
    {"workers": st.integers(1, 4), "priority": st.integers(0, 2), "at": st.integers(0, 6), "works": st.integers(1, 8)}
)
HEARD = st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=15, max_size=15)


@settings(max_examples=200, deadline=None)
@given(jobs=st.lists(COMING, min_size=3, max_size=5), heard=HEARD, restarts=st.sets(st.integers(0, 30), max_size=2))
def test_whoever_hears_late_no_place_is_given_twice_and_all_come_to_their_end(
    jobs: list[dict[str, int]], heard: list[list[bool]], restarts: set[int]
) -> None:
    """Each second some of the launchers ask, after some seconds each of them; and the queue decides twice."""
    site = Site({"n1": 2, "n2": 2})
    left = {number: job["works"] for number, job in enumerate(jobs)}  # seconds of work, by number
    late = dict.fromkeys(left, 0)
    for second in range(400):
        site.now += 1
        if second in restarts:
            site.start(restarted=True)
        site.queue.tick()
        for number in [number for number in left if jobs[number]["at"] <= second]:
            name = f"j{number}"
            if name not in site.launchers:
                site.come(name, jobs[number]["workers"], priority=jobs[number]["priority"])
            elif late[number] == 3 or second >= len(heard) or heard[second][number]:
                late[number] = 0
                launcher_asks(site, name)
            else:
                late[number] += 1
            if f"/store/{name}" in site.groups:
                left[number] -= 1
            if left[number] == 0:
                del left[number], site.groups[f"/store/{name}"], site.launchers[name]
                site.queue.leave(name)
        site.queue.tick()
        if not left:
            return
    raise AssertionError(f"some wait for ever: {site.queue.table()}")


def launcher_asks(site: Site, name: str) -> None:
    """It does what it is told: makes its group, which finds room, or gives it back and waits again."""
    verdict = site.ask(name).verdict
    group = f"/store/{name}"
    if verdict == "start" and group not in site.groups:
        places = fit(site.launchers[name].request, site.cluster().free)
        assert places is not None, "a place was given twice"
        site.groups[group] = places
    if verdict == "leave":
        site.groups.setdefault(group, {})
        site.wait_again(name)


def test_gangs_start_whole_and_one_after_the_other() -> None:
    site = Site({"n1": 2, "n2": 2})
    site.come("a", 3)
    site.come("b", 3)
    replies = site.pass_time(1)
    assert replies["a"].verdict == "start"
    assert replies["b"].verdict == "wait"
    assert "room for 1" in replies["b"].why
    site.place("a", n1=2, n2=1)
    assert site.pass_time(3)["b"].verdict == "wait"
    del site.groups["/store/a"]
    del site.launchers["a"]
    site.queue.leave("a")
    assert site.pass_time(1)["b"].verdict == "start"


def test_one_that_was_let_in_holds_its_places_before_ray_knows_of_them() -> None:
    site = Site({"n1": 2})
    site.come("a", 2)
    site.pass_time(2)
    site.come("b", 1)
    assert site.pass_time(2)["b"].verdict == "wait"


def test_it_holds_them_where_there_was_room_when_it_was_let_in() -> None:
    site = Site({"n1": 1, "n2": 2})
    site.groups["of another program"] = {"n1": 1}
    site.come("a", 1)
    site.pass_time(1)
    del site.groups["of another program"]
    site.come("b", 1, worker={"GPU": 2.0})
    assert site.pass_time(1)["b"].verdict == "wait"
    del site.gpus["n2"]  # then elsewhere
    site.come("c", 1)
    assert "room for 0" in site.pass_time(1)["c"].why


def test_the_last_to_start_makes_room() -> None:
    site = Site({"n1": 2})
    for job in ("first", "second"):
        site.come(job, 1)
        site.pass_time(3)
    site.come("urgent", 1, priority=5)
    replies = site.pass_time(2)
    assert (replies["first"].verdict, replies["second"].verdict) == ("start", "leave")


def test_who_has_not_heard_of_its_start_is_the_last_to_start() -> None:
    site = Site({"n1": 2})
    site.come("heard", 1)
    site.pass_time(3)
    site.come("unheard", 1)
    site.queue.tick()
    site.come("urgent", 1, priority=5)
    site.queue.tick()
    assert site.states() == {"heard": "running", "unheard": "leaving", "urgent": "waiting"}


def test_who_makes_room_for_one_that_is_gone_makes_it_for_the_next() -> None:
    site = Site({"n1": 1})
    site.come("low", 1)
    site.pass_time(2)
    site.place("low", n1=1)
    site.come("urgent", 1, priority=5)
    assert site.pass_time(2)["low"].verdict == "leave"
    site.queue.leave("urgent")
    del site.launchers["urgent"]
    site.come("next", 1)
    assert "low saves and makes room" in site.pass_time(1)["next"].why


def test_a_preempted_job_saves_waits_in_its_old_place_and_goes_on() -> None:
    site = Site({"n1": 2})
    site.come("low", 2)
    site.pass_time(1)
    site.place("low", n1=2)
    site.come("other", 2)
    site.come("urgent", 1, priority=5)
    replies = site.pass_time(2)
    assert replies["low"] == Reply("leave", "it makes room for urgent, whose priority is 5")
    assert replies["urgent"].verdict == "wait"
    site.wait_again("low")
    replies = site.pass_time(2)
    assert (replies["urgent"].verdict, replies["low"].verdict) == ("start", "wait")
    positions = [(row["job"], row["position"]) for row in site.queue.table()["jobs"]]
    assert positions == [("urgent", None), ("low", 1), ("other", 2)]
    site.come("behind", 1, priority=9, worker={"GPU": 2.0})
    assert next(iter(site.states())) == "urgent", "who has places stands before who waits"
    site.queue.leave("behind")
    del site.launchers["behind"]
    site.queue.leave("urgent")
    del site.launchers["urgent"]
    replies = site.pass_time(1)
    assert (replies["low"].verdict, replies["other"].verdict) == ("start", "wait")


def test_one_that_makes_room_before_it_heard_that_it_may_start_waits_again() -> None:
    """Its launcher asks once a second, the queue decides twice in that time: it has nothing to save or to give back."""
    site = Site({"n1": 2})
    site.come("low", 2)
    site.queue.tick()
    site.come("urgent", 2, priority=5)
    site.queue.tick()
    assert site.states() == {"low": "leaving", "urgent": "waiting"}
    replies = site.pass_time(2)
    assert (replies["urgent"].verdict, replies["low"].verdict) == ("start", "wait")
    assert "room for 0" in replies["low"].why


def test_one_that_was_let_in_holds_other_places_once_ray_gave_its_own_to_another() -> None:
    site = Site({"n1": 1, "n2": 2, "n3": 1})
    for job in ("slow", "quick"):
        site.come(job, 1)
        site.pass_time(1)
    site.place("quick", n1=1)  # where the queue has taken the slow one to be
    site.come("big", 1, worker={"GPU": 2.0})
    site.come("more", 1)
    replies = site.pass_time(1)
    assert (replies["big"].verdict, replies["more"].verdict) == ("start", "wait"), "the slow one is on n3 now"


def test_a_queue_that_was_killed_knows_all_again_and_starts_nobody_twice() -> None:
    site = Site({"n1": 2})
    site.come("running", 2)
    site.pass_time(1)
    site.come("waiting", 2)
    site.come("urgent", 2, priority=1)
    site.pass_time(1)
    before = site.queue.table()
    assert site.states() == {"running": "leaving", "urgent": "waiting", "waiting": "waiting"}

    site.start(restarted=True)
    site.gpus["n1"] = 0  # a node is away for a moment, too: whoever waits is not sent away
    replies = {job: site.ask(job) for job in ("urgent", "waiting")}
    site.queue.tick()
    assert {reply.verdict for reply in replies.values()} == {"wait"}
    site.gpus["n1"] = 2
    replies = site.pass_time(LISTEN_S + 1)
    assert [replies[job].verdict for job in ("running", "urgent", "waiting")] == ["leave", "wait", "wait"]
    after = site.queue.table()
    assert [(row["job"], row["state"], row["position"]) for row in after["jobs"]] == [
        (row["job"], row["state"], row["position"]) for row in before["jobs"]
    ]


def test_a_launcher_that_is_silent_loses_its_seat_but_not_its_places() -> None:
    site = Site({"n1": 2})
    site.come("gone", 2)
    site.pass_time(1)
    site.place("gone", n1=2)
    del site.launchers["gone"]
    site.come("next", 2)
    assert site.pass_time(SILENT_S + 2)["next"].verdict == "wait"
    assert set(site.states()) == {"next"}
    site.groups.clear()
    assert site.pass_time(1)["next"].verdict == "start"


def test_who_reports_keeps_its_seat_and_who_does_not_keeps_it_for_a_while() -> None:
    site = Site({"n1": 1})
    for job in ("first", "second"):
        site.come(job, 1)
    silent = site.launchers.pop("second")
    for second in range(int(SILENT_S) + 5):
        site.now += 1
        site.queue.tick()
        assert list(site.states()) == (["first", "second"] if second < SILENT_S else ["first"])
        site.ask("first")
    site.launchers["second"] = silent
    site.ask("second")
    assert list(site.states()) == ["first", "second"]


def test_what_others_hold_is_waited_for() -> None:
    site = Site({"n1": 2})
    site.groups["of another program"] = {"n1": 2}
    assert site.come("a", 2).verdict == "wait"
    del site.groups["of another program"]
    assert site.pass_time(1)["a"].verdict == "start"


def test_what_never_fits_is_refused_at_once_and_what_does_not_now_waits() -> None:
    site = Site({"n1": 2, "n2": 2}, quota={"bob": 1})
    refused = site.come("big", 5)
    assert refused.verdict == "refused"
    assert "5 workers of 1 GPU, which is more than the whole cluster has. Lower resources.workers" in refused.why
    refused = site.come("much", 2, user="bob")
    assert refused.verdict == "refused"
    assert "asks for 2 workers, and the quota of bob is 1. Lower" in refused.why
    assert site.come("elastic", 1, most=2, user="bob").verdict == "refused"
    site.launchers.clear()
    site.come("whole", 4)
    del site.gpus["n2"]
    assert "more than the whole cluster has now" in site.pass_time(1)["whole"].why
    site.gpus["n2"] = 2
    assert site.pass_time(1)["whole"].verdict == "start"


def test_a_quota_that_cannot_be_read_leaves_the_one_before_and_is_told() -> None:
    site = Site({"n1": 4}, quota={"ada": 1})
    site.come("a", 1)
    site.pass_time(1)
    site.quota_error = UsageError("quota.yaml gives each user a number of workers.")
    site.come("b", 1)
    assert "quota: the runs of ada have 1 of 1 workers" in site.pass_time(1)["b"].why
    assert site.queue.table()["problem"].startswith("quota.yaml gives")
    assert site.come("c", 2).verdict == "refused"
    del site.launchers["c"]
    site.quota_error = None
    site.pass_time(1)
    assert site.queue.table()["problem"] == ""


def test_it_is_idle_once_nobody_has_needed_it_for_a_while() -> None:
    site = Site({"n1": 1})
    site.come("a", 1)
    site.pass_time(IDLE_S + 5)
    assert not site.queue.idle
    site.launchers.clear()
    site.queue.leave("a")
    assert not site.queue.idle
    site.pass_time(IDLE_S + 1)
    assert site.queue.idle


def test_the_table_says_when_a_job_may_start() -> None:
    site = Site({"n1": 1})
    site.come("first", 1, expected_s=100.0)
    site.pass_time(1)
    assert [row["may_start"] for row in site.queue.table()["jobs"]] == [None]
    site.come("second", 1)
    site.pass_time(10)
    rows = {row["job"]: row for row in site.queue.table()["jobs"]}
    assert rows["second"]["may_start"] == site.now + 100
    assert (rows["second"]["run"], rows["second"]["store"]) == ("second", "/store")
    assert (rows["first"]["may_start"], rows["first"]["why"]) == (None, "")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ada: many", "ada: 'many'"),
        ("ada: -1", "ada: -1"),
        ("ada: 1\nada: 2", "line 2"),
        ("- ada", "It holds nothing"),
        ("", "It holds nothing"),
    ],
)
def test_a_quota_file_that_is_wrong_says_where(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "quota.yaml"
    file.write_text(text)
    with pytest.raises(UsageError, match="gives each user a number of workers") as caught:
        load_quota(file)
    assert message in str(caught.value)


def test_a_quota_file_is_read(tmp_path: Path) -> None:
    file = tmp_path / "quota.yaml"
    file.write_text("default: 8\nada: 16\n")
    assert load_quota(file) == {"default": 8, "ada": 16}
    assert load_quota(None) == {}
    with pytest.raises(UsageError, match="cannot be read"):
        load_quota(tmp_path / "none.yaml")
