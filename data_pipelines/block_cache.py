"""The node's cache of remote blocks: one folder, one limit in bytes, shared by all processes of the node.

    <folder>/<digest>-<bytes>.block     a block's content, named by what it holds; complete from the moment it is there
             <name>.block.tmp-<random>  one being written, locked (flock) by its writer for as long as that lives
             sharers/<random>           one for each process that has the cache open, locked likewise
             lock                       held (flock) for the moment in which bytes are counted
             used_bytes                 never less than what the files above take
             pins, claims               no content; locks on single bytes of them stand for blocks

A process that uses a block holds a shared lock on that block's byte of `pins`, and nobody evicts what is pinned; one
that fetches a block holds a lock on its byte of `claims`, so that no two fetch the same. All of it is locks of open
files, which the kernel drops when a process dies, however it dies: nothing here asks whether a process id lives.

Only files of these names are ever deleted, and only this module makes them, from bytes that a remote store holds.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
import threading
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from configs.errors import TimedOut, UsageError
from data_pipelines.file_locks import delete_if_unlocked, lock_byte, open_lock_file, unlock_byte
from data_pipelines.local_files import explain, write_all

LOCK_WAIT_S = 60.0
ROOM_WAIT_S = 60.0
_NAME = re.compile(r"[0-9a-f]{16}-\d+\.block")
_TEMPORARY = re.compile(r"[0-9a-f]{16}-\d+\.block\.tmp-[0-9a-f]{16}")
_PAGE = 4096
_SLACK = 32  # an eviction frees 1/32 of the limit at once, so that the folder is listed once for many blocks
_FULL = (errno.ENOSPC, errno.EDQUOT)


class CacheFull(Exception):
    """The disk under the cache has no room for a block, though the limit would allow it."""


def default_folder() -> Path:
    """Where a node's cache is unless the configuration says otherwise."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "shardyard" / "blocks"


@cache
def shared_cache(folder: Path, limit_bytes: int) -> BlockCache:
    """This process's one BlockCache of a folder, for all its data sets."""
    return BlockCache(folder, limit_bytes)


class BlockCache:
    """One process's hold on a node's cache. Safe to use from several threads and processes.

    Names are those of block_name(). Every method raises ShardyardErrors for what the disk does, but where CacheFull
    or None is promised.
    """

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        if limit_bytes < 1:
            raise UsageError(f"data.cache_bytes={limit_bytes} leaves no room for a block. Set some GB.")
        self.folder = folder
        self.limit_bytes = limit_bytes
        self.evictions = 0  # files this process deleted to make room
        self.users = 0  # data sets of this process that use it
        self._threads = threading.RLock()
        self._pinned: dict[str, int] = {}  # name -> how often
        self._claimed: set[str] = set()
        try:
            (folder / "sharers").mkdir(parents=True, exist_ok=True)
            self._open()
        except OSError as error:
            raise explain(error, "use the block cache", folder) from error

    def _open(self) -> None:
        self._process = os.getpid()
        self._lock, self._pins, self._claims = (
            open_lock_file(self.folder / name) for name in ("lock", "pins", "claims")
        )
        with self._locked():
            self._sharer = self.folder / "sharers" / secrets.token_hex(8)
            self._alive = open_lock_file(self._sharer)
            fcntl.flock(self._alive, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._recount()

    def after_fork(self) -> bool:
        """Whether this is a child of the process that opened the cache; it then has it anew, with nothing pinned."""
        if os.getpid() == self._process:
            return False
        self._threads = threading.RLock()
        self._pinned, self._claimed = {}, set()
        for descriptor in (self._lock, self._pins, self._claims, self._alive):
            os.close(descriptor)  # and no unlocking: the parent's locks are these very ones
        self._open()
        return True

    def close(self) -> None:
        """Let go of every pin."""
        with self._threads:
            if self._alive < 0:
                return
            self._sharer.unlink(missing_ok=True)
            for descriptor in (self._lock, self._pins, self._claims, self._alive):
                os.close(descriptor)
            self._alive = -1

    # --- blocks that are there

    def __contains__(self, name: str) -> bool:
        """Whether a block is cached now; only one that is pinned stays so."""
        return (self.folder / name).exists()

    def pin(self, name: str) -> int | None:
        """A descriptor of a block's file, which the caller closes; it is not evicted before as many unpin()s.

        None for one that is not cached.
        """
        with self._threads:
            if not self._hold(name):
                return None
            try:
                descriptor = os.open(self.folder / name, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                self.unpin(name)
                return None
            except OSError as error:
                self.unpin(name)
                raise explain(error, "read", self.folder / name) from error
            with contextlib.suppress(OSError):
                os.utime(descriptor)  # eviction takes what was pinned longest ago
            return descriptor

    def touch(self, name: str) -> bool:
        """Put a block last in the line of those to evict; False for one that is not cached."""
        try:
            os.utime(self.folder / name)
        except OSError:
            return False
        return True

    def unpin(self, name: str) -> None:
        """Undo one pin()."""
        with self._threads:
            if self._pinned[name] > 1:
                self._pinned[name] -= 1
                return
            del self._pinned[name]
            unlock_byte(self._pins, _place(name))

    def drop(self, name: str) -> None:
        """Delete a block's file that turned out to be damaged, though it be pinned."""
        with self._locked():
            self._delete(self.folder / name)

    # --- blocks that come

    @contextlib.contextmanager
    def claim(self, name: str) -> Iterator[bool]:
        """Whether it is the caller who is to fetch a block: for the time of the `with`, nobody else is."""
        with self._threads:
            mine = name not in self._claimed and lock_byte(self._claims, _place(name), shared=False)
            if mine:
                self._claimed.add(name)
        try:
            yield mine
        finally:
            if mine:
                with self._threads:
                    self._claimed.discard(name)
                    unlock_byte(self._claims, _place(name))

    def put(self, name: str, content: bytes | memoryview, *, pin: bool, wait_s: float = ROOM_WAIT_S) -> None:
        """Cache a block, and pin it if asked to.

        Makes room by evicting what nobody has pinned; where all is pinned it waits. Raises UsageError when there is no
        room after wait_s, CacheFull when the disk has none.
        """
        try:
            self._put(name, content, pin, wait_s)
        except CacheFull:  # others filled the disk; the cache gives some of its own room before it gives up
            with self._locked():
                self._make_room(len(content), self._used() - self.limit_bytes // _SLACK)
            self._put(name, content, pin, wait_s)

    def _put(self, name: str, content: bytes | memoryview, pin: bool, wait_s: float) -> None:
        descriptor, temporary = self._reserve(name, len(content), wait_s)
        try:
            with _explained("write", temporary):
                write_all(descriptor, content)
            with self._locked(), _explained("write", temporary):
                if (self.folder / name).exists():  # fetched twice, where a claim was given up
                    self._delete(temporary)
                else:
                    os.rename(temporary, self.folder / name)
                if pin and not self._hold(name):
                    raise AssertionError("only eviction keeps others from pinning, and it holds the lock")
        except BaseException:
            with self._locked():
                self._delete(temporary)
            raise
        finally:
            os.close(descriptor)

    def _reserve(self, name: str, size: int, wait_s: float) -> tuple[int, Path]:
        """A temporary file, locked, whose size is counted already: (its descriptor, its path)."""
        temporary = self.folder / f"{name}.tmp-{secrets.token_hex(8)}"
        deadline = time.monotonic() + (wait_s if _on_disk(size) <= self.limit_bytes else 0)
        while True:
            with self._locked():
                if self._make_room(size, self.limit_bytes):
                    with _explained("write", temporary):
                        self._count(self._used() + _on_disk(size))
                        descriptor = open_lock_file(temporary)
                        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    return descriptor, temporary
            if time.monotonic() >= deadline:
                raise UsageError(
                    f"The block cache {self.folder} is too small: a block of {size} bytes finds no room, for the limit "
                    f"is {self.limit_bytes} bytes and blocks in use at this moment take the rest. Raise "
                    "data.cache_bytes, or, where data.shuffle is examples, set it to blocks."
                )
            time.sleep(0.01)

    # --- room: all of this under the lock

    @property
    def sharers(self) -> int:
        """How many processes have the cache open; those that died since the last eviction are among them."""
        return max(1, len(os.listdir(self.folder / "sharers")))

    def used_bytes(self) -> int:
        """What the cache takes on the disk; a little more after a process was killed, until the next eviction."""
        return self._used()

    def _make_room(self, size: int, limit_bytes: int) -> bool:
        """Evict until there is room for a file under a limit; False where too much is pinned."""
        wanted = _on_disk(size)
        if self._used() + wanted <= limit_bytes:
            return True
        entries = sorted(self._recount())
        used = self._used()
        goal = limit_bytes - max(wanted, limit_bytes // _SLACK)
        for _, path, bytes_there in entries:
            if used <= goal:
                break
            if path.name not in self._pinned and lock_byte(self._pins, _place(path.name), shared=False):
                try:
                    path.unlink(missing_ok=True)
                    used -= bytes_there
                    self.evictions += 1
                finally:
                    unlock_byte(self._pins, _place(path.name))
        self._count(used)
        return used + wanted <= limit_bytes

    def _recount(self) -> list[tuple[int, Path, int]]:
        """Remove what dead processes left, and count anew: (last pinned, path, bytes) of each block."""
        for path in (self.folder / "sharers").iterdir():
            delete_if_unlocked(path)
        blocks, total = [], 0
        with os.scandir(self.folder) as entries:
            for entry in entries:
                path = self.folder / entry.name
                if _TEMPORARY.fullmatch(entry.name) and delete_if_unlocked(path):
                    continue
                if not _NAME.fullmatch(entry.name) and not _TEMPORARY.fullmatch(entry.name):
                    continue
                with contextlib.suppress(FileNotFoundError):
                    status = entry.stat(follow_symlinks=False)
                    # one being written is counted by its name, which has the size it will reach
                    size = _named_size(entry.name)
                    total += size
                    if _NAME.fullmatch(entry.name):
                        blocks.append((status.st_mtime_ns, path, size))
        self._count(total)
        return blocks

    def _used(self) -> int:
        try:
            return int((self.folder / "used_bytes").read_bytes())
        except (FileNotFoundError, ValueError):
            return self.limit_bytes  # unknown: whoever needs room counts

    def _count(self, used: int) -> None:
        descriptor = os.open(self.folder / "used_bytes", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            os.pwrite(descriptor, b"%020d" % max(0, used), 0)
        finally:
            os.close(descriptor)

    def _delete(self, path: Path) -> None:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
            self._count(self._used() - _named_size(path.name))

    # --- locks

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """The cache's lock, for this process and thread alone. Raises TimedOut."""
        deadline = time.monotonic() + LOCK_WAIT_S
        with self._threads:
            while True:
                try:
                    fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise TimedOut(
                            f"The block cache {self.folder} was locked for {LOCK_WAIT_S:g} s by another process that "
                            "does not go on (fuser shows which). End it, or choose another data.cache_dir."
                        ) from None
                    time.sleep(0.001)
            try:
                yield
            finally:
                fcntl.flock(self._lock, fcntl.LOCK_UN)

    def _hold(self, name: str) -> bool:
        """Pin a name, whether or not there is such a file; False where it is just being evicted."""
        if name not in self._pinned and not lock_byte(self._pins, _place(name), shared=True):
            return False
        self._pinned[name] = self._pinned.get(name, 0) + 1
        return True


def block_name(digest: int, size: int) -> str:
    """The cached file's name of a block with this XXH3 digest and length in bytes."""
    return f"{digest:016x}-{size}.block"


def _named_size(name: str) -> int:
    """Bytes that a block's file, or the one it is written to, takes on the disk."""
    return _on_disk(int(name.partition(".")[0].partition("-")[2]))


def _place(name: str) -> int:
    """The byte of `pins` and `claims` that stands for a block."""
    return int(name[:16], 16) >> 2


def _on_disk(size: int) -> int:
    return -(-size // _PAGE) * _PAGE


@contextlib.contextmanager
def _explained(action: str, path: Path) -> Iterator[None]:
    """Make CacheFull of a full disk, and a ShardyardError of what else the disk does."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise CacheFull from error
        raise explain(error, action, path) from error
