"""Packing for loaders that have none: documents one after the other, cut to rows; where documents begin is kept."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch


def packed(documents: Iterable[np.ndarray], batch: int, seq_len: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(batch, seq_len) tokens and the cumulative lengths of their documents; rows cut documents."""
    size = batch * seq_len
    waiting: list[np.ndarray] = []
    num_waiting = 0
    for document in documents:
        waiting.append(document)
        num_waiting += len(document)
        while num_waiting >= size:
            stream = np.concatenate(waiting)
            is_start = np.zeros(size, bool)
            ends = np.cumsum([len(part) for part in waiting])
            is_start[ends[ends < size]] = True
            is_start[::seq_len] = True
            cuts = np.append(np.flatnonzero(is_start), size).astype(np.int32)
            yield torch.from_numpy(stream[:size]).view(batch, seq_len), torch.from_numpy(cuts)
            waiting = [stream[size:]]
            num_waiting = len(waiting[0])


def boundaries(tokens: torch.Tensor) -> torch.Tensor:
    """Where documents begin in packed rows that hold end marks 0: cumulative lengths, cut at the rows too."""
    is_start = tokens.numpy() == 0
    is_start[:, 0] = True
    starts = np.flatnonzero(is_start.reshape(-1))
    return torch.from_numpy(np.append(starts, is_start.size).astype(np.int32))
