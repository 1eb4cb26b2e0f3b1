"""As much of torch.cuda as copies need, on a device as late as its streams and events allow.

What is put on a stream runs only when somebody waits for it, or at the end: so a copy reads its source then, and what
was not waited for finds whatever lies there by that time.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

DEVICE = torch.device("cuda", 0)


@dataclass(eq=False)
class Task:
    """Something that a stream does; after: what comes before it, on this stream and on those waited for."""

    call: Callable[[], None]
    after: list[Task]
    done: bool = False

    def run(self) -> None:
        """It and all that comes before it."""
        waiting = [self]
        while waiting:
            task = waiting[-1]
            left = [] if task.done else [each for each in task.after if not each.done]
            waiting += left
            if not left:
                waiting.pop()
                if not task.done:
                    task.done, task.after = True, []
                    task.call()


@dataclass(eq=False)
class Stream:
    """Does what it is given in its order."""

    cuda: Cuda
    before: list[Task] = field(default_factory=list)

    def put(self, call: Callable[[], None]) -> Task:
        task = Task(call, self.before)
        self.before = [task]
        self.cuda.tasks.append(task)
        return task

    def wait_stream(self, other: Stream) -> None:
        self.before = [*self.before, *other.before]


class Cuda:
    """The device. calls: what was asked of it, in order."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.tasks: list[Task] = []
        self.calls: list[str] = []
        self.lock = threading.RLock()
        self.computing = self.current = Stream(self)
        patch.setattr(torch.cuda, "Stream", lambda device: Stream(self))
        patch.setattr(torch.cuda, "current_stream", lambda device=None: self.current)
        patch.setattr(torch.cuda, "stream", self.stream)
        patch.setattr(torch.cuda, "Event", lambda: Event(self))

    @contextlib.contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before

    def finish(self) -> None:
        """Do what nobody has waited for."""
        for task in reversed(self.tasks):
            task.run()


class Event:
    def __init__(self, cuda: Cuda) -> None:
        self.cuda = cuda

    def record(self) -> None:
        with self.cuda.lock:
            self.task = self.cuda.current.put(lambda: None)

    def synchronize(self) -> None:
        with self.cuda.lock:
            self.task.run()


class Host:
    """A tensor of the host whose copies are the fake's."""

    def __init__(self, cuda: Cuda, name: str, tensor: Tensor) -> None:
        self.cuda, self.name, self.tensor = cuda, name, tensor

    def to(self, device: torch.device, *, non_blocking: bool) -> Copy:
        assert device == DEVICE and non_blocking
        with self.cuda.lock:
            assert self.cuda.current is not self.cuda.computing, "a copy that computing would wait behind"
            self.cuda.calls.append(f"copy {self.name}")
            return Copy(self)


class Copy:
    """A tensor of the device: value, once the copy has run. users: other streams that were said to read it."""

    def __init__(self, source: Host) -> None:
        self.value: Any = None
        self.users: list[Stream] = []
        source.cuda.current.put(lambda: self._read(source.tensor))

    def _read(self, tensor: Tensor) -> None:
        self.value = tensor.clone()

    def record_stream(self, stream: Stream) -> None:
        self.users.append(stream)
