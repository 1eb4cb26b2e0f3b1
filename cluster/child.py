"""A process that trains in one attempt, forked from a warm one (cluster/zygote.py): its log, its progress, its end.

Over its channel it says what it does {"progress": fields} a few times a second, at the end {"outcome": ...}; it hears
{"stop": true}.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import os
import select
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path
from types import FrameType
from typing import Any

from cluster.channel import STACK_SIGNAL, Channel
from configs.errors import Damaged, NotFound, PeerFailed, RunFailed, ShardyardError, UsageError
from data_pipelines.storage import Store
from trainer.progress import Progress

TELL_EVERY_S = 0.2
_COPY_LOG_EVERY_S = 5.0
_MAX_COPIED_LOG_BYTES = 4 << 20


def run(
    channel: Channel,
    stacks: int,
    body: str,
    canary: str,
    log: str,
    environment: dict[str, str],
    arguments: dict[str, Any],
) -> None:
    """Run the body ("module:function") to its end, and send its outcome, or what it raised as plain values.

    stacks: descriptor of a file to which STACK_SIGNAL has the stacks of all threads written, whatever they do.
    canary: what the launcher wrote beside the log, to prove that this node sees the run's folder.
    log: path in the run's folder for all that this process prints.
    """
    os.environ.update(environment)
    progress, stop = Progress(), threading.Event()

    def request_stop(_number: int, _frame: FrameType | None) -> None:
        stop.set()

    faulthandler.register(STACK_SIGNAL, file=stacks, all_threads=True)
    for number in (signal.SIGTERM, signal.SIGUSR1):  # its node is about to go: save while there is time
        signal.signal(number, request_stop)
    threading.Thread(target=_converse, args=(channel, progress, stop), name="channel", daemon=True).start()
    try:
        with _log_to(Store(arguments["store_uri"]).child(arguments["run"]), log, canary):
            outcome = _train(body, arguments, stop, progress)
    except ShardyardError as error:
        outcome = failure(error, progress)
    channel.send({**progress.snapshot(), **outcome})


def _converse(channel: Channel, progress: Progress, stop: threading.Event) -> None:
    """Tell the actor what training does now, and hear it."""
    try:
        while True:
            channel.send({"progress": {**progress.snapshot(), "thread": threading.main_thread().ident}})
            ready, _, _ = select.select([channel], [], [], TELL_EVERY_S)
            if ready and any("stop" in message for message in channel.receive()):
                stop.set()
    except (EOFError, OSError, ValueError):
        os._exit(1)  # the actor is gone


def _train(body: str, arguments: dict[str, Any], stop: threading.Event, progress: Progress) -> dict[str, Any]:
    module, _, function = body.partition(":")
    try:
        train = getattr(importlib.import_module(module), function)
        return dict(train(**arguments, stop=stop, progress=progress))
    except BaseException as error:  # a SystemExit or KeyboardInterrupt of the body must not look like an end
        traceback.print_exc()
        return failure(error, progress)


def failure(error: BaseException, progress: Progress) -> dict[str, Any]:
    """What a worker raised, as plain values: it might not survive pickling, and the caller need not import its class.

    user_error: only the user can mend the cause. A loss that is no number (RunFailed) comes again, since steps are
    repeated exactly, and so does a damaged file.
    """
    text = str(error) if isinstance(error, ShardyardError) else f"{type(error).__name__}: {error}"
    return {
        "outcome": "raised",
        "error": text,
        "user_error": isinstance(error, UsageError | NotFound | RunFailed | Damaged),
        "peer_failed": isinstance(error, PeerFailed),
        "failed_at": time.time(),
        **progress.snapshot(),
    }


@contextlib.contextmanager
def _log_to(run: Store, path: str, canary: str) -> Any:
    """Send what this process and its native libraries print to `path` in the run's folder.

    Raises:
        UsageError: this node does not see the run's folder.
    """
    folder = path.rpartition("/")[0]
    try:
        seen = run.read_bytes(f"{folder}/canary")
    except ShardyardError:
        seen = b""
    if seen != canary.encode():
        raise UsageError(
            f"The store {run.uri} is not the same folder on {socket.gethostname()} as on the launching machine. "
            "Use a store that every node sees: a shared file system mounted at the same path, or a URI (s3://...)."
        )
    local = run.local_path(path)
    target = local if local is not None else Path(tempfile.mkstemp(prefix="shardyard-log-")[1])
    target.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.close(descriptor)
    for text_stream in (sys.stdout, sys.stderr):
        # Line by line: a killed process takes what it had only buffered with it.
        with contextlib.suppress(AttributeError, ValueError):
            text_stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    copier = None if local is not None else _LogCopier(run, path, target)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        if copier is not None:
            copier.close()


class _LogCopier:
    """Keeps the tail of a local log in a remote store, which cannot append."""

    def __init__(self, run: Store, path: str, local: Path) -> None:
        self._run = run
        self._path = path
        self._local = local
        self._copied_bytes = 0
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._keep_copying, name="log", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Copy what is left and remove the local file."""
        self._closing.set()
        self._thread.join()
        self._local.unlink(missing_ok=True)

    def _keep_copying(self) -> None:
        closing = False
        while not closing:
            closing = self._closing.wait(_COPY_LOG_EVERY_S)
            size = self._local.stat().st_size
            if size == self._copied_bytes:
                continue
            with self._local.open("rb") as file:
                file.seek(max(0, size - _MAX_COPIED_LOG_BYTES))
                data = file.read()
            with contextlib.suppress(ShardyardError):  # a store that is out of reach is tried again
                self._run.write_atomic(self._path, data)
                self._copied_bytes = size
