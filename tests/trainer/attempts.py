"""Attempts of whole runs in worker processes, and what they left in the record."""

from __future__ import annotations

import threading
from typing import Any

import torch

from configs.load import load
from data_pipelines.storage import Store
from tests.pool import run_workers
from trainer.checkpoint_files import CheckpointReader
from trainer.distributed import World
from trainer.progress import Progress
from trainer.record import RunRecord
from trainer.run_datasets import decide_datasets
from trainer.validate import validate


class StopAfter(Progress):
    """Asks for a stop once `step` steps are completed; the vote is taken in the next one."""

    def __init__(self, step: int | None, stop: threading.Event) -> None:
        self._at, self._stop = step, stop
        super().__init__()

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "step" and value == self._at:
            self._stop.set()


def work(world: World, store: str, run: str, attempt: int, stop_after: int | None) -> tuple[str, int]:
    from trainer import loop, session

    record = RunRecord.open(store, run, rank=world.rank)
    record.attempt = attempt
    stop = threading.Event()
    with session.open_session(record, world, StopAfter(stop_after if world.rank == 0 else None, stop)) as opened:
        outcome = loop.train(opened, stop)
    record.close()
    return outcome.outcome, outcome.step


def launched(config: dict[str, Any]) -> RunRecord:
    """The record of a run, its data sets decided on."""
    resolved = load(config)
    record = RunRecord.create(Store(config["store"]), resolved)
    decide_datasets(record, validate(resolved), print)
    return record


def train(config: dict[str, Any], *, world_size: int = 2, stop_after: int | None = None) -> RunRecord:
    """One attempt of a run, with so many workers whatever the config says."""
    record = launched(config)
    attempt = record.next_attempt()
    outcomes = run_workers(work, world_size, config["store"], config["name"], attempt, stop_after)
    expected = ("finished", config["steps"]) if stop_after is None else ("stopped", stop_after + 1)
    assert outcomes == [expected] * world_size
    record.close()
    return record


def state(record: RunRecord, step: int) -> dict[str, torch.Tensor]:
    """Everything in a checkpoint: weights, optimizer state and buffers, in full."""
    reader = CheckpointReader(record.store.child("checkpoints", f"step-{step:08d}"))
    assert reader.verify() == []
    found = {}
    for name in [*reader.manifest["parameters"], *reader.manifest["buffers"]]:
        for kind in reader.kinds(name):
            found[f"{kind}/{name}"] = reader.read(name, kind, 0, torch.Size(reader.shape(name)).numel())
    return found


def curve(record: RunRecord) -> list[dict[str, float]]:
    """All metrics by step that are no measurement of time or memory."""
    kept = ("step", "loss", "lr", "grad_norm", "items", "examples", "data/skipped_blocks")
    kept += ("validation/loss", "validation/bits_per_byte", "validation/accuracy")
    return [{name: row[name] for name in kept if name in row} for row in record.stitched()]


def data_state(record: RunRecord, step: int) -> dict[str, Any]:
    """A checkpoint's position in the data."""
    manifest = CheckpointReader(record.store.child("checkpoints", f"step-{step:08d}")).manifest
    data: dict[str, Any] = manifest["data"]
    return data
