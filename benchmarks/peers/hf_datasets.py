"""Hugging Face datasets: Arrow files, mapped."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import datasets.distributed
import numpy as np
import pyarrow as pa
import torch
from torch.utils.data import BatchSampler, DataLoader, RandomSampler

from peers.cases import NUM_CHUNKS, Case
from peers.packing import packed

datasets.disable_progress_bars()

SETTINGS = (
    "Dataset.save_to_disk (12 Arrow files), with_format('numpy') over Sequence(length=...) (d: binary, as bytes), "
    "DataLoader(sampler=BatchSampler(RandomSampler), batch_size=None) as its guide for PyTorch says; b: 256 documents "
    "a query, packed in Python. "
    "Ranks: to_iterable_dataset().shuffle(buffer_size=1000), split_dataset_by_node, state_dict"
)
_DOCUMENTS = 256


def write(case: Case, folder: Path) -> None:
    value = "uint16" if case.key in "ab" else "uint8"
    size = int(np.prod(case.shape))
    if case.key == "d":
        array = pa.array([row.tobytes() for row in case.rows()], pa.binary())
        feature: Any = datasets.Value("binary")
    elif case.key == "b":
        offsets = pa.array(np.load(case.raw / "offsets.npy").astype(np.int32))
        array = pa.ListArray.from_arrays(offsets, pa.array(np.asarray(case.flat())))
        feature = datasets.List(datasets.Value(value))
    else:
        array = pa.FixedSizeListArray.from_arrays(pa.array(np.asarray(case.flat())), size)
        feature = datasets.List(datasets.Value(value), length=size)
    table = datasets.table.InMemoryTable(pa.table({"x": array}))
    datasets.Dataset(table, info=datasets.DatasetInfo(features=datasets.Features({"x": feature}))).save_to_disk(
        folder, num_shards=NUM_CHUNKS
    )


class Peer:
    def __init__(self, case: Case, folder: Path, batch: int, rank: int = 0, world_size: int = 1) -> None:
        self._case, self._batch = case, batch
        self._skip = 0
        dataset = datasets.load_from_disk(str(folder))
        self._dataset = dataset if case.key == "d" else dataset.with_format("numpy")
        self._streamed: Any = None
        if world_size > 1:
            streamed = dataset.to_iterable_dataset(num_shards=NUM_CHUNKS).with_format("numpy")
            streamed = streamed.shuffle(seed=1, buffer_size=1000)
            self._streamed = datasets.distributed.split_dataset_by_node(streamed, rank, world_size)

    def epoch(self) -> Iterator[Any]:
        if self._streamed is not None:
            yield from (batch["x"] for batch in self._streamed.iter(batch_size=self._batch))
            return
        size = _DOCUMENTS if self._case.key == "b" else self._batch
        order = RandomSampler(self._dataset, generator=torch.Generator().manual_seed(1))
        batches = list(BatchSampler(order, size, drop_last=True))[self._skip :]
        self._skip = 0
        queries = (rows["x"] for rows in DataLoader(self._dataset, sampler=batches, batch_size=None, collate_fn=_same))
        if self._case.key == "b":
            yield from packed((document for query in queries for document in query), self._batch, self._case.shape[0])
        elif self._case.key == "d":
            yield from queries
        else:
            for rows in queries:
                yield torch.from_numpy(rows).view(self._batch, *self._case.shape)

    def state(self, batches: int) -> Any:
        return batches if self._streamed is None else self._streamed.state_dict()

    def load(self, state: Any) -> None:
        if self._streamed is None:
            self._skip = state
        else:
            self._streamed.load_state_dict(state)

    def close(self) -> None:
        pass


def _same(rows: Any) -> Any:
    return rows
