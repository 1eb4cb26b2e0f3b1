"""What a disk may hold after a crash, computed from the system calls that were made before it.

The model is that of Pillai et al., "All File Systems Are Not Created Equal" (OSDI 2014): a call's effects lie in memory
until they are synced, and until then any of them may be lost, and any may reach the disk before any other.

    write, truncate                a file's data; durable after an fsync of the file
    create, mkdir, rename, unlink  names; durable after an fsync of the folder(s) that they stand in

That is weaker than what ext4 or XFS give, and all that POSIX promises. A rename is atomic.
"""

from __future__ import annotations

import base64
import gzip
import json
import random
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import xxhash

Files = dict[str, bytes | None]  # what a folder holds, by relative path; None is a folder


@dataclass(frozen=True)
class Call:
    """One system call below the recorded folder, or a mark that the recorded process set between two.

    kind: create, mkdir, write, truncate, rename, unlink, rmdir, sync, mark. path, target: relative to the folder;
    target is a rename's. offset: of a write; the new length of a truncate. data: of a write or a mark.
    """

    kind: str
    path: str = ""
    target: str = ""
    offset: int = 0
    data: bytes = b""


def write_calls(path: Path, calls: Sequence[Call]) -> None:
    """Keep a recording: JSON lines, compressed; the same calls are the same bytes."""
    lines = [json.dumps([c.kind, c.path, c.target, c.offset, base64.b85encode(c.data).decode()]) for c in calls]
    path.write_bytes(gzip.compress("\n".join(lines).encode(), mtime=0))


def read_calls(path: Path) -> list[Call]:
    """A recording that write_calls kept."""
    rows = [json.loads(line) for line in gzip.decompress(path.read_bytes()).decode().splitlines()]
    return [Call(kind, name, target, offset, base64.b85decode(data)) for kind, name, target, offset, data in rows]


@dataclass(frozen=True)
class _Effect:
    """What a call changes. names: (folder's inode, name, inode or None), set together; or data of one inode."""

    names: tuple[tuple[int, str, int | None], ...] = ()
    inode: int | None = None
    offset: int = 0
    data: bytes | None = None  # None: the file's length becomes `offset`


@dataclass(frozen=True)
class CrashState:
    """variant: which of the model's cases. index: the crash lies before this call."""

    index: int
    variant: str
    files: Files


_ROOT = 0


class Disk:
    """A recorded folder, empty at first, at any moment of its recording and after a crash at any moment."""

    def __init__(self, calls: Sequence[Call]) -> None:
        self.calls = calls
        self._effects: dict[int, _Effect] = {}  # by the call's index
        self._syncs: dict[int, int] = {}  # index of the call: inode
        self._folders = {_ROOT}
        self._names: dict[tuple[int, str], int] = {}  # as they are now, in memory
        self._num_inodes = 1
        for index, call in enumerate(calls):
            self._add(index, call)

    def _find(self, path: str) -> int:
        inode = _ROOT
        for name in path.split("/") if path else []:
            inode = self._names[inode, name]
        return inode

    def _place(self, path: str) -> tuple[int, str]:
        folder, _, name = path.rpartition("/")
        return self._find(folder), name

    def _set_names(self, index: int, *names: tuple[tuple[int, str], int | None]) -> None:
        self._effects[index] = _Effect(names=tuple((*place, inode) for place, inode in names))
        for place, inode in names:
            if inode is None:
                del self._names[place]
            else:
                self._names[place] = inode

    def _add(self, index: int, call: Call) -> None:
        match call.kind:
            case "create" | "mkdir":
                if (place := self._place(call.path)) not in self._names:
                    if call.kind == "mkdir":
                        self._folders.add(self._num_inodes)
                    self._set_names(index, (place, self._num_inodes))
                    self._num_inodes += 1
            case "unlink" | "rmdir":
                self._set_names(index, (self._place(call.path), None))
            case "rename":
                source = self._place(call.path)
                self._set_names(index, (self._place(call.target), self._names[source]), (source, None))
            case "write":
                self._effects[index] = _Effect(inode=self._find(call.path), offset=call.offset, data=call.data)
            case "truncate":
                self._effects[index] = _Effect(inode=self._find(call.path), offset=call.offset)
            case "sync":
                self._syncs[index] = self._find(call.path)

    # --- states

    def files(self, end: int | None = None) -> Files:
        """What a reader sees after the first `end` calls; None: after all."""
        return self._built([effect for index, effect in self._effects.items() if end is None or index < end])

    def crash_states(self, *, random_subsets: int, seed: int = 0) -> Iterator[CrashState]:
        """Each different state that a crash before each call, or after the last one, may leave."""
        seen: dict[bytes, None] = {}
        marks = 0
        for index in range(len(self.calls) + 1):
            marks += index > 0 and self.calls[index - 1].kind == "mark"
            for variant, effects in self._variants(index, random_subsets, random.Random(f"{seed} {index}")):
                files = self._built(effects)
                key = digest(files) + bytes([marks])  # what is expected of a state changes at a mark
                if key not in seen:
                    seen[key] = None
                    yield CrashState(index, variant, files)

    def _durable(self, end: int) -> set[int]:
        last_sync: dict[int, int] = {}
        for index, inode in self._syncs.items():
            if index < end:
                last_sync[inode] = index
        return {
            index
            for index, effect in self._effects.items()
            if all(index < last_sync.get(inode, -1) for inode in _inodes(effect))
        }

    def _variants(self, end: int, random_subsets: int, rng: random.Random) -> Iterator[tuple[str, list[_Effect]]]:
        durable = self._durable(end)
        before = {index: effect for index, effect in self._effects.items() if index < end}
        loose = [index for index in before if index not in durable]
        names = [index for index in loose if before[index].names]

        def chosen(indices: Collection[int]) -> list[_Effect]:
            return [effect for index, effect in before.items() if index in durable or index in indices]

        def changed(indices: Collection[int], keep: float, fill: bool) -> list[_Effect]:
            return [_cut(e, keep, fill) if index in indices else e for index, e in before.items()]

        data = [index for index in loose if before[index].data]
        yield "killed: all calls arrived", chosen(loose)
        if not loose:
            return
        yield "power cut: what was not synced is lost", chosen(())
        yield "names without data", chosen(names)
        yield "names with half of the data", changed(data, 0.5, False)
        yield "names with zeros for data", changed(data, 0.0, True)
        yield "the last write is torn", changed(data[-1:], 0.5, False)
        yield "the last name came first", chosen({*loose} - {*names[:-1]})
        yield "the last name is lost", chosen({*loose} - {*names[-1:]})
        for _ in range(random_subsets):
            yield "any part of what was not synced", chosen({index for index in loose if rng.random() < 0.5})

    def _built(self, effects: Sequence[_Effect]) -> Files:
        contents: dict[int, bytearray] = {}
        names: dict[int, dict[str, int]] = {}
        for effect in effects:
            for folder, name, inode in effect.names:
                entries = names.setdefault(folder, {})
                if inode is None:
                    entries.pop(name, None)
                else:
                    entries[name] = inode
            if effect.inode is not None:
                content = contents.setdefault(effect.inode, bytearray())
                end = effect.offset + len(effect.data or b"")
                content.extend(bytes(max(end - len(content), 0)))
                if effect.data is None:
                    del content[effect.offset :]
                else:
                    content[effect.offset : end] = effect.data
        files: Files = {}
        folders = [("", _ROOT)]
        for path, folder in folders:
            for name, inode in names.get(folder, {}).items():
                inside = f"{path}/{name}" if path else name
                files[inside] = None if inode in self._folders else bytes(contents.get(inode, b""))
                if inode in self._folders:
                    folders.append((inside, inode))
        return files


def _inodes(effect: _Effect) -> set[int]:
    """What has to be synced for an effect to be durable."""
    return {folder for folder, _, _ in effect.names} if effect.inode is None else {effect.inode}


def _cut(effect: _Effect, keep: float, fill: bool) -> _Effect:
    """A write of which a part arrived; fill: the rest is zeros, as where a file's length is written before its data."""
    assert effect.data is not None
    arrived = effect.data[: int(len(effect.data) * keep)]
    rest = bytes(len(effect.data) - len(arrived)) if fill else b""
    return _Effect(inode=effect.inode, offset=effect.offset, data=arrived + rest)


def damaged(files: Files, folder: str, flips: int, seed: int = 0) -> Iterator[tuple[str, str, Files]]:
    """(what was done, to which file, the result) for each file below `folder` of a sound state."""
    for path, content in files.items():
        if content is None or not f"{path}/".startswith(f"{folder}/" if folder else "") or not content:
            continue
        rng = random.Random(f"{seed} {path}")
        for _ in range(flips):
            position, bit = rng.randrange(len(content)), 1 << rng.randrange(8)
            flipped = content[:position] + bytes([content[position] ^ bit]) + content[position + 1 :]
            yield "one bit flipped", path, {**files, path: flipped}
        for length in (0, len(content) // 2, len(content) - 1):
            yield "truncated", path, {**files, path: content[:length]}
        yield "missing", path, {name: value for name, value in files.items() if name != path}


def digest(files: Files) -> bytes:
    """Of names and contents."""
    state = xxhash.xxh3_128()
    for path in sorted(files):
        content = files[path]
        state.update(f"{path}\0{-1 if content is None else len(content)}\0".encode())
        state.update(content or b"")
    return state.digest()


def write_files(root: Path, files: Files) -> None:
    """Make a folder that holds this."""
    root.mkdir(parents=True)
    for path in sorted(files):  # folders before what is in them
        content = files[path]
        if content is None:
            (root / path).mkdir()
        else:
            (root / path).write_bytes(content)


def read_files(root: Path) -> Files:
    """What a real folder holds."""
    return {path.relative_to(root).as_posix(): None if path.is_dir() else path.read_bytes() for path in root.rglob("*")}
