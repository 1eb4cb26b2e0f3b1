"""Which example stands at which position of a run's endless order: a pure function of (seed, epoch, position).

Position p is place p % n of epoch p // n, where n is the number of examples; each epoch holds each example once, in
another order. Nothing is stored but a table of the epoch's blocks, so a run resumes at once wherever it stopped.

- BlockOrder (`shuffle: blocks`): the epoch's blocks in permuted order, cut into windows of at most `window_blocks`, and
  the examples of a window permuted among themselves. Only a window's blocks are in use at a time, so that object stores
  are read in large pieces. With two epochs of 5 blocks a b c d e of two examples each, and windows of 3 and 2:

      blocks    d a e | c b             positions    e1 a0 d0 d1 e0 a1 | b0 c1 b1 c0
      blocks    b e c | a d             positions    c0 b1 e1 b0 c1 e0 | d0 a0 a1 d1

- ExampleOrder (`shuffle: examples`): one permutation of all examples; for local disks and data that fits in memory.
- SequentialOrder (`shuffle: sequential`): as they are stored.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np

from configs.errors import UsageError
from data_pipelines.ownership import owners
from data_pipelines.permutation import ROUNDS, keys, permutation, permute

SHUFFLES = ("blocks", "examples", "sequential")
_BLOCKS, _WINDOWS = 0, 1  # what a key permutes
_MANY_BLOCKS = 4096
_CHUNK = 1 << 13


class Order(Protocol):
    """An order, mostly endless, of examples 0 .. num_examples - 1. Safe to use from several threads."""

    num_examples: int

    @property
    def end(self) -> int | None:
        """The position at which it ends; None for an order that is endless, as all but some mixtures are."""

    @property
    def epoch_length(self) -> int | None:
        """How many positions hold each example once; None where an order has no such number (mixtures)."""

    def sample_ids(self, positions: np.ndarray) -> np.ndarray:
        """The example at each of (n,) int64 positions >= 0: (n,) int64."""


def choose_order(shuffle: str, seed: int, block_examples: np.ndarray, window_blocks: int = 64) -> Order:
    """The order that `data.shuffle` names. Raises UsageError for another name."""
    num_examples = int(block_examples.sum())
    if shuffle == "blocks":
        return BlockOrder(seed, block_examples, window_blocks)
    if shuffle == "examples":
        return ExampleOrder(seed, num_examples)
    if shuffle == "sequential":
        return SequentialOrder(num_examples)
    raise UsageError(f"data.shuffle is '{shuffle}'; it can be {', '.join(SHUFFLES)}.")


def sample_ids(seed: int, num_examples: int, positions: np.ndarray) -> np.ndarray:
    """Sample ids, (n,) int64 in [0, num_examples), at positions, (n,) int64 >= 0, of an ExampleOrder."""
    return ExampleOrder(seed, num_examples).sample_ids(positions)


class SequentialOrder:
    """The examples as they are stored, epoch after epoch."""

    end = None

    def __init__(self, num_examples: int) -> None:
        assert num_examples >= 1, num_examples
        self.num_examples = num_examples

    @property
    def epoch_length(self) -> int:
        """The number of examples."""
        return self.num_examples

    def sample_ids(self, positions: np.ndarray) -> np.ndarray:
        """See Order."""
        return _checked(positions) % np.int64(self.num_examples)


class ExampleOrder:
    """A permutation of all examples for each epoch."""

    end = None

    def __init__(self, seed: int, num_examples: int) -> None:
        assert num_examples >= 1, num_examples
        self.num_examples = num_examples
        self._seed = seed

    @property
    def epoch_length(self) -> int:
        """The number of examples."""
        return self.num_examples

    def sample_ids(self, positions: np.ndarray) -> np.ndarray:
        """See Order."""
        epochs, places = np.divmod(_checked(positions), np.int64(self.num_examples))
        ids = np.empty_like(places)
        for epoch in _different(epochs):
            here = slice(None) if epoch is None else epochs == epoch
            number = int(epochs[0]) if epoch is None else epoch
            ids[here] = permute(places[here], self.num_examples, keys(self._seed, number))
        return ids


class _Epoch(NamedTuple):
    """The blocks of an epoch in their order; slot s is the s-th of them."""

    blocks: np.ndarray  # (blocks,) uint32: the block's number
    ends: np.ndarray  # (blocks,) int64: places up to and with slot s
    windows: np.ndarray  # (windows + 1,) int64: place where each window begins, and the end


class BlockOrder:
    """Blocks permuted, then the examples inside each window of blocks."""

    end = None

    def __init__(self, seed: int, block_examples: np.ndarray, window_blocks: int = 64) -> None:
        sizes = np.asarray(block_examples, np.int64)
        self.num_examples = int(sizes.sum())
        assert self.num_examples >= 1 and window_blocks >= 1, (self.num_examples, window_blocks)
        self._seed = seed
        self._sizes = sizes
        self._ends = np.cumsum(sizes)
        num_windows = -(-len(sizes) // window_blocks)  # nearly equal: a last window of one block would be read in order
        self._window_slots = np.arange(num_windows + 1, dtype=np.int64) * len(sizes) // num_windows
        self._epochs: dict[int, _Epoch] = {}

    @property
    def epoch_length(self) -> int:
        """The number of examples."""
        return self.num_examples

    def sample_ids(self, positions: np.ndarray) -> np.ndarray:
        """See Order."""
        epochs, places = np.divmod(_checked(positions), np.int64(self.num_examples))
        ids = np.empty_like(places)
        for epoch in _different(epochs):
            if epoch is None:
                return self._in_epoch(int(epochs[0]), places)
            here = epochs == epoch
            ids[here] = self._in_epoch(epoch, places[here])
        return ids

    def window_blocks_at(self, position: int) -> np.ndarray:
        """The numbers of all blocks of the window in which a position lies: what to have at hand for it."""
        epoch, place = divmod(position, self.num_examples)
        table = self._table(epoch)
        window = int(table.windows[1:].searchsorted(place, side="right"))
        return table.blocks[self._window_slots[window] : self._window_slots[window + 1]]

    def window_stop(self, position: int) -> int:
        """The first position after the window in which a position lies."""
        epoch, place = divmod(position, self.num_examples)
        windows = self._table(epoch).windows
        return epoch * self.num_examples + int(windows[1:][windows[1:].searchsorted(place, side="right")])

    def _in_epoch(self, epoch: int, places: np.ndarray) -> np.ndarray:
        if len(places) == 0:
            return places
        table = self._table(epoch)
        first = int(table.windows[1:].searchsorted(places.min(), side="right"))
        if places.max() < table.windows[first + 1]:  # one window: the common case
            start, stop = int(table.windows[first]), int(table.windows[first + 1])
            places = permute(places - start, stop - start, keys(self._seed, _WINDOWS, epoch, first)) + start
            first_slot, last_slot = self._window_slots[first], self._window_slots[first + 1]
            slots = owners(table.ends[first_slot:last_slot] - start, places - start) + first_slot
        else:
            windows = table.windows[1:].searchsorted(places, side="right")
            starts = table.windows[windows]
            numbers, which = np.unique(windows, return_inverse=True)
            round_keys = keys(self._seed, _WINDOWS, epoch, numbers)[:, which]
            places = permute(places - starts, table.windows[windows + 1] - starts, round_keys) + starts
            slots = table.ends.searchsorted(places, side="right")
        return places + (self._ends[table.blocks[slots]] - table.ends[slots])

    def _table(self, epoch: int) -> _Epoch:
        table = self._epochs.get(epoch)
        if table is None:
            num_blocks = len(self._sizes)
            # Four rounds look random where there are many blocks (Luby and Rackoff); few need the others.
            round_keys = keys(self._seed, _BLOCKS, epoch)[: 4 if num_blocks > _MANY_BLOCKS else ROUNDS]
            blocks = permutation(num_blocks, round_keys)
            ends = np.empty(num_blocks, np.int64)  # little fresh memory: it takes longer than the arithmetic
            for cut in (slice(start, start + _CHUNK) for start in range(0, num_blocks, _CHUNK)):
                np.take(self._sizes, blocks[cut], out=ends[cut], mode="clip")  # "raise" would copy
            np.cumsum(ends, out=ends)
            windows = np.concatenate([np.zeros(1, np.int64), ends[self._window_slots[1:] - 1]])
            assert np.diff(windows).max(initial=0) < 1 << 32, "a window of more than 2^32 examples"
            while len(self._epochs) >= 2:  # this epoch and the next: a batch may hold examples of both
                self._epochs.pop(next(iter(self._epochs)), None)
            self._epochs[epoch] = table = _Epoch(blocks, ends, windows)
        return table


def _checked(positions: np.ndarray) -> np.ndarray:
    positions = np.asarray(positions, np.int64)
    assert positions.size == 0 or positions.min() >= 0, positions.min()
    return positions


def _different(epochs: np.ndarray) -> list[int] | list[None]:
    """The epochs that come up; [None] where there is one, the common case."""
    if len(epochs) == 0:
        return []
    if epochs.min() == epochs.max():
        return [None]
    return [int(epoch) for epoch in np.unique(epochs)]
