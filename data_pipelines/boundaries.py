"""Where documents begin in packed sequences, as attention kernels for sequences of varying length take it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from data_pipelines.buffers import Buffers


class Boundaries:
    """Where documents begin among the inputs of n packed sequences of T inputs; each sequence begins one.

    starts: (documents,) int64, ascending, in the n * T inputs laid end to end.
    """

    def __init__(self, starts: np.ndarray, num_rows: int, seq_len: int) -> None:
        self.starts = starts
        self.num_rows = num_rows
        self.seq_len = seq_len

    @classmethod
    def of(cls, tokens: np.ndarray, eos_id: int, memory: Buffers) -> Boundaries:
        """tokens (n, T + 1), whose documents are each led by an end mark."""
        num_rows, width = tokens.shape
        is_start = memory.take("is_start", tokens.shape, np.bool_)
        np.equal(tokens, eos_id, out=is_start)
        is_start[:, :1] = True
        is_start[:, -1:] = False  # a label alone
        places = np.flatnonzero(is_start)
        return cls(places - places // width, num_rows, width - 1)

    @classmethod
    def scattered(cls, parts: Sequence[Boundaries], rows: Sequence[np.ndarray]) -> Boundaries:
        """Of sequences that come from several parts: those of parts[i], in order, are number rows[i] (n_i,)."""
        seq_len = parts[0].seq_len
        starts = [
            here[part.starts // seq_len] * seq_len + part.starts % seq_len
            for part, here in zip(parts, rows, strict=True)
        ]
        return cls(np.sort(np.concatenate(starts)), sum(map(len, rows)), seq_len)

    def cut(self, counts: np.ndarray, memory: Buffers) -> tuple[np.ndarray, list[int]]:
        """`cu_seqlens` of micro-batches of so many (m,) sequences, one after the other in int32, and the size of each.

        They count from their micro-batch's first input; the last is the number of its inputs.
        """
        inputs = counts * self.seq_len  # (m,) of each micro-batch
        ends = np.cumsum(inputs)
        documents = np.diff(self.starts.searchsorted(ends), prepend=0)
        numbers = np.arange(len(counts))
        cuts = memory.take("cu_seqlens", (len(self.starts) + len(counts),), np.int32)
        cuts[np.arange(len(self.starts)) + np.repeat(numbers, documents)] = self.starts - np.repeat(
            ends - inputs, documents
        )
        cuts[np.cumsum(documents) + numbers] = inputs
        return cuts, (documents + 1).tolist()
