"""Which examples a step took: by the run's data and their order alone, without its model and its weights.

What a step takes is a pure function of the recipe, of where the run began in its data, and of what it has left out,
which its events tell. So any step is answered at once, also where no checkpoint is left and no row was recorded.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from configs.errors import NotFound, ShardyardError, UsageError
from trainer.record import RunRecord, recorded_datasets

if TYPE_CHECKING:
    from data_pipelines.data_state import Exceptions
    from data_pipelines.pack import PackedSplit
    from data_pipelines.shards import Dataset
    from trainer.run_data import Position, RunData

_SHOWN_CHARACTERS = 400  # of a sequence's text
_SHOWN_ROWS = 16  # of those that a sequence is made of


def step_examples(record: RunRecord, step: int, most: int) -> dict[str, Any]:
    """The first `most` of the examples that all workers together took in a step, counted from 1, in their order.

    {"step", "total", "examples": [{"position", "sample_id", "dataset", "file", "rows", "values"}]}. total: of the
    step. dataset: the folder's name in the store. rows: numbers in its training split, in `file`, that the example is
    made of; of a sequence the first 16, and none where the packing tells none. values: as examples_of has them.

    Raises ShardyardErrors: the run has not come to its data, the data is gone, changed or damaged, ...
    """
    import torch

    from trainer.distributed import World
    from trainer.run_data import RunData, fingerprint
    from trainer.run_datasets import open_recorded
    from trainer.validate import validate

    if not 1 <= step <= record.config.steps:
        raise NotFound(f"Run '{record.name}' has the steps 1 to {record.config.steps:,}, and no step {step:,}.")
    if not recorded_datasets(record.store):
        raise NotFound(f"Run '{record.name}' has not come to its data yet, so no step has taken any.")
    plan = validate(record.resolved, sees_inputs=False)
    datasets, events = open_recorded(record, plan), record.events()
    trained_on = [event["data_fingerprint"] for event in events if "data_fingerprint" in event]
    if trained_on and trained_on[-1] != fingerprint(datasets):
        raise UsageError(
            f"Run '{record.name}' was trained on data set {trained_on[-1]}, but the data set is now "
            f"{fingerprint(datasets)}: the position in the data means nothing there. Restore the data to see what a "
            "step took."
        )
    with closing(RunData.of(datasets, plan)) as data:
        start = _beginning(record, data, step)
        start = replace(start, exceptions=left_out(events, start.exceptions))
        with closing(data.loader(plan.config, World(0, 1, 0, torch.device("cpu")), start)) as loader:
            positions, ids = loader.examples(step - 1)
        found = _described(data, ids[:most])
    shown = [{"position": position} | each for position, each in zip(positions[:most].tolist(), found, strict=True)]
    return {"step": step, "total": len(ids), "examples": shown}


def left_out(events: Sequence[dict[str, Any]], exceptions: Exceptions) -> Exceptions:
    """These, and what a run has left out besides, by its events in order.

    What an attempt left out and did not save is forgotten by the next one, which begins before it.
    """
    for number, event in enumerate(events):
        if event["kind"] == "data_skipped" and not _is_forgotten(event["step"], event, events[number:]):
            exceptions = exceptions.skip([(split, block) for split, block in event["blocks"]], event["position"])
        elif event["kind"] == "rolled_back" and not _is_forgotten(event["to"], event, events[number:]):
            exceptions = exceptions.pass_over(np.arange(*event["left_out"]))
    return exceptions


def _is_forgotten(step: int, event: dict[str, Any], later: Iterable[dict[str, Any]]) -> bool:
    """Whether a later attempt began at a checkpoint of this step or before: one that was saved before the event."""
    starts = [each for each in later if each["kind"] == "started" and each["attempt"] > event["attempt"]]
    return any(each["step"] <= step for each in starts)


def _beginning(record: RunRecord, data: RunData, step: int) -> Position:
    """A place of the run in its data before a step: a branch counts from its parent's, all others from the first."""
    from trainer import checkpoint
    from trainer.run_data import Position

    parent = record.config.parent
    if parent is None or parent.state != "all":
        return Position()
    own = checkpoint.newest(record.store.child("checkpoints"), before=step, contents=False)
    try:
        reader = checkpoint.open_checkpoint(parent.checkpoint) if own is None else own[1]
    except ShardyardError as error:
        raise NotFound(
            f"Run '{record.name}' goes on where its parent stood in the data, and neither the parent's checkpoint can "
            f"be read nor has it one of its own before step {step:,}: {error}"
        ) from error
    if step <= reader.manifest["step"]:
        raise NotFound(f"Step {step:,} is its parent's: run '{record.name}' begins after it. Look there.")
    return data.position(reader.manifest, f"Checkpoint {reader.store.path()}")


# --- what they hold


def _described(data: RunData, ids: np.ndarray) -> list[dict[str, Any]]:
    """Of each example where it is stored and what it is."""
    from data_pipelines.ownership import owners
    from data_pipelines.pack import PackedSplit

    parts = getattr(data.train, "parts", (data.train,))
    ends = np.cumsum([len(part) for part in parts])
    found: list[dict[str, Any]] = [{} for _ in ids]
    sources = owners(ends, ids)
    for source in np.unique(sources).tolist():
        part, dataset, here = parts[source], data.datasets[source], np.flatnonzero(sources == source)
        numbers = ids[here] - (ends[source] - len(part))
        files = dataset.index.splits["train"].file[owners(np.cumsum(part.block_examples), numbers)]
        shown = _sequences(dataset, part, numbers) if isinstance(part, PackedSplit) else _rows(dataset, numbers)
        for place, sample_id, file, each in zip(here.tolist(), ids[here].tolist(), files.tolist(), shown, strict=True):
            name = dataset.path.rstrip("/").rpartition("/")[2]
            found[place] = {"sample_id": sample_id, "dataset": name, "file": dataset.index.file_names[file]} | each
    return found


def _rows(dataset: Dataset, numbers: np.ndarray) -> list[dict[str, Any]]:
    from data_pipelines.inspect import examples_of

    values = examples_of(dataset, "train", numbers.tolist())
    return [{"rows": [number], "values": each} for number, each in zip(numbers.tolist(), values, strict=True)]


def _sequences(dataset: Dataset, packed: PackedSplit, numbers: np.ndarray) -> list[dict[str, Any]]:
    gathered = packed.gather(numbers)
    found = []
    for number, tokens, valid in zip(numbers.tolist(), gathered["tokens"], gathered["valid"].tolist(), strict=True):
        assert dataset.tokenizer is not None, "packed data is tokens"
        text = dataset.tokenizer.decode(tokens[1 : 1 + min(valid, _SHOWN_CHARACTERS)])[:_SHOWN_CHARACTERS]
        rows = packed.rows_of(number)[:_SHOWN_ROWS].tolist()
        found.append({"rows": rows, "values": {"tokens": {"text": text, "length": valid}}})
    return found
