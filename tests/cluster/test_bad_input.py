"""Mistakes and faults: one paragraph with cause and remedy, the right exit code, nothing that was good is damaged."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.cli import main
from tests.main_process import run_main
from tests.tiny import write_recipe
from trainer.checkpoint_files import CheckpointReader
from trainer.record import RunRecord


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """(exit code, the paragraph on stderr) of a command that has to fail."""
    capsys.readouterr()
    code = main(list(arguments))
    output = capsys.readouterr()
    assert code != 0 and "Traceback" not in output.err
    (paragraph,) = [part for part in output.err.split("shardyard: ") if part.strip()]
    assert all(line.startswith("checking ") for line in output.out.splitlines())  # progress at most, no result
    return code, paragraph.strip()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- what is wrong before anything begins


def test_a_missing_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_recipe(tmp_path)
    code, text = refused(capsys, "train", str(tmp_path / "rum.yaml"))
    assert code == 4 and "There is no file" in text and f"Did you mean '{tmp_path / 'run.yaml'}'?" in text


def test_a_missing_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = {"name": "text", "paths": [str(tmp_path / "gone.txt")]}
    code, text = refused(capsys, "data", "build", str(write_recipe(tmp_path, data=data)))
    assert code == 4 and str(tmp_path / "gone.txt") in text
    assert not list((tmp_path / "runs").rglob("*.arrow"))


def test_an_unknown_key(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    write_recipe(
        tmp_path, zero={"stagee": 1}, model={"name": "gpt", "num_layers": 1, "hidden_sise": 32, "num_heads": 2}
    )
    monkeypatch.chdir(tmp_path)
    code, text = refused(capsys, "train", "run.yaml")
    lines = Path("run.yaml").read_text().splitlines()
    line = 1 + next(number for number, line in enumerate(lines) if "stagee" in line)
    assert code == 2 and f"run.yaml:{line} zero.stagee: unknown key; did you mean 'stage'?" in text
    # With the sections right, those of the named files are checked the same way.
    write_recipe(tmp_path, model={"name": "gpt", "num_layers": 1, "hidden_sise": 32, "num_heads": 2})
    code, text = refused(capsys, "check", "run.yaml")
    assert code == 2 and "model.hidden_sise: unknown key; did you mean 'hidden_size'?" in text
    assert "model.hidden_size: required" in text or "model.hidden_size" in text


def test_a_micro_batch_larger_than_the_global_batch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = refused(capsys, "train", str(write_recipe(tmp_path)), "batch.micro_batch_size=6")
    assert code == 2 and "batch.micro_batch_size=6 is larger than batch.global_batch_size=5" in text
    assert "Use batch.micro_batch_size=5 or less" in text


def test_a_stage_and_a_precision_that_do_not_go_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = refused(capsys, "train", str(write_recipe(tmp_path)), "zero.stage=0", "precision=bf16")
    assert code == 2 and "zero.stage=0 with precision=bf16" in text
    assert "Use zero.stage=1, or precision=fp32." in text
    assert not (tmp_path / "runs").exists()


def test_a_second_launch_of_a_running_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from configs.load import load
    from data_pipelines.storage import Store

    recipe = write_recipe(tmp_path)
    record = RunRecord.create(Store(tmp_path / "runs"), load(recipe))
    before = contents(tmp_path / "runs")
    with record.acquire_lease():
        code, text = refused(capsys, "train", str(recipe))
    assert code == 2 and f"already running on host {os.uname().nodename}, pid {os.getpid()}" in text
    assert "shardyard runs stop tiny" in text
    assert contents(tmp_path / "runs") == before
    record.close()


def test_verbose_shows_the_traceback_and_keeps_the_exit_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["runs", "show", "nothing", "--store", str(tmp_path), "-v"]) == 4
    assert "Traceback" in capsys.readouterr().err


# --- what breaks on the way


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the finished run 'tiny'; copy it before damaging it."""
    folder = tmp_path_factory.mktemp("finished")
    code, _, err = run_main(folder, str(write_recipe(folder, steps=4)))
    assert code == 0, err
    return folder


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished / "runs", tmp_path / "runs")
    return tmp_path


@pytest.mark.distributed
def test_a_corrupt_shard(finished: Path, copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, store = str(finished / "run.yaml"), f"store={copied / 'runs'}"
    assert main(["data", "verify", recipe, store]) == 0
    (shard,) = (copied / "runs" / "datasets").rglob("train-*.arrow")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)

    code, text = refused(capsys, "data", "verify", recipe, store)
    assert code == 1 and "train-00000-000.arrow, block 0" in text and "shardyard data build" in text
    code, _, err = run_main(copied, recipe, store, "name=other", "steps=4")
    assert code == 1 and str(shard) in err and "fails its digest" in err and "Traceback" not in err
    assert RunRecord.open(str(copied / "runs"), "other").status() == "failed"
    assert shard.read_bytes() == content


@pytest.mark.distributed
def test_a_truncated_checkpoint(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = str(copied / "runs")
    (file,) = (copied / "runs" / "tiny" / "checkpoints" / "step-00000004").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-1])
    for command in (["generate"], ["export"]):
        more = [str(copied / "out")] if command == ["export"] else []
        code, text = refused(capsys, *command, "tiny@4", *more, "--store", store)
        assert code == 1 and str(file) in text and "Use another step" in text
    assert not (copied / "out").exists()
    # Without a step the newest good one is taken, and the damaged one named.
    assert main(["generate", "tiny", "--tokens", "3", "--store", store, "--json"]) == 0
    output = capsys.readouterr()
    assert "step-00000002" in output.out
    assert "step-00000004 is skipped" in output.err


def test_no_such_checkpoint(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = str(copied / "runs")
    code, text = refused(capsys, "generate", "tiny@3", "--store", store)
    assert code == 4 and "There is no finished checkpoint of step 3" in text and "It has steps 2, 4" in text
    code, text = refused(capsys, "generate", "tiny@last", "--store", store)
    assert code == 2 and "after '@' stands a step" in text
    code, text = refused(capsys, "generate", "tny", "--store", store)
    assert code == 4 and "Did you mean 'tiny'?" in text


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 700 KB: room for the data set, the record and one or two checkpoints."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.getuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=700k", "tmpfs", disk]).returncode:
        pytest.skip("mounting a small file system needs root; the same without it: tests of storage and checkpoints")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


@pytest.mark.distributed
def test_a_full_disk(tmp_path: Path, small_disk: Path) -> None:
    recipe, store = str(write_recipe(tmp_path, checkpoint={"every": 2, "keep": None})), f"store={small_disk}"
    code, _, err = run_main(tmp_path, recipe, store)
    assert code == 1 and "the disk is full" in err and "Free some space" in err and "Traceback" not in err
    record = RunRecord.open(str(small_disk), "tiny")
    good = [row["step"] for row in record.checkpoints()]
    assert good in ([2], [2, 4])  # a checkout's uncommitted changes are in the lineage, and take room
    for step in good:
        assert CheckpointReader(record.store.child("checkpoints", f"step-{step:08d}")).verify() == []
    leftovers = [path for path in small_disk.rglob("*") if ".tmp-" in path.name or path.name == "step-00000008"]
    assert leftovers == []

    subprocess.run(["mount", "-o", "remount,size=8m", small_disk], check=True)
    code, _, err = run_main(tmp_path, recipe, store)
    assert (code, err) == (0, "")
    started = [event["step"] for event in record.events() if event["kind"] == "started"]
    assert started == [0, good[-1]]
    assert record.status() == "finished"


@pytest.mark.ray
def test_more_workers_than_the_cluster_has_cpus(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from cluster.embedded_ray import EmbeddedRay
    from cluster.ray_cluster import import_paths

    cluster = EmbeddedRay(1, False, import_paths())
    try:
        code = main(["train", str(write_recipe(tmp_path)), "resources.workers=2"])
    finally:
        cluster.stop()
    output = capsys.readouterr()
    assert code == 3 and "Traceback" not in output.err
    assert "needs 2 CPUs" in output.err and "1 CPU" in output.err and "Lower resources.workers" in output.err
    assert RunRecord.open(str(tmp_path / "runs"), "tiny").status() == "failed"


def test_a_cluster_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import ray

    code = main(["train", str(write_recipe(tmp_path)), "--address", "127.0.0.1:1"])
    output = capsys.readouterr()
    assert not ray.is_initialized(), "some call of Ray's has started one"
    assert code == 3 and "No Ray answers at 127.0.0.1:1" in output.err and "ray start --head" in output.err
    assert RunRecord.open(str(tmp_path / "runs"), "tiny").holder() is None
