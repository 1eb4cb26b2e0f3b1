from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster import sweep as module
from cluster.cli import main
from cluster.mlflow_values import run_tags
from cluster.progress_bar import Narrator
from cluster.sweep import Sweep
from cluster.sweep_folder import Branch, Spec, SweepFolder
from configs.errors import NotFound, RunFailed, Unreachable, UsageError
from configs.load import Resolved
from data_pipelines.storage import Store
from tests.cluster.waiting import alive, wait_for
from trainer import lease
from trainer.record import RunRecord, list_runs
from trainer.validate import load_recipe

ROOT = Path(__file__).resolve().parents[2]


def recipe(folder: Path, **changes: Any) -> Path:
    """Digits and a small network: a step takes milliseconds."""
    values = {
        "name": "d",
        "seed": 1,
        "steps": 60,
        "store": str(folder / "runs"),
        "task": {"name": "image_classification", "num_classes": 10, "image_size": 8, "channels": 1},
        "model": {"name": "mlp", "num_layers": 2, "hidden_size": 32, "dropout": 0.1},
        "data": {"name": "digits", "validation_fraction": 0.2},
        "batch": {"global_batch_size": 16, "micro_batch_size": 16},
        "optimizer": {"lr": 1e-3},
        "evaluation": {"every": 20, "examples": 64},
        "checkpoint": {"every": 20, "keep": None},
        "tracking": {"every": 20, "mlflow": None},
    } | changes
    path = folder / "run.yaml"
    path.write_text(json.dumps(values, indent=1))
    return path


def base(folder: Path, **changes: Any) -> Resolved:
    return load_recipe(recipe(folder, **changes))


def spec(algorithm: str = "random", *rates: float) -> Spec:
    trials = [{"optimizer.lr": rate} for rate in rates or (1e-3, 1e-2)]
    return Spec(algorithm, ["optimizer.lr=log:1e-6:1e-1"], "validation/loss", "min", 0, trials)


def made(folder: Path, algorithm: str = "random", *rates: float, **changes: Any) -> SweepFolder:
    sweep = SweepFolder.create(Store(str(folder / "runs")), "s", spec(algorithm, *rates), base(folder, **changes))
    for trial in sweep.trials():
        sweep.create_run(trial)
    return sweep


def evaluated(sweep: SweepFolder, run: str, losses: dict[int, float], *, saved: bool = True) -> None:
    """A run's record as training leaves it, without weights."""
    record = RunRecord.open(sweep.root.uri, run)
    record.next_attempt()
    for step, loss in losses.items():
        record.metrics(step, {"validation/loss": loss})
        if saved:
            record.store.write_atomic(f"checkpoints/step-{step:08d}/manifest.json", "{}")
    record.close()


# --- before anything starts


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["grid", "optimizer.lrr=1e-3,1e-2"], "did you mean 'lr'"),
        (["grid", "optimizer.lr=1e-3,-1.0"], "refuses optimizer.lr=-1.0"),
        (["grid", "optimizer.lr=log:1e-4:1e-2"], "a grid needs points"),
        (["grid", "optimizer.lr=1e-3,1e-2", "--trials", "3"], "all of its 2 points"),
        (["grid", "steps=10"], "varies nothing"),
        (["gird", "optimizer.lr=1e-3,1e-2"], "Did you mean 'grid'"),
        (["random", "model.num_layers=int:-2:0"], "refuses model.num_layers"),
        (["random", "optimizer.lr=1e-3,1e-2", "--metric", "accuracy"], "--goal min or --goal max"),
        (["asha", "optimizer.lr=1e-3,1e-2", "evaluation.every=null"], "evaluation.every=6"),
        (["asha", "steps=10,20"], "(evaluation.every=20, steps=20)"),
        (["grid", "optimizer.lr=1e-3,1e-2", "--name", "../s"], "'../s-0002' cannot name a run"),
        (["grid", "optimizer.lr=1e-3,1e-2", "--name", "a" * 59], "cannot name a run"),
        (["pbt", "optimizer.lr=1e-3,1e-2", "--name", "a" * 57], "cannot name a run"),
        (["pbt", "model.hidden_size=16,32"], "model.hidden_size cannot change"),
        (["pbt", "steps=60,80"], "steps cannot change"),
        (["pbt", "optimizer.lr=1e-3,1e-2", "--trials", "1"], "at least two members"),
        (
            ["pbt", "optimizer.weight_decay=lin:-1:1", "--trials", "2", "--seed", "2"],
            "refuses optimizer.weight_decay=-1",
        ),
        ([], "Say what to sweep"),
        (["random", "optimizer.lr=1e-3,1e-2", "--resume", "s"], "as it is"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    assert main(["sweep", str(recipe(tmp_path)), *arguments]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_an_unknown_sweep_is_not_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = made(tmp_path)
    assert main(["sweep", "--resume", "ss", "--store", sweep.root.uri]) == 4
    assert "Did you mean 's'?" in capsys.readouterr().err


# --- the folder


def test_a_sweep_is_the_same_or_refused(tmp_path: Path) -> None:
    sweep = made(tmp_path)
    again = SweepFolder.create(sweep.root, "s", spec(), base(tmp_path))
    assert again.trials() == sweep.trials()
    with pytest.raises(UsageError, match="goal: 'min' there, 'max' here"):
        SweepFolder.create(sweep.root, "s", Spec(**{**vars(spec()), "goal": "max"}), base(tmp_path))
    with pytest.raises(UsageError, match="steps: 60 there, 70 here"):
        SweepFolder.create(sweep.root, "s", spec(), base(tmp_path, steps=70))
    with pytest.raises(UsageError, match="seed: 0 there, 1 here"):
        SweepFolder.create(sweep.root, "s", Spec(**{**vars(spec()), "seed": 1}), base(tmp_path))


def test_trials_are_runs_of_the_store_with_their_values_and_their_sweep(tmp_path: Path) -> None:
    sweep = made(tmp_path)
    assert list_runs(sweep.root) == ["s-0001", "s-0002"]
    record = RunRecord.open(sweep.root.uri, "s-0002")
    assert record.config.optimizer.lr == 1e-2
    assert record.resolved.origins["optimizer.lr"] == "command line"
    assert record.resolved.origins["seed"].endswith("run.yaml:3")
    assert record.lineage()["sweep"] == "s"
    assert "mlflow.parentRunId" not in run_tags(record)
    sweep.store.write_atomic("mlflow.json", json.dumps({"run_id": "parent"}))
    assert run_tags(record)["mlflow.parentRunId"] == "parent"


def test_no_run_is_named_as_the_folder_of_sweeps(tmp_path: Path) -> None:
    made(tmp_path)
    with pytest.raises(UsageError, match="sweeps are kept there"):
        RunRecord.create(Store(str(tmp_path / "runs")), base(tmp_path, name="sweeps"))


def test_another_runs_name_is_not_taken(tmp_path: Path) -> None:
    RunRecord.create(Store(str(tmp_path / "runs")), base(tmp_path, name="s-0002")).close()
    with pytest.raises(UsageError, match=r"another config .*--name"):
        made(tmp_path)


def test_a_trial_stands_where_the_decisions_leave_it(tmp_path: Path) -> None:
    sweep = made(tmp_path, "pbt")
    evaluated(sweep, "s-0001", {20: 1.0})
    sweep.add_generation(20, [Branch(2, "s-0002-g2", "s-0001", {"optimizer.lr": 2e-3})])
    sweep.stop_trial(1, 40)
    first, second = sweep.trials()
    assert (first.run, first.after, first.parent, first.stopped_at) == ("s-0001", 20, None, 40)
    assert (second.run, second.after, second.parent, second.stopped_at) == ("s-0002-g2", 20, ("s-0001", 20), None)
    config = sweep.create_run(second).config
    assert (config.optimizer.lr, config.parent and config.parent.state) == (2e-3, "all")
    assert config.parent is not None
    assert Path(config.parent.checkpoint) == tmp_path / "runs" / "s-0001" / "checkpoints" / "step-00000020"
    assert sweep.runs() == ["s-0001", "s-0002", "s-0002-g2"]
    with pytest.raises(NotFound):
        SweepFolder.open(sweep.root, "other")


# --- MLflow


def test_mlflow_out_of_reach_stops_no_sweep(tmp_path: Path) -> None:
    from cluster.sweep_mlflow import SweepInMlflow

    copy = SweepInMlflow(made(tmp_path, tracking={"mlflow": "http://127.0.0.1:9"}))
    copy.start()
    copy.wait_for_first_try()
    assert not copy.finish("FINISHED", ("s-0001", 0.5))


@pytest.mark.slow
def test_trials_stand_under_their_sweep_in_mlflow_also_those_that_it_missed(tmp_path: Path) -> None:
    from mlflow.tracking import MlflowClient

    from cluster.mlflow_copy import sync
    from cluster.sweep_mlflow import SweepInMlflow

    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    sweep = made(tmp_path, tracking={"mlflow": uri})
    sync(RunRecord.open(sweep.root.uri, "s-0001"))  # before the sweep's run is known
    for _ in range(2):  # a sweep that is called again finds what there is
        copy = SweepInMlflow(sweep)
        copy.start()
        assert copy.finish("FINISHED", ("s-0001", 0.5))
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("shardyard")
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert set(runs) == {"s", "s-0001", "s-0002"}
    parents = {name: run.data.tags.get("mlflow.parentRunId") for name, run in runs.items()}
    assert parents == {"s": None, "s-0001": runs["s"].info.run_id, "s-0002": runs["s"].info.run_id}
    assert runs["s"].data.metrics == {"best/validation/loss": 0.5}


# --- a population, with members that only say what they are told


class Member:
    def __init__(self, number: int) -> None:
        self.trial_id = str(number)
        self.config = {"number": number}
        self.status = "PENDING"

    def is_finished(self) -> bool:
        return self.status in ("TERMINATED", "ERROR")


class Members:
    def __init__(self, count: int) -> None:
        self.members = [Member(number) for number in range(1, count + 1)]

    def get_trials(self) -> list[Member]:
        return self.members


def generation(sweep: SweepFolder, losses: dict[int, float | None]) -> list[dict[str, Any]]:
    """Everyone arrives at step 20 in this order with this loss (None: fails); what is decided then."""
    from cluster.search_space import split_space
    from cluster.sweep_schedulers import Population

    scheduler = Population(sweep, split_space(sweep.spec.space)[1], lambda _: None)
    controller = Members(len(losses))
    for number, loss in losses.items():
        member = controller.members[number - 1]
        assert not sweep.generations()
        assert scheduler.choose_trial_to_run(controller) not in (
            None,
            *(m for m in controller.members if m.status != "PENDING"),
        )
        if loss is None:
            member.status = "ERROR"
        else:
            assert scheduler.on_trial_result(controller, member, {"step": 20, "validation/loss": loss}) == "PAUSE"
            member.status = "PAUSED"
    assert scheduler.choose_trial_to_run(controller) in [m for m in controller.members if m.status == "PAUSED"]
    return sweep.generations()


@pytest.mark.parametrize("order", [(1, 2, 3, 4), (4, 3, 2, 1), (2, 4, 1, 3)])
def test_the_worst_of_a_population_goes_on_from_the_best_whoever_is_first(
    tmp_path: Path, order: tuple[int, ...]
) -> None:
    sweep = made(tmp_path, "pbt", 1e-3, 2e-3, 3e-3, 4e-3)
    losses = {1: 0.5, 2: 0.1, 3: 0.9, 4: 0.4}
    for number, loss in losses.items():
        evaluated(sweep, f"s-{number:04d}", {20: loss})
    (decided,) = generation(sweep, {number: losses[number] for number in order})
    (branch,) = decided["branches"]
    assert (decided["step"], branch["number"], branch["run"], branch["parent"]) == (20, 3, "s-0003-g2", "s-0002")
    assert branch["values"]["optimizer.lr"] == 1.6e-3
    assert RunRecord.open(sweep.root.uri, "s-0003-g2").config.optimizer.lr == branch["values"]["optimizer.lr"]


def test_a_population_does_not_wait_for_a_member_that_failed(tmp_path: Path) -> None:
    sweep = made(tmp_path, "pbt", 1e-3, 2e-3, 3e-3)
    for number in (1, 2):
        evaluated(sweep, f"s-{number:04d}", {20: 1.0 / number})
    (decided,) = generation(sweep, {1: 1.0, 2: 0.5, 3: None})
    assert [(branch["number"], branch["parent"]) for branch in decided["branches"]] == [(1, "s-0002")]


def test_a_population_decides_nothing_once_the_sweep_is_to_stop(tmp_path: Path) -> None:
    """Who saves and ends by that has not failed: at the next launch the others wait for it."""
    from cluster.sweep_schedulers import Population

    sweep = made(tmp_path, "pbt", 1e-3, 2e-3, 3e-3)
    scheduler, controller = Population(sweep, {}, lambda _: None), Members(3)
    for member in controller.members[:2]:
        assert scheduler.on_trial_result(controller, member, {"step": 20, "validation/loss": 1.0}) == "PAUSE"
        member.status = "PAUSED"
    sweep.request_stop("SIGINT")
    controller.members[2].status = "TERMINATED"
    assert scheduler.choose_trial_to_run(controller) is None
    assert sweep.generations() == []


def test_nobody_goes_on_from_a_checkpoint_that_is_gone(tmp_path: Path) -> None:
    sweep = made(tmp_path, "pbt")
    for number in (1, 2):
        evaluated(sweep, f"s-{number:04d}", {20: 1.0 / number}, saved=False)
    (decided,) = generation(sweep, {1: 1.0, 2: 0.5})
    assert decided == {"step": 20, "branches": []}


# --- successive halving


class Reports:
    """Tells a scheduler of evaluations; who is given up is written in the sweep's folder."""

    def __init__(self, sweep: SweepFolder) -> None:
        from cluster.sweep_schedulers import SuccessiveHalving

        self.sweep = sweep
        self.scheduler = SuccessiveHalving(sweep, first_rung=20, steps=180)
        self.members = [Member(number) for number in range(1, len(sweep.spec.trials) + 1)]
        for member in self.members:
            self.scheduler.on_trial_add(None, member)

    def tell(self, number: int, step: int, loss: float, *, replayed: bool = False) -> None:
        result = {"step": step, "validation/loss": loss, "replayed": replayed}
        assert self.scheduler.on_trial_result(None, self.members[number - 1], result) == "CONTINUE"

    def given_up(self) -> dict[int, int | None]:
        return {trial.number: trial.stopped_at for trial in self.sweep.trials() if trial.stopped_at is not None}


def test_who_is_not_among_the_best_third_at_a_rung_is_given_up(tmp_path: Path) -> None:
    told = Reports(made(tmp_path, "asha", 1e-3, 2e-3, 3e-3))
    told.tell(1, 20, 0.5)
    told.tell(2, 20, 0.4)
    told.tell(3, 20, 0.9)
    assert told.given_up() == {3: 20}
    told.tell(1, 40, 0.9)  # no rung
    assert told.given_up() == {3: 20}
    told.tell(1, 60, 0.3)
    told.tell(2, 60, 0.4)
    assert told.given_up() == {3: 20, 2: 60}


def test_what_was_decided_before_a_kill_is_not_decided_again_but_counts(tmp_path: Path) -> None:
    told = Reports(made(tmp_path, "asha", 1e-3, 2e-3, 3e-3))
    told.tell(1, 20, 0.4, replayed=True)
    told.tell(2, 20, 0.9, replayed=True)  # was the first there, so it went on
    assert told.given_up() == {}
    told.tell(3, 20, 0.6)
    assert told.given_up() == {3: 20}


# --- a trial, replayed from its record


def reports(sweep: SweepFolder, number: int) -> list[tuple[int, float, bool, bool]]:
    from cluster.sweep_trial import SweepTrial

    trial = SweepTrial.__new__(SweepTrial)  # Tune's own beginning is for an actor
    trial.setup({"store": sweep.root.uri, "sweep": "s", "number": number, "cwd": os.getcwd()})
    found: list[tuple[int, float, bool, bool]] = []
    while not found or not found[-1][3]:
        report = trial.step()
        found.append((report["step"], report["validation/loss"], report["replayed"], report["done"]))
    return found


def test_a_finished_trial_reports_from_its_record_at_once(tmp_path: Path) -> None:
    sweep = made(tmp_path)
    evaluated(sweep, "s-0001", {20: 0.5, 40: 0.25, 60: 0.125})
    record = RunRecord.open(sweep.root.uri, "s-0001")
    record.event("finished", step=60)
    record.close()
    assert reports(sweep, 1) == [(20, 0.5, True, False), (40, 0.25, True, False), (60, 0.125, True, True)]


def test_what_a_launcher_failed_of_after_its_run_had_finished_is_forgotten(tmp_path: Path) -> None:
    sweep = made(tmp_path)
    evaluated(sweep, "s-0001", {60: 0.5})
    record = RunRecord.open(sweep.root.uri, "s-0001")
    record.event("finished", step=60)
    record.close()
    sweep.fail_trial(1, "Its launcher's process is gone.")
    assert reports(sweep, 1) == [(60, 0.5, True, True)]
    assert sweep.failure(1) is None


def test_a_trial_that_was_given_up_reports_what_it_had_until_then_and_ends(tmp_path: Path) -> None:
    sweep = made(tmp_path)
    evaluated(sweep, "s-0001", {20: 0.5, 40: 0.25, 60: 0.125})
    sweep.stop_trial(1, 40)
    assert [(step, done) for step, _, _, done in reports(sweep, 1)] == [(20, False), (40, True)]


def test_a_stopping_sweep_launches_nothing(tmp_path: Path) -> None:
    sweep = made(tmp_path)
    sweep.request_stop("Ctrl-C")
    assert [done for *_, done in reports(sweep, 1)] == [True]
    assert RunRecord.open(sweep.root.uri, "s-0001").status() == "queued"


def test_a_metric_that_the_evaluation_has_not_is_named(tmp_path: Path) -> None:
    sweep = made(tmp_path)
    record = RunRecord.open(sweep.root.uri, "s-0001")
    record.metrics(20, {"validation/accuracy": 1.0})
    record.close()
    with pytest.raises(UsageError, match=r"no validation/loss.*validation/accuracy"):
        reports(sweep, 1)
    assert "validation/accuracy" in str(sweep.failure(1))


# --- the launcher


def test_a_sweep_that_another_process_took_over_ends_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = made(tmp_path)
    monkeypatch.setattr(lease, "RENEW_EVERY_S", 0.05)
    monkeypatch.setattr(module, "END_TIMEOUT_S", 0.0)
    monkeypatch.setattr(Sweep, "_drive", lambda _: time.sleep(30))
    sweep = Sweep(folder, address=None, parallel=None, narrator=Narrator(io.StringIO()))
    later = lease.Claim("f" * 32, lease.Holder("elsewhere", 1, 0.0), True, time.time() + 1, time.time() + 1)
    folder.store.write_atomic(later.path, json.dumps(asdict(later)))
    began = time.monotonic()
    with pytest.raises(RunFailed, match="took the sweep over"):
        sweep.wait()
    assert time.monotonic() - began < 10
    assert folder.store.exists(later.path)


def test_ctrl_c_is_handed_on_once_a_store_that_is_away_answers_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, refused = made(tmp_path), [Unreachable("No space is left."), Unreachable("No space is left.")]

    def request_stop(reason: str) -> None:
        if refused:
            raise refused.pop()
        SweepFolder.request_stop(folder, reason)

    def drive(_: Sweep) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        wait_for(folder.stop_requested, "the request", 10)

    monkeypatch.setattr(folder, "request_stop", request_stop)
    monkeypatch.setattr(Sweep, "_drive", drive)
    sweep = Sweep(folder, address=None, parallel=None, narrator=Narrator(io.StringIO()))
    sweep.wait()
    assert (folder.stop_requested(), sweep.first_signal, refused) == ("SIGINT", signal.SIGINT, [])


# --- real ones


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


@pytest.mark.ray
@pytest.mark.slow
def test_the_first_interrupt_saves_all_trials_and_the_command_to_go_on_is_named(tmp_path: Path) -> None:
    path, store = recipe(tmp_path, steps=100_000, evaluation={"every": 50_000}), tmp_path / "runs"
    sweep = start(tmp_path, str(path), "grid", "optimizer.lr=1e-3,2e-3,3e-3", "--parallel", "1", "--name", "s")
    wait_for(lambda: saved(store, "s-0001", 40), "a checkpoint", 120)
    pids = below(sweep)
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
    path, store = recipe(tmp_path, steps=100_000, evaluation={"every": 50_000}), tmp_path / "runs"
    sweep = start(tmp_path, str(path), "grid", "optimizer.lr=1e-3,2e-3", "--parallel", "1", "--name", "s")
    wait_for(lambda: saved(store, "s-0001", 40), "a checkpoint", 120)
    pids = below(sweep)
    next(child for child in psutil.Process(sweep.pid).children() if "raylet" in child.name()).kill()
    _, told = sweep.communicate(timeout=120)
    assert sweep.returncode == 3, told
    assert "Call the sweep again" in told
    nothing_is_left(sweep, pids)
