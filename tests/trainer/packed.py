"""Documents packed to sequences in plain Python: batches without a data set."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

EOS_ID = 0


@dataclass(frozen=True)
class Packed:
    """One block of documents: [eos, tokens...] each, one after the other, cut every `seq_len` tokens."""

    documents: Sequence[Sequence[int]]
    seq_len: int
    bytes_a_token: int = 4

    @property
    def stream(self) -> list[int]:
        return [token for document in self.documents for token in (EOS_ID, *document)]

    @property
    def num_tokens(self) -> int:
        return len(self.stream)

    @property
    def num_bytes(self) -> int:
        return self.bytes_a_token * sum(map(len, self.documents))

    def __len__(self) -> int:
        return math.ceil(len(self.stream) / self.seq_len)

    def cut(self, number: int) -> tuple[list[int], int]:
        """(tokens of the sequence, padded with the end mark; labels that count)."""
        start = number * self.seq_len
        tokens = self.stream[start : start + self.seq_len + 1]
        valid = min(self.seq_len, len(self.stream) - start)
        return tokens + [EOS_ID] * (self.seq_len + 1 - len(tokens)), valid


def batch_of(split: Packed, sample_ids: Iterable[int]) -> dict[str, torch.Tensor]:
    """As the loader gives it."""
    tokens, valid = zip(*(split.cut(number) for number in sample_ids), strict=True)
    return {
        "tokens": torch.from_numpy(np.array(tokens, np.uint16)),
        "valid": torch.from_numpy(np.array(valid, np.int32)),
    }
