"""One builder at a time in a local folder: a lock that dies with the process that holds it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

LOCK_FILE = "lock"
_POLL_S = 0.1


@contextlib.contextmanager
def hold(folder: Path, is_done: Callable[[], bool], waiting: Callable[[], None]) -> Iterator[bool]:
    """Hold the lock of a build: True when this process shall build, False when another one has finished meanwhile.

    The lock is an flock on a file in the folder, which is removed at the end: the kernel drops it with the process,
    however that ends. waiting: called again and again while another process builds.
    """
    path = folder / LOCK_FILE
    while not is_done():
        folder.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except FileNotFoundError:
            continue  # the other builder has just given up, and removed the folder
        try:
            if not _try_lock(descriptor):
                waiting()
                time.sleep(_POLL_S)
            elif _is_same_file(descriptor, path):
                try:
                    if is_done():  # finished between our look and our lock: this lock file is our own
                        break
                    yield True
                    return
                finally:
                    path.unlink(missing_ok=True)  # while it is held: who waits for it sees that it is another's
                    with contextlib.suppress(OSError):
                        folder.rmdir()  # of a build that left nothing
        finally:
            os.close(descriptor)
    yield False


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_same_file(descriptor: int, path: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), path.stat())
    return False
