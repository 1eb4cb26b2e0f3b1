"""Worker processes for tests, forked from one warm process: torch and DeepSpeed are imported once a session."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import pickle
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Collection
from multiprocessing.connection import Connection, wait
from typing import Any

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["pytest", "tests.preload"])


class WorkerFailed(Exception):
    """A worker raised, died or did not end in time; the message holds its traceback."""


def run_workers(
    function: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout_s: float = 120.0,
    collective_timeout_s: float = 60.0,
    may_die: Collection[int] = (),
) -> list[Any]:
    """Run function(world, *args) in `world_size` new processes that form a world; returns the results by rank.

    function must be at the top of an importable module, so that workers find it.

    The first failure of any ends all of them. Ranks in `may_die` are not waited for, and may end without a result:
    theirs is then None. function may leave the world as it is; workers end without tidying up.

    Raises:
        WorkerFailed: a rank raised (with its traceback), died, or did not end within `timeout_s`.
    """
    with tempfile.TemporaryDirectory(prefix="workers-") as folder:
        workers = []
        try:
            for rank in range(world_size):
                receiver, sender = _context.Pipe(duplex=False)
                init_method = f"file://{folder}/meeting-point"
                process = _context.Process(
                    target=_work,
                    args=(sender, function, rank, world_size, init_method, collective_timeout_s, args),
                    daemon=True,
                )
                process.start()
                sender.close()
                workers.append((process, receiver))
            return _collect(workers, time.monotonic() + timeout_s, may_die)
        finally:
            for process, receiver in workers:
                receiver.close()
                process.kill()
                process.join()


def _collect(workers: list[tuple[Any, Connection]], deadline: float, may_die: Collection[int]) -> list[Any]:
    results: list[Any] = [None] * len(workers)
    pending = {receiver: rank for rank, (_, receiver) in enumerate(workers)}
    while set(pending.values()) - set(may_die):
        ready = wait(list(pending), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise WorkerFailed(f"ranks {sorted(pending.values())} did not end in time")
        for receiver in ready:
            assert isinstance(receiver, Connection)
            rank = pending.pop(receiver)
            try:
                failed, value = pickle.loads(receiver.recv_bytes())  # noqa: S301 - our own process
            except EOFError:
                if rank in may_die:
                    continue
                process = workers[rank][0]
                process.join(5)
                raise WorkerFailed(f"rank {rank} died with exit code {process.exitcode}") from None
            if failed:
                raise WorkerFailed(f"rank {rank} raised\n{value}")
            results[rank] = value
    return results


def _work(
    sender: Connection,
    function: Callable[..., Any],
    rank: int,
    world_size: int,
    init_method: str,
    timeout_s: float,
    args: tuple[Any, ...],
) -> None:
    _die_with_parent()
    from trainer.distributed import init_world

    try:
        world = init_world(rank, world_size, rank, init_method, use_gpu=False, threads=1, timeout_s=timeout_s)
        # Pickled by value: Connection.send would pass tensors as shared memory, which ends with this process.
        message = pickle.dumps((False, function(world, *args)))
    except BaseException:
        message = pickle.dumps((True, traceback.format_exc()))
    sender.send_bytes(message)
    sender.close()
    os._exit(0)  # nothing of torch's or DeepSpeed's is worth tidying up


def _die_with_parent() -> None:
    """Ask Linux to kill this process when the one that forked it ends, so that a killed test run leaves none."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
