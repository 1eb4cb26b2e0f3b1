"""A step's examples as tensors: the same global batch at any number of ranks.

Step s takes the positions examples_seen + (s - start_step) * G .. + G - 1 of the global order (order.py). They are cut
into K = ceil(G / m) global micro-batches, fixed by position; rank r of w runs k = r, r + w, ... so that each rank has
ceil(K / w) of them. Say G = 10, m = 4, w = 2, at step 0 with ids i0 i1 ... i9:

    k = 0: i0 i1 i2 i3     k = 1: i4 i5 i6 i7     k = 2: i8 i9
    rank 0: k = 0, k = 2              rank 1: k = 1, and an idle slot that repeats k = 2

An idle slot keeps the collectives of the ranks in step; whoever runs it must let it contribute nothing. Position runs
on across epochs, so a batch may hold the end of one and the start of the next.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from configs.errors import UsageError
from data_pipelines.order import sample_ids

Prepare = Callable[[Any, np.random.Generator], Mapping[str, np.ndarray]]


class Examples(Protocol):
    """What a loader reads from: rows by sample id."""

    def __len__(self) -> int: ...

    def __getitem__(self, sample_id: int, /) -> Any: ...


@dataclass(frozen=True)
class MicroBatch:
    """One global micro-batch. `tensors` are stacked along the first dimension, in the order of `sample_ids`."""

    index: int  # k: which global micro-batch of the step
    idle: bool  # repeats a micro-batch that another slot runs; must contribute nothing
    sample_ids: np.ndarray  # (examples,) int64
    tensors: dict[str, torch.Tensor]


class Loader:
    """One rank's micro-batches, step by step; the next `prefetch` steps are made ready in a thread.

    `prepare(row, generator)` turns a row into arrays; its generator is seeded by (seed, position), so results depend
    neither on threads nor on ranks. Close it: it leaves no thread behind.
    """

    def __init__(
        self,
        examples: Examples,
        prepare: Prepare,
        *,
        seed: int,
        global_batch_size: int,
        micro_batch_size: int,
        rank: int,
        world_size: int,
        start_step: int = 0,
        examples_seen: int = 0,
        prefetch: int = 2,
    ) -> None:
        assert 0 <= rank < world_size, (rank, world_size)
        assert 1 <= micro_batch_size <= global_batch_size, (micro_batch_size, global_batch_size)
        if len(examples) == 0:
            raise UsageError("The training split is empty. Give the data source more documents.")
        self._examples = examples
        self._prepare = prepare
        self._seed = seed
        self._global_batch_size = global_batch_size
        self._micro_batch_size = micro_batch_size
        self._rank = rank
        self._world_size = world_size
        self._start_step = start_step
        self._examples_seen = examples_seen
        self._prefetch = prefetch
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="loader")
        self._ahead: dict[int, Future[list[MicroBatch]]] = {}
        self.wait_s = 0.0  # how long the last step() waited for its data

    def step(self, step: int) -> list[MicroBatch]:
        """This rank's micro-batches of a step; any step may be asked for, consecutive ones are ready.

        Raises what reading raised (Damaged, ...).
        """
        started = time.perf_counter()
        wanted = range(step, step + 1 + self._prefetch)
        for other in [other for other in self._ahead if other not in wanted]:
            self._ahead.pop(other).cancel()
        for coming in wanted:
            if coming not in self._ahead:
                self._ahead[coming] = self._thread.submit(self._load, coming)
        micro_batches = self._ahead.pop(step).result()
        self.wait_s = time.perf_counter() - started
        return micro_batches

    def close(self) -> None:
        """Stop prefetching and end the thread; may be called twice."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._ahead.clear()

    def positions(self, step: int) -> np.ndarray:
        """Global positions of a step's examples, (G,) int64."""
        first = self._examples_seen + (step - self._start_step) * self._global_batch_size
        return np.arange(first, first + self._global_batch_size, dtype=np.int64)

    def _load(self, step: int) -> list[MicroBatch]:
        positions = self.positions(step)
        ids = sample_ids(self._seed, len(self._examples), positions)
        return [
            _micro_batch(self._examples, self._prepare, index, idle, ids[cut], positions[cut], self._seed)
            for index, idle, cut in _slots(len(ids), self._micro_batch_size, self._rank, self._world_size)
        ]


def evaluation_batches(
    examples: Examples,
    prepare: Prepare,
    *,
    micro_batch_size: int,
    rank: int,
    world_size: int,
    num_examples: int | None = None,
) -> Iterator[MicroBatch]:
    """This rank's micro-batches of an evaluation: over all ranks each example once, the same number on every rank.

    num_examples: how many, spread evenly over the examples; None takes all. The generator of an example's `prepare` is
    seeded by its sample id alone.
    """
    total = len(examples)
    count = total if num_examples is None else min(num_examples, total)
    ids = np.arange(count, dtype=np.int64) * total // max(count, 1)
    for index, idle, cut in _slots(count, micro_batch_size, rank, world_size):
        yield _micro_batch(examples, prepare, index, idle, ids[cut], ids[cut], 0)


def _slots(count: int, micro_batch_size: int, rank: int, world_size: int) -> Iterator[tuple[int, bool, slice]]:
    """(global micro-batch, idle, its part of the batch) for each of a rank's slots; idle ones take the last."""
    num_micro_batches = -(-count // micro_batch_size)
    for slot in range(-(-num_micro_batches // world_size)):
        wanted = rank + slot * world_size
        index = min(wanted, num_micro_batches - 1)
        yield index, wanted > index, slice(index * micro_batch_size, min((index + 1) * micro_batch_size, count))


def _micro_batch(
    examples: Examples,
    prepare: Prepare,
    index: int,
    idle: bool,
    ids: np.ndarray,
    positions: np.ndarray,
    seed: int,
) -> MicroBatch:
    rows = [
        prepare(examples[sample_id], np.random.default_rng((seed & 0xFFFFFFFFFFFFFFFF, position)))
        for sample_id, position in zip(ids.tolist(), positions.tolist(), strict=True)
    ]
    return MicroBatch(index, idle, ids, {name: _stack([row[name] for row in rows]) for name in rows[0]})


def _stack(arrays: Sequence[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.stack(arrays))
