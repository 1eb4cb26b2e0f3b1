"""What targets would submit, and what they say where nothing can be submitted."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster import following as module
from cluster.cli import main
from cluster.following import Following, send, shared_store
from cluster.targets import Job, Status, open_target
from configs.errors import RunFailed, TimedOut, Unreachable, UsageError
from configs.load import load, load_resolved
from configs.schema import Section
from configs.targets import RayTarget, SlurmTarget
from data_pipelines.storage import Store
from tests.configs.minimal import minimal
from trainer.record import RunRecord


def job(**settings: Any) -> Job:
    return Job(load(minimal(name="demo", store="/shared/runs", **settings)))


def slurm_options(script: str) -> dict[str, str]:
    lines = [line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH")]
    return {name: value for name, _, value in (line.partition("=") for line in lines)}


@pytest.mark.parametrize(
    ("workers", "per_node", "gpus", "nodes", "cpus", "gpus_per_node"),
    [(1, 8, 0, "1", "2", None), (4, 1, 0, "4", "2", None), (9, 4, 1, "3", "8", "4"), (2, 4, 1, "1", "4", "2")],
)
def test_slurm_asks_for_what_the_workers_need(
    workers: int, per_node: int, gpus: int, nodes: str, cpus: str, gpus_per_node: str | None
) -> None:
    resources = {"workers": workers, "threads": 2, "gpus_per_worker": gpus}
    settings = SlurmTarget(workers_per_node=per_node, partition="h100", time="2-00:00:00", options=("--qos=long",))
    found = slurm_options(open_target(settings).render(job(resources=resources)))
    assert (found["nodes"], found["cpus-per-task"], found.get("gpus-per-node")) == (nodes, cpus, gpus_per_node)
    assert (found["partition"], found["time"], found["qos"]) == ("h100", "2-00:00:00", "long")
    assert "no-kill" not in found and "requeue" in found


def test_a_slurm_job_that_may_shrink_survives_a_node() -> None:
    script = open_target(SlurmTarget()).render(job(resources={"workers": 4, "min_workers": 2}))
    assert "no-kill" in slurm_options(script)


def test_the_slurm_script_is_bash_and_holds_the_whole_config(tmp_path: Path) -> None:
    sent = job(seed=3)
    script = open_target(SlurmTarget(setup=("module load cuda",), python="/opt/my env/bin/python")).render(sent)
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
    replaced = script.replace("exec '/opt/my env/bin/python' -m cluster.targets.slurm_job /shared/runs/jobs", "cat")
    assert replaced != script
    replaced = replaced.replace("module load cuda", "true")
    received = subprocess.run(["bash"], input=replaced, text=True, capture_output=True, check=True).stdout
    assert load_resolved(received) == sent.resolved


def test_without_slurm_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Unreachable, match=r"There is no squeue on this machine\. Submit from a login node"):
        open_target(SlurmTarget()).find("demo", "/shared/runs")


def test_a_ray_head_that_is_not_there() -> None:
    with pytest.raises(Unreachable, match=r"No Ray dashboard answers at http://127.0.0.1:9: .*port 8265"):
        open_target(RayTarget(address="http://127.0.0.1:9")).find("demo", "/shared/runs")


@pytest.mark.parametrize("has_init", [True, False])
def test_a_package_of_the_users_own_travels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_init: bool) -> None:
    package = f"own_package_{has_init}".lower()
    (tmp_path / package / "models").mkdir(parents=True)
    (tmp_path / package / "models/wide.py").touch()
    if has_init:
        (tmp_path / package / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    sent = job(model={"name": f"{package}.models.wide"})
    request = open_target(RayTarget(address="http://head:8265")).render(sent)
    request = request.partition("\n")[2].partition("\n\n")[0]
    expected = ["configs", "data_pipelines", "trainer", "cluster", str(tmp_path / package), "run.yaml"]
    assert json.loads(request)["runtime_env"]["working_dir"] == expected


def test_no_shell_stays_between_ray_and_what_it_stops(tmp_path: Path) -> None:
    (tmp_path / "python").write_text("#!/bin/sh\necho in the place of the shell\n")
    (tmp_path / "python").chmod(0o755)
    request = open_target(RayTarget(address="http://head:8265")).render(job())
    entrypoint = json.loads(request.partition("\n")[2].partition("\n\n")[0])["entrypoint"]
    command = f"{entrypoint}\necho the shell is still there"  # a shell may leave out to stay for its last command
    ran = subprocess.run(["sh", "-c", command], env={"PATH": f"{tmp_path}:/bin"}, capture_output=True, text=True)
    assert ran.stdout == "in the place of the shell\n"


def test_a_store_that_no_other_machine_sees_is_refused() -> None:
    relative = Job(load(minimal(name="demo", store="runs")))
    with pytest.raises(UsageError, match="absolute path on a shared file system, or an object store"):
        shared_store(relative)


@pytest.mark.parametrize(
    "settings", [RayTarget(address="http://head:8265"), SlurmTarget()], ids=lambda each: type(each).__name__
)
def test_a_dry_run_prints_it_and_touches_nothing(
    settings: Section, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kind = {RayTarget: "ray", SlurmTarget: "slurm"}[type(settings)]
    monkeypatch.chdir(tmp_path)
    given = {"type": kind, **settings.model_dump(exclude_unset=True)}
    (tmp_path / "targets.yaml").write_text(json.dumps({"there": given}))
    command = [
        "train",
        "language_modeling-gpt-tiny",
        f"store={tmp_path}/runs",
        "name=dry",
        "--on",
        "there",
        "--dry-run",
    ]
    assert main([*command, "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["rendered"] in printed.err
    assert "name: dry" in printed.err
    assert not (tmp_path / "runs").exists()


def test_what_excludes_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "targets.yaml").write_text("there: {type: slurm}\n")
    recipe = "language_modeling-gpt-tiny"
    assert main(["train", recipe, "-d"]) == 2
    assert "-d leaves a job at a target" in capsys.readouterr().err
    assert main(["train", recipe, "--on", "there", "--address", "auto"]) == 2
    assert "--address is for this machine" in capsys.readouterr().err
    assert main(["train", recipe, "--on", "nowhere"]) == 4


class Dead:
    """A target whose job ends before its launcher has written a word."""

    def __init__(self, status: Status) -> None:
        self.ends, self.stopped = status, False

    def find(self, run: str, store: str) -> None:
        return None

    def submit(self, job: Job) -> str:
        return "1"

    def status(self, job_id: str) -> Status:
        return self.ends

    def why_pending(self, job_id: str) -> str:
        return self.ends.reason

    def logs(self, job_id: str) -> str:
        return "one\ntwo"

    def stop(self, job_id: str) -> None:
        self.stopped = True


@pytest.mark.parametrize("before", [None, "stopped", "failed"])
def test_a_job_that_dies_before_its_launcher_is_a_failure_whatever_the_run_was_before(
    tmp_path: Path, before: str | None
) -> None:
    sent = Job(load(minimal(name="demo", store=str(tmp_path))))
    if before is not None:
        record = RunRecord.create(Store(str(tmp_path)), sent.resolved)
        record.event(before, step=3, final=True)
        record.close()
    target = Dead(Status("failed", "NODE_FAIL", 9))
    following = Following(target, "hpc", sent, send(target, "hpc", sent), json=True)
    with pytest.raises(
        RunFailed, match=r"Job 1 at hpc has ended without the run: NODE_FAIL, exit code 9\. Its last lines:\none\ntwo"
    ):
        following.wait()


def test_a_run_that_has_finished_is_not_sent_again(tmp_path: Path) -> None:
    sent = Job(load(minimal(name="demo", store=str(tmp_path))))
    record = RunRecord.create(Store(str(tmp_path)), sent.resolved)
    record.event("finished", step=3)
    record.close()
    with pytest.raises(UsageError, match="has finished already; there is nothing left to train"):
        send(Dead(Status("failed")), "hpc", sent)
    assert RunRecord.open(str(tmp_path), "demo").status() == "finished"


def test_a_job_that_will_never_start_is_taken_back(tmp_path: Path) -> None:
    sent, target = Job(load(minimal(name="demo", store=str(tmp_path)))), Dead(Status("refused", "no such nodes"))
    with pytest.raises(UsageError, match="will never start the job, which was taken back: no such nodes"):
        Following(target, "hpc", sent, send(target, "hpc", sent), json=True).wait()
    assert target.stopped


class Scripted(Dead):
    """A target that answers as told, the last way from then on."""

    def __init__(self, *answers: Status | Exception | Callable[[], Status]) -> None:
        self.answers, self.asked, self.stopped = list(answers), 0, False

    def status(self, job_id: str) -> Status:
        answer = self.answers[min(self.asked, len(self.answers) - 1)]
        self.asked += 1
        if isinstance(answer, Exception):
            raise answer
        return answer if isinstance(answer, Status) else answer()


SILENT, SLOW, RUNNING = Unreachable("No answer."), TimedOut("No answer in time."), Status("running")


@pytest.fixture
def launched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Job, RunRecord]:
    """A job that a target runs; whoever follows it asks often, and is patient for a moment."""
    monkeypatch.setattr(module, "POLL_S", 0.01)
    monkeypatch.setattr(module, "PATIENCE_S", 0.2)
    sent = Job(load(minimal(name="demo", store=str(tmp_path))))
    record = RunRecord.create(Store(str(tmp_path)), sent.resolved)
    record.event("started", step=0)
    return sent, record


def finish(record: RunRecord) -> Status:
    record.event("finished", step=3)
    return Status("finished")


def test_a_target_that_is_out_of_reach_for_a_while_is_waited_for(
    launched: tuple[Job, RunRecord], capsys: pytest.CaptureFixture[str]
) -> None:
    sent, record = launched
    target = Scripted(RUNNING, SILENT, SLOW, RUNNING, SILENT, RUNNING, lambda: finish(record))
    assert Following(target, "lab", sent, "1", json=True).wait()["outcome"] == "finished"
    said = capsys.readouterr().err
    assert said.count("lab is out of reach; the run is followed by its own record. No answer") == 2
    assert said.count("lab answers again") == 2


def test_it_is_waited_for_as_long_as_the_run_lives(launched: tuple[Job, RunRecord]) -> None:
    sent, record = launched
    with record.acquire_lease():
        target = Scripted(RUNNING, *[SILENT] * 60, lambda: finish(record))
        assert Following(target, "lab", sent, "1", json=True).wait()["outcome"] == "finished"
    assert target.asked == 62


def test_the_end_of_a_run_is_seen_without_its_target(launched: tuple[Job, RunRecord]) -> None:
    sent, record = launched

    def finish_in_silence() -> Status:
        finish(record)
        raise SILENT

    target = Scripted(RUNNING, SILENT, finish_in_silence)
    assert Following(target, "lab", sent, "1", json=True).wait()["outcome"] == "finished"


@pytest.mark.parametrize(
    ("last", "words"),
    [
        (SILENT, "lab is out of reach, and run 'demo' has shown no sign of life for 0 s: it is before its first"),
        (Status("gone", "no job 1"), "lab has lost job 1 .no job 1., as when its cluster was started anew"),
    ],
)
def test_a_target_that_is_gone_for_good_ends_the_following(
    launched: tuple[Job, RunRecord], last: Status | Exception, words: str
) -> None:
    sent, _ = launched
    with pytest.raises(Unreachable, match=f"{words}.* the same command goes on with it"):
        Following(Scripted(RUNNING, last), "lab", sent, "1", json=True).wait()


def test_a_job_that_is_gone_is_believed_when_its_run_is_dead(launched: tuple[Job, RunRecord]) -> None:
    sent, record = launched
    lease = record.acquire_lease()
    target = Scripted(RUNNING, *[Status("gone")] * 5, lambda: lease.release() or Status("gone"))  # type: ignore[func-returns-value]
    with pytest.raises(Unreachable, match="has lost job 1"):
        Following(target, "lab", sent, "1", json=True).wait()
    assert target.asked == 7


@pytest.mark.parametrize("is_new", [True, False])
def test_what_is_refused_leaves_the_name_free(tmp_path: Path, is_new: bool) -> None:
    class Full(Dead):
        def submit(self, job: Job) -> str:
            raise UsageError("too much")

    sent = Job(load(minimal(name="demo", store=str(tmp_path))))
    if not is_new:
        RunRecord.create(Store(str(tmp_path)), sent.resolved).close()
    with pytest.raises(UsageError, match="too much"):
        send(Full(Status("gone")), "lab", sent)
    assert (tmp_path / "demo").exists() != is_new
