"""Examples of like length side by side, so that a padded micro-batch wastes little.

An order of examples is cut into windows of about `window` positions, never across an epoch's end. In a window the
examples are sorted by length and cut into runs, one a micro-batch, and the runs are permuted: a micro-batch holds
examples of like length, and the micro-batches come in no order of length. With micro-batches of 2 and these lengths:

    base order    7 2 9 3 8 2 | ...      sorted    2 2 | 3 7 | 8 9      runs permuted    8 9 2 2 3 7

It permutes positions inside a window, so each epoch still holds each example once, and is as much a pure function of
the position as the order it is made of. Runs end where micro-batches do also where sizes do not divide. A mixture's
windows also end where its shares change, so that they change just there.

Lengths are those that the build stored (lengths.py): no block is read to plan, so a damaged one changes no order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from data_pipelines.order import Order
from data_pipelines.permutation import keys, permute

_RUNS = 2  # what a key permutes; 0 and 1 are those of order.py
_WINDOW = 8192  # examples
_KEPT_WINDOWS = 4


class BucketOrder:
    """An order with runs of like length, of `micro_batch_size` examples at the positions of micro-batches.

    lengths_of: (n,) int64 sample ids -> (n,) lengths. cuts: ascending positions at which windows end too. A step's
    positions begin at a multiple of global_batch_size, as they do when a run's batch size does not change; where they
    do not, the order is as good, but micro-batches hold parts of two runs.
    """

    def __init__(
        self,
        base: Order,
        lengths_of: Callable[[np.ndarray], np.ndarray],
        *,
        seed: int,
        global_batch_size: int,
        micro_batch_size: int,
        cuts: Sequence[int] = (),
        window: int = _WINDOW,
    ) -> None:
        self.num_examples = base.num_examples
        self.end = base.end
        self._base = base
        self._lengths_of = lengths_of
        self._seed = seed
        self._global_batch_size = global_batch_size
        self._micro_batch_size = micro_batch_size
        # Windows end with global batches, but for an epoch's end.
        self._window = -(-window // global_batch_size) * global_batch_size
        self._cuts = np.array([0, *cuts, np.iinfo(np.int64).max])
        self._windows: dict[int, np.ndarray] = {}  # first position -> sample ids

    @property
    def epoch_length(self) -> int | None:
        """As of the order it is made of."""
        return self._base.epoch_length

    def sample_ids(self, positions: np.ndarray) -> np.ndarray:
        """See Order."""
        positions = np.asarray(positions, np.int64)
        if self.end is not None and len(positions) and positions.max() >= self.end:
            return self._base.sample_ids(positions)  # which says what is wrong
        ids = np.empty_like(positions)
        starts, stops = self._window_of(positions)
        for start, index in zip(*np.unique(starts, return_index=True), strict=True):
            here = starts == start
            ids[here] = self._ids(int(start), int(stops[index]))[positions[here] - start]
        return ids

    def state(self, position: int) -> dict[str, Any]:
        """For a checkpoint before a position: the window of the example before it, and what its order follows from.

        Where that window ends at the position, a run may go on in another order.
        """
        start, stop = self._window_of(np.array([position - 1], np.int64)) if position else ([0], [0])
        return {
            "global_batch_size": self._global_batch_size,
            "micro_batch_size": self._micro_batch_size,
            "window": [int(start[0]), int(stop[0])],
        }

    def _window_of(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The first position of the window of each, and the one after its last."""
        starts = positions // self._window * self._window
        stops = starts + self._window
        if self.epoch_length is not None:
            epoch = positions // self.epoch_length * self.epoch_length
            starts, stops = np.maximum(starts, epoch), np.minimum(stops, epoch + self.epoch_length)
        cut = self._cuts.searchsorted(positions, side="right")
        starts, stops = np.maximum(starts, self._cuts[cut - 1]), np.minimum(stops, self._cuts[cut])
        if self.end is not None:
            stops = np.minimum(stops, self.end)
        return starts, stops

    def _ids(self, start: int, stop: int) -> np.ndarray:
        ids = self._windows.get(start)
        if ids is None:
            while len(self._windows) >= _KEPT_WINDOWS:
                self._windows.pop(next(iter(self._windows)), None)
            self._windows[start] = ids = self._sorted(np.arange(start, stop, dtype=np.int64))
        return ids

    def _sorted(self, positions: np.ndarray) -> np.ndarray:
        base = self._base.sample_ids(positions)
        ascending = base[np.argsort(self._lengths_of(base), kind="stable")]
        # Runs are the micro-batches' places; run r takes the r-th place of a permutation.
        is_first = positions % self._global_batch_size % self._micro_batch_size == 0
        is_first[0] = True
        firsts = np.flatnonzero(is_first)
        sizes = np.diff(np.append(firsts, len(positions)))
        runs = np.arange(len(firsts))
        order = permute(runs, len(runs), keys(self._seed, _RUNS, int(positions[0])))
        begins = np.cumsum(sizes[order]) - sizes[order]  # of run order[i] among the sorted
        place = np.empty(len(runs), np.int64)
        place[order] = begins
        within = np.arange(len(positions)) - np.repeat(firsts, sizes)
        return ascending[np.repeat(place, sizes) + within]
