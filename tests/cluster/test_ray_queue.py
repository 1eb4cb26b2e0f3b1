"""The queue on a real Ray cluster of three hosts: gangs, preemption with the same weights, the loss of the queue."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.chaos.runs import RUN, differing, recipe, state_of, train_undisturbed
from tests.cluster.ray_site import RaySite, missing
from tests.cluster.target_user import TRAIN_S, User
from tests.cluster.waiting import wait_for

pytestmark = [pytest.mark.daemon, pytest.mark.skipif(bool(missing()), reason=f"no hosts here: {missing()}")]

TRAIN = ("train", "run.yaml", "--on", "lab")
ENDLESS, LONG, SHORT = 100_000, 1000, 20
EXACT = {"checkpoint": {"every": 200}, "determinism": "exact", "zero": {"stage": 1}}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RaySite]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CONFIG_HOME", str(tmp_path_factory.mktemp("configuration")))
        with RaySite(tmp_path_factory.mktemp("site")) as made:
            yield made


def user_of(site: RaySite, folder: Path, steps: int, **changes: Any) -> User:
    folder.mkdir()
    return User(folder, site.environment, f'lab: {{type: ray, address: "{site.address}"}}\n', steps, **changes)


def queue_of(user: User) -> list[dict[str, Any]]:
    code, said = user.run("queue", "--json")
    assert code == 0, said
    return list(json.loads(said[said.index("{") :])["jobs"])


def states(user: User) -> dict[str, tuple[str, str]]:
    """State and reason by the store, of which each user here has one."""
    return {row["store"]: (row["state"], row["why"]) for row in queue_of(user)}


def status(user: User) -> str:
    return user.record().status() if Path(user.store, RUN, "run.yaml").exists() else ""


def placed_until(user: User) -> list[tuple[float, float]]:
    """When the run had its places: from, until."""
    spans, since = [], None
    for event in user.record().events():
        if event["kind"] == "placed":
            since = event["time"]
        if event["kind"] in ("finished", "stopped") and since is not None:
            spans.append((since, event["time"]))
            since = None
    return spans


def queue_processes(site: RaySite) -> list[psutil.Process]:
    """The queue's, of this cluster: one, or none."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            of_site = process.environ().get("RAY_AUTH_TOKEN_PATH") == site.environment["RAY_AUTH_TOKEN_PATH"]
            if of_site and "QueueActor" in " ".join(process.cmdline()):
                found.append(process)
    return found


def test_two_gangs_of_the_whole_cluster_run_one_after_the_other(site: RaySite, tmp_path: Path) -> None:
    """Two workers each, on two CPUs: had each got one worker's place, both would wait for ever."""
    users = [user_of(site, tmp_path / name, SHORT) for name in ("ada", "bob")]
    commands = [user.start(*TRAIN) for user in users]
    try:
        reasons = set()
        while not all(command.has_ended for command in commands):
            reasons |= {why for _, why in states(users[0]).values()}
        assert [command.wait() for command in commands] == [0, 0], [command.said for command in commands]
    finally:
        for command in commands:
            command.end()
    assert "asks for 2 workers of 1 CPU, and there is room for 0" in reasons
    (first,), (second,) = sorted(placed_until(user) for user in users)
    assert first[1] <= second[0], "both had places at the same time"


def test_a_preempted_run_ends_with_the_same_weights_though_the_queue_is_killed(site: RaySite, tmp_path: Path) -> None:
    low = user_of(site, tmp_path / "low", LONG, **EXACT)
    high = user_of(site, tmp_path / "high", ENDLESS)
    later = user_of(site, tmp_path / "later", SHORT)
    assert low.run(*TRAIN, "-d")[0] == 0
    wait_for(lambda: low.steps_done() >= 10, "step 10", TRAIN_S)
    assert high.run(*TRAIN, "-d", "--priority", "5")[0] == 0
    wait_for(lambda: high.steps_done() > 0, "the urgent run", TRAIN_S)
    assert 10 <= low.steps_done() < LONG
    assert low.record().events()[-1]["kind"] == "queued"
    assert later.run(*TRAIN, "-d")[0] == 0

    (queue,) = queue_processes(site)
    queue.kill()
    expected = [(high.store, "running"), (low.store, "waiting"), (later.store, "waiting")]

    def knows_all_again() -> bool:
        found = [(row["store"], row["state"]) for row in queue_of(low)]
        return queue not in queue_processes(site) and found == expected

    wait_for(knows_all_again, "a queue that knows all again", TRAIN_S)
    assert status(high) == "running" and placed_until(high) == [], "who trains does not notice"
    assert high.run("runs", "stop", RUN, "--store", high.store)[0] == 0

    for user in (low, later):
        wait_for(lambda user=user: status(user) == "finished", "its end", TRAIN_S)
    spans = sorted(span for user in (low, high, later) for span in placed_until(user))
    assert all(before[1] <= after[0] for before, after in pairwise(spans)), "two had places at once"
    assert len(placed_until(low)) == 2, "it was preempted once"
    assert placed_until(low)[1] < placed_until(later)[0], "the one that was there first goes on first"
    undisturbed = recipe(tmp_path / "undisturbed", LONG) | EXACT
    train_undisturbed(undisturbed)
    assert differing(state_of(low.store, LONG), state_of(undisturbed["store"], LONG)) == []


def test_a_run_that_waits_is_taken_back(site: RaySite, tmp_path: Path) -> None:
    running, waiting = (user_of(site, tmp_path / name, ENDLESS) for name in ("running", "waiting"))
    assert running.run(*TRAIN, "-d")[0] == 0
    wait_for(lambda: running.steps_done() >= 1, "step 1", TRAIN_S)
    assert waiting.run(*TRAIN, "-d")[0] == 0
    wait_for(lambda: states(waiting).get(waiting.store, ("",))[0] == "waiting", "the queue", TRAIN_S)
    code, said = waiting.run("runs", "stop", RUN, "--store", waiting.store)
    assert code == 0 and "Took job" in said, said
    assert status(waiting) == "stopped"
    code, said = running.run("runs", "stop", RUN, "--store", running.store)
    assert code == 0, said
    assert status(running) == "stopped"
    wait_for(lambda: queue_of(running) == [], "an empty queue", TRAIN_S)


def test_quotas_hold_and_the_queue_goes_when_nobody_needs_it(site: RaySite, tmp_path: Path) -> None:
    user = user_of(site, tmp_path / "user", SHORT)
    quota = Path(site.environment["XDG_CONFIG_HOME"]) / "shardyard" / "quota.yaml"
    quota.parent.mkdir(parents=True, exist_ok=True)
    quota.write_text("default: 1\n")
    try:
        began = time.monotonic()
        code, said = user.run(*TRAIN)
        assert code == 2 and "asks for 2 workers, and the quota of" in said, said
        assert time.monotonic() - began < 60
    finally:
        quota.unlink()
    wait_for(lambda: queue_processes(site) == [], "the queue's end", TRAIN_S)
