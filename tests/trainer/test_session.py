"""Whole runs in worker processes: resumed, branched, fine-tuned. The oracle is the run that was never disturbed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cluster.cli import parse
from cluster.commands import train as command
from configs.load import load
from data_pipelines.loader import evaluation_batches
from tests.pool import WorkerFailed, run_workers
from tests.tiny import tiny_config, write_recipe
from tests.trainer.attempts import curve, data_state, launched, state, train
from trainer.checkpoint_files import CheckpointReader
from trainer.distributed import World
from trainer.generate import distinct
from trainer.inference import export_checkpoint
from trainer.progress import Progress
from trainer.record import RunRecord

pytestmark = pytest.mark.distributed


def assert_equal_runs(found: RunRecord, expected: RunRecord, from_step: int = 0) -> None:
    mine, theirs = state(found, 8), state(expected, 8)
    assert mine.keys() == theirs.keys()
    assert {name.partition("/")[0] for name in mine} == {"master", "exp_avg", "exp_avg_sq"}
    assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []
    assert curve(found) == [row for row in curve(expected) if row["step"] > from_step]
    assert samples(found)[-1] == samples(expected)[-1]


def samples(record: RunRecord) -> list[str]:
    return [event["text"] for event in record.events() if event["kind"] == "sample"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("session")


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> RunRecord:
    return train(tiny_config(folder))


def test_the_record_of_a_run_tells_all(undisturbed: RunRecord) -> None:
    rows = undisturbed.stitched()
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert [row["examples"] for row in rows] == [5 * step for step in range(1, 9)]
    assert [row["step"] for row in rows if "validation/bits_per_byte" in row] == [4, 8]
    assert {"loss", "lr", "grad_norm", "tokens_per_s", "step_s", "data_wait_s"} <= rows[0].keys()
    assert [row["step"] for row in undisturbed.checkpoints()] == [2, 4, 6, 8]
    data = data_state(undisturbed, 6)
    assert data["examples_seen"] == 30 and data["exceptions"] == []
    assert data["dataset"]["splits"]["train"]["rows"] > 0
    (text,) = samples(undisturbed)
    assert undisturbed.stitched()[-1]["sample/distinct_2"] == distinct(text, 2)


def test_a_stopped_run_goes_on_as_if_it_had_never_stopped(folder: Path, undisturbed: RunRecord) -> None:
    config = tiny_config(folder, name="stopped")
    stopped = train(config, stop_after=4)
    assert [row["step"] for row in stopped.checkpoints()] == [2, 4, 5]  # between two regular ones
    shutil.copytree(folder / "runs" / "stopped", folder / "copy" / "stopped")
    assert_equal_runs(train(config), undisturbed)

    # The same from before the newest checkpoint, which is damaged: it is named and skipped.
    newest = next((folder / "copy" / "stopped" / "checkpoints" / "step-00000005").glob("*.safetensors"))
    newest.write_bytes(newest.read_bytes()[:-100])
    resumed = train(config | {"store": str(folder / "copy")})
    damage = [event["error"] for event in resumed.events() if event["kind"] == "checkpoint_damaged"]
    assert len(damage) == 1 and newest.name in damage[0] and "skipped" in damage[0]
    assert [event["step"] for event in resumed.events() if event["kind"] == "started"] == [0, 4]
    assert_equal_runs(resumed, undisturbed)


def copied(folder: Path, record: RunRecord, name: str) -> Path:
    """The checkpoints of a copy of a run, in a store of its own."""
    shutil.copytree(record.store.uri, folder / name / record.name)
    return folder / name / record.name / "checkpoints"


def flip_last(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)


def damage_of(record: RunRecord) -> list[str]:
    return [event["error"] for event in record.events() if event["kind"] == "checkpoint_damaged"]


def test_damage_that_one_rank_meets_sends_all_to_an_older_checkpoint(folder: Path, undisturbed: RunRecord) -> None:
    """The sizes are right, so it is met in the middle of the load, by the rank that reads that block."""
    config = tiny_config(folder, name="cut")
    stopped = train(config, stop_after=4)
    for name, damaged, start in (("one", [5], 4), ("all", [5, 4, 2], 0)):
        checkpoints = copied(folder, stopped, name)
        for step in damaged:
            flip_last(sorted((checkpoints / f"step-{step:08d}").glob("*.safetensors"))[1])
        resumed = train(config | {"store": str(folder / name)})
        assert len(damage_of(resumed)) == len(damaged)
        assert all("fails its digest" in each and "skipped" in each for each in damage_of(resumed))
        assert [event["step"] for event in resumed.events() if event["kind"] == "started"] == [0, start]
        assert_equal_runs(resumed, undisturbed)  # of a damaged one nothing is left, in the optimizer neither


def parent(record: RunRecord, step: int, state: str) -> dict[str, str]:
    return {"checkpoint": record.store.path(f"checkpoints/step-{step:08d}"), "state": state}


def test_a_branch_that_changes_nothing_ends_where_its_parent_did(folder: Path, undisturbed: RunRecord) -> None:
    branch = train(tiny_config(folder, name="branch", parent=parent(undisturbed, 4, "all")))
    assert_equal_runs(branch, undisturbed, from_step=4)


def test_fine_tuning_begins_with_the_parents_weights_and_a_fresh_optimizer(
    folder: Path, undisturbed: RunRecord
) -> None:
    config = tiny_config(folder, name="tuned", steps=1, optimizer={"lr": 0.0}, seed=5)
    tuned = train(config | {"parent": parent(undisturbed, 8, "weights")}, world_size=1)
    found, expected = state(tuned, 1), state(undisturbed, 8)
    for name in expected:
        if name.startswith("master/"):
            assert torch.equal(found[name], expected[name])
    assert tuned.stitched()[0]["examples"] == 5
    assert tuned.stitched()[0]["validation/loss"] == pytest.approx(
        undisturbed.stitched()[-1]["validation/loss"], abs=1e-6
    )


def test_fine_tuning_from_a_hugging_face_folder(folder: Path, undisturbed: RunRecord) -> None:
    reader = CheckpointReader(undisturbed.store.child("checkpoints", "step-00000008"))
    export_checkpoint(reader, folder / "exported")
    source = {"checkpoint": str(folder / "exported"), "state": "weights"}
    tuned = train(tiny_config(folder, name="from-hf", steps=1, optimizer={"lr": 0.0}, parent=source), world_size=1)
    assert tuned.stitched()[0]["validation/loss"] == pytest.approx(
        undisturbed.stitched()[-1]["validation/loss"], abs=1e-6
    )


def test_weights_that_know_another_tokenizer_are_refused(folder: Path, undisturbed: RunRecord) -> None:
    """A BPE of the same size, trained on other text: the shapes fit, the meaning does not."""
    tokenizer = {"name": "bpe", "vocab_size": 300}
    task = {"name": "language_modeling", "seq_len": 32, "tokenizer": tokenizer}
    first = train(tiny_config(folder, name="bpe", steps=1, task=task), world_size=1)
    (folder / "other.txt").write_text("\n\n".join(f"{n} zulu zebra zigzag {n * n}" for n in range(80)))
    data = {"name": "text", "paths": [str(folder / "other.txt")], "separator": "\n\n"}
    config = tiny_config(folder, name="other-bpe", task=task, data=data, parent=parent(first, 1, "weights"))
    with pytest.raises(WorkerFailed, match=r"know the token ids of another tokenizer.*task\.tokenizer\.file"):
        train(config, world_size=1)


def launched_from(monkeypatch: pytest.MonkeyPatch, recipe: Path, source: str, *overrides: str) -> dict[str, Any]:
    """The config with which `shardyard train RECIPE --from SOURCE` launches."""
    found: list[Any] = []
    monkeypatch.setattr(command, "foreground", lambda _, recipe, overrides: found.append(load(recipe, overrides)))
    command.train(parse(["train", str(recipe), "--from", source, *overrides]))
    config: dict[str, Any] = found[0].config.model_dump(mode="json")
    return config


def test_fine_tuning_on_other_data_keeps_the_parents_tokenizer(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = folder / "other-data"
    task = {"name": "language_modeling", "seq_len": 32, "tokenizer": {"name": "bpe", "vocab_size": 300}}
    model = {"name": "gpt", "num_layers": 1, "hidden_size": 32, "num_heads": 2}
    recipe = write_recipe(folder, name="old", steps=2, task=task, model=model)
    old = train(tiny_config(folder, name="old", steps=2, task=task, model=model), world_size=1)
    tokenizer = CheckpointReader(old.store.child("checkpoints", "step-00000002")).manifest["tokenizer"]

    # On the parent's own data there is nothing to do: the data set has that tokenizer.
    same = launched_from(monkeypatch, recipe, "old@2", "name=same")
    assert "file" not in same["task"]["tokenizer"] and not (folder / "runs" / "tokenizers").exists()

    (folder / "other.txt").write_text("\n\n".join(f"{n} zulu zebra zigzag {n * n}" for n in range(80)))
    other = f'data={{name: text, paths: ["{folder / "other.txt"}"], separator: "\\n\\n"}}'
    capsys.readouterr()
    config = launched_from(monkeypatch, recipe, "old@2", "name=new", "steps=1", "optimizer.lr=0.0", other)
    (kept,) = (folder / "runs" / "tokenizers").iterdir()
    assert f'parent\'s tokenizer: task.tokenizer.file="{kept}"' in capsys.readouterr().out
    new = train(config, world_size=1)
    manifest = CheckpointReader(new.store.child("checkpoints", "step-00000001")).manifest
    assert manifest["tokenizer"] == tokenizer == kept.read_text()
    assert torch.equal(state(new, 1)["master/embedding.weight"], state(old, 2)["master/embedding.weight"])

    # The same from a Hugging Face folder, whose tokenizer.json adds marks; and from the new run.
    export_checkpoint(CheckpointReader(old.store.child("checkpoints", "step-00000002")), folder / "exported")
    for name, source in (("from-llama", str(folder / "exported")), ("grandchild", "new@1")):
        found = launched_from(monkeypatch, recipe, source, f"name={name}", "steps=1", other)
        assert found["task"]["tokenizer"]["file"] == str(kept)
        train(found, world_size=1)

    # Launched again it is the same run, though its parent is gone.
    shutil.rmtree(folder / "runs" / "old")
    again = launched_from(monkeypatch, recipe, "old@2", "name=new", "steps=1", "optimizer.lr=0.0", other)
    assert again == config


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model": {"name": "gpt", "num_layers": 2, "hidden_size": 32, "num_heads": 2}}, "model.num_layers"),
        ({"task": {"name": "language_modeling", "seq_len": 32, "tokenizer": {"vocab_size": 300}}}, "task.tokenizer"),
    ],
)
def test_weights_of_another_shape_or_meaning_are_refused(
    folder: Path, undisturbed: RunRecord, changes: dict[str, Any], named: str
) -> None:
    name = f"refused-{len(named)}"
    config = tiny_config(folder, name=name, parent=parent(undisturbed, 8, "weights"), **changes)
    with pytest.raises(WorkerFailed, match=f"(?s){named}.*every other key may change"):
        train(config, world_size=1)


def evaluated(world: World, config: dict[str, Any]) -> tuple[list[dict[str, float]], int, int]:
    from trainer import loop, session

    record = RunRecord.open(config["store"], config["name"], rank=world.rank)
    with session.open_session(record, world, Progress()) as opened:
        split = opened.data.validation
        options = {"micro_batch_size": 2, "rank": world.rank, "world_size": world.size}
        sums = [
            opened.engine.evaluate(opened.task, evaluation_batches(split, None, num_examples=number, **options))[0]
            for number in (None, 3)
        ]
        metrics = loop.evaluate(opened, None)
        sums[0]["loss"] = metrics["validation/loss"]
        labels = split.gather(np.arange(len(split)))["valid"]
        part = labels[np.arange(3) * len(split) // 3]
    record.close()
    return sums, int(labels.sum()), int(part.sum())


def test_evaluation_counts_each_example_once_at_any_world_size(folder: Path) -> None:
    losses = []
    for world_size in (1, 2, 3):
        config = tiny_config(folder, name=f"evaluated-{world_size}", resources={"workers": world_size})
        launched(config).close()
        (whole, part), all_labels, first_labels = run_workers(evaluated, world_size, config)[0]
        assert whole["tokens"] == all_labels
        assert part["tokens"] == first_labels
        losses.append(whole["loss"])
    assert max(losses) - min(losses) < 1e-6
