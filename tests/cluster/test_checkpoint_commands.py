"""`shardyard ckpt`: what a run's checkpoints are, whether they are good, and which may go."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cluster.cli import main
from configs.errors import Unreachable
from tests.tiny import tiny_config
from tests.trainer.attempts import train
from trainer.record import RunRecord
from trainer.record_rows import RowWriter

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> RunRecord:
    folder = tmp_path_factory.mktemp("ckpt")
    return train(tiny_config(folder, steps=6, evaluation={"every": 2, "examples": 3}), world_size=1)


@pytest.fixture
def run(trained: RunRecord, tmp_path: Path) -> RunRecord:
    """A copy that a test may damage."""
    import shutil

    source = Path(trained.store.path())
    shutil.copytree(source.parent, tmp_path / "runs")
    return RunRecord.open(str(tmp_path / "runs"), source.name)


def ckpt(run: RunRecord, *arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout, stderr."""
    import contextlib
    import io

    out, err = io.StringIO(), io.StringIO()
    store = str(Path(run.store.path()).parent)
    command, name, *rest = arguments
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(["ckpt", command, name, "--store", store, *rest])
    return code, out.getvalue(), err.getvalue()


def flipped(run: RunRecord, step: int) -> None:
    (path,) = Path(run.store.path(), "checkpoints", f"step-{step:08d}").glob("*.safetensors")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def listed(run: RunRecord) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(ckpt(run, "ls", run.name, "--json")[1])
    return rows


def test_the_list_tells_size_workers_stage_and_evaluation(run: RunRecord) -> None:
    rows = listed(run)
    assert [row["step"] for row in rows] == [2, 4, 6]
    losses = {row["step"]: row["validation/loss"] for row in run.stitched() if "validation/loss" in row}
    assert {row["step"]: row["evaluation"]["loss"] for row in rows} == losses
    assert {(row["world_size"], row["zero_stage"], row["precision"]) for row in rows} == {(1, 1, "fp32")}
    code, out, _ = ckpt(run, "ls", run.name)
    assert code == 0 and f"loss {losses[6]:.4g}" in out.splitlines()[-1]
    Path(run.store.path(), "checkpoints", "step-00000004", "manifest.json").unlink()
    assert "error" in listed(run)[1] and "step 4: " in ckpt(run, "ls", run.name)[1]


def test_who_may_only_read_may_verify(run: RunRecord, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(writer: RowWriter) -> None:
        raise Unreachable("the store is read-only")

    monkeypatch.setattr(RowWriter, "close", refuse)
    code, out, _ = ckpt(run, "verify", f"{run.name}@4")
    assert code == 0 and "step 4: good" in out


def test_damage_is_named_and_the_good_ones_are_told(run: RunRecord) -> None:
    run.event("later")  # of a launcher that is at work
    assert ckpt(run, "verify", run.name)[0] == 0
    run.event("later still")
    flipped(run, 6)
    code, out, err = ckpt(run, "verify", run.name)
    assert code == 1 and "step 4: good" in out and "step 6: " in out and ".safetensors" in out
    assert "1 of 3" in err and "Good ones: 4, 2" in err and "runs resume" in err
    assert ckpt(run, "verify", f"{run.name}@4")[0] == 0
    events = run.events()
    assert [event["kind"] for event in events if "later" in event["kind"]] == ["later", "later still"]
    found = [(event["step"], bool(event["damage"])) for event in events if event["kind"] == "checkpoint_verified"]
    assert found == [(6, False), (4, False), (2, False), (6, True), (4, False), (2, False), (4, False)]
    code, _, err = ckpt(run, "verify", f"{run.name}@5")
    assert code == 4 and "There is: 6, 4, 2" in err
    assert ckpt(run, "verify", f"{run.name}@x")[0] == 2


def test_a_store_out_of_reach_is_not_called_damaged(run: RunRecord, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: Any) -> Any:
        raise Unreachable("The store does not answer.")

    monkeypatch.setattr("trainer.checkpoint_files.read_manifest", unreachable)
    for command in ("ls", "verify"):
        code, _, err = ckpt(run, command, run.name)
        assert code == Unreachable.exit_code and "does not answer" in err and "damaged" not in err


def test_prune_keeps_the_newest_good_ones_and_what_is_asked_for(run: RunRecord) -> None:
    flipped(run, 6)
    assert "2 would go" not in ckpt(run, "prune", run.name, "--keep", "1", "--dry-run")[1]
    code, out, _ = ckpt(run, "prune", run.name, "--keep", "1")
    assert code == 0 and out == "1 deleted: 2\n"
    assert [row["step"] for row in listed(run)] == [4, 6]  # 6 is damaged: it does not count, and is newer


def test_prune_leaves_multiples_and_a_running_run_alone(run: RunRecord, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ckpt(run, "prune", run.name, "--keep", "1", "--every", "2")[1] == "0 deleted\n"
    monkeypatch.setattr(RunRecord, "status", lambda self: "running")
    code, _, err = ckpt(run, "prune", run.name, "--keep", "1")
    assert code == 2 and "is running" in err and "runs stop" in err
    assert [row["step"] for row in listed(run)] == [2, 4, 6]
