"""A loader in a process of its own, which does one thing at a time when asked: so that loaders do not share memory,
imports or threads, and can be measured in turn."""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
_WARM_S = 0.05
_MOST_WAITS_S = 2.0


class PeerFailed(Exception):
    """What the loader said."""


class PeerProcess:
    """`call(name, ...)` runs Session.<name>(...) there. Use it in `with`; the process ends with it."""

    def __init__(self, name: str, log: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self.name = name
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(name, theirs, str(log)), daemon=False)
        self._process.start()
        theirs.close()

    def __enter__(self) -> PeerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError, EOFError):
            self._pipe.send(None)
        self._process.join(20)
        if self._process.is_alive():
            self._process.terminate()
            self._process.join(5)
            self._process.kill()

    def send(self, function: str, *arguments: Any, **named: Any) -> None:
        self._pipe.send((function, arguments, named))

    def receive(self, timeout_s: float = 120.0) -> Any:
        if not self._pipe.poll(timeout_s):
            self._process.kill()
            raise PeerFailed(f"no answer in {timeout_s:.0f} s")
        try:
            failed, value = self._pipe.recv()
        except (EOFError, OSError) as error:
            raise PeerFailed(f"the process ended with {self._process.exitcode}") from error
        if failed:
            raise PeerFailed(value)
        return value

    def call(self, function: str, *arguments: Any, **named: Any) -> Any:
        self.send(function, *arguments, **named)
        return self.receive()


def _serve(name: str, pipe: Any, log: str) -> None:
    sys.path.insert(0, str(ROOT))
    os.environ["OMP_NUM_THREADS"] = "1"
    with open(log, "ab", buffering=0) as file:  # loaders are talkative
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    session = Session(name)
    while (asked := pipe.recv()) is not None:
        function, arguments, named = asked
        try:
            pipe.send((False, getattr(session, function)(*arguments, **named)))
        except Exception as error:
            traceback.print_exc()
            pipe.send((True, f"{type(error).__name__}: {error}".splitlines()[0][:300]))
    with contextlib.suppress(Exception):
        session.close()
    os._exit(0)  # threads and atexit handlers of some loaders would keep the process


class Session:
    """What runs in the loader's process. "bare" is torch alone."""

    def __init__(self, name: str) -> None:
        import numpy  # noqa: F401
        import torch

        torch.set_num_threads(1)
        self._torch = torch
        self._module: Any = importlib.import_module(f"peers.{name}") if name != "bare" else None
        self._peer: Any = None
        self._batches: Iterator[Any] = iter(())

    def write(self, case: Any, folder: str) -> int:
        """Bytes on disk."""
        self._module.write(case, Path(folder))
        return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())

    def open(self, case: Any, folder: str, state: Any = None) -> float:
        """Seconds from nothing (but imports) to the first batch, going on from a state."""
        from peers.cases import num_bytes

        started = time.perf_counter()
        self._case = case
        self._peer = self._module.Peer(case, Path(folder), case.batch)
        if state is not None:
            self._peer.load(state)
        self._batches = _endless(self._peer.epoch)
        first = next(self._batches)
        elapsed = time.perf_counter() - started
        num_bytes(case, first)
        return elapsed

    def half_an_epoch(self) -> Any:
        """The state in the middle of the epoch that open() began."""
        count = self._case.num_batches // 2
        for _ in islice(self._batches, count - 1):
            pass
        return self._peer.state(count)

    def throughput(self, seconds: float) -> float:
        """MB/s (10^6 bytes) of batches, after a short warm-up."""
        from peers.cases import num_bytes

        clock, batches = time.perf_counter, self._batches
        stop = clock() + _WARM_S
        while clock() < stop:
            num_bytes(self._case, next(batches))
        count, started = 0, clock()
        stop = started + seconds
        while (now := clock()) < stop:
            next(batches)
            count += 1
        return count * self._case.batch_bytes / (now - started) / 1e6

    def waits(self, steps: int, compute_s: float) -> list[float]:
        """Seconds that each step waits for its batch, with a consumer that computes so long in between."""
        torch, clock = self._torch, time.perf_counter
        left, out = torch.rand(128, 128), torch.empty(128, 128)
        waits: list[float] = []
        begun = clock()
        for _ in range(steps):
            if len(waits) > 10 and clock() > begun + _MOST_WAITS_S:
                break
            started = clock()
            next(self._batches)
            waits.append(clock() - started)
            stop = clock() + compute_s
            while clock() < stop:
                torch.mm(left, left, out=out)
        return waits

    def neighbours(self, batches: int) -> float:
        """Of pairs of examples that follow each other, the share from the same twelfth of the data."""
        import numpy as np
        from peers.cases import NUM_CHUNKS, batch_ids

        ids = np.concatenate([batch_ids(self._case, batch) for batch in islice(self._batches, batches)])
        part = ids * NUM_CHUNKS // self._case.num_examples
        return float((part[1:] == part[:-1]).mean())

    def memory(self, folder: str) -> dict[str, float]:
        """MiB: `rss` without the pages of mapped data files, `data` those pages, `children` of other processes."""
        import psutil

        self._torch.ones(4).sum()
        data, total = 0, 0
        here = False
        for line in Path("/proc/self/smaps").read_text().splitlines():
            words = line.split()
            if not words[0].endswith(":"):
                here = len(words) > 5 and words[5].startswith(folder)
            elif words[0] == "Rss:":
                total += int(words[1])
                data += int(words[1]) * here
        children = 0
        for child in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                children += child.memory_full_info().uss
        return {"rss": (total - data) / 1024, "data": data / 1024, "children": children / 2**20}

    def seek(self, num_examples: int) -> float:
        """Seconds to make the order of so many examples, and to have the first batch's in its middle."""
        return SEEKS[self._module.__name__.rpartition(".")[2]](num_examples)

    def rank(
        self, case: Any, folder: str, rank: int, world_size: int, port: int, batch: int, steps: int | None, state: Any
    ) -> tuple[list[list[int]], Any]:
        """The numbers of the examples that this rank takes in each of so many steps, and the state afterwards."""
        import torch.distributed as distributed
        from peers.cases import batch_ids

        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size),
            NODE_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        )  # fmt: skip
        distributed.init_process_group("gloo")
        named = {"micro_batch": 4} if self._module.__name__.endswith("shardyard") else {}
        peer = self._module.Peer(case, Path(folder), batch, rank, world_size, **named)
        if state is not None:
            peer.load(state)
        ids = [batch_ids(case, given).tolist() if len(given) else [] for given in islice(peer.epoch(), steps)]
        saved = peer.state(len(ids)) if steps is not None else None
        distributed.barrier()
        return ids, saved

    def close(self) -> None:
        if self._peer is not None:
            self._peer.close()


def _endless(epoch: Callable[[], Iterator[Any]]) -> Iterator[Any]:
    while True:
        yield from epoch()


def _seek_shardyard(num_examples: int) -> float:
    import numpy as np

    from data_pipelines.order import choose_order

    sizes = np.full(num_examples // 512, 512, np.int64)  # blocks of 2 MB of 2,048 tokens
    started = time.perf_counter()
    order = choose_order("blocks", 1, sizes)
    order.sample_ids(num_examples // 2 + np.arange(8))
    return time.perf_counter() - started


def _seek_torch(num_examples: int) -> float:
    from torch.utils.data import RandomSampler

    started = time.perf_counter()
    next(islice(iter(RandomSampler(range(num_examples))), num_examples // 2, None))
    return time.perf_counter() - started


def _seek_mosaicml(num_examples: int) -> float:
    import numpy as np
    from streaming.base.partition import get_partitions
    from streaming.base.shuffle import get_shuffle

    shards = np.full(num_examples // 512, 512, np.int64)
    num_examples = int(shards.sum())
    started = time.perf_counter()
    ids = get_partitions("relaxed", num_examples, 1, 1, 1, 1, 8, num_examples // 2)
    get_shuffle("py1e", shards, 1, 1, 0, 1 << 18)[ids[ids >= 0]]
    return time.perf_counter() - started


def _seek_grain(num_examples: int) -> float:
    import grain

    started = time.perf_counter()
    rows = grain.MapDataset.range(num_examples).shuffle(seed=1)
    [rows[num_examples // 2 + i] for i in range(8)]
    return time.perf_counter() - started


SEEKS = {
    "shardyard": _seek_shardyard,
    "torch_memmap": _seek_torch,
    "mosaicml": _seek_mosaicml,
    "google_grain": _seek_grain,
}
