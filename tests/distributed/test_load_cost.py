"""What a load costs a rank: it reads its own share, and holds little beside what it fills."""

from __future__ import annotations

import gc
import re
from pathlib import Path

import pytest
import torch

from configs.schema import CheckpointConfig
from data_pipelines.storage import Store
from tests.distributed.language_batches import rank_micro_batches
from tests.distributed.small_runs import Case, task
from tests.pool import run_workers
from trainer import checkpoint
from trainer.bound import BoundModel
from trainer.checkpoint import Checkpointer
from trainer.distributed import World
from trainer.engine import Engine
from trainer.engine_layout import parts_of
from trainer.models import gpt
from trainer.progress import Progress

pytestmark = pytest.mark.distributed

MODEL = gpt.Config(num_layers=3, hidden_size=320, num_heads=4)
CELLS = {(3, 2): [3, 0], (1, 3): [1, 2, 3]}  # (written at stage, by so many): stages that read it
KINDS = 3  # the master, and two of Adam
BESIDE = 10 << 20  # a piece of 4 MiB on its way and the one before, the headers of the files


def make_engine(world: World, stage: int) -> Engine:
    return Engine(BoundModel(gpt, MODEL, *task().io()), Case(stage).config(), world)


def write(world: World, folder: str, stage: int) -> None:
    engine = make_engine(world, stage)
    engine.train_step(task(), rank_micro_batches(engine.config, 0, world.rank, world.size), lr=1e-3, step=0)
    saver = Checkpointer(Store(folder), world, CheckpointConfig(keep=None), Progress())
    saver.save(1, engine, {}, wait=True)
    torch.distributed.barrier()


def peak() -> int:
    """The most memory that this process had since it was last reset, in bytes."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) << 10


def load(world: World, folder: str, stages: list[int]) -> list[dict[str, int]]:
    costs = []
    for stage in stages:
        engine = make_engine(world, stage)
        gc.collect()
        reader = checkpoint.find(Store(folder), 1)
        Path("/proc/self/clear_refs").write_text("5")
        before = peak()
        checkpoint.load(engine, reader)
        share = 4 * KINDS * sum(part.numel for part in parts_of(engine))
        costs.append({"read": reader.bytes_read, "share": share, "grown": peak() - before, "all": reader.size_bytes})
    return costs


@pytest.mark.parametrize(("written", "read_by"), [((3, 2), 3), ((1, 3), 2)])
def test_a_rank_reads_its_share_and_holds_little_more(tmp_path: Path, written: tuple[int, int], read_by: int) -> None:
    stage, size = written
    run_workers(write, size, str(tmp_path), stage)
    for costs in run_workers(load, read_by, str(tmp_path), CELLS[written]):
        for target, cost in zip(CELLS[written], costs, strict=True):
            assert cost["share"] <= cost["read"] <= 1.1 * cost["share"], (target, cost)
            if target:
                assert cost["share"] <= 1.01 * cost["all"] / read_by
        # The first load alone: the others use memory that it has freed. Masters were there before, Adam's state is made
        # by the load; below stage 3 gloo gathers the weights in memory of its own, as at every update.
        gathered = costs[0]["all"] / KINDS if CELLS[written][0] in (1, 2) else 0
        grown, share = costs[0]["grown"], costs[0]["share"]
        assert grown <= share * (KINDS - 1) / KINDS + gathered + BESIDE
