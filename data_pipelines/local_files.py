"""Files on a local disk: whole or not at all, durable, and errors that name the cause and the remedy."""

from __future__ import annotations

import errno
import os
import socket
import threading
from pathlib import Path

from configs.errors import NotFound, ShardyardError, Unreachable

_REMEDIES = {
    errno.ENOSPC: ("the disk is full", "Free some space, or choose a store on another disk."),
    errno.EDQUOT: ("the disk quota is used up", "Free some space, or choose a store on another disk."),
    errno.EFBIG: ("the file would exceed the size limit", "Raise the limit (ulimit -f), or choose another store."),
    errno.EACCES: ("permission denied", "Give this user access to it, or choose another store."),
    errno.EPERM: ("permission denied", "Give this user access to it, or choose another store."),
    errno.EROFS: ("the file system is read-only", "Choose a store on a writable disk."),
    errno.ENOTDIR: ("a part of the path is a file, not a folder", "Move that file away, or choose another store."),
    errno.EISDIR: ("it is a folder, not a file", "Move that folder away, or choose another store."),
    errno.EIO: ("the disk reported an input/output error", "Check the disk (dmesg), or choose another store."),
    errno.ESPIPE: ("it can only be read from its beginning on", "Copy it to a local folder, or to an object store."),
    errno.EMFILE: ("this process has too many open files", "Raise the limit (ulimit -n)."),
}


def explain(error: OSError, action: str, path: str | Path) -> ShardyardError:
    """The one-paragraph error for an OSError met while doing `action` ("read", "write", ...) to `path`."""
    if isinstance(error, FileNotFoundError):
        return NotFound(f"Cannot {action} {path}: there is no such file or folder. Check the path.")
    if error.errno in _REMEDIES:
        cause, remedy = _REMEDIES[error.errno]
        return ShardyardError(f"Cannot {action} {path}: {cause}. {remedy}")
    if "://" in str(path):
        return Unreachable(
            f"Cannot {action} {path}: {_first_line(error)}. Check the network, the address and the credentials."
        )
    return ShardyardError(f"Cannot {action} {path}: {_first_line(error)}. Check the path and the disk.")


def _first_line(error: OSError) -> str:
    text = error.strerror or str(error) or type(error).__name__
    return text.strip().splitlines()[0].rstrip(".")


def write_all(descriptor: int, data: bytes | bytearray | memoryview) -> None:
    """Write every byte, however many calls it takes."""
    view = memoryview(data).cast("B")
    while view:
        view = view[os.write(descriptor, view) :]


def replace_file(target: Path, data: bytes | bytearray | memoryview) -> None:
    """Replace a file as a whole and make it durable; nothing of a failed try stays."""
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(target)
    temporary = target.with_name(f".{target.name}.tmp-{socket.gethostname()}-{os.getpid()}-{threading.get_ident()}")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            write_all(descriptor, data)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(target.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a local folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_temporary(name: str) -> bool:
    """Whether a file name is that of a write in progress (or of one that was killed)."""
    return name.startswith(".") and ".tmp-" in name


def _remove_leftovers(target: Path) -> None:
    """Remove what writers of this same file left when they were killed: their process, on this host, is gone."""
    prefix = f".{target.name}.tmp-{socket.gethostname()}-"
    with os.scandir(target.parent) as entries:
        leftovers = [entry.name for entry in entries if entry.name.startswith(prefix)]
    for name in leftovers:
        process_id = name.removeprefix(prefix).partition("-")[0]
        if process_id.isdigit() and int(process_id) != os.getpid() and not Path(f"/proc/{process_id}").exists():
            (target.parent / name).unlink(missing_ok=True)
