"""Records the real system calls by which ranks change a folder, with strace."""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from tests.crash.disk import Call
from tests.pool import run_workers

Saves = Callable[[Any, Path, Callable[[str, str], None]], None]

_CALLS = (
    "openat,creat,open,write,pwrite64,writev,pwritev,pwritev2,ftruncate,truncate,rename,renameat,renameat2,unlink,"
    "unlinkat,rmdir,mkdir,mkdirat,fsync,fdatasync,sync,syncfs,sync_file_range,lseek,link,linkat,symlink,symlinkat,"
    "fallocate,copy_file_range,sendfile,splice"
)
_LINE = re.compile(r"(\d+) +(.*)", re.DOTALL)
_RESUMED = re.compile(r"<\.\.\. \w+ resumed>")
_DONE = re.compile(r"(\w+)\((.*)\) += (-?\d+)(?:<([^>]*)>)?", re.DOTALL)
_DESCRIPTOR = re.compile(r"(\d+|AT_FDCWD)<([^>]*)>")
_TEXT = re.compile(r'"((?:\\x[0-9a-f]{2})*)"')


_TRACED_WITHIN_S = 60.0
_DETACHED_WITHIN_S = 30.0


def strace_works() -> bool:
    """Whether strace is installed and may trace."""
    if shutil.which("strace") is None:
        return False
    return subprocess.run(["strace", "-o", os.devnull, "true"], capture_output=True, check=False).returncode == 0


def record(saves: Saves, world_size: int, work: Path) -> list[Call]:
    """The calls by which `world_size` ranks that run saves(world, folder, mark) change the folder work/store.

    They come in the order in which they returned. mark(word, digest) leaves a mark among them, on rank 0. `work` is
    a new folder; saves stands at the top of a module.
    """
    folder, log = work / "store", work / "strace.log"
    folder.mkdir(parents=True)
    run_workers(_traced, world_size, saves, folder, log)
    calls = list(_calls(log, folder, log.with_name("marks")))
    log.unlink()
    return calls


def _traced(world: Any, saves: Saves, folder: Path, log: Path) -> None:
    """Run on a rank of the pool, traced from here on: it has imported all that the saves need."""
    ctypes.CDLL(None).prctl(0x59616D61, ctypes.c_ulong(-1))  # PR_SET_PTRACER: any process may trace this one
    ids = torch.zeros(world.size, dtype=torch.int64)
    ids[world.rank] = os.getpid()
    torch.distributed.all_reduce(ids)
    options = ["-q", "-f", "-y", "-xx", "-s", "100000000", "-e", f"trace={_CALLS}", "-e", "signal=none", "-o", str(log)]
    strace = None
    if world.rank == 0:
        strace = subprocess.Popen(["strace", *options, *(f"--attach={number}" for number in ids.tolist())])
    deadline = time.monotonic() + _TRACED_WITHIN_S
    while "TracerPid:\t0\n" in Path("/proc/self/status").read_text():
        assert time.monotonic() < deadline, "strace did not attach"
        time.sleep(0.01)
    marks = os.open(log.with_name("marks"), os.O_WRONLY | os.O_CREAT)

    def mark(word: str, digest: str) -> None:
        torch.distributed.barrier()
        if world.rank == 0:
            os.write(marks, json.dumps({word: digest}).encode())
        torch.distributed.barrier()

    torch.distributed.barrier()
    saves(world, folder, mark)
    torch.distributed.barrier()
    if strace is not None:
        strace.send_signal(signal.SIGINT)
        try:
            strace.wait(_DETACHED_WITHIN_S)
        finally:
            strace.kill()
    torch.distributed.barrier()  # strace would wait for ever for a process that ends while it is let go


def _calls(log: Path, folder: Path, marks: Path) -> Iterator[Call]:
    begun: dict[str, str] = {}
    offsets: dict[tuple[str, str], int] = {}  # of (descriptor, path); a path is written by one process at a time
    with log.open() as lines:
        for line in lines:
            match = _LINE.match(line)
            if match is None:
                continue
            task, text = match.groups()
            if text.rstrip().endswith("<unfinished ...>"):
                begun[task] = text.rpartition("<unfinished ...>")[0]
                continue
            if _RESUMED.match(text):
                text = begun.pop(task) + _RESUMED.sub("", text, count=1)
            done = _DONE.match(text)
            if done is not None and int(done[3]) >= 0:
                yield from _call(done, folder, marks, offsets)


def _call(done: re.Match[str], folder: Path, marks: Path, offsets: dict[tuple[str, str], int]) -> Iterator[Call]:
    name, arguments, result = done[1], done[2], int(done[3])
    texts = [_bytes(text) for text in _TEXT.findall(arguments)]
    found = _DESCRIPTOR.match(arguments)
    number, opened = (found[1], os.fsdecode(_bytes(found[2]))) if found else ("", "")
    if name in ("openat", "open", "creat"):
        path = os.fsdecode(_bytes(done[4] or ""))
        offsets[str(result), path] = 0
        inside = _inside(path, folder)
        if inside is not None and ("O_CREAT" in arguments or name == "creat"):
            assert "O_APPEND" not in arguments, f"the recorder cannot follow appends: {path}"
            yield Call("create", inside)
        if inside is not None and ("O_TRUNC" in arguments or name == "creat"):
            yield Call("truncate", inside)
    elif name in ("write", "writev", "pwrite64"):
        if opened == str(marks):
            yield Call("mark", data=texts[0])
        elif (inside := _inside(opened, folder)) is not None:
            data = b"".join(texts)[:result]
            at = int(arguments.rpartition(",")[2]) if name == "pwrite64" else offsets[number, opened]
            if name != "pwrite64":
                offsets[number, opened] = at + result
            yield Call("write", inside, offset=at, data=data)
    elif name == "sendfile":  # of shutil.copyfile: a whole file, from its beginning
        source = _DESCRIPTOR.findall(arguments)[-1][1]
        if (inside := _inside(opened, folder)) is not None and result > 0:
            at = offsets[number, opened]
            offsets[number, opened] = at + result
            yield Call(
                "write", inside, offset=at, data=Path(os.fsdecode(_bytes(source))).read_bytes()[at : at + result]
            )
    elif name == "lseek":
        offsets[number, opened] = result
    elif name in ("fsync", "fdatasync"):
        if (inside := _inside(opened, folder)) is not None:
            yield Call("sync", inside)
    elif name == "ftruncate":
        if (inside := _inside(opened, folder)) is not None:
            yield Call("truncate", inside, offset=int(arguments.rpartition(",")[2]))
    elif name.startswith(("mkdir", "rmdir", "unlink", "rename")):
        kind = "rmdir" if "AT_REMOVEDIR" in arguments else name.removesuffix("2").removesuffix("at")
        places = [os.fsdecode(_bytes(each[1])) for each in _DESCRIPTOR.findall(arguments)] or [os.getcwd()]
        paths = [os.path.join(places[min(i, len(places) - 1)], os.fsdecode(text)) for i, text in enumerate(texts)]
        inner = [_inside(path, folder) for path in paths]
        if inner != [None] * len(inner):
            assert None not in inner, f"the recorder cannot follow a move across its folder: {paths}"
            yield Call(kind, *(each for each in inner if each is not None))
    elif (opened and _inside(opened, folder) is not None) or any(
        _inside(os.fsdecode(text), folder) is not None for text in texts
    ):
        raise NotImplementedError(f"the recorder does not know {name}({arguments[:200]})")


def _bytes(text: str) -> bytes:
    return bytes.fromhex(text.replace("\\x", ""))


def _inside(path: str, folder: Path) -> str | None:
    """A path relative to the folder, without this machine's name; None: it lies elsewhere."""
    if path != str(folder) and not path.startswith(f"{folder}/"):
        return None
    return path[len(str(folder)) + 1 :].replace(socket.gethostname(), "host")
