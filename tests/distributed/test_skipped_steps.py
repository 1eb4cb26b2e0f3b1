"""A step that is refused for its loss or gradient leaves all as it was: against runs that never make it."""

from __future__ import annotations

import gc
import hashlib
import json
import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from torch import Tensor

from configs.schema import RunConfig
from data_pipelines.loader import MicroBatch
from tests.distributed.small_runs import allow_emulated_fp16
from tests.distributed.test_exact import Cell, slots
from tests.distributed.zoo import Cell as ZooCell
from tests.pool import run_workers
from trainer.bound import BoundTask
from trainer.distributed import World, all_gather_json
from trainer.divergence import Limits

pytestmark = pytest.mark.distributed

CELLS = [Cell("mlp", 0, determinism="cluster"), Cell("mlp", 2, determinism="cluster")]
CELLS += [Cell("cnn", 3)]  # running statistics, in exact mode
MORE_CELLS = [Cell("gpt", stage, determinism="cluster") for stage in range(4)] + [Cell("cnn", 0), Cell("gpt", 2)]
MORE_CELLS += [Cell("gpt", stage, precision, determinism="cluster") for stage, precision in ((1, "bf16"), (3, "fp16"))]
STEPS, WRONG = 3, 1
LIMITS = {"spiking loss": Limits(loss=1e-9), "spiking gradient": Limits(grad_norm=1e-9)}  # all steps exceed them
WAYS = ("loss", "gradient", *LIMITS)


def wrong(task: BoundTask, way: str) -> BoundTask:
    """With a loss that is infinite, its gradients finite; or with gradients that are no numbers; else as it is."""

    def loss(*args: Any) -> Tensor:
        found: Tensor = task.module.loss(*args)
        return {"loss": found + math.inf, "gradient": found * math.nan}.get(way, found)

    return replace(task, module=SimpleNamespace(**vars(task.module) | {"loss": loss}))  # type: ignore[arg-type]


def ways_of(cell: Cell) -> list[str]:
    """Gradients that are no numbers are the business of fp16's scaler."""
    return [way for way in WAYS if cell.precision != "fp16" or way != "gradient"]


def train(world: World, cell: Cell, config: RunConfig, way: str = "") -> tuple[str, list[Any]]:
    """A digest of all state after the steps, and their losses and norms. WRONG is refused in `way`, or left out."""
    from trainer import engine_state
    from trainer.engine import Engine

    zoo = ZooCell(cell.model, cell.stage, cell.precision, world.size)
    task = zoo.task()
    engine = Engine(zoo.bound_model(), config, world)
    stats = []
    for step in range(STEPS):
        if step == WRONG and not way:
            continue
        here, limits = task, Limits()
        if step == WRONG:
            here, limits = wrong(task, way), LIMITS.get(way, limits)
        batches: list[MicroBatch] = slots(config, task, world)
        found = engine.train_step(here, batches, lr=1e-2, step=step, limits=limits)
        assert not found.skipped, (cell, way, found)
        if step != WRONG:
            stats.append((found.loss, found.grad_norm))
    digest = hashlib.sha256(json.dumps(engine_state.scalars(engine)).encode())
    for fragment in engine_state.fragments(engine):
        digest.update(fragment.name.encode() + fragment.kind.encode() + fragment.tensor.contiguous().numpy().tobytes())
    return digest.hexdigest(), stats


def work(world: World, cells: list[Cell]) -> list[Any]:
    allow_emulated_fp16()
    gc.freeze()
    report = []
    for cell in cells:
        config = cell.config()
        config = config.model_copy(update={"optimizer": config.optimizer.model_copy(update={"ema_decay": 0.5})})
        report.append([train(world, cell, config, way) for way in ("", *ways_of(cell))])
    return all_gather_json(report)


@pytest.mark.parametrize(
    ("world_size", "cells"),
    [(2, CELLS), pytest.param(1, CELLS, marks=pytest.mark.slow), pytest.param(2, MORE_CELLS, marks=pytest.mark.slow)],
)
def test_a_refused_step_is_as_if_it_had_not_been(world_size: int, cells: list[Cell]) -> None:
    for ranks in run_workers(work, world_size, cells):
        for report in ranks:
            for cell, (plain, *others) in zip(cells, report, strict=True):
                for way, found in zip(ways_of(cell), others, strict=True):
                    assert found == plain, (cell, way)
