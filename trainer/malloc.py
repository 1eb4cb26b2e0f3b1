"""glibc's malloc (2.36, malloc/malloc.c) on a sequence of requests: what stays in memory when tensors come and go.

Only sizes and places are followed, of one arena: that of the thread which trains. A freed block joins free neighbours
and serves the smallest request-fitting best; the heap's end goes back to the system when more than the trim threshold
is free there; large requests that nothing free fits are mapped, and go back at once. Both thresholds rise with what
was mapped and freed.

Why small blocks are followed too: an aligned request is cut from a block that is up to 112 bytes larger, and the
pieces before and after it are free. Caches by thread (tcache) and small objects of torch take them, so that a freed
tensor does not join its neighbours, and is too small for the next tensor of its own size.
"""

from __future__ import annotations

import bisect
from collections import defaultdict
from dataclasses import dataclass

_PAGE, _UNIT, _SMALLEST = 4096, 16, 32  # bytes; a block is a multiple of _UNIT
_FAST, _CACHED, _SMALL = 128, 1040, 1008  # the largest blocks of fastbins, tcache, and bins of one size
_CACHE_COUNT = 7  # blocks of one size in tcache
_LARGEST_THRESHOLD, _TOP_PAD = 32 << 20, 128 << 10
_CONSOLIDATION = 64 << 10
_TENSOR_ALIGNMENT = 64  # c10/core/impl/alloc_cpu.cpp


@dataclass
class Thresholds:
    """mmap: bytes from which on a request is mapped. The end of a heap is given back from twice as many on."""

    mmap: int = 128 << 10


class Heap:
    """Blocks by address: those of the heap from 0 on, mapped ones below 0. All that is allocated is written to.

    resident: bytes in memory now. Those that were in the heap once stay until its end is given back.
    """

    def __init__(self, process: Heap | None = None) -> None:
        """process: the heap of another thread of the same process: thresholds are of the process."""
        self._thresholds: Thresholds = Thresholds() if process is None else process._thresholds
        self._top = self._break = self._touched = 0
        self._used: dict[int, int] = {}
        self._mapped: dict[int, int] = {}
        self._mapped_bytes = self._num_mapped = 0
        self._free: dict[int, int] = {}  # address -> size of what may join its neighbours
        self._free_by_end: dict[int, int] = {}
        self._unsorted: dict[int, None] = {}  # oldest first
        self._bins: list[tuple[int, int, int]] = []  # size, age, address
        self._ages: dict[int, int] = {}
        self._age = 0
        self._remainder: int | None = None  # of the last small request that split a block
        self._cache: defaultdict[int, list[int]] = defaultdict(list)
        self._fast: defaultdict[int, list[int]] = defaultdict(list)

    @property
    def resident(self) -> int:
        """Bytes."""
        return self._touched + self._mapped_bytes

    def malloc(self, size: int) -> int:
        """The address of `size` bytes."""
        need = _block(size)
        if self._cache[need]:
            address = self._cache[need].pop()
            self._used[address] = need
            return address
        address, got = self._take(need)
        if address >= 0:
            self._used[address] = got
        return address

    def tensor(self, size: int) -> int:
        """As posix_memalign for torch: what is before and after the aligned block is freed."""
        need = _block(size)
        address, got = self._take(_block(need + _TENSOR_ALIGNMENT + _SMALLEST))
        if address < 0:
            return address
        before = -(address + _UNIT) % _TENSOR_ALIGNMENT
        if 0 < before < _SMALLEST:
            before += _TENSOR_ALIGNMENT
        if before:
            self._give(address, before)
        address, after = address + before, got - before - need
        self._used[address] = need if after > _SMALLEST else need + after
        if after > _SMALLEST:
            self._give(address + need, after)
        return address

    def free(self, address: int) -> None:
        """What malloc() or tensor() gave."""
        if address >= 0:
            self._give(address, self._used.pop(address))
            return
        size = self._mapped.pop(address)
        self._mapped_bytes -= size
        if self._thresholds.mmap < size <= _LARGEST_THRESHOLD:
            self._thresholds.mmap = size

    def map(self, size: int) -> int:
        """A mapping of its own, whatever its size: what another thread's arena holds, or a part of a larger block."""
        self._num_mapped += 1
        self._mapped[-self._num_mapped] = size
        self._mapped_bytes += size
        return -self._num_mapped

    def _take(self, need: int) -> tuple[int, int]:
        """_int_malloc and sysmalloc: (address, size) of a block of at least `need` bytes."""
        if need <= _FAST and (blocks := self._fast.get(need)):
            return self._and_cache(need, blocks)
        if need > _SMALL:
            self._consolidate()
        elif (same := self._of_size(need)) is not None:
            self._detach(same)
            while len(self._cache[need]) < _CACHE_COUNT and (other := self._of_size(need)) is not None:
                self._detach(other)
                self._cache[need].append(other)
            return same, need
        if (found := self._sort(need)) is not None:
            return found
        place = bisect.bisect_left(self._bins, (need,))
        if place < len(self._bins):
            return self._split(self._bins[place][2], need)
        if self._break - self._top < need + _SMALLEST:
            if self._fast:
                self._consolidate()
                return self._take(need)
            if need >= self._thresholds.mmap:
                size = _pages(need + 8)
                return self.map(size), size
            self._break += _pages(need + _TOP_PAD + _SMALLEST - (self._break - self._top))
        address, self._top = self._top, self._top + need
        self._touched = max(self._touched, self._top)
        return address, need

    def _sort(self, need: int) -> tuple[int, int] | None:
        """Blocks that were freed go to their bins, oldest first, until one fits exactly."""
        cached = False
        while self._unsorted:
            address = next(iter(self._unsorted))
            size = self._free[address]
            alone = len(self._unsorted) == 1 and address == self._remainder
            if need <= _SMALL and alone and size > need + _SMALLEST:
                return self._split(address, need)
            if size == need:
                self._detach(address)
                if need > _CACHED or len(self._cache[need]) == _CACHE_COUNT:
                    return address, need
                self._cache[need].append(address)
                cached = True
                continue
            del self._unsorted[address]
            self._age += 1
            order = self._ages[address] = self._age if size <= _SMALL else -self._age  # of large ones the newest first
            bisect.insort(self._bins, (size, order, address))
        return (self._cache[need].pop(), need) if cached else None

    def _and_cache(self, need: int, blocks: list[int]) -> tuple[int, int]:
        """The newest of a fastbin, and tcache filled with the others."""
        address = blocks.pop()
        while blocks and len(self._cache[need]) < _CACHE_COUNT:
            self._cache[need].append(blocks.pop())
        return address, need

    def _of_size(self, need: int) -> int | None:
        """The oldest in the bin of exactly this size."""
        place = bisect.bisect_left(self._bins, (need,))
        return self._bins[place][2] if place < len(self._bins) and self._bins[place][0] == need else None

    def _split(self, address: int, need: int) -> tuple[int, int]:
        size = self._detach(address)
        if size - need < _SMALLEST:
            return address, size
        self._attach(address + need, size - need)
        if need <= _SMALL:
            self._remainder = address + need
        return address, need

    def _attach(self, address: int, size: int) -> None:
        self._free[address] = size
        self._free_by_end[address + size] = address
        self._unsorted[address] = None

    def _detach(self, address: int) -> int:
        size = self._free.pop(address)
        del self._free_by_end[address + size]
        if address in self._unsorted:
            del self._unsorted[address]
        else:
            del self._bins[bisect.bisect_left(self._bins, (size, self._ages.pop(address), address))]
        return size

    def _give(self, address: int, size: int) -> None:
        """_int_free and systrim."""
        if size <= _CACHED and len(self._cache[size]) < _CACHE_COUNT:
            self._cache[size].append(address)
        elif size <= _FAST:
            self._fast[size].append(address)
        elif self._join(address, size) >= _CONSOLIDATION:
            self._consolidate()
            rest = self._break - self._top
            if rest >= 2 * self._thresholds.mmap:
                self._break -= (rest - _SMALLEST - 1 - _TOP_PAD) // _PAGE * _PAGE
                self._touched = min(self._touched, self._break)

    def _join(self, address: int, size: int) -> int:
        """The size of what it is with its free neighbours."""
        if (before := self._free_by_end.get(address)) is not None:
            size += self._detach(before)
            address = before
        if address + size in self._free:
            size += self._detach(address + size)
        if address + size == self._top:
            self._top = address
            return size + self._break - address
        self._attach(address, size)
        return size

    def _consolidate(self) -> None:
        """malloc_consolidate: fastbins join their neighbours."""
        for size, blocks in self._fast.items():
            for address in blocks:
                self._join(address, size)
        self._fast.clear()


def _block(size: int) -> int:
    return max(_SMALLEST, (size + 8 + _UNIT - 1) // _UNIT * _UNIT)


def _pages(size: int) -> int:
    return -(-size // _PAGE) * _PAGE
