"""`shardyard replay`: what it says, its exit codes, and the processes that it starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster import cli
from cluster.commands import replay as command
from configs.load import load
from data_pipelines.storage import Store
from tests.tiny import tiny_config
from tests.trainer.attempts import train
from trainer.record import RunRecord


def recorded_run(folder: Path) -> str:
    """A record of three steps by two workers, the third of which went wrong; the store."""
    config = tiny_config(folder)
    record = RunRecord.create(Store(config["store"]), load(config))
    record.next_attempt()
    record.event("started", step=0, world_size=2)
    for step in (1, 2):
        record.metrics(step, {"loss": 1 / step, "grad_norm": 0.1 * step})
    record.event("diverged", step=3, what="loss", value=float("nan"), loss=float("nan"), grad_norm=None)
    record.close()
    return str(config["store"])


def answered(monkeypatch: pytest.MonkeyPatch, loss: float, grad_norm: float | None) -> list[Any]:
    """The processes' answer; what they were asked."""
    asked: list[Any] = []
    example = {"sample_id": 4, "loss": 2.0, "items": 32, "documents": ["text.txt:7"], "preview": "the fox"}
    found = {"from_step": 0, "loss": loss, "grad_norm": grad_norm, "examples": [example]}
    monkeypatch.setattr(command, "_in_processes", lambda *given: asked.append(given) or found)
    return asked


def test_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    store = recorded_run(tmp_path)
    asked = answered(monkeypatch, 0.5, 0.2)
    assert cli.main(["replay", "tiny", "--step", "2", "--store", store]) == 0
    ((world_size, (_, _, target, checkpoint_step), _),) = asked
    assert (world_size, target.step, target.loss, checkpoint_step) == (2, 2, 0.5, None)
    said = capsys.readouterr().out
    assert "from the beginning" in said and "1 of them to rebuild the weights" in said and "text.txt:7" in said
    assert cli.main(["replay", "tiny", "--step", "2", "--store", store, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["bit_equal"] is True


def test_other_bits_are_exit_code_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store = recorded_run(tmp_path)
    answered(monkeypatch, 0.5, 0.2000000000000001)
    assert cli.main(["replay", "tiny", "--step", "2", "--store", store, "--json"]) == 1
    given = json.loads(capsys.readouterr().out)
    assert given["replay"]["bit_equal"] is False and "is not what its record says" in given["error"]


def test_a_step_that_ended_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store = recorded_run(tmp_path)
    answered(monkeypatch, float("nan"), None)
    assert cli.main(["replay", "tiny", "--step", "3", "--store", store, "--workers", "1"]) == 0
    assert "The bits may differ: the step was run by 2 worker(s)" in capsys.readouterr().out


def test_what_is_not_there_is_exit_code_4(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = recorded_run(tmp_path)
    assert cli.main(["replay", "tiny", "--step", "7", "--store", store]) == 4
    assert "no loss of step 7. The nearest are 2, 3." in capsys.readouterr().err
    assert cli.main(["replay", "tinny", "--step", "2", "--store", store]) == 4


@pytest.mark.slow
@pytest.mark.distributed
def test_processes_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_config(tmp_path)
    record = train(config, world_size=2)
    assert cli.main(["replay", "tiny", "--step", "6", "--store", config["store"]]) == 0
    assert "from the checkpoint of step 4" in capsys.readouterr().out
    for path in Path(record.store.path("metrics")).iterdir():
        loss = next(row["loss"] for row in record.stitched() if row["step"] == 6)
        path.write_text(path.read_text().replace(repr(loss), repr(loss + 1e-12)))
    assert cli.main(["replay", "tiny", "--step", "6", "--store", config["store"]]) == 1
    named = [each for each in psutil.Process().children(recursive=True) if "multiprocessing.spawn" in each.cmdline()]
    assert named == []
