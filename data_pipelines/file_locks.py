"""Locks that the kernel drops when the process that holds them ends, however it ends.

Who is alive is never asked by process id: an id says nothing across containers, and is given to another process later.
"""

from __future__ import annotations

import fcntl
import os
import struct
from pathlib import Path


def open_lock_file(path: Path) -> int:
    """A descriptor of a file to lock, which is made if need be."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)


def lock_byte(descriptor: int, place: int, *, shared: bool) -> bool:
    """Lock one byte of a file, for readers (shared) or alone; False where another descriptor's lock forbids it.

    The byte need not exist. It is an "open file description lock" of Linux: unlike the older kind it belongs to the
    open file, not to the process, so that closing another descriptor of the same file does not drop it.
    """
    try:
        _set(descriptor, fcntl.F_RDLCK if shared else fcntl.F_WRLCK, place)
    except (BlockingIOError, PermissionError):
        return False
    return True


def unlock_byte(descriptor: int, place: int) -> None:
    """Give up the lock on a byte."""
    _set(descriptor, fcntl.F_UNLCK, place)


def delete_if_unlocked(path: Path) -> bool:
    """Delete a file that its owner keeps flock()ed for as long as it lives; whether the file is gone."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)
        return True
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)


def _set(descriptor: int, kind: int, place: int) -> None:
    flock = struct.pack("hhqqi0q", kind, os.SEEK_SET, place, 1, 0)  # struct flock: type, whence, start, length, pid
    fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, flock)
