"""deploy/slurm/train.sbatch under a real Slurm with a real Ray: preempted, queued again, and trained to the end."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.deploy.slurm_cluster import Slurm, slurm_cluster
from tests.deploy.tools import DEPLOY
from tests.tiny import write_recipe
from trainer.record import RunRecord

SCRIPT = DEPLOY / "slurm" / "train.sbatch"
pytestmark = pytest.mark.daemon


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    with slurm_cluster(tmp_path_factory.mktemp("slurm")) as found:
        yield found


def submit(slurm: Slurm, *arguments: str) -> str:
    job = slurm.submit("--nodes=2", "--cpus-per-task=1", "--time=30", "--output=%j.log", SCRIPT, *arguments)
    slurm.wait_for(job, lambda: slurm.job(job)["JobState"] != "PENDING")
    return job


def left(slurm: Slurm, job: str) -> list[Path]:
    """What a job that has ended should not have left."""
    return [*slurm.folder.glob(".shardyard-*"), *Path("/tmp").glob(f"shardyard-{job}")]


def test_a_run_that_made_room_goes_on(slurm: Slurm) -> None:
    evaluation, checkpoint = {"every": 10_000, "examples": 3}, {"every": 10_000, "keep": None}
    changes = {"steps": 1200, "resources": {"workers": 2}, "evaluation": evaluation, "checkpoint": checkpoint}
    recipe = write_recipe(slurm.folder, name="preempted", **changes)
    job = submit(slurm, str(recipe))
    log = slurm.folder / f"{job}.log"
    slurm.wait_for(job, lambda: log.exists() and "loss" in log.read_text())
    slurm.ask("scancel", "--signal=USR1", "--batch", job)
    slurm.wait_for(job, lambda: slurm.job(job)["Restarts"] == "1" and slurm.job(job)["JobState"] == "PENDING")
    assert left(slurm, job) == []
    record = RunRecord.open(str(slurm.folder / "runs"), "preempted")
    (stopped,) = [event for event in record.events() if event["kind"] == "stopped"]
    assert 0 < stopped["step"] < 1200 and record.checkpoints()[-1]["step"] == stopped["step"]

    slurm.ask("scontrol", "update", f"jobid={job}", "StartTime=now")  # Slurm itself would wait two minutes
    slurm.wait_for(job, lambda: slurm.job(job)["JobState"] == "COMPLETED", timeout_s=300)
    assert slurm.job(job)["ExitCode"] == "0:0"
    assert record.status() == "finished"
    started = [event["step"] for event in record.events() if event["kind"] == "started"]
    assert started == [0, stopped["step"]]
    assert left(slurm, job) == []


def test_the_exit_code_is_the_runs(slurm: Slurm) -> None:
    job = submit(slurm, "no-such-recipe")
    slurm.wait_for(job, lambda: slurm.job(job)["JobState"] == "FAILED")
    assert slurm.job(job)["ExitCode"] in ("2:0", "4:0")
    assert "no-such-recipe" in (slurm.folder / f"{job}.log").read_text()
    assert left(slurm, job) == []
