"""Documents packed into sequences without splitting those that fit in one, by best fit.

After Ding et al. 2024 (https://arxiv.org/abs/2404.10830). A document of N stored tokens (its end mark leads it) gives
N // T whole sequences and a piece of N % T; the pieces are packed into bins of T, the longest first. The paper places
one piece after the other; here all bins choose at once, in rounds of a few array operations, class of lengths by
class: each bin, the roomiest first, takes the longest piece of the class that fits it. When none fits anywhere, bins
are opened. At most a few in a thousand more bins come out (see the tests), in milliseconds a block.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

_CLASS = 0.8  # the shortest piece of a class, as a share of the longest
_SHORT = 8  # pieces of at most 1 / 8 of a sequence are one class


class Plan(NamedTuple):
    """The sequences of one block: first C whole ones, each within one document, then the bins."""

    chunks: np.ndarray  # (C,) int64: where each whole sequence begins in the block's stream
    starts: np.ndarray  # (pieces,) int64: where each piece begins in the stream, bin by bin
    lengths: np.ndarray  # (pieces,) int64
    bins: np.ndarray  # (bins + 1,) int64: bin b holds pieces bins[b]:bins[b + 1]

    def __len__(self) -> int:
        return len(self.chunks) + len(self.bins) - 1

    @property
    def num_bytes(self) -> int:
        """Memory of the arrays."""
        return sum(array.nbytes for array in self)


def plan(lengths: np.ndarray, seq_len: int) -> Plan:
    """How to pack a block's documents of (D,) stored lengths, end marks included. The same for the same lengths."""
    lengths = np.asarray(lengths, np.int64)
    begins = np.cumsum(lengths) - lengths
    whole, rest = np.divmod(lengths, seq_len)
    documents = np.repeat(np.arange(len(lengths)), whole)  # (C,)
    within = np.arange(len(documents)) - np.repeat(np.cumsum(whole) - whole, whole)
    chunks = begins[documents] + within * seq_len

    pieces = np.flatnonzero(rest)
    starts, sizes = (begins + whole * seq_len)[pieces], rest[pieces]
    chosen = _bins(sizes, seq_len)  # (pieces,)
    order = np.argsort(chosen, kind="stable")  # inside a bin in the order of the documents
    counts = np.bincount(chosen, minlength=0)
    bins = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)])
    return Plan(chunks, starts[order], sizes[order], bins)


def num_sequences(lengths: np.ndarray, seq_len: int) -> int:
    """How many sequences plan() gives."""
    whole, rest = np.divmod(np.asarray(lengths, np.int64), seq_len)
    chosen = _bins(rest[rest > 0], seq_len)
    return int(whole.sum()) + (int(chosen.max()) + 1 if len(chosen) else 0)


def _bins(sizes: np.ndarray, capacity: int) -> np.ndarray:
    """The bin of each piece: (pieces,) int64 sizes in 1 .. capacity - 1 -> (pieces,) int64, no bin empty."""
    chosen = np.zeros(len(sizes), np.int64)
    order = np.argsort(sizes, kind="stable")
    rest = sizes[order]  # ascending
    room, bins, num_bins = np.zeros(0, np.int64), np.zeros(0, np.int64), 0  # the open bins: what is free, which it is
    while len(rest):
        first = _class_start(rest, capacity)
        left, group = order[first:], rest[first:]
        order, rest = order[:first], rest[:first]
        smallest = int(rest[0]) if len(rest) else int(group[0])
        while len(group):
            ascending = np.argsort(room, kind="stable")
            ascending = ascending[room[ascending].searchsorted(smallest) :]  # fuller ones take nothing any more
            room, bins = room[ascending], bins[ascending]
            take = _choose(group, room)
            takers = int(take.searchsorted(0))  # take is ascending: bins before `takers` are left without
            if takers == len(take):
                new = _needed(group, capacity, last=not len(rest))
                room = np.concatenate([room, np.full(new, capacity, np.int64)])
                bins = np.concatenate([bins, np.arange(num_bins, num_bins + new)])
                num_bins += new
                continue
            taken = take[takers:]
            chosen[left[taken]] = bins[takers:]
            room[takers:] -= group[taken]
            stays = np.ones(len(group), bool)
            stays[taken] = False
            left, group = left[stays], group[stays]
    return chosen


def _class_start(rest: np.ndarray, capacity: int) -> int:
    """Where the longest class of the pieces left (ascending) begins; the short ones are one class."""
    longest = int(rest[-1])
    return 0 if longest * _SHORT <= capacity else int(rest.searchsorted(longest * _CLASS))


def _choose(group: np.ndarray, room: np.ndarray) -> np.ndarray:
    """The piece (of `group`, ascending) that each bin (`room`, ascending) takes, (bins,); below 0: none.

    From the roomiest bin down: take[i] = min(number that fit room[i], take[i + 1]) - 1, which is a running minimum.
    """
    index = np.arange(len(room))
    fitting = group.searchsorted(room, side="right")
    return np.minimum.accumulate((fitting - index)[::-1])[::-1] + index - 1


def _needed(group: np.ndarray, capacity: int, last: bool) -> int:
    """How many bins to open for pieces that fit nowhere."""
    if last:  # short ones fill their bins
        return -(-int(group.sum()) // capacity)
    return -(-len(group) // (capacity // int(group[-1])))
