"""Which example stands at which position of a run's endless order: a pure function of (seed, epoch, position).

Position p is place p % n of epoch p // n, where n is the number of examples; each epoch holds each example once, in
another order. Nothing is stored but tables of some of the epoch's blocks, so a run resumes at once wherever it stopped.

- BlockOrder (`shuffle: blocks`): the epoch's blocks in permuted order, cut into windows of at most `window_blocks`, and
  the examples of a window permuted among themselves. Only a window's blocks are in use at a time, so that object stores
  are read in large pieces. With two epochs of 5 blocks a b c d e of two examples each, and windows of 3 and 2:

      blocks    d a e | c b             positions    e1 a0 d0 d1 e0 a1 | b0 c1 b1 c0
      blocks    b e c | a d             positions    c0 b1 e1 b0 c1 e0 | d0 a0 a1 d1

- ExampleOrder (`shuffle: examples`): one permutation of all examples; for local disks and data that fits in memory.
- SequentialOrder (`shuffle: sequential`): as they are stored.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple, Protocol

import numpy as np

from configs.errors import UsageError
from data_pipelines.ownership import owners
from data_pipelines.permutation import keys, permutation, permute

SHUFFLES = ("blocks", "examples", "sequential")
_BLOCKS, _WINDOWS, _RUNS = 0, 1, 3  # what a key permutes; 2 is that of buckets.py
_MOST_RUNS = 1 << 15
_REGION_RUNS = 64


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


def choose_order(shuffle: str, seed: int, block_examples: np.ndarray, window_blocks: int = 128) -> Order:
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
        for epoch, run in _runs(epochs):
            ids[run] = permute(places[run], self.num_examples, _keys(self._seed, epoch))
        return ids


class _Region(NamedTuple):
    """A part of an epoch: its blocks in their order; slot s is the s-th of them. Places count from its beginning."""

    blocks: np.ndarray  # (slots,) int64: the block's number
    ends: np.ndarray  # (slots,) int64: places up to and with slot s
    shifts: np.ndarray  # (slots,) int64: from a place in slot s to its example
    window_slots: np.ndarray  # (windows + 1,) int64: slot where each window begins, and the end
    windows: np.ndarray  # (windows + 1,) int64: place where each window begins, and the end


class _Epoch(NamedTuple):
    """Where an epoch's regions lie."""

    runs: np.ndarray  # (runs,) int64: the run at each slot of runs
    ends: np.ndarray  # (regions,) int64: places up to and with the region
    first_windows: np.ndarray  # (regions,) int64: number of the region's first window


class BlockOrder:
    """Blocks permuted, then the examples inside each window of blocks.

    That an epoch begins in milliseconds at any size, blocks are permuted at two levels where there are many: runs of
    blocks that lie side by side, at most 32,768 of them, then the blocks of each *region* of 64 permuted runs. Where
    there are fewer blocks, all are one region.
    """

    end = None

    def __init__(self, seed: int, block_examples: np.ndarray, window_blocks: int = 128) -> None:
        sizes = np.asarray(block_examples, np.int64)
        num_blocks = len(sizes)
        assert num_blocks and window_blocks >= 1, (num_blocks, window_blocks)
        self._seed = seed
        self._sizes = sizes
        self._window_blocks = window_blocks
        self._run_blocks = -(-num_blocks // _MOST_RUNS) if num_blocks > _MOST_RUNS else num_blocks
        run_firsts = np.arange(0, num_blocks, self._run_blocks)
        self._run_sizes = np.add.reduceat(sizes, run_firsts)  # (runs,): examples of each
        self._run_ends = np.cumsum(self._run_sizes)
        self.num_examples = int(self._run_ends[-1])
        assert self.num_examples >= 1
        num_regions = -(-len(run_firsts) // _REGION_RUNS)
        self._region_runs = np.arange(num_regions + 1) * len(run_firsts) // num_regions
        self._epochs: dict[int, _Epoch] = {}
        self._regions: dict[tuple[int, int], _Region] = {}

    @property
    def epoch_length(self) -> int:
        """The number of examples."""
        return self.num_examples

    def sample_ids(self, positions: np.ndarray) -> np.ndarray:
        """See Order."""
        epochs, places = np.divmod(_checked(positions), np.int64(self.num_examples))
        ids = np.empty_like(places)
        for epoch, run in _runs(epochs):
            ids[run] = self._in_epoch(epoch, places[run])
        return ids

    def window_at(self, position: int) -> tuple[np.ndarray, int]:
        """The blocks of the window in which a position lies, and the first position after it."""
        epoch, place = divmod(position, self.num_examples)
        ends = self._epoch(epoch).ends
        number = int(ends.searchsorted(place, side="right"))
        region, start = self._region(epoch, number), int(ends[number - 1]) if number else 0
        window = int(region.windows[1:].searchsorted(place - start, side="right"))
        blocks = region.blocks[region.window_slots[window] : region.window_slots[window + 1]]
        return blocks, epoch * self.num_examples + start + int(region.windows[window + 1])

    def _in_epoch(self, epoch: int, places: np.ndarray) -> np.ndarray:
        if len(places) == 0:
            return places
        ends = self._epoch(epoch).ends
        first, last = ends.searchsorted([places.min(), places.max()], side="right").tolist()
        if first == last:  # the common case
            return self._in_region(epoch, first, places - (ends[first - 1] if first else 0))
        ids = np.empty_like(places)
        regions = ends.searchsorted(places, side="right")
        for number in np.unique(regions).tolist():
            here = regions == number
            ids[here] = self._in_region(epoch, number, places[here] - (ends[number - 1] if number else 0))
        return ids

    def _in_region(self, epoch: int, number: int, places: np.ndarray) -> np.ndarray:
        region = self._region(epoch, number)
        first_window = int(self._epoch(epoch).first_windows[number])
        first = int(region.windows[1:].searchsorted(places.min(), side="right"))
        if places.max() < region.windows[first + 1]:  # one window: the common case
            start, stop = int(region.windows[first]), int(region.windows[first + 1])
            places = permute(places - start, stop - start, _keys(self._seed, _WINDOWS, epoch, first_window + first))
            first_slot, last_slot = region.window_slots[first], region.window_slots[first + 1]
            slots = owners(region.ends[first_slot:last_slot] - start, places) + first_slot
            places += start
        else:
            windows = region.windows[1:].searchsorted(places, side="right")
            starts = region.windows[windows]
            numbers, which = np.unique(windows, return_inverse=True)
            round_keys = keys(self._seed, _WINDOWS, epoch, first_window + numbers)[:, which]
            places = permute(places - starts, region.windows[windows + 1] - starts, round_keys) + starts
            slots = region.ends.searchsorted(places, side="right")
        return places + region.shifts[slots]

    def _epoch(self, epoch: int) -> _Epoch:
        table = self._epochs.get(epoch)
        if table is None:
            num_runs = len(self._run_sizes)
            runs = permutation(num_runs, keys(self._seed, _RUNS, epoch)).astype(np.int64)
            ends = np.cumsum(np.add.reduceat(self._run_sizes[runs], self._region_runs[:-1]))
            blocks = np.add.reduceat(self._blocks_of(runs), self._region_runs[:-1])  # (regions,)
            num_windows = -(-blocks // self._window_blocks)
            while len(self._epochs) >= 2:  # this epoch and the next: a batch may hold examples of both
                self._epochs.pop(next(iter(self._epochs)), None)
            self._epochs[epoch] = table = _Epoch(runs, ends, np.cumsum(num_windows) - num_windows)
        return table

    def _blocks_of(self, runs: np.ndarray) -> np.ndarray:
        """How many blocks each of the runs holds."""
        return np.minimum(self._run_blocks, len(self._sizes) - runs * self._run_blocks)

    def _region(self, epoch: int, number: int) -> _Region:
        region = self._regions.get((epoch, number))
        if region is None:
            runs = self._epoch(epoch).runs[self._region_runs[number] : self._region_runs[number + 1]]
            counts = self._blocks_of(runs)
            within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
            blocks = np.repeat(runs * self._run_blocks, counts) + within  # as they are stored, run after run
            sizes = self._sizes[blocks]
            before = np.cumsum(sizes) - sizes
            run_firsts = self._run_ends[runs] - self._run_sizes[runs]
            firsts = before + np.repeat(
                run_firsts - before[np.cumsum(counts) - counts], counts
            )  # example of each block
            order = permutation(len(blocks), keys(self._seed, _BLOCKS, epoch)).astype(np.int64)
            blocks, ends = blocks[order], np.cumsum(sizes[order])
            shifts = firsts[order] + sizes[order] - ends
            # Nearly equal windows: a last one of one block would be read in order.
            num_windows = -(-len(blocks) // self._window_blocks)
            window_slots = np.arange(num_windows + 1, dtype=np.int64) * len(blocks) // num_windows
            windows = np.concatenate([np.zeros(1, np.int64), ends[window_slots[1:] - 1]])
            assert np.diff(windows).max(initial=0) < 1 << 32, "a window of more than 2^32 examples"
            while len(self._regions) >= 3:  # a batch may hold examples of two
                self._regions.pop(next(iter(self._regions)), None)
            self._regions[epoch, number] = region = _Region(blocks, ends, shifts, window_slots, windows)
        return region


def _checked(positions: np.ndarray) -> np.ndarray:
    positions = np.asarray(positions, np.int64)
    assert positions.size == 0 or positions.min() >= 0, positions.min()
    return positions


def _runs(epochs: np.ndarray) -> list[tuple[int, slice]]:
    """The epochs that come up, each with where: an epoch comes again where positions do not ascend."""
    if len(epochs) == 0:
        return []
    cuts = [0, *(np.flatnonzero(epochs[1:] != epochs[:-1]) + 1).tolist(), len(epochs)]
    return [(int(epochs[start]), slice(start, stop)) for start, stop in pairwise(cuts)]


@lru_cache(maxsize=64)  # they are asked for again and again while a window is read
def _keys(seed: int, *counters: int) -> np.ndarray:
    return keys(seed, *counters)
