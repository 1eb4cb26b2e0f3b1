"""Small images that show their class, made of numbers alone: the same in every process."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from configs.schema import RunConfig
from data_pipelines.loader import MicroBatch

IMAGE_PX = 8
NUM_CLASSES = 4


def global_micro_batches(config: RunConfig, step: int) -> list[dict[str, Tensor]]:
    """The micro-batches of a step, in their order: flat, rows, columns or a chessboard, with noise."""
    rng = np.random.default_rng((config.seed, step))
    examples, size = config.batch.global_batch_size, config.batch.micro_batch_size
    labels = rng.integers(0, NUM_CLASSES, examples)
    images = rng.integers(0, 120, (examples, IMAGE_PX, IMAGE_PX, 3)).astype(np.uint8)
    for image, label in zip(images, labels.tolist(), strict=True):
        image[:: 1 + label % 2, :: 1 + label // 2] += 100
    batch = {"image": torch.from_numpy(images), "label": torch.from_numpy(labels)}
    return [
        {name: tensor[start : start + size] for name, tensor in batch.items()} for start in range(0, examples, size)
    ]


def rank_micro_batches(config: RunConfig, step: int, rank: int, world_size: int) -> list[MicroBatch]:
    """What the loader gives a rank: k = rank, rank + w, ...; idle slots repeat the last."""
    micro_batches = global_micro_batches(config, step)
    mine = []
    for slot in range(config.accumulation(world_size)):
        k = rank + slot * world_size
        index = min(k, len(micro_batches) - 1)
        tensors = micro_batches[index]
        mine.append(MicroBatch(index, k > index, np.arange(len(tensors["label"])), tensors))
    return mine
