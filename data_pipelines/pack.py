"""Documents packed to sequences of a fixed length, their boundaries kept; nothing is stored, nothing is dropped.

The stream of a block is, for each document, the end mark and then its tokens, and one more end mark at the end:

    eos a1 a2 a3 eos b1 eos c1 c2 eos        3 documents of 3, 1 and 2 tokens: 6 + 3 + 1 = 10 tokens

Sequence j of a block, of length T, is stream[j*T : j*T + T + 1]: inputs are its first T tokens, labels its last T.
So each token of each document, and its end, is a label exactly once. With T = 4:

    j = 0   tokens eos a1 a2 a3 eos     document 0 0 0 0 1     position 0 1 2 3 0     valid 4
    j = 1   tokens eos b1 eos c1 c2     document 0 0 1 1 1     position 0 1 0 1 2     valid 4
    j = 2   tokens c2 eos eos eos eos   document 0 1 2 2 2     position 0 0 0 1 2     valid 1, then padding

A block has ceil((tokens + documents) / T) sequences: the number depends on seq_len alone. Only the last sequence of a
block is padded, so blocks of 1-4 MB lose nearly nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypedDict

import numpy as np

if TYPE_CHECKING:
    from data_pipelines.index import Block
    from data_pipelines.shards import BlockData


class PackedSequence(TypedDict):
    """One example; T = seq_len."""

    tokens: np.ndarray  # (T + 1,) int32
    document: np.ndarray  # (T + 1,) int32: 0 for the sequence's first document, one more after each end mark
    position: np.ndarray  # (T + 1,) int32: since the document's end mark, or since the start of the sequence
    valid: int  # labels that count: tokens[1 : 1 + valid]; what follows is padding


class PackedSplit:
    """The sequences of a split: len(), and [sample_id] in O(log blocks). Safe to use from several threads."""

    def __init__(self, blocks: Sequence[Block], read: Callable[[Block], BlockData], seq_len: int, eos_id: int) -> None:
        assert seq_len >= 1, seq_len
        self.seq_len = seq_len
        self.num_documents: int = sum(block.rows for block in blocks)
        self.num_tokens: int = sum(block.tokens + block.rows for block in blocks)  # labels: each token and each end
        self.num_bytes: int = sum(block.text_bytes for block in blocks)  # of the documents' text
        self._blocks = blocks
        self._read = read
        self._eos_id = eos_id
        counts = [-(-(block.tokens + block.rows) // seq_len) for block in blocks]
        self._ends = np.cumsum(np.array(counts, np.int64))  # (blocks,): sequences up to and with each block

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, sample_id: int) -> PackedSequence:
        """The sequence of a sample id in [0, len). Raises IndexError beyond it, Damaged for a block that is broken."""
        if not 0 <= sample_id < len(self):
            raise IndexError(f"sample {sample_id} of {len(self)}")
        number = int(np.searchsorted(self._ends, sample_id, side="right"))
        block = self._blocks[number]
        before = int(self._ends[number - 1]) if number else 0
        return _cut(self._read(block), (int(sample_id) - before) * self.seq_len, self.seq_len, self._eos_id)


def _cut(data: BlockData, start: int, seq_len: int, eos_id: int) -> PackedSequence:
    """The stream's tokens start .. start + seq_len, both included, padded with documents of their own."""
    stop = min(start + seq_len + 1, int(data.marks[-1]) + 1)
    first, last = data.marks.searchsorted((start, stop)).tolist()  # end marks first .. last - 1 lie within
    size = stop - start
    index = np.arange(seq_len + 1, dtype=np.int32)
    if first == last:  # inside one document: the common case where documents are long (the last cut holds an end mark)
        tokens = data.tokens[start - first : stop - last].astype(np.int32)
        return {"tokens": tokens, "document": np.zeros(seq_len + 1, np.int32), "position": index, "valid": seq_len}

    is_mark = np.zeros(seq_len + 1, bool)
    is_mark[data.marks[first:last] - start] = True
    is_mark[size : size + 1] = True  # padding begins a document of its own
    tokens = np.full(seq_len + 1, eos_id, np.int32)
    # Of the `start` tokens of the stream before the cut, `first` are end marks.
    tokens[:size][~is_mark[:size]] = data.tokens[start - first : stop - last]

    document = np.cumsum(is_mark, dtype=np.int32)
    document -= document[0]
    position = index - np.maximum.accumulate(np.where(is_mark, index, np.int32(0)))
    return {"tokens": tokens, "document": document, "position": position, "valid": size - 1}
