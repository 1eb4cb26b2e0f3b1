from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from cluster import train
from cluster.launch import Run
from configs.errors import UsageError
from data_pipelines.storage import Store
from tests.trainer.attempts import launched
from trainer.record import RunRecord

pytestmark = [pytest.mark.ray, pytest.mark.daemon]  # each ends a Ray of its own

ROOT = Path(__file__).resolve().parents[2]

DRIVER = """
    import json, sys
    from cluster import train
    from configs.errors import ShardyardError
    config, body = json.loads(sys.argv[1]), sys.argv[2]
    run = train(config, body="tests.cluster.bodies:" + body)
    try:
        print(json.dumps(run.wait()))
    except ShardyardError as error:
        print(error)
        sys.exit(error.exit_code)
"""


def recipe(folder: Path, **more: Any) -> dict[str, Any]:
    texts = folder / "texts"
    texts.mkdir()
    for i in range(30):
        (texts / f"{i}.txt").write_text(f"the {i}th text has {i * i} words " * (i + 1))
    return {
        "name": "demo",
        "steps": 20,
        "store": str(folder / "runs"),
        "task": {"name": "language_modeling", "seq_len": 16, "tokenizer": {"name": "bytes", "vocab_size": 257}},
        "model": {"name": "gpt", "num_layers": 1, "hidden_size": 16, "num_heads": 2},
        "data": {"name": "text", "paths": [str(texts)], "validation_fraction": 0.3},
        "batch": {"global_batch_size": 4, "micro_batch_size": 2},
        "optimizer": {"lr": 1e-3},
        "resources": {"workers": 2},
        "tracking": {"mlflow": None},
        **more,
    }


def kinds(record: RunRecord) -> list[str]:
    return [event["kind"] for event in record.events()]


def last_word(config: dict[str, Any]) -> dict[str, Any]:
    """Its last event but for what was planned, which comes at some time while things start, or when all is over."""
    events = RunRecord.open(config["store"], "demo").events()
    return [event for event in events if event["kind"] != "planned"][-1]


def start_driver(config: dict[str, Any], body: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", textwrap.dedent(DRIVER), json.dumps(config), body]
    # A session of its own, as a terminal's foreground job has: Ctrl-C reaches every process in it.
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True)


def wait_for_training(config: dict[str, Any], driver: subprocess.Popen[str]) -> list[int]:
    """The pids of its workers, once they are at work."""
    written = [Path(config["store"]) / "demo" / f"facts-1-{rank}" for rank in range(2)]
    deadline = time.monotonic() + 90
    while not all(path.exists() and path.read_text() for path in written):
        assert driver.poll() is None, driver.stdout and driver.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return [int(path.read_text().split()[3]) for path in written]


def nothing_is_left(driver: subprocess.Popen[str], pids: list[int]) -> None:
    for pid in pids:
        assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    assert not list(Path(tempfile.gettempdir()).glob(f"shardyard-ray-{driver.pid}-*"))


def test_a_run_from_python(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = recipe(tmp_path)
    run = train(config, body="tests.cluster.bodies:steps")
    with pytest.raises(UsageError, match="already running"):
        train(config, body="tests.cluster.bodies:steps")
    result = run.wait()
    assert (result["outcome"], result["step"], result["restarts"]) == ("finished", 20, 0)
    assert run.status() == "finished"
    record = RunRecord.open(config["store"], "demo")
    happened = kinds(record)
    happened.remove("planned")  # once, at some time while things start
    assert happened == ["created", "queued", "placed", "finished"]
    assert record.status() == "finished"
    assert "fingerprint" in str(record.lineage())
    assert run.datasets()[0].splits
    assert not list(Path(tempfile.gettempdir()).glob(f"shardyard-ray-{os.getpid()}-*"))
    assert "RAY_AUTH_TOKEN_PATH" not in os.environ
    printed = capsys.readouterr()
    assert "raylet" not in printed.out
    assert printed.err == ""
    again = train(config, body="tests.cluster.bodies:steps")
    assert again.wait()["outcome"] == "finished"
    assert "finished already" in capsys.readouterr().out


def test_a_run_that_ended_early_tells_its_own_last_step(tmp_path: Path) -> None:
    config = recipe(tmp_path)
    record = launched(config)
    record.event("finished", step=7)
    record.close()
    result = train(config, body="tests.cluster.bodies:steps").wait()
    assert (result["outcome"], result["step"]) == ("finished", 7)


def test_the_first_interrupt_saves_and_the_command_to_resume_is_named(tmp_path: Path) -> None:
    config = recipe(tmp_path)
    driver = start_driver(config, "endless")
    pids = wait_for_training(config, driver)
    below = [process.pid for process in psutil.Process(driver.pid).children(recursive=True)]
    os.killpg(driver.pid, signal.SIGINT)
    output, _ = driver.communicate(timeout=60)
    assert driver.returncode == 130
    assert f"shardyard runs resume demo --store {config['store']}" in output
    last = last_word(config)
    assert (last["kind"], last["reason"]) == ("stopped", "Ctrl-C")
    assert last["step"] > 0
    nothing_is_left(driver, [*pids, *below])


def test_a_preempted_launcher_saves_and_asks_to_be_started_again(tmp_path: Path) -> None:
    config = recipe(tmp_path)
    driver = start_driver(config, "endless")
    wait_for_training(config, driver)
    driver.send_signal(signal.SIGUSR1)
    output, _ = driver.communicate(timeout=60)
    assert driver.returncode == 75
    assert f"shardyard runs resume demo --store {config['store']}" in output
    last = last_word(config)
    assert (last["kind"], last["reason"]) == ("stopped", "SIGUSR1")


def test_a_preempted_worker_stops_the_run(tmp_path: Path) -> None:
    config = recipe(tmp_path)
    driver = start_driver(config, "endless")
    for pid in wait_for_training(config, driver):  # these bodies have no vote that would tell the other
        os.kill(pid, signal.SIGTERM)
    driver.communicate(timeout=60)
    assert driver.returncode == 75
    last = last_word(config)
    assert (last["kind"], last["reason"]) == ("stopped", "a worker was told to end (SIGTERM)")


def test_the_second_interrupt_ends_it_at_once(tmp_path: Path) -> None:
    config = recipe(tmp_path)
    driver = start_driver(config, "deaf")
    pids = wait_for_training(config, driver)
    below = [process.pid for process in psutil.Process(driver.pid).children(recursive=True)]
    os.killpg(driver.pid, signal.SIGINT)
    time.sleep(1.0)
    assert driver.poll() is None, "a deaf worker cannot have saved"
    os.killpg(driver.pid, signal.SIGINT)
    driver.communicate(timeout=60)
    assert driver.returncode == 130
    nothing_is_left(driver, [*pids, *below])


def test_only_a_person_ends_it_at_once() -> None:
    """Whoever schedules may tell it twice, in two ways."""
    run = object.__new__(Run)
    told: list[str] = []
    run._interrupts, run._first_signal = 0, None
    run._drive = SimpleNamespace(  # type: ignore[assignment]
        controller=SimpleNamespace(request_stop=lambda reason: told.append(reason), abort=lambda: told.append("abort"))
    )
    with run._signals():
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM):
            signal.raise_signal(number)
        assert told == ["SIGUSR1"]
        signal.raise_signal(signal.SIGINT)
    assert told == ["SIGUSR1", "abort"]


def test_another_process_asks_it_to_stop(tmp_path: Path) -> None:
    config = recipe(tmp_path)
    driver = start_driver(config, "endless")
    wait_for_training(config, driver)
    RunRecord(Store(config["store"]).child("demo"), RunRecord.open(config["store"], "demo").resolved).request_stop(
        "asked"
    )
    output, _ = driver.communicate(timeout=60)
    assert driver.returncode == 0
    assert '"outcome": "stopped"' in output
