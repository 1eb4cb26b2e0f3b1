"""The blocks of a split that lies in a remote store (or is compressed), mapped from this node's cache of blocks.

A block that is asked for is mapped, if need be from the node's cache (block_cache.py), if need be after it was fetched
into that (fetch.py), and stays pinned there until it is released, and a while longer if there is room. What comes next
is fetched before it is asked for; of several processes on a node that want the same block, one fetches it.
"""

from __future__ import annotations

import os
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from configs.errors import Damaged, UsageError
from data_pipelines.block_cache import ROOM_WAIT_S, CacheFull, block_name, default_folder, shared_cache
from data_pipelines.damage import BlockDamaged, DamagedBlock, DamageLog, DamagePolicy
from data_pipelines.fetch import BlockFetcher, content_damage
from data_pipelines.fetch_queue import FetchQueue
from data_pipelines.index import Index
from data_pipelines.ranges import Counters
from data_pipelines.slots import Slots
from data_pipelines.storage import Store

NUM_FETCHES = 8  # at a time, ahead of use; as many more may run for blocks that somebody waits for
MAX_SLOTS = 2048
_MAX_IDLE = 512
_SHARE = 4  # a fourth of the cache is for pinned blocks that nobody uses now, a fourth for what comes next
_FULL_DISK_PAUSE_S = 30.0
_MAX_DAMAGED_SHARE = 0.05
_FEW = 4


@dataclass
class _Held:
    """A block in a slot."""

    slot: int
    users: int
    name: str | None  # of its file in the cache; None for one that is in memory only


class CachedBlocks:
    """A BlockSource (block_source.py) of remote blocks. Safe to use from several threads."""

    stays = False  # views of the content are good until release()

    def __init__(self, store: Store, index: Index, split: str, policy: DamagePolicy, log: DamageLog) -> None:
        self._blocks = blocks = index.splits[split]
        self._columns = index.columns
        self._policy = policy
        self._log = log
        self._counters = Counters()
        self._store = store
        self._file_names = index.file_names
        folder = Path(policy.cache_path).expanduser().absolute() if policy.cache_path else default_folder()
        self._cache = shared_cache(folder, policy.cache_bytes)
        self._cache.users += 1
        largest = int(blocks.content_bytes.max(initial=1))
        self._slots = Slots(max(1, min(len(blocks), MAX_SLOTS, (1 << 44) // largest)), largest)
        self._closed = False
        self._start()

    def _start(self) -> None:
        self._process = os.getpid()
        self._lock = threading.RLock()
        self._fetcher = BlockFetcher(
            self._store, self._file_names, self._blocks, self._columns, self._policy, self._counters
        )
        self._queue = FetchQueue(self._fetch, NUM_FETCHES)
        self._held: dict[int, _Held] = {}
        self._idle: OrderedDict[int, int] = OrderedDict()  # block -> bytes; used longest ago first
        self._free = list(range(self._slots.number))
        self._arrived: dict[int, bytes | memoryview | None] = {}  # pinned for who waits (None), or held in memory
        self._checked: dict[int, int] = {}  # block -> inode of the file whose digest was checked
        self._asked: set[int] = set()
        self._disk_full_until = 0.0
        self._share, self._share_until = 0, 0.0

    def flat(self) -> np.ndarray:
        """See BlockSource."""
        return self._slots.array

    def locate(self, blocks: np.ndarray) -> np.ndarray:
        """See BlockSource. Raises UsageError where the cache is too small, Unreachable where the store is."""
        self._after_fork()
        wanted, places = np.unique(blocks, return_inverse=True)
        numbers = wanted.tolist()
        self._refuse_known(numbers)
        self._hold(numbers)
        with self._lock:
            offsets = [self._slots.offset(self._held[block].slot) for block in numbers]
        return np.array(offsets, np.int64)[places]

    def release(self, blocks: np.ndarray) -> None:
        """See BlockSource."""
        self._release(np.unique(blocks).tolist())

    def prefetch(self, blocks: np.ndarray) -> None:
        """See BlockSource. As much as a fourth of the cache holds; the rest is for a later call."""
        self._after_fork()
        if time.monotonic() < self._disk_full_until:
            return
        wanted = list(dict.fromkeys(blocks.tolist()))
        room = np.cumsum(self._blocks.content_bytes[wanted]) <= self._cache.limit_bytes // _SHARE
        wanted = wanted[: int(room.sum())]
        new = [block for block in wanted if block not in self._asked and block not in self._held]
        if new:
            coming = [block for block in wanted if block not in self._held]
            self._queue.soon(coming)
        self._asked = set(wanted)

    def metrics(self) -> dict[str, float]:
        """Plain numbers since the split was opened; bytes and evictions of the cache are this process's view of it.

        fetches, fetched_bytes, requests; retries = throttled + stalls + cut_short + failed_requests; damaged_fetches
        (answers that failed a digest), damaged_blocks (given up); hits, misses, hit_rate and wait_s of blocks asked
        for; in_memory (served past a full disk); evictions, cache_bytes.
        """
        values = {name: 0.0 for name in COUNTED} | self._counters.values()
        asked = values["hits"] + values["misses"]
        values["hit_rate"] = values["hits"] / asked if asked else 1.0
        values["damaged_blocks"] = len(self._log)
        values["evictions"] = self._cache.evictions
        values["cache_bytes"] = self._cache.used_bytes()
        return values

    def close(self) -> None:
        """See BlockSource. Reads that wait for a store are given up."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._fetcher.close()
            self._queue.close()
            for block in list(self._held):
                self._detach(block)
            self._unpin_arrived(list(self._arrived))
            self._cache.users -= 1

    # --- holding blocks

    def _hold(self, wanted: list[int]) -> None:
        """Have all of these in slots, with this caller as one more user; none of them if one fails."""
        self._refuse_too_many(wanted)
        held: list[int] = []
        try:
            missing = self._take_all(wanted, held)
            self._counters.add("hits", len(held))
            self._counters.add("misses", len(missing))
            began = time.monotonic()
            while missing:
                self._await(missing)
                missing = self._take_all(missing, held)  # one may have been evicted again meanwhile
            self._counters.add("wait_s", time.monotonic() - began)
        except BaseException:
            self._release(held)
            self._unpin_arrived(wanted)
            raise

    def _take_all(self, wanted: Iterable[int], held: list[int]) -> list[int]:
        """Take what is there, noting it in `held`; the rest."""
        missing = []
        for block in wanted:
            with self._lock:
                if self._take(block):
                    held.append(block)
                else:
                    missing.append(block)
        return missing

    def _await(self, missing: list[int]) -> None:
        damaged: list[DamagedBlock] = []
        for future in [self._queue.now(block) for block in missing]:
            try:
                future.result()
            except BlockDamaged as error:
                damaged += error.found
        if damaged:
            raise BlockDamaged(damaged, self._policy.action)

    def _take(self, block: int) -> bool:
        """Have a block in a slot, if it is there or in the cache; the caller holds the lock."""
        held = self._held.get(block) or self._attach(block)
        if held is None:
            return False
        self._idle.pop(block, None)
        held.users += 1
        return True

    def _attach(self, block: int) -> _Held | None:
        name, size = self._name(block), int(self._blocks.content_bytes[block])
        content = self._arrived.get(block)
        if content is not None:
            held = _Held(self._free_slot(), 0, None)
            self._slots.fill(held.slot, content)
            del self._arrived[block]
        else:
            descriptor = self._cache.pin(name)
            if descriptor is None:
                return None
            held = _Held(self._free_slot(), 0, name)
            try:
                sound = self._map(held.slot, block, descriptor, size)
            finally:
                os.close(descriptor)
            self._unpin_arrived([block])
            if not sound:  # a disk that went bad, or lost power: the store has it still
                self._put_back(held)
                self._cache.drop(name)
                self._counters.add("cache_damaged")
                return None
        self._held[block] = held
        return held

    def _map(self, slot: int, block: int, descriptor: int, size: int) -> bool:
        status = os.fstat(descriptor)
        if status.st_size != size:
            return False
        self._slots.map(slot, descriptor, size)
        if self._checked.get(block) != status.st_ino:
            if content_damage(self._slots.content(slot, size), self._blocks, block, self._columns) is not None:
                return False
            self._checked[block] = status.st_ino
        return True

    def _free_slot(self) -> int:
        if not self._free:
            self._detach(next(iter(self._idle)))
        return self._free.pop()

    def _release(self, blocks: list[int]) -> None:
        with self._lock:
            for block in blocks:
                held = self._held.get(block)
                if held is None:  # closed meanwhile, or from before a fork
                    continue
                held.users -= 1
                if held.users == 0:
                    if held.name is None:
                        self._detach(block)
                    else:
                        self._idle[block] = int(self._blocks.content_bytes[block])
            self._trim()

    def _trim(self, share: int | None = None) -> None:
        """Let go of idle blocks, the oldest first, down to this process's share of the cache."""
        if not self._idle:
            return
        if share is None:
            share = self._idle_share()
        total = sum(self._idle.values())
        while self._idle and (total > share or len(self._idle) > _MAX_IDLE):
            block, size = next(iter(self._idle.items()))
            self._detach(block)
            total -= size

    def _idle_share(self) -> int:
        """Bytes of idle blocks that this data set may keep pinned; counted anew each second."""
        now = time.monotonic()
        if now >= self._share_until:
            self._share = self._cache.limit_bytes // _SHARE // (self._cache.sharers * self._cache.users)
            self._share_until = now + 1.0
        return self._share

    def _detach(self, block: int) -> None:
        self._idle.pop(block, None)
        self._put_back(self._held.pop(block))

    def _put_back(self, held: _Held) -> None:
        self._slots.clear(held.slot)
        self._free.append(held.slot)
        if held.name is not None:
            self._cache.unpin(held.name)

    def _unpin_arrived(self, blocks: list[int]) -> None:
        """Give up what was kept of fetched blocks for whoever waited for them."""
        with self._lock:
            for block in blocks:
                if block in self._arrived and self._arrived.pop(block) is None:
                    self._cache.unpin(self._name(block))

    # --- fetching, in the queue's threads

    def _fetch(self, block: int, urgent: bool) -> None:
        """See to it that a block is in the cache; for who waits for it, it is pinned there, or kept in memory."""
        name = self._name(block)
        give_up_claims = time.monotonic() + self._policy.retry_s + self._policy.stall_s
        while not self._closed:
            if self._cache.touch(name):
                return
            with self._cache.claim(name) as mine:
                if mine or time.monotonic() > give_up_claims:
                    if not self._cache.touch(name):  # it may have come just before
                        self._fetch_claimed(block, name, urgent)
                    return
            if not urgent:
                return  # another process is fetching it
            time.sleep(0.005)

    def _fetch_claimed(self, block: int, name: str, urgent: bool) -> None:
        try:
            content = self._fetcher.content(block)
        except BlockDamaged as error:
            self._log.add(error.found)
            self._refuse_too_damaged()
            raise
        try:
            self._put(name, content, urgent)
        except CacheFull:
            self._disk_full_until = time.monotonic() + _FULL_DISK_PAUSE_S
            if not urgent:
                return
            self._counters.add("in_memory")
        else:
            if not urgent:
                return
            content = None  # type: ignore[assignment]
        with self._lock:
            self._unpin_arrived([block])
            self._arrived[block] = content

    def _put(self, name: str, content: bytes | memoryview, urgent: bool) -> None:
        try:
            self._cache.put(name, content, pin=urgent, wait_s=0)
        except UsageError:
            if not urgent:
                return  # all is in use: it is fetched when it is needed
            with self._lock:
                self._trim(0)
            self._cache.put(name, content, pin=True, wait_s=ROOM_WAIT_S)

    # --- refusals

    def _refuse_known(self, wanted: list[int]) -> None:
        if len(self._log) and (known := [self._log[block] for block in wanted if block in self._log]):
            raise BlockDamaged(known, self._policy.action)

    def _refuse_too_many(self, wanted: list[int]) -> None:
        needed = int(self._blocks.content_bytes[wanted].sum())
        if needed > self._cache.limit_bytes or len(wanted) > self._slots.number:
            raise UsageError(
                f"{len(wanted)} blocks, {needed} bytes, are read at once; the block cache {self._cache.folder} holds "
                f"{self._cache.limit_bytes} bytes, and {self._slots.number} blocks at once. Raise data.cache_bytes, "
                "or, where data.shuffle is examples, set it to blocks."
            )

    def _refuse_too_damaged(self) -> None:
        """Skipping is for the odd block; where much is gone, something else is wrong."""
        if len(self._log) > max(_FEW, _MAX_DAMAGED_SHARE * len(self._blocks)):
            named = BlockDamaged([self._log[block] for block in self._log.blocks()])
            raise Damaged(f"{len(self._log)} of {len(self._blocks)} blocks are damaged or missing. {named}")

    def _name(self, block: int) -> str:
        every = self._blocks
        digest = (every.content_xxh3 if every.compressed else every.xxh3)[block]
        return block_name(int(digest), int(every.content_bytes[block]))

    def _after_fork(self) -> None:
        if os.getpid() != self._process:
            self._cache.after_fork()
            self._start()


COUNTED = (
    *("fetches", "fetched_bytes", "requests", "retries", "throttled", "stalls", "cut_short", "failed_requests"),
    *("damaged_fetches", "cache_damaged", "hits", "misses", "wait_s", "in_memory"),
)
