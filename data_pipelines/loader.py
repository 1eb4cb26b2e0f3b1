"""A step's examples as tensors: the same global batch at any number of ranks.

Step s takes the positions examples_seen + (s - start_step) * G .. + G - 1 of the global order (order.py). They are cut
into K = ceil(G / m) global micro-batches, fixed by position; rank r of w runs k = r, r + w, ... so that each rank has
ceil(K / w) of them. Say G = 10, m = 4, w = 2, at step 0 with ids i0 i1 ... i9:

    k = 0: i0 i1 i2 i3     k = 1: i4 i5 i6 i7     k = 2: i8 i9
    rank 0: k = 0, k = 2              rank 1: k = 1, and an idle slot that repeats k = 2

An idle slot keeps the collectives of the ranks in step; whoever runs it must let it contribute nothing. Position runs
on across epochs, so a batch may hold the end of one and the start of the next. Examples of skipped blocks
(data_state.py) are left out of their micro-batch; one that loses all of them becomes idle. Examples that are passed
over, because training went wrong with them, are left out of the order itself: those after them move up.

A thread makes *hand-overs* of several steps at once: one gather into buffers that are used again and again, so that a
step costs a few microseconds of Python. The first hand-over is one step, the next ones double, up to some megabytes. A
caller who comes before they are ready makes one himself.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch

from configs.errors import Damaged, UsageError
from data_pipelines.batches import Batcher, MicroBatch, Prepare
from data_pipelines.buffers import Buffers
from data_pipelines.data_state import Exceptions
from data_pipelines.examples import Examples
from data_pipelines.omissions import Omissions
from data_pipelines.order import Order

__all__ = ["Loader", "MicroBatch", "Prepare", "evaluation_batches"]

_HAND_OVERS = 3  # ahead
_BUFFERS = _HAND_OVERS + 3  # those ahead, the one in use, and two that may still be copied to a device
_HAND_OVER_BYTES = 13 << 19  # 6.5 MiB
_AHEAD = 4096  # examples ahead that are planned, and whose blocks are asked for


@dataclass(slots=True, eq=False)
class _HandOver:
    """The micro-batches of some steps, in buffers that nobody else uses."""

    steps: range
    micro_batches: list[list[MicroBatch]]  # of each step
    num_bytes: int
    buffers: Buffers
    event: Any = None  # copies to the device that still read the buffers


class _Plan(NamedTuple):
    """What this rank takes in coming steps."""

    steps: range
    positions: np.ndarray  # (steps * examples a step,) int64
    ids: np.ndarray  # the same of sample ids
    blocks: np.ndarray  # the same of their blocks

    def holds(self, steps: range) -> bool:
        return self.steps.start <= steps.start and steps.stop <= self.steps.stop


_NO_PLAN = _Plan(range(0), *[np.empty(0, np.int64)] * 3)


class Loader:
    """One rank's micro-batches, step by step, made ready in a thread.

    The tensors of a step are overwritten some time after the next step() call; copy what must last. `prepare(row,
    generator)` turns an example into arrays; it runs in `threads` threads, its generator is seeded by (seed, position),
    so results depend neither on threads nor on ranks. None takes the examples' arrays as they are. pad: what fills up
    arrays that differ in length; ragged: which of those that `prepare` gives do, and in how many axes (batches.py).
    pin: page-locked buffers, for asynchronous copies to a GPU. damage "skip": examples of damaged blocks are left out,
    and found_damage() has the blocks; the caller must agree with the other ranks, skip() them, and ask for the step
    again. Close it: it leaves no thread behind.
    """

    def __init__(
        self,
        examples: Examples,
        order: Order,
        prepare: Prepare | None = None,
        *,
        seed: int,
        global_batch_size: int,
        micro_batch_size: int,
        rank: int,
        world_size: int,
        start_step: int = 0,
        examples_seen: int = 0,
        prefetch_bytes: int = 26 << 20,
        threads: int = 1,
        pin: bool = False,
        pad: float = 0,
        ragged: Mapping[str, int] = MappingProxyType({}),
        exceptions: Exceptions = Exceptions(),  # noqa: B008 (immutable)
        damage: str = "stop",
    ) -> None:
        assert 0 <= rank < world_size, (rank, world_size)
        assert 1 <= micro_batch_size <= global_batch_size, (micro_batch_size, global_batch_size)
        assert damage in ("stop", "skip"), damage
        if len(examples) == 0:
            raise UsageError("The training split is empty. Give the data source more documents.")
        assert order.num_examples == len(examples), (order.num_examples, len(examples))
        self.wait_s = 0.0  # how long the last step() waited for its data
        self._examples = examples
        self._order = order
        self._global_batch_size = global_batch_size
        self._start_step = start_step
        self._examples_seen = examples_seen
        self._prefetch_bytes = prefetch_bytes
        self._damage = damage
        self._pin = pin
        slots = list(_slots(global_batch_size, micro_batch_size, rank, world_size))
        self._slots = [(index, idle) for index, idle, _ in slots]
        self._sizes = np.array([cut.stop - cut.start for _, _, cut in slots])
        self._repeats: dict[int, tuple[np.ndarray, list[tuple[int, bool]]]] = {}
        self._offsets = np.concatenate([np.arange(cut.start, cut.stop, dtype=np.int64) for _, _, cut in slots])
        self._omissions = Omissions(examples, order, exceptions)
        self._batcher = Batcher(prepare, seed, threads, pad, ragged)
        self._ahead_steps = _AHEAD // len(self._offsets)
        self._plan = _NO_PLAN
        self._planning = threading.Lock()  # held to replace the plan
        self._free: list[Buffers] = []
        self._copied: deque[_HandOver] = deque()  # given back, but a device may still read their buffers
        self._num_buffers = 0
        self._ahead: deque[tuple[range, Future[_HandOver]]] = deque()
        self._given: _HandOver | None = None
        self._steps = range(0)  # of self._given
        self._size = 1  # steps of the next hand-over
        self._reader = _one_thread()

    def step(self, step: int) -> list[MicroBatch]:
        """This rank's micro-batches of a step; any step may be asked for, consecutive ones are ready.

        Raises what reading raised (Damaged, ...).
        """
        steps = self._steps
        if steps.start <= step < steps.stop:
            self.wait_s = 0.0
        else:
            started = time.perf_counter()
            self._advance(step)
            self.wait_s = time.perf_counter() - started
        assert self._given is not None
        return self._given.micro_batches[step - self._given.steps.start]

    @property
    def exceptions(self) -> Exceptions:
        """What is left out, for the checkpoint."""
        return self._omissions.exceptions

    def positions(self, step: int) -> np.ndarray:
        """Global positions of a step's examples, (G,) int64."""
        return self._positions_of(range(step, step + 1), np.arange(self._global_batch_size, dtype=np.int64))

    def position(self, step: int) -> int:
        """Where the run stands in the global order when `step` steps are completed."""
        taken = (step - self._start_step) * self._global_batch_size
        if taken == 0:
            return self._examples_seen
        return int(self.exceptions.positions(self._examples_seen, np.array([taken - 1]))[0]) + 1

    def examples(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Positions and sample ids, (n,) int64 each, of what all ranks together train on in a step."""
        positions = self.positions(step)
        return self._omissions.without(positions, self._order.sample_ids(positions))

    def found_damage(self) -> list[tuple[str, int]]:
        """Damaged blocks (split, number) that were found while reading and are not skipped yet; takes no time."""
        return self._omissions.found()

    def skip(self, blocks: Sequence[tuple[str, int]], position: int) -> None:
        """Leave out the examples of blocks (split, number) from a position on. All ranks must do the same.

        Raises Damaged where nothing would be left.
        """
        self._omissions.skip(blocks, position)
        self._forget()

    def go_back(self, step: int, position: int, without: np.ndarray) -> None:
        """Stand at `position` of the order with `step` steps completed, and pass over the positions `without` (n,).

        All ranks must do the same.
        """
        with self._planning:
            self._omissions.exceptions = self.exceptions.pass_over(without)
            self._start_step, self._examples_seen = step, position
        self._forget()

    def close(self) -> None:
        """Stop reading ahead and end the threads; may be called twice."""
        self._reader.shutdown(wait=True, cancel_futures=True)
        self._batcher.close()
        self._ahead.clear()
        self._copied.clear()
        self._given, self._steps = None, range(0)

    # --- in the caller's thread

    def _advance(self, step: int) -> None:
        """Take the hand-over that begins with `step`, and order the next ones."""
        if not (self._ahead and self._ahead[0][0].start == step):
            self._forget()
        self._give_back()
        self._order_hand_overs(step)
        try:
            given = self._next_made()
        except Exception:
            several = len(self._ahead.popleft()[0]) > 1
            self._forget()
            if not several:
                raise
            self._order_hand_overs(step, most=1)  # the error belongs to one of the steps: give those before it
            given = self._next_made()
        self._ahead.popleft()
        self._given, self._steps = given, given.steps
        a_step = max(1, given.num_bytes // len(given.steps))
        most = max(1, min(_HAND_OVER_BYTES, self._prefetch_bytes // _HAND_OVERS) // a_step)
        self._size = min(2 * len(given.steps), most)
        self._order_hand_overs(given.steps.stop)

    def _next_made(self) -> _HandOver:
        """The first of the hand-overs ahead. What no reader has begun is made here rather than waited for."""
        for number, (steps, future) in enumerate(self._ahead):
            if self._ahead[0][1].done():
                break
            if future.cancel():
                made: Future[_HandOver] = Future()
                try:
                    made.set_result(self._load(steps))
                except Exception as error:
                    made.set_exception(error)
                self._ahead[number] = steps, made
        return self._ahead[0][1].result()

    def _order_hand_overs(self, step: int, most: int | None = None) -> None:
        """Have the hand-overs from `step` on made: as many as there are buffers for."""
        next_step = self._ahead[-1][0].stop if self._ahead else step
        while len(self._ahead) < self._depth():
            steps = range(next_step, next_step + (most or self._size))
            self._ahead.append((steps, self._reader.submit(self._load, steps)))
            next_step = steps.stop
            if most or self._given is None:
                break

    def _depth(self) -> int:
        """Hand-overs ahead: as many as prefetch_bytes hold, one at least."""
        size = self._given.num_bytes if self._given is not None else _HAND_OVER_BYTES
        return max(1, min(_HAND_OVERS, self._prefetch_bytes // max(1, size)))

    def _give_back(self) -> None:
        given, self._given, self._steps = self._given, None, range(0)
        if given is None:
            return
        if self._pin:  # the buffers may be filled again when the copies that were asked for until now are through
            given.event = torch.cuda.Event()
            given.event.record()
            self._copied.append(given)
        else:
            self._free.append(given.buffers)

    def _forget(self) -> None:
        """Drop what was read ahead."""
        self._give_back()
        for _, future in self._ahead:
            if not future.cancel():
                future.add_done_callback(self._recycle_result)
        self._ahead.clear()
        with self._planning:
            self._plan = _NO_PLAN
        self._size = 1

    # --- in the reader's thread, and in the caller's

    def _take_buffers(self) -> Buffers:
        """Free ones, or new ones; once there are enough, those whose copies to the device were asked for first."""
        with contextlib.suppress(IndexError):
            return self._free.pop()
        if self._num_buffers >= _BUFFERS:
            with contextlib.suppress(IndexError):
                given = self._copied.popleft()
                given.event.synchronize()
                return given.buffers
        self._num_buffers += 1
        return Buffers(self._pin)

    def _recycle_result(self, future: Future[_HandOver]) -> None:
        if not future.cancelled() and future.exception() is None:
            self._free.append(future.result().buffers)

    def _load(self, steps: range) -> _HandOver:
        buffers = self._take_buffers()
        try:
            return self._fill(steps, buffers)
        except BaseException:
            self._free.append(buffers)
            raise

    def _fill(self, steps: range, buffers: Buffers) -> _HandOver:
        positions, ids, blocks = self._planned(steps)
        sizes, slots = self._repeated(len(steps))
        if self._omissions:
            positions, ids, sizes, slots = self._omissions.leave_out(positions, ids, sizes, slots)
            blocks = self._omissions.blocks_of(ids)
        try:
            arrays = self._examples.gather(ids, buffers, blocks)
        except Damaged:
            if self._damage == "stop":
                raise
            self._omissions.find_damage(ids)
            return self._fill(steps, buffers)
        every = self._batcher.cut(arrays, slots, positions, ids, sizes, buffers)
        width = len(self._slots)
        micro_batches = [every[first : first + width] for first in range(0, len(every), width)]
        a_step = sum(tensor.nbytes for each in micro_batches[0] for tensor in each.tensors.values())
        return _HandOver(steps, micro_batches, a_step * len(steps), buffers)

    def _repeated(self, num_steps: int) -> tuple[np.ndarray, list[tuple[int, bool]]]:
        """The sizes and the slots of so many steps."""
        found = self._repeats.get(num_steps)
        if found is None:
            found = self._repeats[num_steps] = np.tile(self._sizes, num_steps), self._slots * num_steps
        return found

    def _planned(self, steps: range) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Positions, sample ids and blocks of these steps' examples on this rank, (examples,) int64 each.

        Those of the coming steps are worked out along with them, by one thread while the other goes on with what there
        is, and their blocks are asked for.
        """
        plan = self._plan
        if not plan.holds(steps):
            with self._planning:
                plan = self._plan
                if not plan.holds(steps):
                    self._plan = plan = self._extended(plan, steps)
        elif plan.steps.stop < steps.stop + self._ahead_steps and self._planning.acquire(blocking=False):
            try:
                if self._plan is plan:
                    self._plan = self._extended(plan, steps)
            finally:
                self._planning.release()
        width = len(self._offsets)
        start = (steps.start - plan.steps.start) * width
        cut = slice(start, start + len(steps) * width)
        return plan.positions[cut], plan.ids[cut], plan.blocks[cut]

    def _extended(self, plan: _Plan, steps: range) -> _Plan:
        """A plan that holds these steps and some after them. Its blocks are asked for."""
        more = 2 * self._ahead_steps
        if not plan.steps.start <= steps.start <= plan.steps.stop or not plan.steps:
            plan = _Plan(range(steps.start, steps.start), *_NO_PLAN[1:])
            more = 0  # the first step comes as soon as it can
        if self._order.end is not None:
            end = self._order.end - self.exceptions.num_passed(self._examples_seen)
            taken = (steps.stop - self._start_step) * self._global_batch_size
            left = (end - self._examples_seen - taken) // self._global_batch_size
            more = max(0, min(more, left))
        stop = max(plan.steps.stop, steps.stop + more)
        if stop == plan.steps.stop:
            return plan
        positions, ids = self._located(range(plan.steps.stop, stop))
        start = max(plan.steps.start, steps.start - self._ahead_steps)  # the other thread may be at earlier steps
        passed = (start - plan.steps.start) * len(self._offsets)
        extended = _Plan(
            range(start, stop),
            np.concatenate([plan.positions[passed:], positions]),
            np.concatenate([plan.ids[passed:], ids]),
            np.concatenate([plan.blocks[passed:], self._omissions.blocks_of(ids)]),
        )
        self._examples.prefetch(extended.blocks[(steps.start - start) * len(self._offsets) :])
        return extended

    def _located(self, steps: range) -> tuple[np.ndarray, np.ndarray]:
        positions = self._positions_of(steps, self._offsets)
        return positions, self._order.sample_ids(positions)

    def _positions_of(self, steps: range, offsets: np.ndarray) -> np.ndarray:
        """Positions of the examples at (n,) `offsets` of each step, (steps * n,) int64."""
        firsts = (np.arange(steps.start, steps.stop, dtype=np.int64) - self._start_step) * self._global_batch_size
        return self.exceptions.positions(self._examples_seen, (firsts[:, None] + offsets).reshape(-1))


def _one_thread() -> ThreadPoolExecutor:
    """A thread that reads ahead on one core."""
    reader = ThreadPoolExecutor(1, "loader", initializer=_use_one_core)
    num_threads = torch.get_num_threads()
    reader.submit(int).result()
    torch.set_num_threads(num_threads)  # what threads made later begin with
    return reader


def _use_one_core() -> None:
    """For this thread: a gather is one memory copy, which more threads would only take from training."""
    torch.get_num_threads()  # takes the setting of the process first, which would undo the next line later
    torch.set_num_threads(1)


def evaluation_batches(
    examples: Examples,
    prepare: Prepare | None = None,
    *,
    micro_batch_size: int,
    rank: int,
    world_size: int,
    num_examples: int | None = None,
    threads: int = 1,
    pad: float = 0,
    ragged: Mapping[str, int] = MappingProxyType({}),
) -> Iterator[MicroBatch]:
    """This rank's micro-batches of an evaluation: over all ranks each example once, the same number on every rank.

    num_examples: how many, spread evenly over the examples; None takes all. The generator of an example's `prepare` is
    seeded by its sample id alone. threads, pad, ragged: as of Loader. The next micro-batch is made ready in a thread
    meanwhile; read the iterator to its end, or close it.
    """
    total = len(examples)
    count = total if num_examples is None else min(num_examples, total)
    ids = np.arange(count, dtype=np.int64) * total // max(count, 1)
    batcher = Batcher(prepare, 0, threads, pad, ragged)

    def made(index: int, idle: bool, cut: slice) -> MicroBatch:
        memory = Buffers()
        arrays = examples.gather(ids[cut], memory)
        sizes = np.array([cut.stop - cut.start])
        return batcher.cut(arrays, [(index, idle)], ids[cut], ids[cut], sizes, memory)[0]

    reader = _one_thread()
    try:
        ahead: Future[MicroBatch] | None = None
        for slot in _slots(count, micro_batch_size, rank, world_size):
            following = reader.submit(made, *slot)
            if ahead is not None:
                yield ahead.result()
            ahead = following
        if ahead is not None:
            yield ahead.result()
    finally:
        reader.shutdown(wait=True, cancel_futures=True)
        batcher.close()


def _slots(count: int, micro_batch_size: int, rank: int, world_size: int) -> Iterator[tuple[int, bool, slice]]:
    """(global micro-batch, idle, its part of the batch) for each of a rank's slots; idle ones take the last."""
    num_micro_batches = -(-count // micro_batch_size)
    for slot in range(-(-num_micro_batches // world_size)):
        wanted = rank + slot * world_size
        index = min(wanted, num_micro_batches - 1)
        yield index, wanted > index, slice(index * micro_batch_size, min((index + 1) * micro_batch_size, count))
