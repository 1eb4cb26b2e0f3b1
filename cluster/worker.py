"""One worker process on the cluster: a thread that trains, and others that answer pings and stop requests meanwhile.

The class knows nothing of Ray but its process's place in it; ray_group.py makes an actor of it.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path
from typing import Any

from configs.errors import Damaged, NotFound, PeerFailed, RunFailed, ShardyardError, UsageError
from data_pipelines.storage import Store
from trainer.progress import Progress

_COPY_LOG_EVERY_S = 5.0
_MAX_COPIED_LOG_BYTES = 4 << 20


class Worker:
    """Lives as long as its process. Its methods are called from different threads at once."""

    def __init__(self, folder: str, environment: dict[str, str]) -> None:
        # Before torch is imported: it reads thread counts and switches once.
        os.environ.update(environment)
        if os.path.isdir(folder):
            os.chdir(folder)  # relative paths and modules beside the recipe mean the same as where it was launched
        if folder not in sys.path:
            sys.path.append(folder)
        die_with_parent()
        self._progress = Progress()
        self._stop = threading.Event()

    def describe(self) -> dict[str, Any]:
        """Where this process is: what the group needs to rank, reach, watch and kill it."""
        import psutil
        import ray

        context = ray.get_runtime_context()
        address = ray.util.get_node_ip_address()
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            if (interface := _interface_of(address)) is not None:
                os.environ.setdefault(name, interface)
        return {
            "pid": os.getpid(),
            "process_started_at": psutil.Process().create_time(),
            "node_id": context.get_node_id(),
            "node": socket.gethostname(),
            "address": address,
            "gpus": [str(gpu) for gpu in ray.get_gpu_ids()],
        }

    def free_port(self) -> int:
        """A port that is free on this node now; it may be taken before it is used."""
        with socket.socket() as listener:
            listener.bind(("", 0))
            return int(listener.getsockname()[1])

    def warm(self, modules: list[str], visible_gpus: str | None) -> float:
        """Import what training needs, ahead of it; returns the seconds that it took.

        visible_gpus: GPUs of all workers of this node, so that they can reach each other's memory.
        """
        if visible_gpus is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = visible_gpus
        started = time.perf_counter()
        for module in modules:
            importlib.import_module(module)
        return time.perf_counter() - started

    def train(self, body: str, canary: bytes, log: str, arguments: dict[str, Any]) -> dict[str, Any]:
        """Run the body ("module:function") to its end; returns its outcome, or what it raised as plain values.

        canary: what the launcher wrote beside the log, to prove that this node sees the run's folder.
        log: path in the run's folder for all that this process prints.
        """
        try:
            with _log_to(Store(arguments["store_uri"]).child(arguments["run"]), log, canary):
                return self._train(body, arguments)
        except ShardyardError as error:
            return failure(error, self._progress)

    def _train(self, body: str, arguments: dict[str, Any]) -> dict[str, Any]:
        module, _, function = body.partition(":")
        try:
            run = getattr(importlib.import_module(module), function)
            return dict(run(**arguments, stop=self._stop, progress=self._progress))
        except BaseException as error:  # a SystemExit or KeyboardInterrupt of the body must not look like an end
            traceback.print_exc()
            return failure(error, self._progress)

    def ping(self) -> dict[str, Any]:
        """What training does now."""
        return self._progress.snapshot()

    def stop(self) -> None:
        """Ask training to save a checkpoint and return."""
        self._stop.set()


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
def _log_to(run: Store, path: str, canary: bytes) -> Any:
    """Send what this process and its native libraries print to `path` in the run's folder.

    Raises:
        UsageError: this node does not see the run's folder.
    """
    folder = path.rpartition("/")[0]
    try:
        seen = run.read_bytes(f"{folder}/canary")
    except ShardyardError:
        seen = b""
    if seen != canary:
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


def die_with_parent() -> None:
    """Have the kernel kill this process when Ray's process that started it dies: a stopped one cannot do it itself."""
    pr_set_pdeathsig = 1
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL, 0, 0, 0)


def _interface_of(address: str) -> str | None:
    """The network interface that has this address, so that the ranks meet on the network that Ray uses."""
    import psutil

    for name, entries in psutil.net_if_addrs().items():
        if any(entry.address == address for entry in entries):
            return name
    return None
