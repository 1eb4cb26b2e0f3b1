"""Small runs for tests: a tiny GPT, and batches with documents of uneven length, made of numbers alone.

The same in every process, so that workers and a plain loop train on the same examples.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from configs.schema import RunConfig
from data_pipelines.loader import MicroBatch
from tests.configs.minimal import minimal
from trainer.bound import BoundModel, BoundTask
from trainer.models import gpt
from trainer.tasks import language_modeling

VOCAB_SIZE = 257  # of the tokenizer `bytes`
SEQ_LEN = 16
IGNORED = -100


@dataclass(frozen=True)
class Case:
    """7 examples in micro-batches of 2 are K = 4, the last with one example: at 3 workers 2 of 6 slots are idle."""

    stage: int = 0
    optimizer: str = "adamw"
    precision: str = "fp32"
    tied: bool = False
    offload: bool = False
    checkpointing: bool = False
    clip: float | None = 0.5
    micro_batch_size: int = 2
    num_layers: int = 1
    steps: int = 50

    def config(self) -> RunConfig:
        lr = {"sgd": 0.3, "rmsprop": 1e-3}.get(self.optimizer, 3e-3)
        momentum = 0.9 if self.optimizer in ("sgd", "rmsprop") else 0.0
        return RunConfig.model_validate(
            minimal(
                seed=11,
                steps=self.steps,
                batch={"global_batch_size": 7, "micro_batch_size": self.micro_batch_size},
                precision=self.precision,
                zero={"stage": self.stage, "offload_optimizer": self.offload},
                optimizer={
                    "name": self.optimizer,
                    "lr": lr,
                    "momentum": momentum,
                    "weight_decay": 0.1,
                    "clip_grad_norm": self.clip,
                },
            )
        )

    def model(self) -> BoundModel:
        config = gpt.Config(
            num_layers=self.num_layers,
            hidden_size=24,
            num_heads=4,
            num_kv_heads=2,
            intermediate_size=32,
            tie_embeddings=self.tied,
            dropout=0.1,
            activation_checkpointing=self.checkpointing,
        )
        return BoundModel(gpt, config, *task().io())

    def plain(self) -> Case:
        """The same for all cases that must train alike."""
        return replace(self, stage=1, offload=False, checkpointing=False)


def task() -> BoundTask:
    tokenizer = {"name": "bytes", "vocab_size": VOCAB_SIZE}
    return BoundTask(
        language_modeling, language_modeling.Config.model_validate({"seq_len": SEQ_LEN, "tokenizer": tokenizer})
    )


def global_batch(config: RunConfig, step: int) -> dict[str, Tensor]:
    """Examples whose valid labels differ widely in number, so that a mean of the ranks' means would be wrong."""
    rng = np.random.default_rng((config.seed, step))
    shape = (config.batch.global_batch_size, SEQ_LEN)
    tokens = rng.integers(0, VOCAB_SIZE, shape)
    labels = (tokens * 7 + 3) % VOCAB_SIZE
    valid = rng.integers(1, SEQ_LEN + 1, shape[0])
    labels[np.arange(SEQ_LEN) >= valid[:, None]] = IGNORED
    starts = rng.random(shape) < 0.2
    starts[:, 0] = True
    document = starts.cumsum(axis=1)
    first = np.maximum.accumulate(np.where(starts, np.arange(SEQ_LEN), 0), axis=1)
    arrays = {"tokens": tokens, "labels": labels, "document": document, "position": np.arange(SEQ_LEN) - first}
    return {name: torch.from_numpy(np.ascontiguousarray(array)).to(torch.int64) for name, array in arrays.items()}


def global_micro_batches(config: RunConfig, step: int) -> list[dict[str, Tensor]]:
    """The K micro-batches of a step, in their order."""
    batch, size = global_batch(config, step), config.batch.micro_batch_size
    return [
        {name: tensor[k * size : (k + 1) * size] for name, tensor in batch.items()}
        for k in range(config.num_micro_batches)
    ]


def rank_micro_batches(config: RunConfig, step: int, rank: int, world_size: int) -> list[MicroBatch]:
    """What the loader gives a rank: k = rank, rank + w, ...; idle slots repeat the last."""
    micro_batches = global_micro_batches(config, step)
    mine = []
    for slot in range(config.accumulation(world_size)):
        k = rank + slot * world_size
        idle = k >= len(micro_batches)
        index = len(micro_batches) - 1 if idle else k
        tensors = micro_batches[index]
        mine.append(MicroBatch(index, idle, np.arange(len(tensors["tokens"])), tensors))
    return mine


def allow_emulated_fp16() -> None:
    """PyTorch computes fp16 on any CPU, slowly: lets a worker see the path of processors that have it."""
    import deepspeed

    import trainer.engine

    type(deepspeed.get_accelerator()).is_fp16_supported = lambda self: True
    trainer.engine.unsupported = lambda device, precision: None  # type: ignore[assignment]
