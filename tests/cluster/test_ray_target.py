"""Training on a real Ray cluster of three hosts, by its Jobs API: results, refusals, and what is lost on the way."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.runs import RUN, differing, recipe, state_of, train_undisturbed
from tests.cluster.namespaces import HERE
from tests.cluster.ray_site import HEAD, NODES, RaySite, missing
from tests.cluster.target_user import TRAIN_S, Command, User
from tests.cluster.waiting import wait_for

pytestmark = [pytest.mark.daemon, pytest.mark.skipif(bool(missing()), reason=f"no hosts here: {missing()}")]

TRAIN = ("train", "run.yaml", "--on", "lab")
MANY, HARMED_AFTER = 100_000, 20
ROOT = Path(__file__).resolve().parents[2]
EXACT = {"checkpoint": {"every": 15}, "determinism": "exact", "zero": {"stage": 1}}

# A GPT that writes down where it is built, and from which files.
WITNESS = """
import json, pathlib, socket
import trainer
from trainer.models.gpt import *
from trainer.models import gpt

def build(config, input, output):
    pathlib.Path({folder!r}, socket.gethostname()).write_text(json.dumps([__file__, trainer.__file__]))
    return gpt.build(config, input, output)
"""
FAULTY = """
import socket
from trainer.models.gpt import *
from trainer.models import gpt

def build(config, input, output):
    if socket.gethostname() in {nodes!r}:
        raise ArithmeticError("the model cannot be built")
    return gpt.build(config, input, output)
"""
DEADLY = """
import os, socket
from trainer.models.gpt import *

if socket.gethostname() == "head":
    print("about to die", flush=True)
    os._exit(9)
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RaySite]:
    with RaySite(tmp_path_factory.mktemp("site")) as made:
        yield made


def user_of(site: RaySite, folder: Path, steps: int, **changes: Any) -> User:
    return User(folder, site.environment, f'lab: {{type: ray, address: "{site.address}"}}\n', steps, **changes)


def own_model(folder: Path, text: str) -> dict[str, Any]:
    """A user's own model, in a file beside the recipe."""
    (folder / "mine").mkdir()
    (folder / "mine/model.py").write_text(text)
    return recipe(folder, 1)["model"] | {"name": "mine.model"}


def ask(site: RaySite, path: str, method: str = "GET") -> Any:
    """What the dashboard answers."""
    token = Path(site.environment["RAY_AUTH_TOKEN_PATH"]).read_text()
    headers = {"Authorization": f"Bearer {token}"}
    request = urllib.request.Request(f"{site.address}/api/jobs/{path}", headers=headers, method=method)
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)


def jobs(site: RaySite) -> dict[str, str]:
    """What the cluster knows of: statuses of jobs by their ids."""
    return {job["submission_id"]: job["status"] for job in ask(site, "") if job["submission_id"]}


@pytest.fixture(autouse=True)
def idle(site: RaySite) -> Iterator[None]:
    """A test that fails leaves no job behind, which would fail the next."""
    yield
    for job in [job for job, status in jobs(site).items() if status in ("PENDING", "RUNNING")]:
        ask(site, f"{job}/stop", "POST")
        wait_for(lambda job=job: jobs(site)[job] not in ("PENDING", "RUNNING"), f"the end of {job}", TRAIN_S)


def job_of(said: str) -> str:
    found = re.search(r"Job (\S+) at lab", said)
    assert found, said
    return found[1]


def train_until(user: User, step: int) -> Command:
    """The following of a run that has completed so many steps."""
    following = user.start(*TRAIN)
    try:
        wait_for(lambda: user.steps_done() >= step or following.has_ended, f"step {step}", TRAIN_S)
        assert not following.has_ended, following.said
    except BaseException:
        following.end()
        raise
    return following


def test_it_trains_on_two_nodes_by_the_code_of_who_sends_it(site: RaySite, tmp_path: Path) -> None:
    seen = tmp_path / "seen"
    seen.mkdir()
    user = user_of(site, tmp_path, 20, model=own_model(tmp_path, WITNESS.format(folder=str(seen))))
    code, said = user.run(*TRAIN)
    assert code == 0, said
    assert "has finished after step 20" in said
    assert "INFO" not in said, "nothing but what is ours"
    for node in NODES:  # who plans the run builds the model, too: the launcher, and the sender from its own folder
        for file in json.loads((seen / node).read_text()):
            assert "/working_dir_files/" in file, f"{node} has used {file}"
    (placed,) = user.events("placed")
    assert {worker["node"] for worker in placed["workers"]} == set(NODES)
    assert user.record().checkpoints()[-1]["step"] == 20
    assert jobs(site)[job_of(said)] == "SUCCEEDED"


def test_a_dry_run_sends_nothing(site: RaySite, tmp_path: Path) -> None:
    before = jobs(site)
    user = user_of(site, tmp_path, 20)
    code, said = user.run(*TRAIN, "--dry-run")
    assert code == 0 and f"POST {site.address}/api/jobs/" in said and "name: chaos" in said, said
    assert jobs(site) == before and not Path(user.store).exists()


def test_it_is_left_alone_come_back_to_and_stopped(site: RaySite, tmp_path: Path) -> None:
    user = user_of(site, tmp_path, MANY)
    code, said = user.run(*TRAIN, "-d")
    assert code == 0 and "the same command comes back to it" in said, said
    job = job_of(said)
    following = train_until(user, 5)
    following.interrupt()
    assert following.wait() == 0, following.said
    assert f"Left alone, run '{RUN}' goes on at lab: the same command comes back to it, and `shardyard runs stop" in (
        following.said
    )
    done = user.steps_done()
    again = user.start(*TRAIN)
    try:
        again.wait_for("step ")
        assert user.run("runs", "stop", RUN, "--store", user.store)[0] == 0
        assert again.wait() == 0, again.said
    finally:
        again.end()
    assert {job_of(each) for each in (said, following.said, again.said)} == {job}
    (stopped,) = user.events("stopped")
    assert stopped["step"] > done
    assert user.record().checkpoints()[-1]["step"] == stopped["step"], "it was saved"
    assert f"has stopped after step {stopped['step']:,}" in again.said
    wait_for(lambda: jobs(site)[job] == "SUCCEEDED", "the end of the job")


def test_the_dashboard_is_told_what_of_the_nodes_is_taken(site: RaySite, tmp_path: Path) -> None:
    user = user_of(site, tmp_path, MANY)

    def nodes() -> dict[str, dict[str, Any]]:
        asked = subprocess.run(
            [sys.executable, "-m", "cluster.dashboard.ask_target", "lab"],
            cwd=tmp_path,
            env=os.environ | site.environment | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            check=True,
            timeout=60,
        )
        return {node["node"]: node for node in json.loads(asked.stdout)["nodes"]}

    following = train_until(user, 1)
    try:
        wait_for(lambda: sum(node["used_cpus"] for node in nodes().values()) >= 2, "Ray's count of its CPUs", TRAIN_S)
        found = nodes()
        assert len(found) == 3
        assert all(0 <= node["used_cpus"] <= node["cpus"] for node in found.values())
        assert all(0 < node["used_bytes"] < node["memory_bytes"] for node in found.values())
    finally:
        following.end()


def test_the_first_failure_is_named(site: RaySite, tmp_path: Path) -> None:
    model = own_model(tmp_path, FAULTY.format(nodes=NODES))
    user = user_of(site, tmp_path, 20, model=model, recovery={"max_restarts": 0})
    code, said = user.run(*TRAIN)
    assert code == 1 and "ArithmeticError: the model cannot be built" in said and "the same command goes on" in said, (
        said
    )
    assert jobs(site)[job_of(said)] == "FAILED"


def test_a_launcher_that_dies_before_its_first_word(site: RaySite, tmp_path: Path) -> None:
    user = user_of(site, tmp_path, 20, model=own_model(tmp_path, DEADLY))
    code, said = user.run(*TRAIN)
    assert code == 1 and said.count("exit code 9") == 1 and said.count("about to die") == 1, said
    assert re.search(r"Job \S+ at lab has ended without the run: .*exit code 9\. Its last lines:", said), said


@pytest.mark.parametrize(
    ("change", "environment", "code", "words"),
    [
        ("", {"RAY_AUTH_TOKEN_PATH": "wrong"}, 3, "refuses us: .*nvalid.* RAY_AUTH_TOKEN_PATH to a file with"),
        ("", {"RAY_AUTH_TOKEN_PATH": "nothing"}, 3, "refuses us: .*nothing.* RAY_AUTH_TOKEN_PATH to a file with"),
        ("", {"RAY_AUTH_MODE": "disabled"}, 3, "refuses us: .*issing.* RAY_AUTH_TOKEN_PATH to a file with"),
        ("resources.workers=3", {}, 2, "room for 3 workers .* of 1 CPU each.* room for 2: it has 2 CPU .*or add nodes"),
        ("resources.threads=2", {}, 2, "room for 0: it has 2 CPU .of one node 1.* Lower .*resources.threads"),
        ("resources.gpus_per_worker=1", {}, 2, "of 1 CPU and 1 GPU each.* room for 0: it has .* and 0 GPU"),
    ],
)
def test_refusals(
    site: RaySite, tmp_path: Path, change: str, environment: dict[str, str], code: int, words: str
) -> None:
    before = jobs(site)
    (tmp_path / "wrong").write_text("0" * 64)
    user = user_of(site, tmp_path, 20)
    found, said = user.run(*TRAIN, *filter(None, [change]), timeout_s=60, **environment)
    assert found == code, said
    assert re.search(words, said) and len(said.splitlines()) == 1, said
    assert jobs(site) == before and not Path(user.store, RUN).exists()


@pytest.mark.parametrize("address", ["http://{network}.99:8265", "http://{head}:9", "http://no-such-head.invalid:8265"])
def test_a_head_that_is_not_there(site: RaySite, tmp_path: Path, address: str) -> None:
    head = site.addresses[HEAD]
    user = user_of(site, tmp_path, 20)
    given = address.format(head=head, network=head.rpartition(".")[0])
    (tmp_path / "targets.yaml").write_text(f'lab: {{type: ray, address: "{given}"}}\n')
    code, said = user.run(*TRAIN, timeout_s=60)
    assert code == 3 and f"No Ray dashboard answers at {given}" in said and "port 8265" in said, said
    assert len(said.splitlines()) == 1, said


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Store of the run that nobody harms."""
    settings = recipe(tmp_path_factory.mktemp("undisturbed"), 240) | EXACT
    train_undisturbed(settings)
    return str(settings["store"])


@pytest.mark.parametrize("harm", ["kill", "cut"])
def test_a_lost_node_leaves_no_trace_in_the_weights(site: RaySite, tmp_path: Path, undisturbed: str, harm: str) -> None:
    elastic = {"resources": {"workers": 2, "min_workers": 1}, "recovery": {"max_restarts": 3}}
    user = user_of(site, tmp_path, 240, **EXACT, **elastic)
    following = train_until(user, HARMED_AFTER)
    lost = NODES[1]
    try:
        getattr(site, harm)(lost)
        assert following.wait() == 0, following.said
    finally:
        following.end()
        if harm == "cut":
            site.kill(lost)  # the cluster has given it up
        site.start_node(lost)
    failed = user.events("failed")[0]
    assert failed["node"] == lost, failed
    assert [event["world_size"] for event in user.events("started")] == [2, 1]
    assert differing(state_of(user.store, 240), state_of(undisturbed, 240)) == []


def test_the_run_is_followed_while_the_head_is_out_of_sight(site: RaySite, tmp_path: Path) -> None:
    user = user_of(site, tmp_path, MANY)
    following = train_until(user, 5)
    try:
        site.cut(HERE)
        following.wait_for("lab is out of reach; the run is followed by its own record")
        said, done = len(following.said), user.steps_done()
        wait_for(lambda: user.steps_done() > done and "loss" in following.said[said:], "steps that are followed")
        site.mend(HERE)
        following.wait_for("lab answers again")
        assert user.run("runs", "stop", RUN, "--store", user.store)[0] == 0
        assert following.wait() == 0, following.said
    finally:
        site.mend(HERE)
        following.end()


def test_a_run_outlives_its_head(site: RaySite, tmp_path: Path) -> None:
    user = user_of(site, tmp_path, 400)
    following = train_until(user, HARMED_AFTER)
    try:
        site.kill(HEAD)
        assert following.wait() == 3, following.said
    finally:
        following.end()
        site.restart()
    assert re.search(r"lab is out of reach, and run 'chaos' .* Once lab is back, the same command", following.said)
    code, said = user.run(*TRAIN)
    assert code == 0 and "has finished after step 400" in said, said
    assert user.events("started")[-1]["step"] > 0, "it went on"


def test_a_head_that_starts_anew_has_lost_the_job(site: RaySite, tmp_path: Path) -> None:
    user = user_of(site, tmp_path, MANY)
    following = train_until(user, HARMED_AFTER)
    try:
        site.restart()
        assert following.wait() == 3, following.said
    finally:
        following.end()
    assert re.search(r"lab has lost job .* the same command goes on with it", following.said)
