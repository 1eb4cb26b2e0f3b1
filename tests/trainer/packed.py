"""A packed split from documents in memory, and a batch of some of its sequences."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow as pa
import torch

from data_pipelines.index import Block
from data_pipelines.pack import PackedSplit
from data_pipelines.shards import BlockData
from trainer.tasks import language_modeling

EOS_ID = 0


def packed_split(documents: Sequence[Sequence[int]], seq_len: int, bytes_a_token: int = 4) -> PackedSplit:
    lengths = np.array([len(document) for document in documents])
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    data = BlockData(
        keys=pa.array([str(number) for number in range(len(documents))]),
        tokens=np.array([token for document in documents for token in document], np.uint16),
        offsets=offsets,
        marks=offsets.astype(np.int64) + np.arange(len(documents) + 1),
        num_bytes=lengths * bytes_a_token,
    )
    tokens = int(lengths.sum())
    block = Block("x.arrow", 0, 0, len(documents), 0, 0, tokens, tokens * bytes_a_token, 0)
    return PackedSplit([block], lambda _: data, seq_len, EOS_ID)


def batch_of(
    split: PackedSplit, config: language_modeling.Config, sample_ids: Iterable[int]
) -> dict[str, torch.Tensor]:
    rows = [language_modeling.prepare(split[number], np.random.default_rng(0), config) for number in sample_ids]
    return {name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in rows[0]}
