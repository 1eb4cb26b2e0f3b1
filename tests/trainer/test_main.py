"""`python -m trainer`: alone and under torchrun, interrupted, refused. No Ray."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from cluster.cli import main as shardyard
from tests.main_process import MainProcess, run_main
from tests.tiny import write_recipe
from trainer.__main__ import SAME_REQUEST_S, main, stop_on_signal
from trainer.checkpoint_files import CheckpointReader
from trainer.lease import current_claim
from trainer.record import RunRecord

pytestmark = pytest.mark.distributed

ROOT = Path(__file__).resolve().parents[2]


def record_of(folder: Path) -> RunRecord:
    return RunRecord.open(str(folder / "runs"), "tiny")


def test_a_run_alone(tmp_path: Path) -> None:
    recipe = str(write_recipe(tmp_path))
    code, out, err = run_main(tmp_path, recipe, "steps=3")
    assert (code, err) == (0, "")
    assert out.startswith("Run 'tiny': gpt of 24,704 parameters on text, 1 worker, ZeRO-1, fp32.")
    assert re.search(r"Run 'tiny' has finished after step 3: loss [\d.]+, .*Checkpoint: .*step-00000003", out)
    assert record_of(tmp_path).status() == "finished"

    # Launched again it has nothing to do, and says so.
    code, out, _ = run_main(tmp_path, recipe, "steps=3")
    assert (code, out) == (0, "Run 'tiny' has finished already; there is nothing left to train.\n")
    # With another config it is refused, and stays what it was.
    code, _, err = run_main(tmp_path, recipe, "steps=3", "seed=9")
    assert code == 2 and "seed: 0 there, 9 here" in err and "Traceback" not in err
    assert record_of(tmp_path).status() == "finished"


@pytest.mark.parametrize("how", ["SIGINT", "runs stop"])
def test_a_stopped_run_is_saved_and_the_same_command_goes_on(
    tmp_path: Path, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    # So many steps that it cannot end before it is stopped.
    recipe = str(write_recipe(tmp_path, steps=100_000, checkpoint={"every": 100_000}, evaluation={"every": None}))
    process = MainProcess(tmp_path, recipe)
    process.wait_for(lambda: (tmp_path / "runs/tiny/run.yaml").exists() and record_of(tmp_path).stitched())
    if how == "SIGINT":
        process.send(signal.SIGINT)
    else:
        assert shardyard(["runs", "stop", "tiny", "--store", str(tmp_path / "runs")]) == 0
        assert "'tiny' has stopped. Go on with it: shardyard runs resume tiny --store" in capsys.readouterr().out
    assert process.wait() == 130
    (checkpoint,) = record_of(tmp_path).checkpoints()
    step = checkpoint["step"]
    assert (
        f"Stopped and saved after step {step}. Go on with the same command: python -m trainer {recipe}" in process.err
    )
    assert record_of(tmp_path).status() == "stopped"
    assert current_claim(record_of(tmp_path).store) is None
    assert CheckpointReader(record_of(tmp_path).store.child("checkpoints", f"step-{step:08d}")).verify() == []

    again = MainProcess(tmp_path, recipe)
    again.wait_for(lambda: record_of(tmp_path).stitched()[-1]["step"] > step)
    again.send(signal.SIGTERM if how == "SIGINT" else signal.SIGUSR1)
    assert again.wait() == 75  # a scheduler starts it again
    saved = record_of(tmp_path).checkpoints()[-1]["step"]
    assert f"Stopped and saved after step {saved}." in again.err
    started = [event["step"] for event in record_of(tmp_path).events() if event["kind"] == "started"]
    assert started == [0, step]


def test_a_signal_that_torchrun_passes_on_once_more_is_one_request(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now, sent = [100.0], []
    monkeypatch.setattr("trainer.__main__.time.monotonic", lambda: now[0])
    with stop_on_signal() as stop:
        signal.raise_signal(signal.SIGTERM)
        assert (stop.is_set(), stop.signal) == (True, signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL, "the next one would end it before it has saved"
        signal.raise_signal(signal.SIGTERM)
        assert capsys.readouterr().err.count("Saving a checkpoint") == 1
        now[0] += 2 * SAME_REQUEST_S
        monkeypatch.setattr("trainer.__main__.signal.raise_signal", sent.append)
        os.kill(os.getpid(), signal.SIGTERM)
        assert sent == [signal.SIGTERM] and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert stop.signal == signal.SIGTERM


def test_an_interrupt_before_training_shows_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("trainer.__main__.train", interrupted)
    assert main(["run.yaml"]) == 130
    assert capsys.readouterr().err.strip() == "trainer: Interrupted before training began."


def test_a_run_alone_listens_on_loopback_alone(tmp_path: Path) -> None:
    recipe = str(write_recipe(tmp_path, steps=1_000_000))
    process = MainProcess(tmp_path, recipe)
    process.wait_for(lambda: (tmp_path / "runs" / "tiny" / "run.yaml").exists() and record_of(tmp_path).checkpoints())
    assert process.pid is not None
    connections = psutil.Process(process.pid).net_connections(kind="tcp")
    listening = {connection.laddr.ip for connection in connections if connection.status == psutil.CONN_LISTEN}
    process.send(signal.SIGINT)
    assert process.wait() == 130
    assert listening <= {"127.0.0.1", "::1"}


def test_two_ranks_under_torchrun(tmp_path: Path) -> None:
    recipe = str(write_recipe(tmp_path, steps=3))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "trainer"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, recipe, "zero.stage=2"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 0, done.stderr
    record = record_of(tmp_path)
    assert record.status() == "finished"
    (started,) = [event for event in record.events() if event["kind"] == "started"]
    assert started["world_size"] == 2
    assert record.config.resources.workers == 2
    manifest = CheckpointReader(record.store.child("checkpoints", "step-00000003")).manifest
    assert len(manifest["files"]) == 2


def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    recipe = str(write_recipe(tmp_path))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        world = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        code, _, err = run_main(tmp_path, recipe, environment=world)
    assert code == 3
    assert f"127.0.0.1:{port}" in err and "the port is in use" in err and "Traceback" not in err
    record = record_of(tmp_path)
    assert record.status() == "failed"
    assert current_claim(record.store) is None


def test_torchruns_environment_has_to_be_whole(tmp_path: Path) -> None:
    code, _, err = run_main(tmp_path, str(write_recipe(tmp_path)), environment={"RANK": "0", "WORLD_SIZE": "2"})
    assert code == 2 and "MASTER_ADDR" in err and "torchrun" in err


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE"])
def test_a_rank_that_is_no_number_is_named(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(name, "x")
    assert main(["run.yaml"]) == 2
    assert f"variable {name} is 'x'" in capsys.readouterr().err


def test_an_error_in_a_users_own_file_is_shown_with_its_line(tmp_path: Path) -> None:
    module = tmp_path / "own" / "model_of_this_test.py"
    module.parent.mkdir()
    module.write_text(
        "from trainer.models.gpt import *\n\n\ndef init_parameter(config, name, tensor, generator):\n"
        "    raise KeyError(f'no rule for {name}')\n"
    )
    recipe = str(write_recipe(tmp_path))
    process = MainProcess(tmp_path, recipe, "model.name=own.model_of_this_test")
    assert process.wait() == 1
    assert "Traceback" not in process.err
    assert f"no rule for embedding.weight' ({module}:5; -v shows the traceback)" in process.err
    assert record_of(tmp_path).status() == "failed"
