"""A save copies masters and optimizer state behind training: what is saved are the bits of its step all the same.

The copy is held back until training waits for it, or for some seconds where it does not: then it reads what training
has made of the weights by that time.
"""

from __future__ import annotations

import gc
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.schema import CheckpointConfig, RunConfig
from data_pipelines.storage import Store
from tests.distributed.language_batches import rank_micro_batches
from tests.distributed.small_runs import Case, task
from tests.pool import run_workers
from trainer import checkpoint, engine_state
from trainer.checkpoint import Checkpointer
from trainer.distributed import World
from trainer.engine import Engine
from trainer.progress import Progress

pytestmark = pytest.mark.distributed

HELD_S = 3.0


@dataclass(frozen=True)
class Save:
    """A save, and what comes right after it: "step", "evaluation" or "load" (of an older checkpoint)."""

    case: Case
    then: str = "step"
    determinism: str = "cluster"

    def config(self) -> RunConfig:
        return self.case.config().model_copy(update={"determinism": self.determinism})


SAVES = [Save(Case(stage, clip=None)) for stage in (0, 1, 2, 3)]
SAVES += [Save(Case(stage, precision="bf16")) for stage in (1, 3)]
SAVES += [Save(Case(stage, ema_decay=0.5), then) for stage, then in ((1, "step"), (0, "evaluation"), (3, "evaluation"))]
SAVES += [Save(Case(stage), determinism="exact") for stage in (0, 2)]
SAVES += [Save(Case(2), "load"), Save(Case(3, offload=True))]


def step(engine: Engine, number: int) -> None:
    batches = rank_micro_batches(engine.config, number, engine.world.rank, engine.world.size)
    engine.train_step(task(), batches, lr=0.01, step=number)


def state(engine: Engine) -> dict[tuple[str, str, int], torch.Tensor]:
    return {(each.kind, each.name, each.start): each.tensor.clone() for each in engine_state.fragments(engine)}


def hold_back(saver: Checkpointer, engine: Engine) -> list[str]:
    """Let the next copy begin when training waits for it. Returns what training was at whenever it did, a list."""
    waits: list[str] = []
    waited_for = threading.Event()
    copy, wait = saver._buffer.copy, engine.reading.wait

    def late_copy(fragments: Any) -> Any:
        waited_for.wait(HELD_S)
        return copy(fragments)

    def noted_wait() -> None:
        if saver._thread is not None:
            waits.append(engine._progress.phase)
            waited_for.set()
        wait()

    saver._buffer.copy, engine.reading.wait = late_copy, noted_wait  # type: ignore[method-assign]
    return waits


def save_worker(world: World, folder: str, saves: list[Save]) -> list[dict[str, Any]]:
    gc.freeze()
    report = []
    for number, each in enumerate(saves):
        store = Store(f"{folder}/{number}")
        engine = Engine(each.case.model(), each.config(), world)
        saver = Checkpointer(store, world, CheckpointConfig(keep=None), Progress())
        step(engine, 0)
        saver.save(1, engine, {}, wait=True)
        step(engine, 1)
        torch.distributed.barrier()
        held = state(engine)
        waits = hold_back(saver, engine)
        saver.save(2, engine, {})
        if each.then == "evaluation":
            engine.evaluate(task(), iter(rank_micro_batches(engine.config, 0, world.rank, world.size)))
        elif each.then == "load":
            checkpoint.load(engine, checkpoint.find(store, 1))
        else:
            step(engine, 2)
        changed = state(engine)
        saver.wait()
        torch.distributed.barrier()
        reader = checkpoint.find(store, 2)
        found = {key: reader.read(key[1], key[0], key[2], key[2] + tensor.numel()) for key, tensor in held.items()}
        report.append(
            {
                "error": saver.last_error,
                "other bits": [key for key, tensor in held.items() if not torch.equal(found[key], tensor)],
                "waited in": waits[:1],
                "training went on": each.then == "evaluation"
                or any(not torch.equal(changed[key], tensor) for key, tensor in held.items()),
                "told": engine.reading.waited_s > 0,
            }
        )
    return report


@pytest.mark.parametrize("world_size", [1, 2])
def test_what_is_saved_are_the_bits_of_the_step_and_only_its_change_waits(tmp_path: Path, world_size: int) -> None:
    for report in run_workers(save_worker, world_size, str(tmp_path), SAVES):
        for each, found in zip(SAVES, report, strict=True):
            good = {"error": None, "other bits": [], "waited in": ["optimizer"], "training went on": True, "told": True}
            assert found == good, each


def buffers_worker(world: World, folder: str) -> tuple[list[str], bool]:
    """A CNN's running statistics change in the forward pass, which does not wait."""
    from tests.distributed.test_exact import Cell, slots
    from tests.distributed.zoo import Cell as ZooCell

    cell = Cell("cnn", 1, determinism="cluster")
    config, zoo = cell.config(), ZooCell("cnn", 1, "fp32", world.size)
    engine = Engine(zoo.bound_model(), config, world)
    saver = Checkpointer(Store(folder), world, CheckpointConfig(keep=None), Progress())
    engine.train_step(zoo.task(), slots(config, zoo.task(), world), lr=1e-2, step=0)
    held = state(engine)
    hold_back(saver, engine)
    saver.save(1, engine, {})
    engine.train_step(zoo.task(), slots(config, zoo.task(), world), lr=1e-2, step=1)
    saver.wait()
    reader = checkpoint.find(Store(folder), 1)
    buffers = {key: tensor for key, tensor in held.items() if key[0] == "buffer"}
    changed = state(engine)
    return [
        key[1]
        for key, tensor in buffers.items()
        if not torch.equal(reader.read(key[1], "buffer", 0, tensor.numel()), tensor)
    ], any(not torch.equal(changed[key], tensor) for key, tensor in buffers.items())


def test_buffers_are_copied_at_once(tmp_path: Path) -> None:
    assert run_workers(buffers_worker, 1, str(tmp_path)) == [([], True)]


def failing_copy_worker(world: World, folder: str) -> tuple[str | None, str | None]:
    case = Case(1)
    engine = Engine(case.model(), case.config(), world)
    saver = Checkpointer(Store(folder), world, CheckpointConfig(keep=None), Progress())
    copy = saver._buffer.copy

    def no_memory(fragments: Any) -> Any:
        raise MemoryError("no room for the copy")

    if world.rank == world.size - 1:
        saver._buffer.copy = no_memory  # type: ignore[method-assign]
    saver.save(1, engine, {})
    step(engine, 0)  # does not wait for ever
    saver.wait()
    failed = saver.last_error
    saver._buffer.copy = copy  # type: ignore[method-assign]
    saver.save(2, engine, {}, wait=True)
    return failed, saver.last_error


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_copy_that_fails_fails_its_save_and_nothing_else(tmp_path: Path, world_size: int) -> None:
    for failed, later in run_workers(failing_copy_worker, world_size, str(tmp_path)):
        assert failed is not None and "no room for the copy" in failed
        assert later is None
    assert checkpoint.saved_steps(Store(tmp_path)) == [2]
