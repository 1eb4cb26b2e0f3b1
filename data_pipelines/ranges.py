"""Byte ranges of remote files, read through whatever an object store does on a bad day.

A read that fails in passing (throttled, reset, cut short, answered with a 500, or silent) is made again after a pause
that doubles each time, with jitter so that many workers do not come back at once, until the policy's budget is spent:
then the store is out of reach (Unreachable). What will not change by asking again (no such file, no access) is told at
once.
"""

from __future__ import annotations

import itertools
import os
import random
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from typing import Any, TypeVar

from configs.errors import NotFound, ShardyardError, Unreachable
from data_pipelines.damage import DamagePolicy
from data_pipelines.file_systems import s3_with
from data_pipelines.local_files import explain
from data_pipelines.storage import Store
from data_pipelines.time_limit import Stalled, within

FIRST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 10.0
REQUEST_BYTES = 8 << 20  # a longer range is read in several requests, so that a slow one still shows progress
_OPEN_FILES = 64
_FOR_GOOD = ("ACCESS_DENIED", "FORBIDDEN", "NO_SUCH_BUCKET", "INVALID_ACCESS_KEY", "SIGNATURE", "CREDENTIALS")
_THROTTLED = (
    *("SLOW_DOWN", "SLOWDOWN", "THROTTL", "REQUEST_LIMIT", "TOO MANY REQUESTS", "SERVICE_UNAVAILABLE"),
    *(" 503", " 429"),
)
_TIMED_OUT = ("CURLCODE: 28",)

T = TypeVar("T")


class CutShort(OSError):
    """A request gave fewer bytes than the file has there."""


class Truncated(Exception):
    """The file ends before the range that was asked for."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.size = size


class Counters:
    """Numbers of one data set in one process, for the run's metrics. Safe to use from several threads."""

    def __init__(self) -> None:
        self._values: dict[str, float] = {}
        self._lock = threading.Lock()

    def add(self, name: str, amount: float = 1) -> None:
        """Count something."""
        with self._lock:
            self._values[name] = self._values.get(name, 0) + amount

    def values(self) -> dict[str, float]:
        """All that was counted so far."""
        with self._lock:
            return dict(self._values)


def pauses(seed: str) -> Iterator[float]:
    """Seconds to wait before each further try: doubling, up to half of each taken off by chance. A seed's are fixed."""
    generator = random.Random(seed)
    longest = FIRST_PAUSE_S
    while True:
        yield longest * generator.uniform(0.5, 1.0)
        longest = min(LONGEST_PAUSE_S, 2 * longest)


class RangeReader:
    """Byte ranges of a store's files. Safe to use from several threads; close() wakes those that wait to try again."""

    def __init__(self, store: Store, policy: DamagePolicy, counters: Counters, seed: int | None = None) -> None:
        self._store = store
        self._policy = policy
        self._counters = counters
        self._seed = os.getpid() if seed is None else seed
        self._files: OrderedDict[str, Any] = OrderedDict()
        self._lock = threading.Lock()
        self._closed = threading.Event()

    def read(self, path: str, start: int, stop: int) -> bytes:
        """Bytes start..stop of a file.

        Raises NotFound, Truncated, another ShardyardError for what no further try can change, and Unreachable when
        the store still fails after the policy's retry_s.
        """
        cuts = [*range(start, stop, REQUEST_BYTES), stop]
        parts = [
            self._patiently(path, first, partial(self._once, path, first, last))
            for first, last in itertools.pairwise(cuts)
        ]
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def read_file(self, path: str) -> bytes:
        """The whole file; one on a local disk without further tries. Raises what read() does, but Truncated."""
        if self._store.is_local:
            return self._store.read_bytes(path)
        size = self._patiently(path, 0, lambda: within(self._policy.stall_s, lambda: int(self._open(path).size())))
        return self.read(path, 0, size)

    def pause(self, seconds: float) -> None:
        """Wait. Raises Unreachable when closed meanwhile."""
        if self._closed.wait(seconds):
            raise Unreachable(f"Reading from {self._store.path()} was given up: the data set is closed.")

    def forget(self, path: str) -> None:
        """Open the file anew at the next read."""
        with self._lock:
            self._files.pop(path, None)

    def close(self) -> None:
        """No further tries."""
        self._closed.set()
        with self._lock:
            self._files.clear()

    def _patiently(self, path: str, start: int, request: Callable[[], T]) -> T:
        """The answer to a request, which is made until it is answered in full or the budget is spent."""
        waits = pauses(f"{self._seed} {path} {start}")
        tries, failing_since = 0, None
        while True:
            tries += 1
            began = time.monotonic()
            try:
                return request()
            except Truncated:
                raise
            except Exception as error:
                self.forget(path)
                if not in_passing(error):
                    if isinstance(error, OSError):
                        raise explain(error, "read", self._store.path(path)) from error
                    raise
                self._counters.add("retries")
                self._counters.add(kind_of(error))
                failing_since = failing_since or began
                wait = next(waits)
                if time.monotonic() + wait - failing_since > self._policy.retry_s:
                    raise self._given_up(path, tries, time.monotonic() - failing_since, error) from error
                self.pause(wait)

    def _once(self, path: str, start: int, stop: int) -> bytes:
        def request() -> bytes:
            file = self._open(path)
            if file.size() < stop:
                raise Truncated(file.size())
            return bytes(file.read_at(stop - start, start))

        self._counters.add("requests")
        data = within(self._policy.stall_s, request)
        if len(data) != stop - start:
            raise CutShort(f"{len(data)} bytes came instead of {stop - start}")
        self._counters.add("fetched_bytes", len(data))
        return data

    def _open(self, path: str) -> Any:
        """An open file; kept, because opening one asks an object store for its size."""
        with self._lock:
            file = self._files.get(path)
        if file is None:
            file = self._open_anew(path)
            with self._lock:
                self._files[path] = file
                if len(self._files) > _OPEN_FILES:
                    self._files.popitem(last=False)
        return file

    def _open_anew(self, path: str) -> Any:
        local = self._store.local_path(path)
        if local is not None:
            import pyarrow as pa

            return pa.OSFile(str(local))
        file_system, root = self._file_system
        return file_system.open_input_file(f"{root}/{path}")

    @cached_property
    def _file_system(self) -> tuple[Any, str]:
        file_system, root = self._store._remote
        return without_retries(file_system, self._policy.stall_s), root

    def _given_up(self, path: str, tries: int, seconds: float, error: Exception) -> Unreachable:
        cause = (next(iter(str(error).strip().splitlines()), "") or type(error).__name__).rstrip(".: ")
        return Unreachable(
            f"{self._store.path(path)} could not be read: {tries} tries in {seconds:.0f} s failed, the last with: "
            f"{cause}. Check the store and the network, and launch the run again: it goes on where it was. "
            f"For a store that is away for longer raise data.retry_s (now {self._policy.retry_s:g})."
        )


def without_retries(file_system: Any, timeout_s: float) -> Any:
    """An S3 file system that tells of a failed request at once; any other as it is."""
    from pyarrow.fs import AwsStandardS3RetryStrategy

    once = AwsStandardS3RetryStrategy(max_attempts=1)
    return s3_with(file_system, retry_strategy=once, request_timeout=timeout_s)


def in_passing(error: Exception) -> bool:
    """Whether the same request may well succeed in a moment."""
    if isinstance(error, FileNotFoundError | PermissionError | NotFound | TypeError | AttributeError | AssertionError):
        return False
    if isinstance(error, ShardyardError) and not isinstance(error, Unreachable):
        return False
    text = str(error).upper()
    return not any(code in text for code in _FOR_GOOD)


def kind_of(error: Exception) -> str:
    """The counter for an error in passing."""
    text = str(error).upper()
    if isinstance(error, Stalled) or any(code in text for code in _TIMED_OUT):
        return "stalls"
    if isinstance(error, CutShort) or "PARTIAL FILE" in text:
        return "cut_short"
    return "throttled" if any(code in text for code in _THROTTLED) else "failed_requests"
