"""Where a rank's time goes, by its host's clock: into its own work, or into waits for the other ranks.

A wait is what Python spends waiting for a collective. Between CPUs (gloo) that is all of it, the transfer included. On
a GPU only small sums over CPU tensors are seen: NCCL's collectives are queued on the device, where the host does not
wait for them. What the device still has to do, its own work or a collective, is waited for when the host asks for a
number of it, mostly in the update, and counts as that part's work.
"""

from __future__ import annotations

import time
from datetime import timedelta

import torch.distributed as dist

_torch_wait = dist.Work.wait
_waited_s = 0.0


def time_collectives() -> None:
    """Count this process's waits from now on: DeepSpeed's, too, which all end in this method of torch's."""

    def timed(work: dist.Work, *arguments: timedelta) -> bool:
        global _waited_s
        started = time.perf_counter()
        try:
            return _torch_wait(work, *arguments)
        finally:
            _waited_s += time.perf_counter() - started

    dist.Work.wait = timed  # type: ignore[assignment]


def leave_collectives() -> None:
    """Count no more."""
    dist.Work.wait = _torch_wait  # type: ignore[method-assign]


def waited_s() -> float:
    """Seconds of all waits of this process so far."""
    return _waited_s


class Stopwatch:
    """Laps of work, without the waits in them."""

    def __init__(self) -> None:
        self._mark = time.perf_counter()
        self._waited_s = _waited_s

    def lap(self) -> float:
        """Seconds of work since the last lap."""
        now, waited = time.perf_counter(), _waited_s
        work_s = now - self._mark - (waited - self._waited_s)
        self._mark, self._waited_s = now, waited
        return work_s
