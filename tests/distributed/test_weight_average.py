"""The average of the weights against torch's AveragedModel, in checkpoints too, at any stage and world size."""

from __future__ import annotations

import gc
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from configs.schema import CheckpointConfig
from data_pipelines.storage import Store
from tests.distributed.language_batches import rank_micro_batches
from tests.distributed.small_runs import Case, task
from tests.distributed.test_engine import full_weights
from tests.distributed.test_parity import full_masters
from tests.pool import run_workers
from trainer import checkpoint
from trainer.checkpoint import Checkpointer
from trainer.checkpoint_files import CheckpointReader
from trainer.engine import Engine
from trainer.progress import Progress

pytestmark = pytest.mark.distributed

DECAY = 0.3  # reached after three updates, so that both sides of the warm-up are tried
CASES = [Case(stage, ema_decay=DECAY, tied=True) for stage in range(4)]
CASES += [Case(stage, "adamw", "bf16", ema_decay=DECAY) for stage in (1, 2, 3)]


def step(engine: Engine, number: int) -> Any:
    batches = rank_micro_batches(engine.config, number, engine.world.rank, engine.world.size)
    return engine.train_step(task(), batches, lr=0.01, step=number)


def masters(engine: Engine) -> dict[str, Tensor]:
    return {name: each.clone() for name, each in full_masters(engine).items()}


def averaged_weights(engine: Engine) -> dict[str, Tensor]:
    with engine.inference():
        return masters(engine)


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def holder(masters: dict[str, Tensor]) -> nn.ParameterList:
    return nn.ParameterList(nn.Parameter(each.clone()) for each in masters.values())


def average_worker(world: Any, folder: str, cases: list[Case]) -> list[dict[str, bool]]:
    gc.freeze()
    report = []
    for number, case in enumerate(cases):
        engine = Engine(case.model(), case.config(), world)
        oracle = AveragedModel(
            holder(masters(engine)),
            avg_fn=lambda average, new, t: average + (1 - min(DECAY, float(t) / (9 + float(t)))) * (new - average),
        )
        oracle.update_parameters(holder(masters(engine)))  # its first is a copy
        for each in range(5):
            step(engine, each)
            oracle.update_parameters(holder(masters(engine)))
        before, forward = masters(engine), full_weights(engine)
        average = averaged_weights(engine)
        with engine.inference():
            shown = full_weights(engine)
        dtype = next(iter(shown.values())).dtype
        saver = Checkpointer(Store(f"{folder}/{number}"), world, CheckpointConfig(keep=None), Progress())
        saver.save(5, engine, {}, wait=True)
        torch.distributed.barrier()
        after = [step(engine, each).loss for each in (5, 6)]

        reader = checkpoint.find(Store(f"{folder}/{number}"), 5)
        resumed = Engine(case.model(), case.config(), world)
        checkpoint.load(resumed, reader)
        tuned = Engine(case.model(), case.config(), world)
        checkpoint.load_weights(tuned, reader)
        report.append(
            {
                "as torch's": all(
                    torch.allclose(a, b, rtol=1e-5, atol=1e-7)
                    for a, b in zip(average.values(), oracle.module.parameters(), strict=True)
                ),
                "another than the weights": not same(average, before),
                "used by inference": same(shown, {name: each.to(dtype) for name, each in average.items()}),
                "loaded": same(averaged_weights(resumed), average) and same(masters(resumed), before),
                "resumed": [step(resumed, each).loss for each in (5, 6)] == after,
                "resumed average": same(averaged_weights(resumed), averaged_weights(engine)),
                "as other runs begin with it": same(masters(tuned), average) and same(averaged_weights(tuned), average),
                "exported": all(torch.equal(average[n], each) for n, each in reader.weights() if n in average),
                "forward unharmed": same(forward, {name: each.to(dtype) for name, each in before.items()}),
            }
        )
    return report


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_average_is_torchs_and_is_evaluated_saved_and_resumed(tmp_path: Path, world_size: int) -> None:
    for report in run_workers(average_worker, world_size, str(tmp_path), CASES):
        for case, found in zip(CASES, report, strict=True):
            assert all(found.values()), (case, found)


def load_worker(world: Any, folder: str, sources: int) -> list[bool]:
    gc.freeze()
    equal = []
    for source in range(sources):
        reader = CheckpointReader(Store(f"{folder}/{source}").child("step-00000005"))
        stored = {
            name: reader.read(name, "ema", 0, math.prod(reader.shape(name))) for name in reader.manifest["ranges"]
        }
        for stage in range(4):
            case = Case(stage, ema_decay=DECAY, tied=True)
            engine = Engine(case.model(), case.config(), world)
            checkpoint.load(engine, reader)
            found = averaged_weights(engine)
            equal.append(all(torch.equal(found[name].flatten(), stored[name]) for name in found))
            assert engine.average is not None and engine.average.num_updates == 5
    return equal


@pytest.mark.parametrize(("written_by", "read_by"), [(2, 1), (1, 3)])
def test_it_loads_at_any_stage_and_world_size(tmp_path: Path, written_by: int, read_by: int) -> None:
    run_workers(average_worker, written_by, str(tmp_path), CASES[:4])
    for equal in run_workers(load_worker, read_by, str(tmp_path), 4):
        assert equal == [True] * 16


def overflow_worker(world: Any) -> bool:
    case = Case(0, ema_decay=DECAY)
    engine = Engine(case.model(), case.config(), world)
    step(engine, 0)
    before = averaged_weights(engine)
    next(engine.module.parameters()).register_hook(lambda gradient: gradient * float("inf"))
    assert step(engine, 1).grad_norm == float("inf")
    return same(before, averaged_weights(engine))


def test_a_step_that_was_not_applied_does_not_count() -> None:
    assert run_workers(overflow_worker, 1) == [True]
