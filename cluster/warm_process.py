"""The actor's side of its warm process (cluster/zygote.py) and of the child that it forked last."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from typing import Any

from cluster.channel import STACK_SIGNAL, Channel
from cluster.reaper import start_ticks

END_TIMEOUT_S = 2.0
FORK_TIMEOUT_S = 30.0
STACK_TIMEOUT_S = 0.5
# As long ago it counts as heard of, at least, while it uses the processor.
MAX_UNHEARD_AT_WORK_S = 1.0
STACK_LINES = 30
# Sees the same modules as this process, in the same order, and none of the folder that it stands in by accident.
_START = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from cluster.zygote import main
main(int(sys.argv[2]), int(sys.argv[3]))
"""


class WarmProcess:
    """A process that has the imports behind it and can fork children that train, one at a time."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        self._channel = Channel(ours)
        self._replies: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._process: subprocess.Popen[bytes] | None = None
        self._child: Child | None = None
        self._started = threading.Event()
        self.gone = threading.Event()
        # The kernel ends it with the thread that starts it, so that thread has to live as long.
        threading.Thread(target=self._own, args=(theirs,), name="warm process", daemon=True).start()
        self._started.wait()

    def import_modules(self, modules: list[str]) -> dict[str, Any]:
        """Import these; see Worker.warm."""
        reply = self._ask({"imports": modules})
        if reply is None:
            return {"outcome": "died", "error": self._death()}
        if "failed" in reply:
            missing = reply["failed"].startswith("ModuleNotFoundError")
            return {"outcome": "raised", "error": reply["failed"], "user_error": missing, "failed_at": time.time()}
        return {"processes": [(self.pid, start_ticks(self.pid))], **reply}

    def fork(self, arguments: dict[str, Any]) -> Child:
        """A child that runs cluster.child.run(**arguments)."""
        ours, theirs = socket.socketpair()
        self._child = child = Child(Channel(ours))
        with theirs:
            reply = self._ask({"fork": arguments}, (theirs.fileno(), child.stacks.fileno()), FORK_TIMEOUT_S)
        if reply is None:
            child.end(self._death())
        else:
            child.begin(reply["forked"])
        return child

    def can_fork(self) -> bool:
        """Whether it lives, and has buried its child."""
        return not self.gone.is_set() and (self._child is None or self._child.ended.wait(END_TIMEOUT_S))

    @property
    def pid(self) -> int:
        """Its process."""
        assert self._process is not None, "it could not be started"
        return self._process.pid

    def close(self) -> None:
        """End it, and its child with it."""
        self._channel.close()

    def _ask(
        self, request: dict[str, Any], descriptors: Sequence[int] = (), timeout_s: float | None = None
    ) -> dict[str, Any] | None:
        """Its reply; None if it is gone, or stopped."""
        try:
            self._channel.send(request, descriptors)
            return self._replies.get(timeout=timeout_s)
        except OSError:
            return None
        except queue.Empty:  # a late reply would be taken for that to the next request
            assert self._process is not None
            self._process.kill()
            return None

    def _own(self, theirs: socket.socket) -> None:
        command = [sys.executable, "-c", _START, json.dumps(sys.path), str(theirs.fileno()), str(os.getpid())]
        try:
            with theirs:
                self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()])
            self._started.set()
            with contextlib.suppress(EOFError):
                while True:
                    for message in self._channel.receive():
                        self._hear(message)
            self._process.wait()
        finally:
            self.gone.set()
            self._started.set()
            self._replies.put(None)
            if self._child is not None:
                self._child.end(self._death())

    def _hear(self, message: dict[str, Any]) -> None:
        if "ended" not in message:
            self._replies.put(message)
        elif self._child is not None and self._child.pid in (message["ended"], None):
            self._child.end(f"the process is gone: {manner_of_death(os.waitstatus_to_exitcode(message['status']))}")

    def _death(self) -> str:
        code = None if self._process is None else self._process.poll()
        how = "it does not answer" if code is None else manner_of_death(code)
        return f"the process that its worker is forked from is gone: {how}"


class Child:
    """A forked process that trains. Methods may be called from different threads."""

    def __init__(self, channel: Channel) -> None:
        self.pid: int | None = None
        self.ended = threading.Event()
        self.stacks = tempfile.TemporaryFile()  # noqa: SIM115 - closed when the child has ended
        self._channel = channel
        self._started_ticks: int | None = None
        self._progress: dict[str, Any] = {}
        self._outcome: dict[str, Any] | None = None
        self._death = ""
        self._heard_at = time.monotonic()
        self._ticks: int | None = None
        self._listener = threading.Thread(target=self._listen, name="child", daemon=True)
        self._listener.start()

    def begin(self, pid: int) -> None:
        """It was forked."""
        self.pid, self._started_ticks = pid, start_ticks(pid)

    def end(self, death: str) -> None:
        """It is gone; `death` says how."""
        if not self.ended.is_set():
            self._death = death
            self.ended.set()

    def wait(self) -> dict[str, Any]:
        """Its outcome, once it has ended."""
        self.ended.wait()
        self._listener.join(END_TIMEOUT_S)  # what it said last is still on its way; whom it started may keep the line
        self._channel.close()
        self.stacks.close()
        return self._outcome or {"outcome": "died", "error": self._death}

    def report(self) -> dict[str, Any]:
        """What it said last, how long ago, and its process.

        Python's lock may be held in a library for long, so that it says nothing; while it uses the processor it lives.
        """
        ticks = processor_ticks(self.pid)
        if ticks != self._ticks:
            self._ticks, self._heard_at = ticks, max(self._heard_at, time.monotonic() - MAX_UNHEARD_AT_WORK_S)
        processes = [] if self.pid is None else [(self.pid, self._started_ticks)]
        return {**self._progress, "unheard_s": time.monotonic() - self._heard_at, "processes": processes}

    def stop(self) -> None:
        """Ask it to save and return."""
        with contextlib.suppress(OSError):
            self._channel.send({"stop": True})

    def kill(self) -> None:
        """SIGKILL, which also ends a stopped one."""
        if self.pid is not None and start_ticks(self.pid) == self._started_ticks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)

    def stack(self) -> tuple[str, str]:
        """Python stacks of its training thread, shortened, and of all threads; empty where they cannot be had.

        A stopped process goes on until they are written: it may end a step, and is stopped again.
        """
        if self.pid is None or start_ticks(self.pid) != self._started_ticks:
            return "", ""
        stat = _stat(self.pid)
        stopped = stat is not None and stat[0] == b"T"
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, STACK_SIGNAL)
            os.kill(self.pid, signal.SIGCONT)
        deadline, size = time.monotonic() + STACK_TIMEOUT_S, -1
        while time.monotonic() < deadline and (size <= 0 or os.fstat(self.stacks.fileno()).st_size != size):
            size = os.fstat(self.stacks.fileno()).st_size
            time.sleep(0.01)
        if stopped:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGSTOP)
        text = os.pread(self.stacks.fileno(), max(size, 0), 0).decode("utf-8", "replace")
        return training_stack(text, self._progress.get("thread", 0)), text

    def _listen(self) -> None:
        with contextlib.suppress(EOFError):
            while True:
                for message in self._channel.receive():
                    if "progress" in message:
                        self._progress, self._heard_at = message["progress"], time.monotonic()
                    else:
                        self._outcome = message


def processor_ticks(pid: int | None) -> int | None:
    """Processor time that a process has used, in clock ticks; None where it cannot be told."""
    fields = _stat(pid)
    return None if fields is None else int(fields[11]) + int(fields[12])


def _stat(pid: int | None) -> list[bytes] | None:
    """Fields of /proc/PID/stat behind the name, the state first (see proc(5)); None where there are none."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/stat", "rb") as file:
        return file.read().rpartition(b")")[2].split()
    return None


def training_stack(text: str, thread: int) -> str:
    """One thread's calls, the innermost first, out of what faulthandler writes."""
    for block in text.split("\n\n"):
        head, _, calls = block.partition("\n")
        if f"0x{thread:016x}" in head:
            return "\n".join(calls.splitlines()[:STACK_LINES])
    return ""


def manner_of_death(code: int) -> str:
    """How a process ended, from its exit code (negative: a signal's number)."""
    if code >= 0:
        return f"it exited with code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = "a signal"
    hint = ", by hand or because memory ran out" if -code == signal.SIGKILL else ""
    return f"killed by {name} (signal {-code}){hint}"
