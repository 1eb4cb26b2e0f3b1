"""JSON lines, and sometimes file descriptors, over a socket to another process of this machine."""

from __future__ import annotations

import array
import contextlib
import json
import os
import signal
import socket
import threading
from collections.abc import Sequence
from typing import Any

# Has a child write down what all of its threads do.
STACK_SIGNAL = signal.SIGUSR2
_READ_BYTES = 1 << 16
_MAX_DESCRIPTORS = 4


class Channel:
    """One end of a connection. Any thread may send, one may receive. It owns its socket."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        self._sending = threading.Lock()
        self._buffer = b""
        self._descriptors: list[int] = []

    def fileno(self) -> int:
        """For select."""
        return self._socket.fileno()

    def send(self, message: dict[str, Any], descriptors: Sequence[int] = ()) -> None:
        """Send a message, with copies of file descriptors.

        Raises:
            OSError: nobody is at the other end.
        """
        data = json.dumps(message).encode() + b"\n"
        attached = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
        with self._sending:
            sent = self._socket.sendmsg([data], attached)
            self._socket.sendall(data[sent:])

    def receive(self) -> list[dict[str, Any]]:
        """The messages that have come since the last call, which may be none; waits where nothing has come at all.

        Raises:
            EOFError: nobody is at the other end.
        """
        size = socket.CMSG_SPACE(_MAX_DESCRIPTORS * array.array("i").itemsize)
        try:
            data, attached, _, _ = self._socket.recvmsg(_READ_BYTES, size)
        except OSError as error:
            raise EOFError from error
        if not data:
            raise EOFError
        for level, kind, content in attached:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                self._descriptors.extend(array.array("i", content))
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        return [json.loads(line) for line in lines]

    def take_descriptor(self) -> int:
        """The oldest descriptor that came with a message and was not taken yet."""
        return self._descriptors.pop(0)

    def close(self) -> None:
        """Close this end. Safe to call twice."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes a thread that receives
        self._socket.close()
        while self._descriptors:
            os.close(self._descriptors.pop())
