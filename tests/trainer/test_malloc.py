"""The heap against the malloc of this system, in a process of its own."""

from __future__ import annotations

import json
import platform
import random
import subprocess
import sys

import pytest

from trainer.malloc import Heap

MIB = 1 << 20
Request = tuple[str, int, int]  # "tensor", "malloc" or "free"; which block; bytes

# Python's own objects of up to 512 bytes do not come from malloc, and nothing larger is made in the loop.
REAL = """
import ctypes, json, sys
c = ctypes.CDLL(None)
c.malloc.restype = ctypes.c_void_p
c.malloc.argtypes, c.free.argtypes = [ctypes.c_size_t], [ctypes.c_void_p]
c.posix_memalign.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]
c.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
requests = json.load(sys.stdin)
held = (ctypes.c_void_p * len(requests))()
resident = (ctypes.c_long * (len(requests) + 1))()
start, file = ctypes.addressof(held), open("/proc/self/statm", "rb", buffering=0)
def now():
    file.seek(0)
    return int(file.read(64).split()[1]) * 4096
def follow(some):
    for number, (kind, block, size) in enumerate(some):
        if kind == "free":
            c.free(held[block])
        else:
            if kind == "tensor":
                c.posix_memalign(start + 8 * block, 64, size)
            else:
                held[block] = c.malloc(size)
            c.memset(held[block], 1, size)
        resident[number + 1] = now()
follow([("tensor", 0, 100), ("free", 0, 0), ("malloc", 0, 100)])  # what Python makes once
# Whatever was free before is used up, so that only what follows matters, and the heap goes on at a multiple of 64.
end = max(c.malloc(100_000) for _ in range(300))
sizes = [*range(65536, 2048, -2048), *range(2040, 8, -16)]
for size in sizes:
    while c.malloc(size) < end:
        pass
c.malloc(-(c.malloc(24) + 16) % 64 + 56)
resident[0] = now()
follow(requests)
print(json.dumps([each - resident[0] for each in resident[1:]]))
"""


def real(requests: list[Request]) -> list[int]:
    """Growth of resident memory after each request, in bytes."""
    command = [sys.executable, "-I", "-c", REAL]
    done = subprocess.run(command, input=json.dumps(requests), capture_output=True, text=True, check=True, timeout=60)
    found: list[int] = json.loads(done.stdout)
    return found


def simulated(requests: list[Request]) -> list[int]:
    """The same, of a heap."""
    heap, held, found = Heap(), {}, []
    for kind, block, size in requests:
        if kind == "free":
            heap.free(held.pop(block))
        else:
            held[block] = heap.tensor(size) if kind == "tensor" else heap.malloc(size)
        found.append(heap.resident)
    return found


def random_requests(seed: int, count: int, live_bytes: int, largest: int) -> list[Request]:
    """Tensors of random sizes with small objects among them; which one goes is random, and at times nearly all do."""
    rng = random.Random(seed)
    requests: list[Request] = []
    held: dict[int, int] = {}
    limit = live_bytes
    for block in range(count):
        kind = rng.choice(("tensor", "malloc"))
        size = int(2 ** rng.uniform(12, largest.bit_length() - 1)) if kind == "tensor" else rng.randrange(16, 1000)
        requests.append((kind, block, size))
        held[block] = size
        if rng.random() < 0.01:
            limit = rng.choice((live_bytes, live_bytes // 10))
        while sum(held.values()) > limit:
            gone = rng.choice(list(held))
            del held[gone]
            requests.append(("free", gone, 0))
    return requests


pytestmark = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or tuple(map(int, platform.libc_ver()[1].split("."))) >= (2, 38),
    reason="malloc as in glibc before 2.38",
)


@pytest.mark.parametrize("largest", [2 * MIB, 16 * MIB, 64 * MIB], ids=lambda size: f"{size // MIB} MiB")
@pytest.mark.parametrize("seed", range(3))
def test_random_requests_take_as_much(seed: int, largest: int) -> None:
    _agree(random_requests(seed, 1500, 8 * largest, largest))


def _agree(requests: list[Request]) -> None:
    """At the peak, and on the mean of all moments."""
    ours, theirs = simulated(requests), real(requests)
    assert max(ours) == pytest.approx(max(theirs), rel=0.02)
    apart = sum(abs(one - other) for one, other in zip(ours, theirs, strict=True))
    assert apart < 0.02 * sum(theirs)


def step_like_requests(steps: int, layers: int, small: bool) -> list[Request]:
    """A forward pass whose tensors stay with small objects among them, and a backward pass that frees them last first.

    Its gradients stay until the next step.
    """
    requests: list[Request] = []
    count = 0

    def new(kind: str, size: int) -> int:
        nonlocal count
        requests.append((kind, count, size))
        count += 1
        return count - 1

    gradients: list[int] = []
    for _ in range(steps):
        kept: list[int] = []
        objects: list[int] = []
        for _ in range(layers):
            for size in (2 * MIB, 2 * MIB, 6 * MIB):
                passing = new("tensor", size)
                kept.append(new("tensor", size))
                objects += [new("malloc", each) for each in (176, 32, 32, 88, 16, 72, 40) if small]
                requests.append(("free", passing, 0))
        requests += [("free", each, 0) for each in gradients]
        gradients = []
        for each in reversed(kept):
            passing = new("tensor", 2 * MIB)
            requests.append(("free", each, 0))
            gradients.append(new("tensor", MIB))
            requests.append(("free", passing, 0))
        requests += [("free", each, 0) for each in objects]
    return requests


@pytest.mark.parametrize("small", [False, True], ids=["tensors alone", "small objects among them"])
def test_steps_take_as_much(small: bool) -> None:
    _agree(step_like_requests(4, 12, small))
