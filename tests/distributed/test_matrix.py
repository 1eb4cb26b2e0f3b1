"""Any to any: written at one ZeRO stage and world size, loaded at another, with models of the zoo.

After the load masters and optimizer state are the writer's bits, and five more steps are the writer's own. One launch
for each world size writes, and one reads. `make matrix` goes through all cells, `make test` through a few that hold
every pair of values of any two factors.
"""

from __future__ import annotations

import gc
import hashlib
import itertools
import random
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from configs.schema import CheckpointConfig, RunConfig
from data_pipelines.loader import MicroBatch
from data_pipelines.storage import Store
from tests.configs.minimal import minimal
from tests.distributed.small_runs import allow_emulated_fp16
from tests.distributed.test_checkpoint import everything
from tests.distributed.zoo import Cell as ZooCell
from tests.distributed.zoo import micro_batches
from tests.pool import run_workers
from trainer import checkpoint
from trainer.checkpoint import Checkpointer
from trainer.distributed import World
from trainer.engine import Engine
from trainer.engine_layout import persistent_buffers
from trainer.progress import Progress

pytestmark = pytest.mark.distributed

FACTORS: dict[str, list[Any]] = {
    "model": ["gpt", "cnn", "lstm"],
    "optimizer": ["adamw", "sgd"],
    "precision": ["fp32", "bf16", "fp16"],
    "offload": [False, True],
    "stage": [0, 1, 2, 3],
    "size": [1, 2, 3, 4],
    "to_stage": [0, 1, 2, 3],
    "to_size": [1, 2, 3, 4],
}
SAVED, STEPS = 2, 5
TOLERANCE = {"fp32": 1e-3, "bf16": 5e-2, "fp16": 2e-2}  # of the losses: the order of sums differs


class Source(NamedTuple):
    """What is written, at world size `size`."""

    model: str
    optimizer: str
    precision: str
    offload: bool
    stage: int
    size: int

    def config(self, stage: int) -> RunConfig:
        momentum = {"momentum": 0.9} if self.optimizer == "sgd" else {}
        return RunConfig.model_validate(
            minimal(
                seed=11,
                steps=SAVED + STEPS,
                batch={"global_batch_size": 5, "micro_batch_size": 2},
                precision=self.precision,
                zero={"stage": stage, "offload_optimizer": self.offload},
                optimizer={"name": self.optimizer, "lr": 1e-3, "weight_decay": 0.1, "clip_grad_norm": 0.5, **momentum},
            )
        )

    def folder(self, base: str) -> Store:
        return Store(f"{base}/{'-'.join(map(str, self))}")


class Cell(NamedTuple):
    """A source, and where it is loaded."""

    source: Source
    to_stage: int
    to_size: int


def all_cells() -> list[Cell]:
    """The whole product, less what a config refuses: stage 0 in low precision or with offload."""
    rows = itertools.product(*FACTORS.values())
    cells = [Cell(Source(*row[:6]), *row[6:]) for row in rows]
    return [
        cell
        for cell in cells
        if 0 not in (cell.source.stage, cell.to_stage) or (cell.source.precision == "fp32" and not cell.source.offload)
    ]


def pairs(cell: Cell) -> set[tuple[int, Any, int, Any]]:
    row = [*cell.source, cell.to_stage, cell.to_size]
    return {(i, row[i], j, row[j]) for i, j in itertools.combinations(range(len(row)), 2)}


def pairwise(cells: list[Cell], seed: int) -> list[Cell]:
    """Few cells that hold every pair of values that any cell holds: again and again that with most new pairs."""
    cells = random.Random(seed).sample(cells, len(cells))
    held = [pairs(cell) for cell in cells]
    wanted, chosen = set[tuple[int, Any, int, Any]]().union(*held), []
    while wanted:
        best = max(range(len(cells)), key=lambda index: len(held[index] & wanted))
        chosen.append(cells[best])
        wanted -= held[best]
    return chosen


# --- in the workers


def losses(engine: Engine, source: Source, world: World, steps: range) -> list[float]:
    zoo = ZooCell(source.model, engine.zero_stage, source.precision, world.size)
    task = zoo.task()
    mine = own_slots(engine.config, micro_batches(task), world)
    return [engine.train_step(task, mine, lr=1e-3, step=step).loss for step in steps]


def own_slots(config: RunConfig, batches: list[dict[str, Tensor]], world: World) -> list[MicroBatch]:
    """This rank's of a step's micro-batches; some are idle."""
    mine = []
    for wanted in range(world.rank, world.size * config.accumulation(world.size), world.size):
        index = min(wanted, len(batches) - 1)
        mine.append(
            MicroBatch(index, wanted > index, np.arange(len(next(iter(batches[index].values())))), batches[index])
        )
    return mine


def make_engine(source: Source, stage: int, world: World) -> Engine:
    if source.precision == "fp16":
        allow_emulated_fp16()
    model = ZooCell(source.model, stage, source.precision, world.size).bound_model()
    return Engine(model, source.config(stage), world)


def digests(engine: Engine) -> dict[str, str]:
    """Of masters, optimizer state, forward's weights and stored buffers, in full, by DeepSpeed's own functions."""
    stored = persistent_buffers(engine.module)
    return {
        name: hashlib.sha256(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, tensor in everything(engine).items()
        if not name.endswith(".buffer") or name.removesuffix(".buffer") in stored
    }


def write(world: World, base: str, sources: list[Source]) -> dict[Source, tuple[dict[str, str], list[float]]]:
    gc.freeze()
    found = {}
    for source in sources:
        engine = make_engine(source, source.stage, world)
        losses(engine, source, world, range(SAVED))
        saver = Checkpointer(source.folder(base), world, CheckpointConfig(keep=None), Progress())
        saver.save(SAVED, engine, {}, wait=True)
        state = digests(engine)
        found[source] = state, losses(engine, source, world, range(SAVED, SAVED + STEPS))
        assert saver.last_error is None
        saver.close()
    return found


def load(world: World, base: str, cells: list[Cell]) -> dict[Cell, tuple[dict[str, str], list[float]]]:
    gc.freeze()
    found = {}
    for cell in cells:
        engine = make_engine(cell.source, cell.to_stage, world)
        checkpoint.load(engine, checkpoint.find(cell.source.folder(base), SAVED))
        found[cell] = digests(engine), losses(engine, cell.source, world, range(SAVED, SAVED + STEPS))
    return found


# --- the tests


def check(base: str, cells: list[Cell], timeout_s: float) -> None:
    written: dict[Source, tuple[dict[str, str], list[float]]] = {}
    for size in FACTORS["size"]:
        sources = sorted({cell.source for cell in cells if cell.source.size == size})
        if sources:
            written |= run_workers(write, size, base, sources, timeout_s=timeout_s)[0]
    checked = 0
    for size in FACTORS["to_size"]:
        here = [cell for cell in cells if cell.to_size == size]
        for found in run_workers(load, size, base, here, timeout_s=timeout_s) if here else []:
            for cell, (state, after) in found.items():
                saved, expected = written[cell.source]
                different = [name for name in {*saved, *state} if saved.get(name) != state.get(name)]
                assert not different, f"{cell}: {sorted(different)[:5]}"
                tolerance = TOLERANCE[cell.source.precision]
                assert after == pytest.approx(expected, rel=tolerance), f"{cell}: {after} and {expected}"
        checked += len(here)
    print(f"{checked} cells, {len(written)} checkpoints")
    assert checked == len(cells)


def test_a_few_cells_that_hold_every_pair(tmp_path: Path) -> None:
    cells = all_cells()
    few = pairwise(cells, seed=0)
    assert len(few) < 40
    assert set().union(*map(pairs, few)) == set().union(*map(pairs, cells))
    check(str(tmp_path), few, timeout_s=120)


@pytest.mark.slow
@pytest.mark.parametrize("model", FACTORS["model"])
def test_every_cell(model: str, tmp_path: Path) -> None:
    check(str(tmp_path), [cell for cell in all_cells() if cell.source.model == model], timeout_s=3600)


def test_stage_0_in_low_precision_or_with_offload_is_refused_with_the_remedy() -> None:
    for source in (Source("gpt", "adamw", "bf16", False, 0, 1), Source("gpt", "adamw", "fp32", True, 0, 1)):
        with pytest.raises(ValueError, match=r"stage: 1|stage=1|stage 1"):
            source.config(0)
