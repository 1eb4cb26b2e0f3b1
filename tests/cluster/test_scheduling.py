"""The queue's decisions, by what comes of them in a simulated cluster, and by cases that one can see through."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.scheduling import Placed, Request, allowance, decide, earliest, fit, forecast

GPU = {"GPU": 1.0}


def job(name: str, workers: int = 1, *, priority: int = 0, at: float = 0.0, s: float | None = None, **more) -> Request:
    """A request of `workers` workers of a GPU each."""
    values = {"user": "ada", "worker": GPU, "fewest": workers, "most": workers} | more
    return Request(job=name, priority=priority, submitted_at=at, expected_s=s, **values)


def gpus(**free: float) -> dict[str, dict[str, float]]:
    """Free GPUs by node."""
    return {node: {"GPU": amount} for node, amount in free.items()}


# --- a cluster that is simulated, with the pure decisions as its queue


@dataclass
class Cluster:
    """Nodes and jobs over time. Every start, end and preemption is checked as it happens."""

    nodes: dict[str, dict[str, float]]
    arrivals: list[tuple[float, Request, float]]  # when, what, how long it really takes
    quota: dict[str, int] = field(default_factory=dict)
    promises: bool = False  # whether the first that waits is held to start when it was told
    now: float = 0.0

    def __post_init__(self) -> None:
        self.real = {request.job: seconds for _, request, seconds in self.arrivals}
        self.waiting: dict[str, Request] = {}
        self.placed: dict[str, Placed] = {}
        self.started_at: dict[str, float] = {}
        self.promised: dict[str, float] = {}  # when the head of the queue was told that it starts
        self.preemptions = 0

    def free(self) -> dict[str, dict[str, float]]:
        free = {node: dict(amounts) for node, amounts in self.nodes.items()}
        for placed in self.placed.values():
            for node, count in placed.held.items():
                for name, amount in placed.request.worker.items():
                    free[node][name] -= count * amount
        assert all(amount > -1e-6 for amounts in free.values() for amount in amounts.values()), "more than there is"
        return free

    def run(self) -> None:
        """To the end of all jobs, or until nothing can happen any more."""
        todo = sorted(self.arrivals, key=lambda arrival: arrival[0])
        for _ in range(10_000):
            while todo and todo[0][0] <= self.now:
                _, request, _ = todo.pop(0)
                self.waiting[request.job] = request
                self.promised.clear()  # who comes later may come first
            self.settle()
            times = [self.end(placed) for placed in self.placed.values()] + [time for time, _, _ in todo]
            if not times:
                return
            self.now = max(self.now, min(times))
            for placed in [placed for placed in self.placed.values() if self.end(placed) <= self.now]:
                del self.placed[placed.request.job]
                self.real[placed.request.job] = 0.0
        raise AssertionError("it goes on for ever")

    def end(self, placed: Placed) -> float:
        return placed.started_at + self.real[placed.request.job]

    def settle(self) -> None:
        """Decide until nothing changes."""
        for _ in range(1000):
            decisions = decide(self.waiting.values(), list(self.placed.values()), self.free(), self.quota, self.now)
            assert decisions.why.keys() | decisions.start.keys() == self.waiting.keys()
            assert not decisions.why.keys() & decisions.start.keys()
            for name, held in decisions.start.items():
                request = self.waiting.pop(name)
                assert request.fewest <= sum(held.values()) <= request.most
                self.placed[name] = Placed(request, held, self.now)
                self.started_at[name] = self.now
                if name in self.promised:
                    assert self.now <= self.promised.pop(name) + 1e-6, f"{name} was held up"
            self.check_quota()
            for name, sake in decisions.preempt.items():
                victim = self.placed.pop(name)
                assert victim.request.priority < self.waiting[sake].priority
                assert fit(self.waiting[sake], self.free_with(decisions.preempt)) is not None, "in vain"
                self.real[name] -= self.now - victim.started_at
                left = None if victim.request.expected_s is None else self.real[name]
                self.waiting[name] = replace(victim.request, expected_s=left)
                self.preemptions += 1
            if not decisions.start and not decisions.preempt:
                break
        else:
            raise AssertionError("it never settles")
        if self.promises:
            self.promise()

    def free_with(self, leaving: dict[str, str]) -> dict[str, dict[str, float]]:
        kept = self.placed
        self.placed = {name: placed for name, placed in kept.items() if name not in leaving}
        try:
            return self.free()
        finally:
            self.placed = kept

    def promise(self) -> None:
        """Note when the first that waits for room would start if nothing more was started."""
        for request in sorted(self.waiting.values(), key=lambda request: request.rank):
            if fit(request, self.nodes) is None:
                continue
            start = earliest(request, list(self.placed.values()), self.free(), self.now)
            if start < math.inf:
                self.promised.setdefault(request.job, start)
            return

    def check_quota(self) -> None:
        for user in {placed.request.user for placed in self.placed.values()}:
            used = sum(sum(each.held.values()) for each in self.placed.values() if each.request.user == user)
            assert used <= allowance(user, self.quota)


NODES = st.dictionaries(
    st.sampled_from(["n1", "n2", "n3", "n4"]),
    st.fixed_dictionaries({"GPU": st.integers(0, 4).map(float), "CPU": st.integers(1, 8).map(float)}),
    min_size=1,
)
WORKERS = st.sampled_from([{"GPU": 1.0, "CPU": 1.0}, {"GPU": 2.0, "CPU": 1.0}, {"CPU": 1.0}, {"CPU": 4.0}])


@st.composite
def arrivals(draw: st.DrawFn, *, known: bool) -> list[tuple[float, Request, float]]:
    """Jobs over some minutes; known: the queue is told how long they take, which is right."""
    found = []
    for number in range(draw(st.integers(1, 12))):
        fewest = draw(st.integers(1, 4))
        at, seconds = float(draw(st.integers(0, 300))), float(draw(st.integers(1, 200)))
        expected = seconds if known or draw(st.booleans()) else None
        request = Request(
            job=f"j{number}",
            user=draw(st.sampled_from(["ada", "bob"])),
            worker=draw(WORKERS),
            fewest=fewest,
            most=fewest + (0 if known else draw(st.integers(0, 2))),
            priority=draw(st.integers(0, 2)),
            submitted_at=at,
            expected_s=expected,
        )
        found.append((at, request, seconds))
    return found


QUOTA = st.sampled_from([{}, {"ada": 4}, {"default": 5, "bob": 3}])


@settings(max_examples=300, deadline=None)
@given(nodes=NODES, jobs=arrivals(known=False), quota=QUOTA)
def test_all_that_can_run_run_to_their_end(nodes, jobs, quota) -> None:
    """No deadlock, no starvation, never more than there is, no user over the quota, preemption only downwards."""
    cluster = Cluster(nodes, jobs, quota)
    cluster.run()
    for _, request, _ in jobs:
        possible = fit(request, nodes) is not None and request.most <= allowance(request.user, quota)
        assert (request.job in cluster.started_at) == possible
    assert all(seconds == 0 for name, seconds in cluster.real.items() if name in cluster.started_at)


@settings(max_examples=300, deadline=None)
@given(nodes=NODES, jobs=arrivals(known=True))
def test_back_filling_never_holds_up_the_first_that_waits(nodes, jobs) -> None:
    """With right estimates it starts when it would have, had nothing been put in front of it (asserted on the way)."""
    alike = [(at, replace(request, priority=0), seconds) for at, request, seconds in jobs]
    Cluster(nodes, alike, promises=True).run()


@settings(max_examples=200, deadline=None)
@given(nodes=NODES, jobs=arrivals(known=True), quota=QUOTA)
def test_what_is_forecast_is_what_comes(nodes, jobs, quota) -> None:
    together = [(0.0, replace(request, submitted_at=0.0), seconds) for _, request, seconds in jobs]
    cluster = Cluster(nodes, together, quota)
    told = forecast([request for _, request, _ in together], [], nodes, quota, 0.0)
    cluster.run()
    assert told.keys() == cluster.started_at.keys()
    first = {name: told[name] for name in told if cluster.preemptions == 0}
    assert all(first[name] == pytest.approx(cluster.started_at[name]) for name in first)


# --- cases


def test_two_gangs_that_would_deadlock_run_one_after_the_other() -> None:
    decisions = decide([job("a", 3, at=1), job("b", 3, at=2)], [], gpus(n1=2, n2=2), {}, 0)
    assert decisions.start == {"a": {"n1": 2, "n2": 1}}
    assert "room for 1" in decisions.why["b"]


def test_higher_priority_goes_first_and_ties_by_submission() -> None:
    waiting = [job("late", at=2), job("early", at=1), job("high", priority=5, at=3)]
    assert list(decide(waiting, [], gpus(n1=2), {}, 0).start) == ["high", "early"]


def test_a_quota_holds_up_its_user_alone() -> None:
    waiting = [job("a1", 2, at=1), job("a2", 2, at=2), job("b", 1, at=3, user="bob")]
    decisions = decide(waiting, [], gpus(n1=8), {"ada": 3}, 0)
    assert set(decisions.start) == {"a1", "b"}
    assert decisions.why["a2"] == "quota: the runs of ada have 2 of 3 workers, and this one asks for 2"


def test_a_quota_counts_what_a_job_may_grow_to_and_what_it_holds_while_it_moves() -> None:
    grows = Placed(job("grows", fewest=1, most=3), {"n1": 1}, started_at=0)
    moves = Placed(job("moves", 1), {"n1": 1, "n2": 1}, started_at=0)
    for placed, used in ((grows, 3), (moves, 2)):
        waits = decide([job("next", 1)], [placed], gpus(n1=4), {"ada": used}, 0)
        assert f"have {used} of {used} workers" in waits.why["next"]
        assert set(decide([job("next", 1)], [placed], gpus(n1=4), {"ada": used + 1}, 0).start) == {"next"}
    both = [job("grows", at=1, fewest=1, most=3), job("next", 1, at=2, worker={"CPU": 1.0})]
    assert set(decide(both, [], {"n1": {"GPU": 1.0, "CPU": 1.0}}, {"ada": 3}, 0).start) == {"grows"}


def test_a_quota_by_name_goes_before_the_default() -> None:
    assert allowance("ada", {"ada": 1, "default": 4}) == 1
    assert allowance("bob", {"ada": 1, "default": 4}) == 4
    assert allowance("bob", {"ada": 1}) == math.inf


def test_no_more_is_preempted_than_needed_and_the_dearest_is_kept() -> None:
    placed = [
        Placed(job("long", 2), {"n1": 2}, started_at=0),
        Placed(job("small", 1), {"n1": 1}, started_at=50),
        Placed(job("new", 2), {"n2": 2}, started_at=90),
        Placed(job("equal", 1, priority=3), {"n2": 1}, started_at=95),
    ]
    decisions = decide([job("urgent", 2, priority=3)], placed, gpus(n1=0, n2=0), {}, 100)
    assert decisions.preempt == {"new": "urgent"}
    assert "new saves and makes room" in decisions.why["urgent"]


def test_nobody_is_preempted_in_vain_or_twice() -> None:
    low = Placed(job("low", 1), {"n1": 1}, started_at=0)
    high = Placed(job("high", 3, priority=9), {"n1": 3}, started_at=0)
    assert decide([job("big", 3, priority=5)], [low, high], gpus(n1=0), {}, 10).preempt == {}
    going = replace(low, leaving=True)
    assert decide([job("next", 1, priority=5)], [going, high], gpus(n1=0), {}, 10).preempt == {}


def test_what_makes_room_already_counts_before_anybody_else_is_asked() -> None:
    going = Placed(job("going", 1), {"n1": 1}, started_at=50, leaving=True)
    stays = Placed(job("stays", 1), {"n1": 1}, started_at=0)
    assert decide([job("urgent", 1, priority=5)], [going, stays], gpus(n1=0), {}, 60).preempt == {}
    assert decide([job("urgent", 2, priority=5)], [going, stays], gpus(n1=0), {}, 60).preempt == {"stays": "urgent"}


def test_the_lowest_priority_makes_room_first_however_long_it_has_run() -> None:
    placed = [
        Placed(job("low", 1, priority=1), {"n1": 1}, started_at=0),
        Placed(job("high", 1, priority=2), {"n1": 1}, started_at=50),
    ]
    assert decide([job("urgent", 1, priority=5)], placed, gpus(n1=0), {}, 60).preempt == {"low": "urgent"}


def test_of_those_that_may_stay_the_one_with_most_to_lose_stays() -> None:
    """The last to start are asked first; the third of them has places enough that one of the others can stay."""
    placed = [
        Placed(job(name, workers), {"n1": workers}, started_at=at)
        for name, workers, at in (("last", 1, 90), ("middle", 1, 80), ("first", 2, 70))
    ]
    assert set(decide([job("urgent", 3, priority=5)], placed, gpus(n1=0), {}, 99).preempt) == {"last", "first"}


def test_a_small_job_is_filled_in_where_it_ends_in_time() -> None:
    placed = [Placed(job("running", 3, s=100), {"n1": 3}, started_at=0)]
    waiting = [job("big", 4, at=1, s=50), job("short", 1, at=2, s=60), job("long", 1, at=3, s=200), job("any", 1, at=4)]
    decisions = decide(waiting, placed, gpus(n1=1), {}, 0)
    assert list(decisions.start) == ["short"]
    assert decisions.why["long"] == decisions.why["any"] == "behind big"
    exact = [waiting[0], job("exact", 1, at=2, s=100)]
    assert list(decide(exact, placed, gpus(n1=1), {}, 0).start) == ["exact"]
    more = decide(waiting[:1] + waiting[2:], placed, gpus(n1=1), {}, 0)
    assert more.why["long"] == more.why["any"] == "its start would delay big, which comes first"


def test_jobs_of_unknown_length_do_not_pile_up_in_front_of_the_first() -> None:
    """Each alone would leave it room in the end; together they would not."""
    placed = [Placed(job("running", 2), {"n1": 2}, started_at=0)]
    big = job("big", 3, at=1)
    first = decide([big, job("s1", 1, at=2), job("s2", 1, at=3)], placed, gpus(n1=2), {}, 0)
    assert list(first.start) == ["s1"]
    placed.append(Placed(job("s1", 1, at=2), {"n1": 1}, started_at=0))
    assert decide([big, job("s2", 1, at=3)], placed, gpus(n1=1), {}, 5).start == {}


def test_in_front_of_one_of_which_nobody_knows_when_it_starts_even_a_short_job_waits() -> None:
    placed = [Placed(job("running", 3), {"n1": 3}, started_at=0)]
    decisions = decide([job("big", 4, at=1), job("short", 1, at=2, s=1)], placed, gpus(n1=1), {}, 0)
    assert decisions.why["short"] == "its start would delay big, which comes first"


def test_what_was_filled_in_counts_as_ended_where_it_ends_in_time() -> None:
    placed = [
        Placed(job("running", 2, s=100), {"n1": 2}, started_at=0),
        Placed(job("filled", 1, at=2, s=50), {"n1": 1}, started_at=0),
    ]
    assert set(decide([job("big", 3, at=1), job("open", 1, at=3)], placed, gpus(n1=1), {}, 0).start) == {"open"}


def test_only_the_first_that_waits_for_room_is_held_to_its_time() -> None:
    """The third fits, and delays the second alone; the second itself waits, though nobody stands before it but one."""
    placed = [Placed(job("running", 2, s=100), {"n1": 2}, started_at=0)]
    waiting = [job("first", 3, at=1), job("second", 4, at=2, priority=0), job("third", 1, at=3)]
    decisions = decide(waiting, placed, gpus(n1=2), {}, 0)
    assert set(decisions.start) == {"third"}
    assert decisions.why["second"] == "behind first"


def test_what_the_cluster_has_lost_the_room_for_holds_nobody_up() -> None:
    decisions = decide([job("big", 8, at=1), job("small", 1, at=2)], [], gpus(n1=4), {}, 0)
    assert set(decisions.start) == {"small"}
    assert "more than the whole cluster has now" in decisions.why["big"]


def test_an_elastic_job_takes_what_there_is() -> None:
    assert decide([job("e", fewest=2, most=6)], [], gpus(n1=3, n2=1), {}, 0).start == {"e": {"n1": 3, "n2": 1}}
    assert fit(job("e", fewest=5, most=6), gpus(n1=3, n2=1)) is None


def test_workers_go_where_the_least_is_left_over() -> None:
    assert fit(job("a", 1), gpus(n1=4, n2=1, n3=2)) == {"n2": 1}
    assert fit(job("a", 2), gpus(n1=4, n2=1, n3=2)) == {"n3": 2}
    assert fit(job("a", 5), gpus(n1=4, n2=1, n3=2)) == {"n1": 4, "n2": 1}


def test_parts_of_a_resource_are_counted_as_ray_does() -> None:
    tenths = job("a", fewest=10, most=10, worker={"CPU": 0.1, "GPU": 0.0})
    assert fit(tenths, {"n1": {"CPU": 1.0}}) == {"n1": 10}


def test_an_end_is_told_from_when_it_was_known_and_an_overdue_one_is_now() -> None:
    later = Placed(job("running", 1, s=30), {"n1": 1}, started_at=0, told_at=50)
    assert earliest(job("next", 1), [later], gpus(n1=0), 60) == 80
    overdue = Placed(job("running", 1, s=30), {"n1": 1}, started_at=0)
    assert earliest(job("next", 1), [overdue], gpus(n1=0), 60) == 60
    leaving = replace(later, leaving=True)
    assert earliest(job("next", 1), [leaving], gpus(n1=0), 60) == 60


def test_places_on_a_node_that_is_gone_come_not_back() -> None:
    placed = [Placed(job("running", 2, s=10), {"gone": 2}, started_at=0)]
    assert earliest(job("next", 1), placed, gpus(n1=0), 0) == math.inf


def test_a_forecast_leaves_out_what_nobody_can_tell() -> None:
    placed = [Placed(job("open", 1), {"n1": 1}, started_at=0), Placed(job("known", 1, s=30), {"n1": 1}, started_at=10)]
    told = forecast([job("one", 1, at=1), job("two", 1, at=2)], placed, gpus(n1=0), {}, 20)
    assert told == {"one": 40}


def test_a_forecast_lets_who_made_room_go_on_with_what_is_left_of_it() -> None:
    """At 10 ada's quota lets `urgent` in, for which `filled` makes room; the rest of it comes before `last`."""
    placed = [Placed(job("running", 1, priority=9, s=10), {"n1": 1}, started_at=0)]
    waiting = [
        job("urgent", 2, priority=5, at=1, s=5),
        job("filled", 1, at=2, s=100, user="bob"),
        job("last", 2, at=3, s=1, user="bob"),
    ]
    assert forecast(waiting, placed, gpus(n1=1), {"ada": 2}, 0) == {"filled": 0, "urgent": 10, "last": 105}


def test_a_forecast_lets_who_makes_room_already_wait_again_in_its_place() -> None:
    placed = [Placed(job("going", 1, s=50), {"n1": 1}, started_at=0, leaving=True, told_at=20)]
    waiting = [job("urgent", 1, priority=5, at=2, s=10), job("last", 1, at=3)]
    assert forecast(waiting, placed, gpus(n1=0), {}, 20) == {"urgent": 20, "last": 80}
