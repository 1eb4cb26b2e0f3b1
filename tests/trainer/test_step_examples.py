"""What a step took, told without its model: the loaders that trained it are the oracle."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from configs.errors import NotFound, ShardyardError, UsageError
from data_pipelines.data_state import Exceptions
from tests.tiny import tiny_config
from tests.trainer.attempts import launched, train
from tests.trainer.test_mixture_runs import config as mixture
from tests.trainer.test_ragged_runs import CHANGE
from tests.trainer.test_ragged_runs import mixture as signals
from trainer.checkpoint import find
from trainer.distributed import World
from trainer.record import RunRecord, recorded_datasets
from trainer.run_data import Position, RunData
from trainer.run_datasets import open_recorded
from trainer.step_examples import left_out, step_examples
from trainer.validate import validate

Taken = list[tuple[int, dict[str, torch.Tensor]]]  # sample ids with their tensors, in the order of a step


def loaded(record: RunRecord, steps: range, world_size: int, start: Position) -> list[Taken]:
    """What the ranks' loaders give for each step, of an attempt that begins at `start`."""
    plan = validate(record.resolved)
    taken: list[list[Any]] = [[] for _ in steps]
    with closing(RunData.of(open_recorded(record, plan), plan)) as data:
        for rank in range(world_size):
            with closing(data.loader(plan.config, World(rank, world_size, 0, torch.device("cpu")), start)) as loader:
                for step in steps:
                    taken[step - steps.start] += [
                        (batch.index, batch.sample_ids, {name: value.clone() for name, value in batch.tensors.items()})
                        for batch in loader.step(step)
                        if not batch.idle
                    ]
    return [
        [
            (sample_id, {name: value[place] for name, value in tensors.items()})
            for _, ids, tensors in sorted(batches, key=lambda each: each[0])
            for place, sample_id in enumerate(ids.tolist())
        ]
        for batches in taken
    ]


def texts(record: RunRecord, taken: Taken) -> list[str]:
    """Of sequences of tokens."""
    plan = validate(record.resolved)
    tokenizer = open_recorded(record, plan)[0].tokenizer
    assert tokenizer is not None
    return [tokenizer.decode(each["tokens"][1 : 1 + int(each["valid"])].numpy()) for _, each in taken]


@pytest.mark.parametrize("make", [tiny_config, mixture], ids=["text", "mixture"])
def test_sequences_of_text_resumed_at_another_world_size(tmp_path: Path, make: Any) -> None:
    record = launched(make(tmp_path))
    taken = loaded(record, range(5), 3, Position()) + loaded(record, range(5, 8), 2, Position(5, 25))
    for step, wanted in enumerate(taken, 1):
        found = step_examples(record, step, 100)
        assert (found["step"], found["total"]) == (step, 5)
        assert [each["sample_id"] for each in found["examples"]] == [sample_id for sample_id, _ in wanted]
        assert [each["position"] for each in found["examples"]] == list(range(5 * step - 5, 5 * step))
        shown = [each["values"]["tokens"] for each in found["examples"]]
        assert [each["text"] for each in shown] == texts(record, wanted)
        assert [each["length"] for each in shown] == [int(each["valid"]) for _, each in wanted]
        assert step_examples(record, step, 2)["examples"] == found["examples"][:2]
    names = {each["dataset"] for step in range(1, 9) for each in step_examples(record, step, 5)["examples"]}
    assert len(names) == (2 if make is mixture else 1)


def test_the_rows_that_a_sequence_is_made_of(tmp_path: Path) -> None:
    record = launched(tiny_config(tmp_path))
    (dataset,) = open_recorded(record, validate(record.resolved))
    documents = [tokens for _, tokens, _ in dataset.documents("train")]
    assert dataset.tokenizer is not None
    for each in step_examples(record, 3, 5)["examples"]:
        joined = np.concatenate([np.append(documents[row], 0) for row in each["rows"]])
        assert each["values"]["tokens"]["text"] in dataset.tokenizer.decode(joined)
        assert each["file"] == "train-00000-000.arrow" and len(each["rows"]) < len(documents)


def test_rows_of_like_length_of_a_mixture_that_changes(tmp_path: Path) -> None:
    record = launched(signals(tmp_path, CHANGE))
    for step, wanted in enumerate(loaded(record, range(12), 2, Position()), 1):
        found = step_examples(record, step, 100)["examples"]
        assert [each["sample_id"] for each in found] == [sample_id for sample_id, _ in wanted]
        assert {each["dataset"] for each in found} <= set(recorded_datasets(record.store))


def test_pictures_as_rows(tmp_path: Path) -> None:
    settings = {
        "task": {"name": "image_classification", "image_size": 8, "num_classes": 10, "channels": 1},
        "model": {"name": "cnn", "blocks": [1], "width": 8},
        "data": {"name": "digits"},
        "batch": {"global_batch_size": 7, "micro_batch_size": 3},
    }
    record = launched(tiny_config(tmp_path, **settings))
    for step, wanted in zip(range(3, 5), loaded(record, range(2, 4), 2, Position(2, 14)), strict=True):
        found = step_examples(record, step, 100)["examples"]
        assert [each["rows"] for each in found] == [[sample_id] for sample_id, _ in wanted]
        assert [each["values"]["label"] for each in found] == [int(each["label"]) for _, each in wanted]
        assert all("picture" in each["values"]["image"] for each in found)


def test_without_what_was_left_out(tmp_path: Path) -> None:
    """A block is skipped from step 3 on, and of step 5 the examples are passed over when it has diverged."""
    record = launched(tiny_config(tmp_path))
    record.attempt = 1
    record.event("started", step=0, world_size=2)
    record.event("data_skipped", step=2, position=10, blocks=[["validation", 0]])
    record.event("rolled_back", step=5, to=4, left_out=[20, 25])
    start = Position(0, 0, Exceptions().skip([("validation", 0)], 10).pass_over(np.arange(20, 25)))
    taken = loaded(record, range(8), 2, start)
    for step in (4, 5, 8):
        found = step_examples(record, step, 100)["examples"]
        assert [each["sample_id"] for each in found] == [sample_id for sample_id, _ in taken[step - 1]]
    assert found[0]["position"] == 40  # of step 8, where 35 would be without


def test_what_was_not_saved_is_forgotten_by_the_next_attempt() -> None:
    def events(start: int) -> list[dict[str, Any]]:
        return [
            {"kind": "started", "attempt": 1, "step": 0},
            {"kind": "data_skipped", "attempt": 1, "step": 6, "position": 30, "blocks": [["train", 3]]},
            {"kind": "rolled_back", "attempt": 1, "step": 9, "to": 4, "left_out": [40, 45]},
            {"kind": "started", "attempt": 2, "step": start},
        ]

    skipped, passed = Exceptions().skip([("train", 3)], 30), Exceptions().pass_over(np.arange(40, 45))
    assert left_out(events(4), Exceptions()) == Exceptions()
    assert left_out(events(6), Exceptions()) == passed
    assert left_out(events(8), Exceptions()) == replace(passed, skipped=skipped.skipped)
    assert left_out(events(4)[:3], Exceptions()) == replace(passed, skipped=skipped.skipped)


def test_what_cannot_be_told(tmp_path: Path) -> None:
    record = launched(tiny_config(tmp_path))
    for step in (0, 9):
        with pytest.raises(NotFound, match="has the steps 1 to 8"):
            step_examples(record, step, 1)
    record.attempt = 1
    record.event("started", step=0, data_fingerprint="f" * 32)
    with pytest.raises(UsageError, match=r"was trained on data set f+, but the data set is now \w+"):
        step_examples(record, 1, 1)
    (folder,) = (tmp_path / "runs" / "datasets").iterdir()
    folder.rename(folder.with_name("elsewhere"))
    with pytest.raises(ShardyardError, match=folder.name):
        step_examples(record, 1, 1)
    record.store.delete("datasets.json")
    with pytest.raises(NotFound, match="has not come to its data yet"):
        step_examples(record, 1, 1)


@pytest.mark.distributed
def test_a_branch_goes_on_where_its_parent_stood(tmp_path: Path) -> None:
    parent = train(tiny_config(tmp_path, steps=4), world_size=2)
    at_2 = parent.store.path("checkpoints/step-00000002")
    batch = {"global_batch_size": 3, "micro_batch_size": 2}
    given = tiny_config(tmp_path, name="branch", batch=batch, parent={"checkpoint": at_2, "state": "all"})
    branch = train(given, world_size=1)
    manifest = find(parent.store.child("checkpoints"), 2).manifest
    assert manifest["data"]["examples_seen"] == 10
    taken = loaded(branch, range(2, 8), 1, Position(2, 10))
    for step in (3, 8):  # by the parent's checkpoint, and by one of its own
        found = step_examples(branch, step, 100)["examples"]
        assert [each["sample_id"] for each in found] == [sample_id for sample_id, _ in taken[step - 3]]
    with pytest.raises(NotFound, match="Step 2 is its parent's"):
        step_examples(branch, 2, 1)
    parent.store.delete_dir()
    assert step_examples(branch, 8, 100)["examples"] == found
    with pytest.raises(NotFound, match="neither the parent's checkpoint can be read"):
        step_examples(branch, 3, 1)
