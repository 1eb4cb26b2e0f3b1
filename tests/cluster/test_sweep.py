"""Sweeps: what is refused, what stands in their folder, and trials as runs."""

from __future__ import annotations

import io
import json
import os
import signal
import time
from dataclasses import asdict
from pathlib import Path

import pytest

from cluster import sweep as module
from cluster.cli import main
from cluster.mlflow_values import run_tags
from cluster.progress_bar import Narrator
from cluster.sweep import Sweep
from cluster.sweep_folder import Branch, Spec, SweepFolder
from configs.errors import NotFound, RunFailed, Unreachable, UsageError
from data_pipelines.storage import Store
from tests.cluster.sweeps import base, evaluated, made, recipe, spec
from tests.cluster.waiting import wait_for
from trainer import lease
from trainer.record import RunRecord, list_runs

ROOT = Path(__file__).resolve().parents[2]


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
