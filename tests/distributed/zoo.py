"""Any model of the zoo trained by the engine, and by a plain PyTorch loop on the same made-up rows: their losses.

`tests/distributed/test_zoo.py` runs a few cells of the grid, `benchmarks/parity_grid.py` all of it.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from types import ModuleType

import numpy as np
import torch
from torch import Tensor, nn

from configs.plugins import find_plugin
from configs.schema import RunConfig, Section
from data_pipelines.loader import MicroBatch
from tests.configs.minimal import minimal
from tests.contract.examples import bound_task, example_config
from trainer.bound import BoundModel, BoundTask
from trainer.distributed import World
from trainer.example_batch import batch_of, example_rows
from trainer.initialization import materialize
from trainer.rng import seed_forward

TASKS = {
    "mlp": "image_classification",
    "cnn": "image_classification",
    "rnn": "language_modeling",
    "lstm": "language_modeling",
    "gpt": "language_modeling",
    "bert": "masked_language_modeling",
    "seq2seq": "machine_translation",
    "detector": "object_detection",
    "unet": "medical_imaging",
    "hf-llama": "language_modeling",
    "hf-gpt2": "language_modeling",
    "hf-bert": "masked_language_modeling",
    "hf-vit": "image_classification",
}
_SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
ARCHITECTURES: dict[str, dict[str, float]] = {
    "llama": _SIZES | {"num_key_value_heads": 2},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "resid_pdrop": 0.1},
    "bert": _SIZES | {"hidden_dropout_prob": 0.1},
    "vit": _SIZES | {"patch_size": 4},
}
STEPS = 20
LR = {"rnn": 1e-2, "lstm": 1e-2}  # 1e-3 for the others; so that each learns enough to differ if it is wrong
MICRO_BATCH = 2
GLOBAL_BATCH = 5  # three micro-batches, the last with one example: with two workers one slot is idle
# Largest difference of a loss, as a share of the first. fp32: the order of sums; less precision: masters that differ in
# the last bit of fp32 round to other weights.
BOUNDS = {"fp32": 3e-5, "bf16": 5e-3, "fp16": 2e-3}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Cell:
    """A model, and how it is trained."""

    model: str
    stage: int
    precision: str
    world_size: int

    def config(self) -> RunConfig:
        return RunConfig.model_validate(
            minimal(
                seed=11,
                steps=STEPS,
                batch={"global_batch_size": GLOBAL_BATCH, "micro_batch_size": MICRO_BATCH},
                precision=self.precision,
                zero={"stage": self.stage},
                optimizer={"name": "adamw", "lr": self.lr, "weight_decay": 0.1, "clip_grad_norm": 0.5},
            )
        )

    @property
    def lr(self) -> float:
        return LR.get(self.model, 1e-3)

    def task(self) -> BoundTask:
        return bound_task(TASKS[self.model])

    def bound_model(self) -> BoundModel:
        name, _, architecture = self.model.partition("-")
        module = find_plugin("trainer.models", name)
        if architecture:
            config = _hf_config(module, architecture)
        elif name == "gpt":  # a tenth of its example's time, for grids of many cells
            config = module.Config(num_layers=2, hidden_size=16, num_heads=2, dropout=0.1)
        else:
            config = example_config(module)
        return BoundModel(module, config, *self.task().io())


def _hf_config(module: ModuleType, architecture: str) -> Section:
    config: Section = module.Config(architecture=architecture, settings=ARCHITECTURES[architecture])
    return config


def micro_batches(task: BoundTask) -> list[dict[str, Tensor]]:
    """The global micro-batches of every step: the same few examples again and again, so that the loss must fall."""
    rows = example_rows(task, GLOBAL_BATCH)
    return [batch_of(task, rows[start : start + MICRO_BATCH]) for start in range(0, len(rows), MICRO_BATCH)]


@functools.cache
def plain_losses(cell: Cell, skipped: tuple[int, ...]) -> list[float]:
    """Mean loss of each step by nothing but PyTorch: low precision in the model, everything else in fp32.

    skipped: steps without an update.
    """
    torch.set_num_threads(1)
    config, task, model, dtype = cell.config(), cell.task(), cell.bound_model(), DTYPES[cell.precision]
    with torch.device("meta"):
        module = model.build()
    materialize(module, model.init_parameter, seed=config.seed)
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)
    masters = [nn.Parameter(parameter.detach().float()) for parameter in module.parameters()]
    groups = [
        {"params": [master for master in masters if master.ndim > 1], "weight_decay": 0.1},
        {"params": [master for master in masters if master.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=cell.lr, betas=config.optimizer.betas, eps=config.optimizer.eps)
    batches = micro_batches(task)
    count = sum(task.num_items(batch) for batch in batches)
    losses = []
    for step in range(STEPS):
        total = 0.0
        for index, batch in enumerate(batches):
            seed_forward(config.seed, step, index)
            loss = task.loss(module, batch)
            total += loss.item()
            scale = 2.0**16 if cell.precision == "fp16" else 1.0
            gradients = torch.autograd.grad(loss / count * scale, list(module.parameters()), allow_unused=True)
            for master, gradient in zip(masters, gradients, strict=True):
                if gradient is not None:
                    ours = gradient.float() / scale
                    master.grad = ours if master.grad is None else master.grad + ours
        nn.utils.clip_grad_norm_(masters, 0.5)
        if step not in skipped:
            optimizer.step()
        optimizer.zero_grad()
        for parameter, master in zip(module.parameters(), masters, strict=True):
            parameter.data.copy_(master)
        losses.append(total / count)
    return losses


def engine_losses(world: World, cell: Cell) -> tuple[list[float], tuple[int, ...]]:
    """The same by the engine, as one rank; and the steps whose update the scaler of fp16 has taken back.

    Raises:
        UsageError: the cell is one that the engine refuses.
    """
    from trainer.engine import Engine

    config, task = cell.config(), cell.task()
    engine = Engine(cell.bound_model(), config, world)
    batches = micro_batches(task)
    mine = []
    for slot in range(config.accumulation(world.size)):
        wanted = world.rank + slot * world.size
        index = min(wanted, len(batches) - 1)
        mine.append(MicroBatch(index, wanted > index, np.arange(len(batches[index])), batches[index]))
    stats = [engine.train_step(task, mine, lr=cell.lr, step=step) for step in range(STEPS)]
    return [each.loss for each in stats], tuple(step for step, each in enumerate(stats) if each.skipped)


def difference(cell: Cell, losses: list[float], skipped: tuple[int, ...]) -> float:
    """The largest difference from the plain loop's losses, as a share of its first one."""
    plain = plain_losses(replace(cell, stage=1, world_size=1), skipped)
    assert len(skipped) <= 2, "the scaler has to find its scale in the first steps"
    assert plain[-1] < 0.95 * plain[0], "the plain loop must learn, or the comparison says little"
    assert all(map(math.isfinite, losses)) and len(losses) == len(plain)
    return max(abs(ours - theirs) / plain[0] for ours, theirs in zip(losses, plain, strict=True))
