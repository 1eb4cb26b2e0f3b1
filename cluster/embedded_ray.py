"""A Ray of our own for one run: on loopback, with a token, quiet, and gone without a trace at the end."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cluster.reaper import start_ticks
from configs.errors import Unreachable

# Ray's least. Training moves nothing through the object store.
OBJECT_STORE_BYTES = 75 << 20
END_TIMEOUT_S = 5.0
_FOLDER_PREFIX = "shardyard-ray-"
_LONGEST_SOCKET = 107  # bytes of a path (unix(7))


class EmbeddedRay:
    """Ray processes started by this process; `stop()` ends them and removes their folder.

    Start it in a thread that lives as long as it is needed: the kernel ends Ray's processes with the thread that
    started them, so that they do not outlive a killed launcher.
    """

    def __init__(self, num_cpus: int, use_gpus: bool, import_paths: list[str]) -> None:
        _remove_leftovers()
        self.folder = _new_folder()
        self._reaper = _start_reaper(self.folder)
        self._processes: list[Any] = []
        self._servers: list[Any] = []
        self._environment = {
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(_write_token(self.folder)),
            # Numbers that nobody reads here: they would cost a percent of a small machine.
            "RAY_enable_metrics_collection": "0",
            "RAY_task_events_report_interval_ms": "0",
            "RAY_event_stats": "0",
            "RAY_worker_niceness": "0",  # Ray's 15 lets everything else on the machine go first
        }
        self._previous = {name: os.environ.get(name) for name in self._environment}
        try:
            self._start(num_cpus, use_gpus, import_paths)
        except BaseException as error:
            self.stop()
            if isinstance(error, Exception):
                raise Unreachable(
                    f"Ray could not be started on this machine: {error}. Look at free memory and at the space in "
                    f"{self.folder.parent} and /dev/shm, or join a running cluster with --address."
                ) from error
            raise

    def _start(self, num_cpus: int, use_gpus: bool, import_paths: list[str]) -> None:
        os.environ.update(self._environment)
        import ray

        _forget_token()
        with quiet(), loopback(), _only_needed_processes():
            ray.init(
                address="local",
                num_cpus=num_cpus,
                num_gpus=None if use_gpus else 0,
                include_dashboard=False,
                log_to_driver=False,
                configure_logging=False,
                logging_level=logging.ERROR,
                object_store_memory=OBJECT_STORE_BYTES,
                job_config=ray.job_config.JobConfig(_py_driver_sys_path=import_paths),
                _temp_dir=str(self.folder),
            )
        self._processes = _children_of_folder(self.folder)
        self._servers = [process for process in self._processes if process.ppid() == os.getpid()]
        for process in self._processes:
            _tell(self._reaper, f"{process.pid} {start_ticks(process.pid) or 0}")

    def is_alive(self) -> bool:
        """Whether Ray's servers still run: nothing that waits for Ray notices when they are killed."""
        return not any(_is_gone(process) for process in self._servers)

    def stop(self) -> None:
        """Shut down, and kill what is left. Safe to call twice and from any thread."""
        import ray

        # Taken anew: workers came since the start. Ray's own end leaves some of them behind when it is interrupted.
        processes = [*self._processes, *_children_of_folder(self.folder)]
        with contextlib.suppress(Exception):  # it may be half started, or its processes killed by hand
            ray.shutdown()
        end_processes(processes)
        self._reaper.communicate()  # it removes the folder
        for name, value in self._previous.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        _forget_token()


def end_processes(processes: list[Any]) -> None:
    """SIGKILL processes (psutil.Process, which tell a later process with the same pid) and wait until they are gone."""
    import psutil

    deadline = time.monotonic() + END_TIMEOUT_S
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            while process.is_running() and process.status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
                time.sleep(0.01)


def _is_gone(process: Any) -> bool:
    import psutil

    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Connect to Ray without its remarks: it prints deaths of workers on stdout, which may belong to --json.

    And without its handler of fatal signals, which takes SIGTERM for one: it aborts the process 3 s after it, while
    the run that was asked to stop still saves.

    Private API of the pinned Ray: the thread that prints cannot be left out otherwise, and the variable that turns the
    handler off is read when ray is imported.
    """
    import ray._private.ray_constants as constants
    import ray._private.worker as worker

    logging.getLogger("ray").setLevel(logging.ERROR)
    listen, disabled = worker.listen_error_messages, constants.RAY_DISABLE_FAILURE_SIGNAL_HANDLER
    try:
        worker.listen_error_messages = lambda *_: None
        constants.RAY_DISABLE_FAILURE_SIGNAL_HANDLER = True
        yield
    finally:
        worker.listen_error_messages, constants.RAY_DISABLE_FAILURE_SIGNAL_HANDLER = listen, disabled


@contextlib.contextmanager
def loopback() -> Iterator[None]:
    """Let Ray's address of this machine be 127.0.0.1, to listen and to connect there.

    Private API of the pinned Ray: otherwise it replaces that address by another one of the machine, unless it believes
    that clusters of several machines are not supported, as on macOS.
    """
    import ray._private.ray_constants as constants

    clusters = constants.ENABLE_RAY_CLUSTER
    try:
        constants.ENABLE_RAY_CLUSTER = False
        yield
    finally:
        constants.ENABLE_RAY_CLUSTER = clusters


@contextlib.contextmanager
def _only_needed_processes() -> Iterator[None]:
    """Start Ray without autoscaler, dashboard server and log monitor.

    Private API of the pinned Ray: it has no options for these. They would cost 5 s of processor time at the start, and
    later a percent or two of a small machine.
    """
    from ray._private.node import Node

    names = ("start_monitor", "start_api_server", "start_log_monitor")
    methods = {name: getattr(Node, name) for name in names}
    try:
        for name in names:
            setattr(Node, name, lambda *_, **__: None)
        yield
    finally:
        for name, method in methods.items():
            setattr(Node, name, method)


def _children_of_folder(folder: Path) -> list[Any]:
    """Ray's processes below this one, known by their folder, with all that they started."""
    import psutil

    found: list[Any] = []
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if any(str(folder) in argument for argument in child.cmdline()):
                found += [child, *child.children(recursive=True)]
    return found


def _new_folder() -> Path:
    """In the folder for temporary files; where paths of Ray's sockets would become too long there, in /tmp."""
    base, name = tempfile.gettempdir(), f"{_FOLDER_PREFIX}{os.getpid()}-"
    sockets = f"/{name}12345678/session_2026-11-28_12-42-02_214597_{os.getpid()}/sockets/plasma_store"
    if len(os.fsencode(base + sockets)) > _LONGEST_SOCKET and os.access("/tmp", os.W_OK):
        base = "/tmp"
    return Path(tempfile.mkdtemp(prefix=name, dir=base))


def _start_reaper(folder: Path) -> subprocess.Popen[str]:
    # -I -S: the standard library alone, started in 20 ms. A session of its own: Ctrl-C in the terminal is not for it.
    command = [sys.executable, "-I", "-S", str(Path(__file__).with_name("reaper.py"))]
    reaper = subprocess.Popen(command, stdin=subprocess.PIPE, text=True, start_new_session=True)
    _tell(reaper, f"{folder}")
    return reaper


def _tell(reaper: subprocess.Popen[str], line: str) -> None:
    assert reaper.stdin is not None
    reaper.stdin.write(f"{line}\n")
    reaper.stdin.flush()


def _remove_leftovers() -> None:
    """Remove folders of launchers that were killed together with their reaper."""
    import psutil

    for base in {tempfile.gettempdir(), "/tmp"}:
        for folder in Path(base).glob(f"{_FOLDER_PREFIX}*-*"):
            pid = folder.name.removeprefix(_FOLDER_PREFIX).partition("-")[0]
            with contextlib.suppress(OSError):
                if pid.isdigit() and not psutil.pid_exists(int(pid)) and folder.stat().st_uid == os.getuid():
                    shutil.rmtree(folder, ignore_errors=True)


def _write_token(folder: Path) -> Path:
    path = folder / "token"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(secrets.token_hex(32))
    return path


def _forget_token() -> None:
    """Have Ray read the token file again: it keeps what it read for as long as the process lives."""
    import ray._raylet

    raylet: Any = ray._raylet
    raylet.AuthenticationTokenLoader.instance().reset_cache()
    raylet.Config.initialize("")
