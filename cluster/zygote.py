"""A process that imports all that training needs, once, and forks a trained-in child for each attempt.

It runs nothing else: no thread, no Ray, no GPU in use, so that a fork of it is a clean process that has its imports
behind it. It ends with the actor that started it, and its children end with it, whatever they do.

Over its channel come requests, one at a time: {"imports": [modules]}, and {"fork": arguments of cluster.child.run} with
the child's end of a channel and a file for its stacks. It answers {"imported_s": seconds} or {"failed": error}, and
{"forked": pid}. Whenever a child has ended it says {"ended": pid, "status": as of os.waitpid}.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import os
import select
import signal
import socket
import time
import traceback
from typing import Any, NoReturn

from cluster.channel import Channel


def main(descriptor: int, parent: int) -> None:
    """Serve the process `parent` at the other end of the socket `descriptor`, until it is gone."""
    die_with(parent)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])  # Ray's processes block some
    # The launcher decides; this process ends with it. SIGCHLD is told by the pipe.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGCHLD):
        signal.signal(number, lambda *_: None)  # a handler, unlike SIG_IGN, is not inherited by other programs
    channel = Channel(socket.socket(fileno=descriptor))
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    sources: list[Any] = [channel, woken]
    with contextlib.suppress(EOFError, OSError):
        while True:
            ready, _, _ = select.select(sources, [], [])
            if woken in ready:
                os.read(woken, 1024)
                _tell_ended(channel)
            if channel in ready:
                for request in channel.receive():
                    _serve(channel, request, (woken, wake))


def _serve(channel: Channel, request: dict[str, Any], pipe: tuple[int, int]) -> None:
    if "imports" in request:
        channel.send(_import(request["imports"]))
        return
    descriptor, stacks, parent = channel.take_descriptor(), channel.take_descriptor(), os.getpid()
    pid = os.fork()
    if pid == 0:
        die_with(parent)
        for end in (channel.fileno(), *pipe):
            os.close(end)
        _become_child(descriptor, stacks, request["fork"])
    os.close(descriptor)
    os.close(stacks)
    channel.send({"forked": pid})


def _import(modules: list[str]) -> dict[str, Any]:
    started = time.perf_counter()
    try:
        for module in modules:
            importlib.import_module(module)
    except BaseException as error:
        traceback.print_exc()
        return {"failed": f"{type(error).__name__}: {error}"}
    gc.collect()
    gc.freeze()  # a collection in a child would touch, and so copy, every page that it shares
    return {"imported_s": time.perf_counter() - started}


def _become_child(descriptor: int, stacks: int, arguments: dict[str, Any]) -> NoReturn:
    code = 1
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        from cluster import child

        child.run(Channel(socket.socket(fileno=descriptor)), stacks, **arguments)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)  # nothing of torch's or DeepSpeed's is worth tidying up


def _tell_ended(channel: Channel) -> None:
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            channel.send({"ended": pid, "status": status})


def die_with(parent: int | None = None) -> None:
    """Have the kernel kill this process when the thread that started it ends: a stopped process cannot do it itself.

    parent: the process that started it, to end at once where that one is gone already.
    """
    pr_set_pdeathsig = 1
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL, 0, 0, 0)
    if parent is not None and os.getppid() != parent:
        os._exit(1)
