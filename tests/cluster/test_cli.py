"""Every command, as a user calls it."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster import embedded_ray, train
from cluster.cli import build_parser, main, parse
from configs.errors import RunFailed
from configs.load import load
from configs.schema import RunConfig
from tests.main_process import run_main
from tests.tiny import tiny_config, write_recipe
from trainer.__main__ import main as trainer_main
from trainer.record import RunRecord

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "ray", "pydantic", "pyarrow", "numpy", "mlflow", "transformers", "deepspeed", "rich", "yaml")
MEASURE_HELP = f"""
import resource, sys
from cluster.cli import main
try:
    main(["--help"])
except SystemExit as end:
    assert end.code == 0
usage = resource.getrusage(resource.RUSAGE_SELF)
print("loaded:", *[name for name in {HEAVY!r} if name in sys.modules])
print("cpu:", usage.ru_utime + usage.ru_stime)
"""


def ask(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    """What a command prints with --json."""
    capsys.readouterr()
    code = main([*arguments, "--json"])
    output = capsys.readouterr()
    assert code == 0, output.err
    return json.loads(output.out)


def tell(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a command says to a person."""
    capsys.readouterr()
    assert main(list(arguments)) == 0
    output = capsys.readouterr()
    assert output.err == ""
    return output.out


def test_help_is_instant() -> None:
    """Processor time, which other programs on the machine do not change."""
    done = subprocess.run([sys.executable, "-c", MEASURE_HELP], cwd=ROOT, capture_output=True, text=True, check=True)
    *help_text, loaded, cpu = done.stdout.splitlines()
    assert loaded == "loaded:"
    assert float(cpu.split()[1]) < 0.3
    for command in ("init", "check", "train", "runs", "logs", "generate", "export", "data", "doctor"):
        assert any(line.strip().startswith(command) for line in help_text)


@pytest.mark.parametrize("asked", [[], ["--json"], ["-v"]])
def test_no_secret_is_in_an_error(
    asked: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Libraries put what they were called with into their errors: a token from the environment, a password in a URL."""
    monkeypatch.setenv("SERVICE_TOKEN", "canary-of-the-environment")
    said = "401 for canary-of-the-environment at https://me:canary-password@host/, Authorization: Bearer canary-bearer"
    for module, leaking in (("cluster.commands.runs.ls", main), ("trainer.__main__.train", trainer_main)):
        failing = RunFailed(said) if leaking is trainer_main else OSError(said)

        def fail(*_: Any, error: Exception = failing) -> None:
            raise error

        monkeypatch.setattr(module, fail)
        assert leaking(["runs", "ls", *asked] if leaking is main else ["recipe", *set(asked) - {"--json"}]) == 1
        output = capsys.readouterr()
        assert "canary" not in output.out + output.err
        assert "401 for [redacted] at https://[redacted]@host/" in output.err


def test_every_command_has_a_function() -> None:
    """The function of a command is found when it is called: here they are all looked up."""
    import importlib

    found = set()
    for command in [
        *(["init"], ["check", "r"], ["train", "r"], ["logs", "r"], ["generate", "r"], ["export", "r", "f"]),
        *(["doctor"], ["metrics"]),
        *(["runs", "ls"], *(["runs", name, "r"] for name in ("show", "stop", "sync", "resume"))),
        *(["data", name, "r"] for name in ("build", "inspect", "verify")),
        *(["data", "diff", "a", "b"], ["data", "export", "r", "--out", "f"]),
    ]:
        module, _, function = build_parser().parse_args(command).handler.partition(":")
        assert callable(getattr(importlib.import_module(f"cluster.commands.{module}"), function))
        found.add(f"{module}:{function}")
    assert len(found) == 18


def test_overrides_may_stand_on_both_sides_of_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert parse(["train", "r.yaml", "steps=1", "--address", "auto", "seed=2"]).overrides == ["steps=1", "seed=2"]
    for wrong in (["train", "r.yaml", "--adress", "auto"], ["runs", "ls", "more"]):
        with pytest.raises(SystemExit) as end:
            parse(wrong)
        assert end.value.code == 2
    assert "unrecognized arguments" in capsys.readouterr().err


def test_init_check(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    said = tell(capsys, "init")
    assert "shardyard check run.yaml" in said
    assert Path("run.yaml").read_text().startswith("# yaml-language-server: $schema=./shardyard.schema.json")
    assert json.loads(Path("shardyard.schema.json").read_text())["properties"]["steps"]
    assert "parameters" in tell(capsys, "check", "run.yaml")
    assert ask(capsys, "check", "run.yaml", "steps=70")["steps"] == 70
    assert ask(capsys, "check", "run.yaml")["plan"]["fits"] and "process" in tell(capsys, "check", "run.yaml")
    warned = ask(
        capsys, "check", "run.yaml", "resources.workers=3", "batch.global_batch_size=8", "batch.micro_batch_size=4"
    )
    assert "33% of the work of each step is idle" in warned["warnings"][0]
    before = Path("run.yaml").read_text()
    assert main(["init", "--json"]) == 2
    error = json.loads(capsys.readouterr().out)
    assert error["kind"] == "UsageError" and error["exit_code"] == 2 and "left as it is" in error["error"]
    assert Path("run.yaml").read_text() == before


def test_json_lists_every_problem_of_a_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(write_recipe(tmp_path, seed=-1)), "zero.stage=9", "--json"]) == 2
    problems = json.loads(capsys.readouterr().out)["problems"]
    assert [problem["key"] for problem in problems] == ["seed", "zero.stage"]


def test_doctor(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from cluster.commands import doctor

    findings = ask(capsys, "doctor", "--store", str(tmp_path / "runs"))["findings"]
    assert {"python", "torch", "devices", "memory", "/dev/shm", "store"} <= {finding["what"] for finding in findings}
    assert not (tmp_path / "runs").exists()
    monkeypatch.setattr(doctor, "REQUIRED_PACKAGES", ("no-such-package",))
    assert main(["doctor", "--store", str(tmp_path / "runs"), "--json"]) == 1
    output = json.loads(capsys.readouterr().out)
    assert [item["what"] for item in output["findings"] if not item["ok"]] == ["no-such-package"]
    assert "make setup" in output["error"]


@pytest.mark.parametrize("store", ["runs", "s3://bucket/runs?endpoint_override=127.0.0.1:9&scheme=http", "a b"])
def test_commands_that_are_shown_can_be_pasted(tmp_path: Path, store: str, capsys: pytest.CaptureFixture[str]) -> None:
    from cluster.commands.train import _farewell

    config = load(tiny_config(tmp_path, store=store)).config
    run: Any = SimpleNamespace(name="tiny", record=SimpleNamespace(config=config, events=list), resume_command="")
    result = {"outcome": "finished", "step": 4, "metrics": {}, "checkpoint": None}
    _farewell(Namespace(json=False), run, result)
    named = ["tiny"] if store == "runs" else ["tiny", "--store", store]
    said = capsys.readouterr().out.splitlines()
    commands = [line.partition("shardyard ")[2] for line in said if "shardyard " in line]
    assert [as_a_shell_reads(command) for command in commands] == [
        ["runs", "show", *named],
        ["generate", *named, "--prompt", "..."],
    ]


def as_a_shell_reads(command: str) -> list[str]:
    """Its words; "&" and the like, where they are not quoted, are words of their own."""
    words = shlex.shlex(command, posix=True, punctuation_chars=True)
    words.whitespace_split = True
    return list(words)


# --- what is known of runs, with no cluster


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the finished run 'tiny'."""
    folder = tmp_path_factory.mktemp("finished")
    code, _, err = run_main(folder, str(write_recipe(folder, steps=4)))
    assert code == 0, err
    return folder


@pytest.mark.distributed
def test_runs(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(finished / "runs", tmp_path / "runs")
    (tmp_path / "runs" / "broken").mkdir()
    (tmp_path / "runs" / "broken" / "run.yaml").write_text("name: [")
    store = ("--store", str(tmp_path / "runs"))
    listed = {row["run"]: row for row in ask(capsys, "runs", "ls", *store)}
    assert listed["tiny"]["status"] == "finished" and listed["tiny"]["step"] == 4
    assert listed["broken"]["status"] == "damaged"
    assert re.search(r"tiny +finished +- +4 +4 ", tell(capsys, "runs", "ls", *store))
    shown = ask(capsys, "runs", "show", "tiny", *store)
    assert [row["step"] for row in shown["checkpoints"]] == [2, 4]
    (waste,) = [
        event["packing_waste"] for event in RunRecord.open(store[1], "tiny").events() if event["kind"] == "started"
    ]
    assert shown["packing_waste"] == waste > 0
    assert shown["memory"]["peak_bytes"] > shown["memory"]["base_bytes"] > 2**20
    said = tell(capsys, "runs", "show", "tiny", *store)
    assert re.search(r"memory +\d\.\d\d GB at most \(rank 0\)\n", said)
    assert "ATTEMPT" in said and f"padding       {100 * waste:.2g} % of the packed sequences" in said
    assert "No runs in" in tell(capsys, "runs", "ls", "--store", str(tmp_path / "none"))
    assert main(["runs", "stop", "tiny", *store]) == 2
    assert main(["runs", "sync", "tiny", *store]) == 2
    assert "tracking.mlflow = null" in capsys.readouterr().err
    assert main(["logs", "tiny", *store]) == 4  # only workers on a cluster have logs of their own
    log = tmp_path / "runs" / "tiny" / "attempts" / "0001" / "rank-00000.log"
    log.write_text("héllo\n")
    assert tell(capsys, "logs", "tiny", *store) == "héllo\n"
    assert tell(capsys, "logs", "tiny", "--follow", *store) == "héllo\n"


@pytest.mark.distributed
def test_following_a_log_goes_on_with_the_attempts_that_follow(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(finished / "runs", tmp_path / "runs")
    attempts = tmp_path / "runs" / "tiny" / "attempts"
    looks = iter(["no log yet", "first", "second", "over"])

    def holder(_: RunRecord) -> str | None:
        match next(looks):
            case "first":
                (attempts / "0001" / "rank-00000.log").write_text("one\n")
            case "second":
                (attempts / "0001" / "rank-00000.log").write_text("one\nits end\n")
                (attempts / "0002").mkdir()
                (attempts / "0002" / "rank-00000.log").write_text("two\n")
            case "over":
                return None
        return "somebody"

    monkeypatch.setattr(RunRecord, "holder", holder)
    monkeypatch.setattr("cluster.commands.runs.POLL_EVERY_S", 0.0)
    store = ("--store", str(tmp_path / "runs"))
    assert tell(capsys, "logs", "tiny", "--follow", *store) == "one\nits end\ntwo\n"


@pytest.mark.distributed
def test_generate_and_export(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from trainer.checkpoint import find
    from trainer.inference import load_model

    store = ("--store", str(finished / "runs"))
    options = ("--prompt", "the ", "--tokens", "12", "--temperature", "0", *store)
    text = ask(capsys, "generate", "tiny@4", *options)["text"]
    assert tell(capsys, "generate", "tiny", *options) == f"the {text}\n"

    folder = str(tmp_path / "exported")
    assert "from_pretrained" in tell(capsys, "export", "tiny@4", folder, *store)
    theirs, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ours, _ = load_model(find(RunRecord.open(str(finished / "runs"), "tiny").store.child("checkpoints"), 4))
    ids = tokenizer("the lazy dog", return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.allclose(ours(ids), theirs(ids).logits, atol=1e-4)
    assert main(["export", "tiny", folder, *store]) == 2
    assert "exists already" in capsys.readouterr().err


# --- runs on Ray


@pytest.mark.ray
def test_train_from_python(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = train(tiny_config(tmp_path, steps=3), ["resources.workers=2"])
    assert run.wait()["outcome"] == "finished"
    assert [row["step"] for row in run.metrics()] == [1, 2, 3]
    assert run.metrics()[-1]["validation/bits_per_byte"] > 0
    assert run.status() == "finished" and run.sample() is not None
    assert (run.checkpoint() or "").endswith("step-00000003")
    output = capsys.readouterr()
    assert output.out.startswith("Run 'tiny': gpt of 24,704 parameters")
    assert "SIGTERM" not in output.err
    assert not list(Path("/tmp").glob(f"{embedded_ray._FOLDER_PREFIX}{os.getpid()}-*"))


@pytest.mark.ray
def test_train_from_another_run(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As a branch, on Ray; launched again it has finished, though its parent's checkpoint is gone by then."""
    recipe, store = str(write_recipe(finished, steps=4)), ("--store", str(finished / "runs"))
    command = ("train", recipe, "--from", "tiny@2", "--branch", "name=branch", "optimizer.lr=0.02", "steps=4")
    result = ask(capsys, *command)
    assert result["outcome"] == "finished" and result["step"] == 4 and result["metrics"]["examples"] == 20
    shown = ask(capsys, "runs", "show", "branch", *store)
    assert shown["attempts"][0]["start_step"] == 2
    log = tell(capsys, "logs", "branch", *store)
    assert "Traceback" not in log

    shutil.rmtree(finished / "runs" / "tiny" / "checkpoints" / "step-00000002")
    assert main([*command, "--json"]) == 0
    assert "has finished already" in capsys.readouterr().err
    parent = RunConfig.model_validate(RunRecord.open(str(finished / "runs"), "branch").config.model_dump()).parent
    assert parent is not None and parent.state == "all"


def test_doctor_leaves_a_store_as_it_is(tmp_path: Path) -> None:
    from cluster.commands import doctor

    assert doctor._store(str(tmp_path / "a" / "b" / "runs")).found
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "canary").write_text("the user's own")
    doctor._store(str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["canary"]
    assert (tmp_path / "canary").read_text() == "the user's own"
    assert not doctor._store(str(tmp_path / "canary" / "runs")).ok
