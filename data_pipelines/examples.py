"""What a loader reads from: rows by number, many at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from data_pipelines.buffers import Buffers

if TYPE_CHECKING:
    from data_pipelines.rows import Split


class Examples(Protocol):
    """The examples of a split, numbered in the order of its blocks: ids 0 .. len - 1."""

    @property
    def name(self) -> str:
        """Names the split in messages and in the state of a run."""

    @property
    def block_examples(self) -> np.ndarray:
        """(blocks,) int64: how many examples each block holds."""

    def __len__(self) -> int: ...

    def gather(self, ids: np.ndarray, out: Buffers | None = None, blocks: np.ndarray | None = None) -> dict[str, Any]:
        """The examples (n,) int64 `ids`, in that order: name -> (n, ...) array, or Ragged where shapes differ.

        With `out` the arrays lie in its memory, and the next call with it overwrites them. blocks: (n,) int64, the
        block of each, where the caller knows it. Raises Damaged.
        """

    def prefetch(self, blocks: np.ndarray) -> None:
        """Say which blocks, (n,) int64, are wanted soon, in the order of their use; returns at once."""


@dataclass(frozen=True)
class Rows:
    """Some columns of a split: the examples of a task that takes rows as they are stored."""

    split: Split
    columns: Sequence[str]
    name: str = "train"

    def __len__(self) -> int:
        return self.split.num_rows

    @property
    def block_examples(self) -> np.ndarray:
        """(blocks,) int64: how many rows each block holds."""
        return self.split.block_examples

    def gather(self, ids: np.ndarray, out: Buffers | None = None, blocks: np.ndarray | None = None) -> dict[str, Any]:
        """The rows (n,) int64 `ids`; see Examples."""
        return self.split.gather(ids, self.columns, out, blocks)

    def prefetch(self, blocks: np.ndarray) -> None:
        """Say which blocks are wanted soon."""
        self.split.prefetch(blocks)
