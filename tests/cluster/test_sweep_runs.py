"""Real sweeps, from the command line: they end, are killed and go on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster.sweep_folder import SweepFolder
from data_pipelines.storage import Store
from tests.cluster.sweeps import recipe
from tests.cluster.waiting import alive, wait_for
from trainer.record import RunRecord, list_runs

ROOT = Path(__file__).resolve().parents[2]


def command(folder: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "cluster.cli", "sweep", *arguments, "--json"]


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    # A session of its own, as a terminal's foreground job has: Ctrl-C reaches every process in it.
    return subprocess.Popen(
        command(folder, *arguments),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finished(folder: Path, *arguments: str) -> dict[str, Any]:
    done = subprocess.run(command(folder, *arguments), cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def below(process: subprocess.Popen[str]) -> list[int]:
    return [child.pid for child in psutil.Process(process.pid).children(recursive=True)]


def nothing_is_left(process: subprocess.Popen[str], pids: list[int]) -> None:
    wait_for(lambda: not any(alive(pid) for pid in pids), "the end of all processes")
    wait_for(
        lambda: not list(Path(tempfile.gettempdir()).glob(f"shardyard-ray-{process.pid}-*")), "the end of Ray's folder"
    )


def killed(sweep: subprocess.Popen[str]) -> None:
    """Kill it, and wait until its processes are gone."""
    pids = below(sweep)
    sweep.kill()
    sweep.communicate()
    nothing_is_left(sweep, pids)


def weights(store: Path, run: str, step: int) -> list[bytes]:
    """Weights and the optimizer's state as one worker wrote them; the files' names are drawn at random."""
    folder = store / run / "checkpoints" / f"step-{step:08d}"
    found = [file.read_bytes() for file in folder.glob("*.safetensors")]
    assert found
    return found


def saved(store: Path, run: str, step: int) -> bool:
    return (store / run / "checkpoints" / f"step-{step:08d}" / "manifest.json").exists()


def members(store: Path, status: str) -> list[str]:
    """Runs that a population consists of now, and that stand so."""
    runs = [trial.run for trial in SweepFolder.open(Store(str(store)), "s").trials()]
    there = list_runs(Store(str(store)))  # a generation is decided before its runs are made
    return [run for run in runs if run in there and RunRecord.open(str(store), run).status() == status]


def decided(store: Path) -> list[dict[str, Any]]:
    return SweepFolder.open(Store(str(store)), "s").generations()


@pytest.mark.ray
@pytest.mark.slow
def test_a_grid_with_a_trial_that_fails(tmp_path: Path) -> None:
    result = finished(tmp_path, str(recipe(tmp_path)), "grid", "optimizer.lr=1e-3,1e30", "--name", "s")
    good, bad = result["trials"]
    assert (result["best"], good["status"], good["step"], good["values"]) == (
        "s-0001",
        "finished",
        60,
        {"optimizer.lr": 1e-3},
    )
    assert (bad["run"], bad["status"]) == ("s-0002", "failed")
    assert "The loss of step" in bad["error"]


@pytest.mark.ray
@pytest.mark.slow
def test_asha_gives_the_bad_one_up(tmp_path: Path) -> None:
    path = recipe(tmp_path, steps=3000, checkpoint={"every": 3000}, evaluation={"every": 300})
    # One after the other, since of two side by side the bad one may pass its first rung before it is compared.
    arguments = ("asha", "optimizer.lr=1e-9,1e-3", "--trials", "2", "--seed", "1", "--parallel", "1", "--name", "s")
    result = finished(tmp_path, str(path), *arguments)
    good, bad = result["trials"]
    assert (good["run"], good["status"], good["step"]) == ("s-0001", "finished", 3000)
    assert (bad["run"], bad["status"]) == ("s-0002", "given up after 300")
    record = RunRecord.open(str(tmp_path / "runs"), "s-0002")
    assert record.status() == "stopped"
    assert 300 <= record.checkpoints()[-1]["step"] < 3000  # saved, so that it can be gone on with
    again = finished(tmp_path, "--resume", "s", "--store", str(tmp_path / "runs"))
    assert again == result


@pytest.mark.ray
@pytest.mark.slow
def test_the_worst_of_a_population_goes_on_from_the_weights_of_the_best(tmp_path: Path) -> None:
    path = recipe(tmp_path, steps=1200, evaluation={"every": 600})
    result = finished(
        tmp_path, str(path), "pbt", "optimizer.lr=1e-3,1e-9", "--trials", "2", "--seed", "1", "--name", "s"
    )
    sweep = SweepFolder.open(Store(str(tmp_path / "runs")), "s")
    assert {values["optimizer.lr"] for values in sweep.spec.trials} == {1e-3, 1e-9}
    (decided,) = sweep.generations()
    (branch,) = decided["branches"]
    parent = RunRecord.open(sweep.root.uri, branch["parent"])
    assert parent.config.optimizer.lr == 1e-3
    record = RunRecord.open(sweep.root.uri, branch["run"])
    assert min(row["step"] for row in record.stitched()) > 600
    assert record.attempts()[0]["start_step"] == 600
    assert {row["run"]: row["status"] for row in result["trials"]} == {parent.name: "finished", record.name: "finished"}
    # With this rate weights hardly move: what it knows at its end it has from its parent.
    assert record.config.optimizer.lr == 1e-9
    beginning = next(row for row in RunRecord.open(sweep.root.uri, "s-0001").stitched() if "validation/loss" in row)
    assert max(row["value"] for row in result["trials"]) < beginning["validation/loss"] / 2


@pytest.mark.ray
@pytest.mark.slow
def test_a_killed_sweep_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    arguments = ("random", "optimizer.lr=log:1e-4:1e-2", "--trials", "3", "--seed", "5", "--name", "s")
    outcomes = []
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
        path = recipe(tmp_path / name, steps=600, checkpoint={"every": 50, "keep": None}, evaluation={"every": 200})
        store = tmp_path / name / "runs"
        if name == "killed":
            sweep = start(tmp_path, str(path), *arguments)
            wait_for(lambda store=store: saved(store, "s-0001", 100), "a checkpoint", 120)
            killed(sweep)
            assert not saved(store, "s-0003", 600)
        result = finished(tmp_path, str(path), *arguments)
        assert list_runs(Store(str(store))) == ["s-0001", "s-0002", "s-0003"]
        outcomes.append((result, {row["run"]: weights(store, row["run"], 600) for row in result["trials"]}))
    assert outcomes[0] == outcomes[1]


@pytest.mark.ray
@pytest.mark.slow
def test_a_killed_population_goes_on_to_the_same_population(tmp_path: Path) -> None:
    """Killed before its first decision, while the second member trains, and again when one of them has finished."""
    # One after the other, so that a kill finds the members at different places.
    arguments = ("pbt", "optimizer.lr=1e-3,1e-5", "--trials", "2", "--seed", "1", "--parallel", "1", "--name", "s")
    outcomes = []
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
        path, store = recipe(tmp_path / name, steps=2000, evaluation={"every": 1000}), tmp_path / name / "runs"
        if name == "killed":
            sweep = start(tmp_path, str(path), *arguments)
            wait_for(lambda store=store: saved(store, "s-0001", 1000), "the first evaluation", 120)
            wait_for(lambda store=store: members(store, "running") == ["s-0002"], "the second member", 120)
            killed(sweep)
            assert decided(store) == []
            sweep = start(tmp_path, str(path), *arguments)
            wait_for(lambda store=store: members(store, "finished"), "the end of a member", 240)
            killed(sweep)
            ended = members(store, "finished")
            assert (len(ended), len(decided(store))) == (1, 1)
            record = RunRecord.open(str(store), ended[0])
            before = record.attempts(), record.metrics_table()
        result = finished(tmp_path, str(path), *arguments)
        runs = members(store, "finished")
        outcomes.append((result, decided(store), {run: weights(store, run, 2000) for run in runs}))
    assert (record.attempts(), record.metrics_table()) == before, "what has finished is not trained again"
    assert len(runs) == 2
    assert outcomes[0] == outcomes[1]


def at_work(folder: Path, store: Path) -> tuple[subprocess.Popen[str], list[int]]:
    """A sweep of three trials that has saved something of its first, and the processes below it."""
    path = recipe(folder, steps=100_000, evaluation={"every": 50_000})
    sweep = start(folder, str(path), "grid", "optimizer.lr=1e-3,2e-3,3e-3", "--parallel", "1", "--name", "s")
    wait_for(lambda: saved(store, "s-0001", 40), "a checkpoint", 120)
    return sweep, below(sweep)


@pytest.mark.ray
@pytest.mark.slow
def test_the_first_interrupt_saves_all_trials_and_the_command_to_go_on_is_named(tmp_path: Path) -> None:
    store = tmp_path / "runs"
    sweep, pids = at_work(tmp_path, store)
    os.killpg(sweep.pid, signal.SIGINT)
    output, told = sweep.communicate(timeout=120)
    assert sweep.returncode == 130, told
    go_on = f"shardyard sweep --resume s --store {store}"
    assert json.loads(output)["exit_code"] == 130
    assert go_on in told
    nothing_is_left(sweep, pids)
    record = RunRecord.open(str(store), "s-0001")
    assert record.status() == "stopped"
    assert record.checkpoints()[-1]["step"] == record.events()[-1]["step"]
    # One at a time: the others have not begun.
    assert [RunRecord.open(str(store), run).status() for run in ("s-0002", "s-0003")] == ["queued", "queued"]


@pytest.mark.ray
@pytest.mark.slow
def test_a_sweep_whose_ray_is_killed_says_so_and_ends(tmp_path: Path) -> None:
    sweep, pids = at_work(tmp_path, tmp_path / "runs")
    next(child for child in psutil.Process(sweep.pid).children() if "raylet" in child.name()).kill()
    _, told = sweep.communicate(timeout=120)
    assert sweep.returncode == 3, told
    assert "Call the sweep again" in told
    nothing_is_left(sweep, pids)
