"""Training under a real Slurm of two nodes: what was submitted, exit codes, preemption, refusals."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.runs import RUN
from tests.cluster.slurm_site import SlurmSite, missing
from tests.cluster.target_user import TRAIN_S, User
from tests.cluster.waiting import wait_for
from trainer.record import RunRecord

pytestmark = [pytest.mark.daemon, pytest.mark.skipif(bool(missing()), reason=f"no Slurm here: {missing()}")]

TARGETS = """\
hpc: {type: slurm, partition: low, time: "10", options: [--exclusive]}
wrong: {type: slurm, partition: h100}
huge: {type: slurm, partition: low, workers_per_node: 64}
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmSite]:
    with SlurmSite(tmp_path_factory.mktemp("site"), "SlurmctldParameters=preempt_send_user_signal\n") as made:
        yield made


def user_of(site: SlurmSite, folder: Path, steps: int, **changes: Any) -> User:
    return User(folder, site.environment, TARGETS, steps, **changes)


def job_of(said: str) -> str:
    found = re.search(r"Job (\d+) at hpc", said)
    assert found, said
    return found[1]


def test_it_trains_across_both_nodes_and_leaves_nothing(site: SlurmSite, tmp_path: Path) -> None:
    before = set(Path("/tmp").glob("shardyard-slurm-*"))
    user = user_of(site, tmp_path, steps=20)
    code, said = user.run("train", "run.yaml", "--on", "hpc")
    assert code == 0, said
    assert "20/20" in said
    record = RunRecord.open(user.store, RUN)
    placed = next(event for event in record.events() if event["kind"] == "placed")
    assert {worker["node"] for worker in placed["workers"]} == set(site.nodes)
    job = site.job(job_of(said))
    assert (job["JobState"], job["ExitCode"]) == ("COMPLETED", "0:0")
    assert [path.name for path in Path(user.store, "jobs").iterdir()] == [f"{RUN}-{job_of(said)}.log"]
    assert set(Path("/tmp").glob("shardyard-slurm-*")) == before


def test_a_run_that_fails_ends_its_job_with_its_exit_code(site: SlurmSite, tmp_path: Path) -> None:
    user = user_of(site, tmp_path, steps=20, data={"name": "text", "paths": [str(tmp_path / "nothing")]})
    code, said = user.run("train", "run.yaml", "--on", "hpc")
    assert code == 1, said
    assert "nothing" in said
    job = site.job(job_of(said))
    assert job["JobState"] == "FAILED" and job["ExitCode"] != "0:0"


def test_preempted_it_saves_is_queued_again_and_goes_on(site: SlurmSite, tmp_path: Path) -> None:
    user = user_of(site, tmp_path, steps=2000)
    following = user.start("train", "run.yaml", "--on", "hpc")
    try:
        wait_for(lambda: saved(user) > 100, "some checkpoints", TRAIN_S)
        high = ("--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null")
        other = site.run("sbatch", "--parsable", *high, "--wrap=sleep 2")
        assert other.returncode == 0, other.stderr
        assert following.wait() == 0, following.said
    finally:
        following.end()
    assert "2,000/2,000" in following.said
    record = RunRecord.open(user.store, RUN)
    ends = [(event["kind"], event["step"]) for event in record.events() if event["kind"] in ("stopped", "finished")]
    starts = [event["step"] for event in record.events() if event["kind"] == "started"]
    assert [kind for kind, _ in ends] == ["stopped", "finished"]
    assert starts == [0, ends[0][1]], "it went on from where it was preempted"
    assert site.job(job_of(following.said))["Restarts"] == "1"


def saved(user: User) -> int:
    folder = Path(user.store, RUN, "checkpoints")
    return max((int(name.removeprefix("step-")) for name in os.listdir(folder)), default=0) if folder.exists() else 0


@pytest.mark.parametrize(
    ("target", "remedy"), [("wrong", "`sinfo` lists the partitions"), ("huge", "set a smaller workers_per_node")]
)
def test_what_slurm_refuses_is_told_with_the_remedy(site: SlurmSite, tmp_path: Path, target: str, remedy: str) -> None:
    user = user_of(site, tmp_path, steps=20, resources={"workers": 64})
    code, said = user.run("train", "run.yaml", "--on", target, timeout_s=60)
    assert code == 2 and remedy in said, said
