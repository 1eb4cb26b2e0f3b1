"""Data sets that outlive their sources: decided on by who launches, opened by the workers."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from configs.errors import Damaged, NotFound, PeerFailed, ShardyardError
from configs.load import load
from data_pipelines.storage import Store
from tests.pool import run_workers
from tests.tiny import tiny_config
from tests.trainer import test_mixture_runs as mixtures
from tests.trainer.attempts import curve, launched, train
from trainer.distributed import World
from trainer.record import RunRecord, recorded_datasets
from trainer.run_datasets import decide_datasets, decide_together, open_recorded
from trainer.validate import validate

pytestmark = pytest.mark.distributed


def decided(config: dict[str, Any]) -> tuple[list[str], list[str]]:
    """(the data sets that a launch decides on, what it says)"""
    said: list[str] = []
    resolved = load(config)
    record = RunRecord.create(Store(config["store"]), resolved)
    datasets = decide_datasets(record, validate(resolved), said.append)
    return [dataset.path for dataset in datasets], said


def test_a_run_goes_on_though_its_source_is_gone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The workers of the whole second attempt, and a branch, find no source; the oracle is a run that had one."""
    undisturbed = train(tiny_config(tmp_path))
    stopped = tiny_config(tmp_path, name="stopped")
    train(stopped, stop_after=4)
    (tmp_path / "text.txt").rename(tmp_path / "away")
    (tmp_path / "runs" / "datasets").rename(tmp_path / "elsewhere")
    with pytest.raises(NotFound, match="There is no file or folder"):
        train(stopped)
    (tmp_path / "elsewhere").rename(tmp_path / "runs" / "datasets")
    capsys.readouterr()
    assert curve(train(stopped)) == curve(undisturbed)
    assert "text.txt. Check data.paths" in (said := capsys.readouterr().out)
    assert f"The run reads what was built before: {tmp_path / 'runs' / 'datasets' / 'text-'}" in said
    parent = {"checkpoint": undisturbed.store.path("checkpoints/step-00000004"), "state": "all"}
    assert curve(train(stopped | {"name": "branch", "parent": parent})) == curve(undisturbed)[4:]


def test_what_the_run_itself_read_comes_first(tmp_path: Path) -> None:
    config, text = tiny_config(tmp_path), tmp_path / "text.txt"
    mine, said = decided(config)
    assert said == []
    before = text.read_text()
    text.write_text(before.upper())
    later, _ = decided(config | {"name": "later"})
    assert later != mine
    text.unlink()
    assert decided(config)[0] == mine
    assert decided(config | {"name": "new"})[0] == later, "the newest, for a run that has read none"
    shutil.rmtree(mine[0])
    assert decided(config)[0] == later
    with pytest.raises(NotFound):
        decided(config | {"name": "other", "data": config["data"] | {"validation_fraction": 0.2}})


def test_a_branch_of_a_mixture_reads_what_its_parent_did(tmp_path: Path) -> None:
    parent = train(mixtures.config(tmp_path, steps=2), world_size=1)
    checkpoint = {"checkpoint": parent.store.path("checkpoints/step-00000002"), "state": "all"}
    config = mixtures.config(tmp_path, name="branch", parent=checkpoint, steps=3)
    (tmp_path / "numbers.txt").unlink()
    branch = train(config, world_size=1)
    assert recorded_datasets(branch.store) == recorded_datasets(parent.store)
    with pytest.raises(NotFound):
        decided(config | {"name": "new", "parent": None})


def test_a_build_that_fails_while_its_source_is_there_is_no_reason_to_read_older_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(tmp_path)
    decided(config)
    (tmp_path / "text.txt").write_text("other text")

    def full(*_: Any, **__: Any) -> None:
        raise ShardyardError("the disk is full")

    monkeypatch.setattr("data_pipelines.build.Build.ensure", full)
    with pytest.raises(ShardyardError, match="the disk is full"):
        decided(config)


def test_a_list_of_data_sets_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    record = launched(tiny_config(tmp_path))
    record.store.write_atomic("datasets.json", "{}")
    with pytest.raises(Damaged, match=r"datasets\.json cannot be read \(KeyError"):
        recorded_datasets(record.store)


def together(world: World, config: dict[str, Any]) -> str:
    resolved = load(config)
    if world.rank == 0:
        RunRecord.create(Store(config["store"]), resolved)
    plan = validate(resolved, sees_inputs=world.rank == 0)
    record = RunRecord(Store(config["store"]).child(config["name"]), resolved, rank=world.rank)
    if world.rank > 0:  # a node that sees no source

        def unseen(_: Any) -> None:
            raise AssertionError("this rank looks at the source")

        plan.source.identity = unseen  # type: ignore[attr-defined]
    try:
        decide_together(record, plan, world)
    except (NotFound, PeerFailed) as error:
        return f"{type(error).__name__}: {error}"
    return open_recorded(record, plan)[0].fingerprint


def test_rank_0_decides_and_the_others_wait_and_follow(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    first, second = run_workers(together, 2, config)
    assert first == second and len(first) == 32
    shutil.rmtree(tmp_path / "runs")
    (tmp_path / "text.txt").unlink()
    first, second = run_workers(together, 2, config)
    assert first.startswith("NotFound: There is no file or folder") and "rank 0 tells why" in second
