"""Image classification with batch normalisation against a plain PyTorch loop with PyTorch's own BatchNorm2d.

The loop runs the global micro-batches in their order in one process. Whatever the ZeRO stage, the number of workers and
of idle slots: the same losses, final weights and running statistics, the last on every rank.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from configs.schema import RunConfig
from tests.configs.minimal import minimal
from tests.distributed.image_batches import IMAGE_PX, NUM_CLASSES, global_micro_batches, rank_micro_batches
from tests.pool import run_workers
from trainer.bound import BoundModel, BoundTask
from trainer.distributed import World
from trainer.initialization import materialize
from trainer.models import cnn
from trainer.parts.batch_norm import BatchNorm2d
from trainer.rng import seed_forward
from trainer.tasks import image_classification

pytestmark = pytest.mark.distributed

STEPS = 30


@dataclass(frozen=True)
class Trained:
    losses: list[float]
    state: dict[str, Tensor]  # masters and running statistics


def task() -> BoundTask:
    return BoundTask(image_classification, image_classification.Config(num_classes=NUM_CLASSES, image_size=IMAGE_PX))


def model() -> BoundModel:
    return BoundModel(cnn, cnn.Config(blocks=(1, 1), width=4, dropout=0.1), *task().io())


def config(stage: int, precision: str = "fp32") -> RunConfig:
    """7 examples in micro-batches of 2 are K = 4, the last with one example: at 3 workers 2 of 6 slots are idle."""
    return RunConfig.model_validate(
        minimal(
            seed=3,
            steps=STEPS,
            batch={"global_batch_size": 7, "micro_batch_size": 2},
            zero={"stage": stage},
            precision=precision,
            optimizer={"name": "sgd", "lr": 0.05, "momentum": 0.9, "clip_grad_norm": 5.0},
        )
    )


# --- the oracle


@functools.cache
def plain_training() -> Trained:
    torch.set_num_threads(1)
    settings = config(0)
    with torch.device("meta"):
        module = model().build()
    materialize(module, model().init_parameter, seed=settings.seed)
    module = with_plain_norms(module)
    optimizer = torch.optim.SGD(module.parameters(), lr=settings.optimizer.lr, momentum=0.9)
    losses = []
    for step in range(STEPS):
        total = 0.0
        for k, batch in enumerate(global_micro_batches(settings, step)):
            seed_forward(settings.seed, step, k)
            loss = task().loss(module, batch)
            (loss / settings.batch.global_batch_size).backward()
            total += loss.item()
        nn.utils.clip_grad_norm_(module.parameters(), 5.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total / settings.batch.global_batch_size)
    kept = {name: value for name, value in module.state_dict().items() if not name.endswith("num_batches_tracked")}
    return Trained(losses, kept)


def with_plain_norms(module: nn.Module) -> nn.Module:
    """The same with PyTorch's own BatchNorm2d in place of ours."""
    for name, child in module.named_children():
        if isinstance(child, BatchNorm2d):
            plain = nn.BatchNorm2d(len(child.weight), eps=child.eps, momentum=child.momentum)
            plain.weight, plain.bias = child.weight, child.bias
            setattr(module, name, plain)
        else:
            with_plain_norms(child)
    return module


# --- in the workers


def train(world: World, stage: int, precision: str) -> Trained:
    from trainer.engine import Engine

    settings = config(stage, precision)
    engine = Engine(model(), settings, world)
    losses = []
    for step in range(STEPS):
        micro_batches = rank_micro_batches(settings, step, world.rank, world.size)
        losses.append(engine.train_step(task(), micro_batches, lr=settings.optimizer.lr, step=step).loss)
    return Trained(losses, state_of(engine))


def state_of(engine: Any) -> dict[str, Tensor]:
    from deepspeed.utils import safe_get_full_fp32_param

    from trainer.engine_layout import persistent_buffers

    whole = dict(engine.module.named_parameters())
    if engine.zero_stage > 0:
        whole = {name: safe_get_full_fp32_param(parameter) for name, parameter in whole.items()}
    return {
        name: value.detach().clone() for name, value in [*whole.items(), *persistent_buffers(engine.module).items()]
    }


# --- the tests


@pytest.mark.parametrize(("stage", "world_size"), [(0, 1), (0, 3), (1, 2), (2, 3), (3, 1), (3, 3)])
def test_fp32(stage: int, world_size: int) -> None:
    plain = plain_training()
    assert sum(plain.losses[-5:]) < 0.85 * sum(plain.losses[:5]), (
        "the plain loop must learn, or the comparison says little"
    )
    ranks = run_workers(train, world_size, stage, "fp32")
    statistics = [name for name in plain.state if "running" in name]
    assert len(statistics) == 12  # of six norms
    for trained in ranks:
        assert trained.losses == pytest.approx(plain.losses, abs=2e-5)
        assert trained.state.keys() == plain.state.keys()
        for name, expected in plain.state.items():
            torch.testing.assert_close(trained.state[name], expected, atol=2e-5, rtol=2e-4, msg=name)
        for name in statistics:
            assert torch.equal(trained.state[name], ranks[0].state[name]), f"{name} differs between ranks"


@pytest.mark.parametrize("stage", [1, 3])
def test_bf16_keeps_statistics_in_fp32(stage: int) -> None:
    """DeepSpeed converts a module to bf16 as a whole; rounded at each step, a running mean would stop moving."""
    trained = run_workers(train, 2, stage, "bf16")[0]
    plain = plain_training()
    assert trained.losses == pytest.approx(plain.losses, abs=0.2)
    for name, value in trained.state.items():
        if "running" in name:
            assert value.dtype == torch.float32
            assert not torch.equal(value, value.bfloat16().float()), f"{name} was rounded"
