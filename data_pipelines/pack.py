"""Documents packed to sequences of a fixed length, their boundaries kept; nothing is stored, nothing is dropped.

In a block the stored documents stand one after the other, each led by its end mark; one more end mark is thought at
the end. This is the block's stream:

    eos a1 a2 a3 eos b1 eos c1 c2 eos        3 documents of 3, 1 and 2 tokens: 4 + 2 + 3 = 9 stored

**concat**: sequence j of a block, of length T, is stream[j*T : j*T + T + 1]: inputs are its first T tokens, labels its
last T. So each token of each document, and its end, is a label exactly once. With T = 4:

    j = 0   tokens eos a1 a2 a3 eos     valid 4
    j = 1   tokens eos b1 eos c1 c2     valid 4
    j = 2   tokens c2 eos eos eos eos   valid 1, then padding

A block has ceil(stored / T) sequences: the number depends on seq_len alone. Only the last sequence of a block is
padded, so blocks of 1-4 MB lose nearly nothing. Padding is end marks, documents of their own.

**best_fit**: a document is split only where it is longer than T (best_fit.py): it gives whole sequences as above, and
a piece of what is left, led by an end mark in place of its first token (which was the last label before it). A sequence
of pieces is the pieces, then end marks; valid = their stored length. Here, with T = 4, a | b c would need 4 | 5:

    j = 0   tokens eos a1 a2 a3 eos     valid 4
    j = 1   tokens eos c1 c2 eos eos    valid 3
    j = 2   tokens eos b1 eos eos eos   valid 2

Again each token and each end is a label exactly once. The number of sequences of each block stands in the index.
In both, a token's document is the number of end marks before it in its sequence, and positions restart at each.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from configs.errors import Damaged
from data_pipelines import best_fit
from data_pipelines.boundaries import Boundaries
from data_pipelines.buffers import Buffers
from data_pipelines.index import REBUILD
from data_pipelines.native import copy_rows, view_at
from data_pipelines.ownership import owners

if TYPE_CHECKING:
    from data_pipelines.rows import Split

_PLANS_BYTES = 32 << 20  # of best-fit plans kept


class PackedSplit:
    """The sequences of a split whose column "tokens" holds lists of ids; see Examples. Safe for several threads.

    eos_id: the end mark that leads each stored document. boundaries: give "cu_seqlens" too.
    """

    def __init__(
        self, split: Split, seq_len: int, eos_id: int, kind: str = "concat", *, boundaries: bool = False
    ) -> None:
        assert seq_len >= 1 and kind in ("concat", "best_fit"), (seq_len, kind)
        self.name = split.name
        self.seq_len = seq_len
        self.eos_id = eos_id
        self.kind = kind
        self._boundaries = boundaries
        blocks = split.blocks
        self.num_documents = int(blocks.rows.sum())
        self.num_tokens = int(blocks.tokens.sum())  # labels: each token and each end
        self.num_bytes = int(blocks.text_bytes.sum())  # of the documents' text
        self._split = split
        self._stored = np.ascontiguousarray(blocks.tokens)
        self._values_at = split.values_at(np.arange(len(blocks)), "tokens")
        self._dtype = next(column.numpy_dtype for column in split.columns if column.name == "tokens")
        self._plans: dict[int, best_fit.Plan] = {}
        self._plans_bytes = 0
        self._lock = threading.Lock()
        self.block_examples = self._counts()  # (blocks,) int64
        self._ends = np.cumsum(self.block_examples)
        self._starts = self._ends - self.block_examples

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    @property
    def waste(self) -> float:
        """The share of all places that is padding."""
        return 1.0 - self.num_tokens / (len(self) * self.seq_len) if len(self) else 0.0

    def gather(self, ids: np.ndarray, out: Buffers | None = None, blocks: np.ndarray | None = None) -> dict[str, Any]:
        """Sequences (n,) int64 `ids`: "tokens" (n, T + 1) uint16 or uint32, "valid" (n,) int32, the labels that count.

        tokens[i, 1 : 1 + valid[i]] are those labels; what follows is padding. With boundaries there are "cu_seqlens",
        Boundaries, which become a tensor for each micro-batch. With `out` they lie in its memory.
        Raises IndexError for an id beyond the split, Damaged for a block that is broken.
        """
        memory = Buffers() if out is None else out
        tokens = memory.take("tokens", (len(ids), self.seq_len + 1), self._dtype)
        valid = memory.take("valid", (len(ids),), np.int32)
        if len(ids):
            self._copy(ids, self.block_of(ids) if blocks is None else blocks, tokens, valid)
        if not self._boundaries:
            return {"tokens": tokens, "valid": valid}
        return {"tokens": tokens, "valid": valid, "cu_seqlens": Boundaries.of(tokens, self.eos_id, memory)}

    def _copy(self, ids: np.ndarray, blocks: np.ndarray, tokens: np.ndarray, valid: np.ndarray) -> None:
        within = ids - self._starts[blocks]
        if self.kind == "concat":
            with self._split.located(blocks) as contents:
                begins = contents + self._values_at[blocks]
                self._copy_cuts(begins, self._stored[blocks], within * self.seq_len, tokens, valid)
        else:
            used, which = np.unique(blocks, return_inverse=True)
            with self._split.located(used) as contents:
                self._copy_planned(contents + self._values_at[used], used, which, within, tokens, valid)

    def rows_of(self, number: int) -> np.ndarray:
        """The rows of the split whose documents a sequence is cut from, (n,) int64; none are told of best_fit."""
        if self.kind != "concat":
            return np.empty(0, np.int64)
        (block,) = self.block_of(np.array([number])).tolist()
        ends = np.cumsum(self._split.lengths(block, "tokens"))
        start = (number - int(self._starts[block])) * self.seq_len
        first, last = ends.searchsorted([start, min(start + self.seq_len, int(ends[-1]) - 1)], side="right").tolist()
        return np.arange(first, last + 1) + int(self._split.block_examples[:block].sum())

    def block_of(self, ids: np.ndarray) -> np.ndarray:
        """The block that holds each of the sequences (n,): (n,) int64. Raises IndexError for a number that is none."""
        if len(ids) and not (ids.min() >= 0 and ids.max() < len(self)):
            raise IndexError(f"sequences {ids.min()} to {ids.max()} of {len(self)}")
        return owners(self._ends, ids)

    def prefetch(self, blocks: np.ndarray) -> None:
        """Say which blocks are wanted soon."""
        self._split.prefetch(blocks)

    def _copy_cuts(
        self, begins: np.ndarray, stored: np.ndarray, starts: np.ndarray, tokens: np.ndarray, valid: np.ndarray
    ) -> None:
        """Row i: stream[start : start + T + 1] of a block of stored[i] values that begin at the address begins[i]."""
        size = self._dtype.itemsize
        left = stored - starts  # stored tokens from the start on
        np.minimum(left, self.seq_len, out=valid, casting="unsafe")
        places = begins + starts * size
        if left.min() > self.seq_len:
            copy_rows(places, tokens)
            return
        short = np.flatnonzero(left <= self.seq_len)  # the last of its block: nothing may be read beyond it
        if len(short) < len(places):
            safe = places.copy()
            safe[short] = places[left.argmax()]
            copy_rows(safe, tokens)
        for row, place, count in zip(short.tolist(), places[short].tolist(), left[short].tolist(), strict=True):
            tokens[row, :count] = view_at(place, count, self._dtype)
            tokens[row, count:] = self.eos_id

    def _copy_planned(
        self,
        begins: np.ndarray,
        used: np.ndarray,
        which: np.ndarray,
        within: np.ndarray,
        tokens: np.ndarray,
        valid: np.ndarray,
    ) -> None:
        """Row i: sequence within[i] of the plan of block used[which[i]], whose values begin at begins[which[i]]."""
        plans = [self._plan(block) for block in used.tolist()]
        num_chunks = np.array([len(plan.chunks) for plan in plans])[which]
        streams = [
            view_at(begin, stored, self._dtype)
            for begin, stored in zip(begins.tolist(), self._stored[used].tolist(), strict=True)
        ]
        rows = np.flatnonzero(within < num_chunks)
        if len(rows):
            pairs = zip(which[rows].tolist(), within[rows].tolist(), strict=True)
            starts = np.array([plans[block].chunks[number] for block, number in pairs])
            cuts, counts = np.empty((len(rows), self.seq_len + 1), self._dtype), np.empty(len(rows), np.int32)
            self._copy_cuts(begins[which[rows]], self._stored[used[which[rows]]], starts, cuts, counts)
            tokens[rows], valid[rows] = cuts, counts
        padding = np.full(self.seq_len + 1, self.eos_id, self._dtype)
        rows = np.flatnonzero(within >= num_chunks)
        numbers = (within - num_chunks)[rows].tolist()
        for row, block, number in zip(rows.tolist(), which[rows].tolist(), numbers, strict=True):
            valid[row] = _copy_bin(plans[block], number, streams[block], padding, tokens[row])

    def _counts(self) -> np.ndarray:
        blocks = self._split.blocks
        if self.kind == "concat":
            return -(-self._stored // self.seq_len)
        counts: Any = blocks.packed.get(self.seq_len)
        if counts is None:  # built for another length: look at every block once
            every = range(len(blocks))
            counts = [best_fit.num_sequences(self._split.lengths(block, "tokens"), self.seq_len) for block in every]
        return np.asarray(counts, np.int64)

    def _plan(self, block: int) -> best_fit.Plan:
        with self._lock:
            plan = self._plans.pop(block, None)
            if plan is not None:
                self._plans[block] = plan  # used last
                return plan
        plan = best_fit.plan(self._split.lengths(block, "tokens"), self.seq_len)
        if len(plan) != self.block_examples[block]:
            raise Damaged(
                f"The index counts {self.block_examples[block]} sequences of {self.seq_len} tokens in block {block} of "
                f"the split '{self.name}', but its documents give {len(plan)}. {REBUILD}"
            )
        with self._lock:
            if block not in self._plans:
                self._plans[block] = plan
                self._plans_bytes += plan.num_bytes
            while self._plans_bytes > _PLANS_BYTES and len(self._plans) > 1:
                self._plans_bytes -= self._plans.pop(next(iter(self._plans))).num_bytes
        return plan


def _copy_bin(plan: best_fit.Plan, number: int, stream: np.ndarray, padding: np.ndarray, out: np.ndarray) -> int:
    """The pieces of a bin, each led by an end mark, and padding, into out (T + 1,); returns the pieces' length."""
    first, last = plan.bins[number : number + 2].tolist()
    starts, lengths = plan.starts[first:last].tolist(), plan.lengths[first:last].tolist()
    parts = [stream[start : start + length] for start, length in zip(starts, lengths, strict=True)]
    size = sum(lengths)
    parts.append(padding[size:])
    np.concatenate(parts, out=out)
    place = 0
    for length in lengths:
        out[place] = padding[0]
        place += length
    return size


def best_fit_counts(lengths: np.ndarray, seq_lens: Sequence[int]) -> dict[int, int]:
    """seq_len -> best-fit sequences of a block whose documents have these stored lengths (D,): for the index."""
    return {seq_len: best_fit.num_sequences(lengths, seq_len) for seq_len in seq_lens}
