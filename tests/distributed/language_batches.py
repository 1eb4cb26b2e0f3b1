"""Small language-modelling batches with documents of uneven length, made of numbers alone.

The same in every process, so that workers and a plain loop train on the same examples.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from configs.schema import RunConfig
from data_pipelines.loader import MicroBatch
from data_pipelines.tokenizer import EOS_ID

VOCAB_SIZE = 257  # of the tokenizer `bytes`
SEQ_LEN = 16


def global_batch(config: RunConfig, step: int) -> dict[str, Tensor]:
    """Examples whose valid labels differ widely in number, so that a mean of the ranks' means would be wrong."""
    rng = np.random.default_rng((config.seed, step))
    examples = config.batch.global_batch_size
    tokens = np.empty((examples, SEQ_LEN + 1), np.uint16)
    tokens[:, 0] = rng.integers(1, VOCAB_SIZE, examples)
    ends = rng.random(tokens.shape) < 0.2
    for place in range(1, SEQ_LEN + 1):
        begins = tokens[:, place - 1] == EOS_ID
        follows = np.where(
            begins, rng.integers(1, VOCAB_SIZE, examples), tokens[:, place - 1] * 7 % (VOCAB_SIZE - 1) + 1
        )
        tokens[:, place] = np.where(ends[:, place], EOS_ID, follows)
    valid = rng.integers(1, SEQ_LEN + 1, examples, dtype=np.int32)
    tokens[np.arange(SEQ_LEN + 1) > valid[:, None]] = EOS_ID  # padding
    return {"tokens": torch.from_numpy(tokens), "valid": torch.from_numpy(valid)}


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
