"""Small language-modelling batches with documents of uneven length, made of numbers alone.

The same in every process, so that workers and a plain loop train on the same examples.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from configs.schema import RunConfig
from data_pipelines.loader import MicroBatch

VOCAB_SIZE = 257  # of the tokenizer `bytes`
SEQ_LEN = 16
IGNORED = -100


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
