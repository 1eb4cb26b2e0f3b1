"""What grows is written as numbered segments: an object store cannot append, and a killed writer may tear a line."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING

from data_pipelines.local_files import write_all

if TYPE_CHECKING:
    from data_pipelines.storage import Store

_SEGMENT_BYTES = 8 << 20


class SegmentWriter:
    """Appends lines to numbered files; readers join them with Store.read_segments.

    write() only keeps the bytes: it never waits for I/O. flush() does the I/O in the calling thread; when it fails the
    bytes are kept for the next flush and the file keeps whole lines only. Local: one file, followed by the next at
    8 MB. Remote: a new file for every flush. A new writer never appends to an earlier writer's file, whose last line
    may be torn. Safe to use from several threads; each writer process needs a prefix of its own on a remote store.
    """

    def __init__(self, store: Store, path_prefix: str) -> None:
        self._store = store
        self._prefix = path_prefix
        self._pending: list[bytes] = []
        self._pending_lock = threading.Lock()
        self._flush_lock = threading.Lock()
        self._descriptor: int | None = None
        self._number: int | None = None

    def write(self, data: bytes) -> None:
        """Keep whole lines for the next flush."""
        with self._pending_lock:
            self._pending.append(data)

    def flush(self) -> None:
        """Write what is kept; on a ShardyardError it stays kept."""
        with self._flush_lock:
            with self._pending_lock:
                pending, self._pending = self._pending, []
            if not pending:
                return
            try:
                with self._store.explained("write", self._prefix):
                    self._append(b"".join(pending))
            except BaseException:
                with self._pending_lock:
                    self._pending[:0] = pending
                raise

    def close(self) -> None:
        """Flush and let go of the file; the writer may be used again afterwards (it then starts a new file)."""
        try:
            self.flush()
        finally:
            with self._flush_lock:
                self._close_segment()

    def _append(self, data: bytes) -> None:
        if not self._store.is_local:
            self._number = self._next_number()
            self._store.write_atomic(f"{self._prefix}-{self._number:06d}.jsonl", data)
            return
        descriptor = self._descriptor if self._descriptor is not None else self._open_segment()
        start = os.fstat(descriptor).st_size
        try:
            write_all(descriptor, data)
        except OSError:
            os.ftruncate(descriptor, start)
            raise
        if start + len(data) >= _SEGMENT_BYTES:
            self._close_segment()

    def _next_number(self) -> int:
        if self._number is not None:
            return self._number + 1
        names = self._store.segments(self._prefix)
        return int(names[-1].removesuffix(".jsonl").rpartition("-")[2]) + 1 if names else 1

    def _open_segment(self) -> int:
        number = self._next_number()
        while True:
            target = self._store.local_path(f"{self._prefix}-{number:06d}.jsonl")
            assert target is not None
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                self._descriptor = os.open(target, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL, 0o666)
            except FileExistsError:  # another process took this number since the listing
                number += 1
                continue
            self._number = number
            return self._descriptor

    def _close_segment(self) -> None:
        if self._descriptor is not None:
            descriptor, self._descriptor = self._descriptor, None
            os.close(descriptor)
