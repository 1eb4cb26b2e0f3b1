"""Class weights: over all micro-batches and workers together, PyTorch's own weighted mean of the whole batch."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F

from configs.schema import RunConfig
from tests.configs.minimal import minimal
from tests.distributed.image_batches import IMAGE_PX, NUM_CLASSES, global_micro_batches, rank_micro_batches
from tests.pool import run_workers
from trainer.bound import BoundModel, BoundTask
from trainer.distributed import World
from trainer.initialization import materialize
from trainer.models import mlp
from trainer.tasks import image_classification

pytestmark = pytest.mark.distributed

STEPS = 8
WEIGHTS = (0.02, 0.2, 0.05, 0.1)  # those of a batch add up to less than 1


def task() -> BoundTask:
    return BoundTask(
        image_classification,
        image_classification.Config(num_classes=NUM_CLASSES, image_size=IMAGE_PX, class_weights=WEIGHTS),
    )


def model() -> BoundModel:
    return BoundModel(mlp, mlp.Config(num_layers=1, hidden_size=16), *task().io())


def config(stage: int) -> RunConfig:
    return RunConfig.model_validate(
        minimal(
            seed=3,
            steps=STEPS,
            batch={"global_batch_size": 7, "micro_batch_size": 2},
            zero={"stage": stage},
            optimizer={"name": "sgd", "lr": 0.1, "clip_grad_norm": None},
        )
    )


@functools.cache
def plain_losses() -> list[float]:
    settings = config(0)
    with torch.device("meta"):
        module = model().build()
    materialize(module, model().init_parameter, seed=settings.seed)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    losses = []
    for step in range(STEPS):
        batches = global_micro_batches(settings, step)
        image = torch.cat([batch["image"] for batch in batches])
        label = torch.cat([batch["label"] for batch in batches])
        logits = module(((image.permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.25).contiguous())
        loss = F.cross_entropy(logits, label, weight=torch.tensor(WEIGHTS))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def train(world: World, stage: int) -> list[tuple[float, int]]:
    from trainer.engine import Engine

    settings = config(stage)
    engine = Engine(model(), settings, world)
    found = []
    for step in range(STEPS):
        stats = engine.train_step(task(), rank_micro_batches(settings, step, world.rank, world.size), lr=0.1, step=step)
        found.append((stats.loss, stats.num_items))
    return found


@pytest.mark.parametrize(("stage", "world_size"), [(0, 1), (2, 3), (3, 2)])  # three have idle slots
def test_the_loss_is_pytorch_s_weighted_mean(stage: int, world_size: int) -> None:
    (found, *others) = run_workers(train, world_size, stage)
    assert all(other == found for other in others)
    assert [loss for loss, _ in found] == pytest.approx(plain_losses(), rel=1e-4)
    assert {items for _, items in found} == {7}


def test_a_weight_for_each_class_is_asked_for() -> None:
    with pytest.raises(ValueError, match="class_weights has 2 numbers for 4 classes"):
        image_classification.Config(num_classes=4, image_size=8, class_weights=(1.0, 2.0))
    with pytest.raises(ValueError, match="greater than or equal to 0"):
        image_classification.Config(num_classes=2, image_size=8, class_weights=(1.0, -1.0))
    with pytest.raises(ValueError, match="nothing would count"):
        image_classification.Config(num_classes=2, image_size=8, class_weights=(0.0, 0.0))
