"""np.memmap behind a torch Dataset and DataLoader, an example at a time: what most training scripts do."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler, RandomSampler, Sampler

from peers.cases import SEQ_LEN, Case
from peers.packing import boundaries

SETTINGS = (
    "np.memmap of the raw file, Dataset.__getitem__ gives a view, default_collate; DataLoader(num_workers=0, "
    "shuffle=True). b: rows cut from the stream, boundaries found by the end marks in collate_fn. Resume: a batch "
    "sampler that skips, as accelerate does; ranks: DistributedSampler"
)


def write(case: Case, folder: Path) -> None:
    pass


class Mapped(Dataset[Any]):
    def __init__(self, case: Case) -> None:
        rows = case.flat()
        size = int(np.prod(case.shape))
        self.rows = np.asarray(rows[: len(rows) // size * size].reshape(-1, *case.shape))
        self.as_bytes = case.key == "d"

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.rows[index].tobytes() if self.as_bytes else torch.from_numpy(self.rows[index])


def collate_packed(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.stack(rows)
    return tokens, boundaries(tokens)


class Skipping(Sampler[list[int]]):
    """The batches of a sampler from one on; the first time only."""

    def __init__(self, batches: Sampler[list[int]]) -> None:
        self.batches = batches
        self.skip = 0

    def __iter__(self) -> Iterator[list[int]]:
        skip, self.skip = self.skip, 0
        return islice(iter(self.batches), skip, None)


class Peer:
    def __init__(self, case: Case, folder: Path, batch: int, rank: int = 0, world_size: int = 1) -> None:
        assert case.key != "b" or case.shape == (SEQ_LEN,)
        dataset = self.dataset(case)
        sampler: Any
        if world_size == 1:
            sampler = RandomSampler(dataset, generator=torch.Generator().manual_seed(1))
        else:
            sampler = DistributedSampler(dataset, world_size, rank, shuffle=True, seed=1)
        self._global_batch = batch * world_size
        self._batches = Skipping(BatchSampler(sampler, batch, drop_last=world_size == 1))
        self._world_size = world_size
        self._loader = self.loader(dataset, self._batches, case)

    def dataset(self, case: Case) -> Any:
        return Mapped(case)

    def loader(self, dataset: Any, batches: Any, case: Case) -> DataLoader[Any]:
        collate = {"b": collate_packed, "d": list}.get(case.key)
        return DataLoader(dataset, batch_sampler=batches, collate_fn=collate)

    def epoch(self) -> Iterator[Any]:
        return iter(self._loader)

    def state(self, batches: int) -> Any:
        return {"examples": batches * self._global_batch}

    def load(self, state: Any) -> None:
        self._batches.skip = state["examples"] // self._global_batch

    def close(self) -> None:
        pass
