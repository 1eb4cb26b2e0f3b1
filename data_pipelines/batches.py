"""Gathered examples cut into micro-batches of tensors.

Arrays of one shape are stacked. Stored lists, and arrays of `prepare` that the task says are ragged in their first k
axes, are padded to the longest of their *micro-batch*, never of more, so that a batch does not depend on what is read
with it. With them come their sizes, always: `<name>_length`, (B,) int32, where one axis is ragged; else `<name>_size`,
(B, k) int32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch

from configs.errors import UsageError
from data_pipelines.boundaries import Boundaries
from data_pipelines.buffers import Buffers

_LONG_ROW = 512  # elements from which copying row by row is faster than by a mask over all

Prepare = Callable[[Any, np.random.Generator], Mapping[str, np.ndarray]]


@dataclass(slots=True, eq=False)
class MicroBatch:
    """One global micro-batch. `tensors` are stacked along the first dimension, in the order of `sample_ids`."""

    index: int  # k: which global micro-batch of the step
    idle: bool  # repeats a micro-batch that another slot runs, or has no examples left; must contribute nothing
    sample_ids: np.ndarray  # (examples,) int64
    tensors: dict[str, torch.Tensor]


class Batcher:
    """Makes micro-batches of gathered examples, with `prepare` for each example or without.

    ragged: of arrays that `prepare` gives, by name: how many of their first axes may differ.
    """

    def __init__(self, prepare: Prepare | None, seed: int, threads: int, pad: float, ragged: Mapping[str, int]) -> None:
        assert threads >= 1, threads
        self._prepare = prepare
        self._seed = seed & 0xFFFFFFFFFFFFFFFF
        self._pad = pad
        self._ragged = ragged
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, "prepare") if prepare is not None and threads > 1 else None

    def close(self) -> None:
        """End the threads."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def cut(
        self,
        arrays: Mapping[str, Any],
        slots: Sequence[tuple[int, bool]],
        positions: np.ndarray,
        ids: np.ndarray,
        sizes: np.ndarray,
        buffers: Buffers,
    ) -> list[MicroBatch]:
        """A micro-batch for each slot (k, idle), of `sizes` (slots,) examples one after the other.

        arrays: name -> (examples, ...) array, Ragged or Boundaries; positions and ids (examples,) int64. The tensors
        lie in the arrays or in `buffers`.
        """
        counts = sizes.tolist()
        if self._prepare is not None:
            batches = self._collated(self._prepared(arrays, positions), counts, buffers)
        else:
            columns: dict[str, Sequence[torch.Tensor]] = {}
            for name, values in arrays.items():
                if isinstance(values, np.ndarray):
                    columns[name] = torch.from_numpy(values).split_with_sizes(counts)
                elif isinstance(values, Boundaries):
                    cuts, documents = values.cut(sizes, buffers)
                    columns[name] = torch.from_numpy(cuts).split_with_sizes(documents)
                else:
                    columns[name], columns[f"{name}_length"] = self._padded_lists(name, values, counts, buffers)
            names = tuple(columns)
            batches = [dict(zip(names, row)) for row in zip(*columns.values(), strict=True)]  # noqa: B905 - hot
        parts = [ids[start:end] for start, end in pairwise(accumulate(counts, initial=0))]
        return [
            MicroBatch(index, idle, part, tensors)
            for (index, idle), part, tensors in zip(slots, parts, batches, strict=True)
        ]

    def _padded_lists(
        self, name: str, ragged: Any, counts: list[int], buffers: Buffers
    ) -> tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]:
        """Stored lists as one padded tensor (B, longest, ...) a micro-batch, and lengths (B,) int32."""
        values, first = ragged.values, 0
        longest = int(np.maximum.reduce(ragged.lengths, initial=0))
        if len(values) == longest * len(ragged):  # all of one length, and nothing between them
            rows = torch.from_numpy(values.reshape(len(ragged), longest, *values.shape[1:]))
            sizes = torch.from_numpy(ragged.lengths.astype(np.int32))
            return rows.split_with_sizes(counts), sizes.split_with_sizes(counts)
        padded, lengths = [], []
        for number, count in enumerate(counts):
            starts, sizes = ragged.starts[first : first + count], ragged.lengths[first : first + count]
            first += count
            longest = int(sizes.max(initial=0))
            shape = (count, longest, *values.shape[1:])
            target = buffers.take(f"{name}/padded/{number}", shape, values.dtype)
            _pad_rows(values, starts, sizes, target, self._pad)
            padded.append(torch.from_numpy(target))
            lengths.append(torch.from_numpy(sizes.astype(np.int32)))
        return padded, lengths

    def _prepared(self, arrays: Mapping[str, Any], positions: np.ndarray) -> list[Mapping[str, np.ndarray]]:
        """prepare() of each example, in order."""
        total = len(positions)
        if self._pool is None:
            return self._prepare_rows(arrays, positions, 0, total)
        each = -(-total // (4 * self._threads))
        starts = range(0, total, max(1, each))
        parts = [self._pool.submit(self._prepare_rows, arrays, positions, start, start + each) for start in starts]
        return [row for part in parts for row in part.result()]

    def _prepare_rows(
        self, arrays: Mapping[str, Any], positions: np.ndarray, start: int, stop: int
    ) -> list[Mapping[str, np.ndarray]]:
        assert self._prepare is not None
        rows = []
        for number, position in enumerate(positions[start:stop].tolist(), start):
            row = {name: values[number] for name, values in arrays.items()}
            rows.append(self._prepare(row, np.random.default_rng((self._seed, position))))
        return rows

    def _collated(
        self, rows: list[Mapping[str, np.ndarray]], counts: list[int], buffers: Buffers
    ) -> list[dict[str, torch.Tensor]]:
        """The tensors of each micro-batch."""
        batches, start = [], 0
        for number, count in enumerate(counts):
            batch = rows[start : start + count]
            start += count
            tensors = {}
            for name in batch[0]:
                arrays = [np.asarray(row[name]) for row in batch]
                key, axes = f"{name}/prepared/{number}", self._ragged.get(name, 0)
                if len({array.shape for array in arrays}) == 1:
                    target = np.stack(arrays, out=buffers.take(key, (count, *arrays[0].shape), arrays[0].dtype))
                else:
                    target = buffers.take(key, (count, *_padded_shape(name, axes, arrays)), arrays[0].dtype)
                    _pad_arrays(arrays, target, self._pad)
                tensors[name] = torch.from_numpy(target)
                if axes:
                    sizes = np.array([array.shape[:axes] for array in arrays], np.int32)
                    if axes == 1:
                        tensors[f"{name}_length"] = torch.from_numpy(sizes.squeeze(1))
                    else:
                        tensors[f"{name}_size"] = torch.from_numpy(sizes)
            batches.append(tensors)
        return batches


def _padded_shape(name: str, axes: int, arrays: Sequence[np.ndarray]) -> tuple[int, ...]:
    """That which holds each of the arrays. Raises UsageError where they differ beyond their first `axes` sizes."""
    if len({(array.ndim, array.shape[axes:]) for array in arrays}) > 1:
        shapes = ", ".join(map(str, sorted({array.shape for array in arrays})[:3]))
        raise UsageError(
            f"Examples of one batch have '{name}' of shapes {shapes}; it may differ in its first {axes} sizes. Give "
            "them one shape in the task's preparation, or say in the task's RAGGED in how many axes they differ."
        )
    return tuple(map(max, zip(*(array.shape for array in arrays), strict=True)))


def _pad_arrays(arrays: Sequence[np.ndarray], target: np.ndarray, pad: float) -> None:
    """target[i] = arrays[i], in the corner of its first places, and `pad` around it."""
    target[:] = pad
    for row, array in zip(target, arrays, strict=True):
        row[tuple(map(slice, array.shape))] = array


def _pad_rows(values: np.ndarray, starts: np.ndarray, sizes: np.ndarray, target: np.ndarray, pad: float) -> None:
    """target[i] = values[starts[i] : starts[i] + sizes[i]], then `pad`."""
    if target.size < _LONG_ROW * len(target) and len(values):
        places = np.arange(target.shape[1])
        np.take(values, starts[:, None] + places, axis=0, out=target, mode="clip")
        target[places >= sizes[:, None]] = pad
        return
    for row, start, size in zip(target, starts.tolist(), sizes.tolist(), strict=True):
        row[:size] = values[start : start + size]
        row[size:] = pad
