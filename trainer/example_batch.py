"""Batches that a task makes up: with them a model is tried, and its memory is planned, without its data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_pipelines.batches import Batcher
from data_pipelines.buffers import Buffers
from data_pipelines.columns import Column
from data_pipelines.rows import Ragged
from data_pipelines.tokenizer import EOS_ID
from trainer.bound import BoundTask

_MADE_UP = 8  # rows; a larger batch repeats them


def example_batch(task: BoundTask, size: int) -> dict[str, Tensor]:
    """A training batch of `size` made-up examples, as a loader gives it."""
    batch = batch_of(task, example_rows(task, min(size, _MADE_UP)))
    rows = torch.arange(size) % min(size, _MADE_UP)
    return {name: tensor[rows] for name, tensor in batch.items()}


def stored_columns(task: BoundTask) -> list[Column]:
    """What a data set for this task holds, as far as it reads it."""
    rng = np.random.default_rng(0)
    rows = [task.example(rng) for _ in range(20)]
    return [column_of(name, [row[name] for row in rows]) for name in task.columns()]


def column_of(name: str, values: Sequence[Any]) -> Column:
    """The column that holds these values; arrays that differ in their first size are lists."""
    if isinstance(values[0], str | bytes):
        return Column(name, "utf8" if isinstance(values[0], str) else "binary")
    arrays = [np.asarray(value) for value in values]
    shape = arrays[0].shape
    if len({array.shape for array in arrays}) > 1:
        shape = (None, *shape[1:])
    return Column(name, arrays[0].dtype.name, shape)


def example_rows(task: BoundTask, count: int) -> list[dict[str, Any]]:
    """Examples as a loader reads them: packed sequences, the last one padded; or stored rows."""
    rng = np.random.default_rng(0)
    if (seq_len := task.packing()) is None:
        rows = [task.example(rng) for _ in range(count)]
        return [{name: _stored(row[name]) for name in task.columns()} for row in rows]
    rows = []
    for number in range(count):
        tokens = rng.integers(1, task.io()[0].vocab_size, seq_len + 1).astype(np.uint16)
        tokens[[0, seq_len // 2]] = EOS_ID  # two documents
        valid = seq_len if number + 1 < count else seq_len // 3
        tokens[valid + 1 :] = EOS_ID
        rows.append({"tokens": tokens, "valid": np.int32(valid)})
    return rows


def _stored(value: Any) -> np.ndarray:
    """As it is read: text and bytes are arrays of bytes."""
    raw = value.encode() if isinstance(value, str) else value
    return np.frombuffer(raw, np.uint8) if isinstance(raw, bytes) else np.asarray(value)


def batch_of(task: BoundTask, rows: list[dict[str, Any]], *, training: bool = True) -> dict[str, Tensor]:
    """The batch that a loader makes of these rows."""
    packed = task.packing() is not None
    columns = {} if packed else {column.name: column for column in stored_columns(task)}
    arrays: dict[str, Any] = {}
    for name in rows[0]:
        values = [row[name] for row in rows]
        if not packed and columns[name].is_ragged:
            offsets = np.cumsum([0, *map(len, values)])
            arrays[name] = Ragged.joined(np.concatenate(values), offsets)
        else:
            arrays[name] = np.stack(values)
    prepare = task.preparation(stored_columns(task), training=training)
    batcher = Batcher(prepare, 0, 1, task.pad, task.ragged)
    places = np.arange(len(rows))
    (made,) = batcher.cut(arrays, [(0, False)], places, places, np.array([len(rows)]), Buffers())
    return {name: tensor.clone() for name, tensor in made.tensors.items()}
