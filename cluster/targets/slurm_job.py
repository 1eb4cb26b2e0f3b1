"""What a Slurm job runs, in its batch script: Ray on each node as a step, and the launcher beside the first.

    python -m cluster.targets.slurm_job FOLDER < run.yaml      in the batch script
    python -m cluster.targets.slurm_job FOLDER --head          the step of the first node, --worker of any other

The nodes meet in a folder below FOLDER, which all of them see: the token, the head's address, and a file that ends
them. Not by `ray symmetric-run`, which returns 0 where the launcher failed.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

from configs.errors import Preempted

TOKEN, ADDRESS, END = "token", "address", "end"
START_S, END_S, POLL_S = 120.0, 20.0, 0.2


def main(argv: list[str]) -> int:
    """The batch script's exit code is the launcher's; one that was preempted is queued again."""
    folder = Path(argv[0], f"slurm-{os.environ['SLURM_JOB_ID']}")
    os.environ["RAY_AUTH_MODE"], os.environ["RAY_AUTH_TOKEN_PATH"] = "token", str(folder / TOKEN)
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["RAY_raylet_start_wait_time_s"] = f"{START_S:.0f}"  # noqa: SIM112 - Ray's own spelling
    if len(argv) > 1:
        return run_node(folder, is_head=argv[1] == "--head")
    shutil.rmtree(folder, ignore_errors=True)  # of the time before it was queued again
    folder.mkdir(mode=0o700, parents=True)
    recipe = folder / "run.yaml"
    recipe.write_text(sys.stdin.read(), encoding="utf-8")
    with os.fdopen(os.open(folder / TOKEN, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(secrets.token_hex(32))
    try:
        launcher = Launcher()
        with ray_nodes(Path(argv[0]), folder) as address:
            code = launcher.run(recipe, address)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if code == Preempted.exit_code:
        subprocess.run(["scontrol", "requeue", os.environ["SLURM_JOB_ID"]], check=False)
    return code


class Launcher:
    """`shardyard train` as a process of its own; SIGTERM and SIGUSR1 to the batch script are handed on to it."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._signal: int | None = None
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._hand_on)

    def run(self, recipe: Path, address: str) -> int:
        """Its exit code."""
        if self._signal is not None:  # before there was anything to save
            return Preempted.exit_code
        command = [sys.executable, "-m", "cluster.cli", "train", str(recipe), "--address", address]
        self._process = subprocess.Popen(command)
        if self._signal is not None:
            self._process.send_signal(self._signal)
        return self._process.wait()

    def _hand_on(self, number: int, _frame: FrameType | None) -> None:
        self._signal = number
        if self._process is not None:
            self._process.send_signal(number)


@contextlib.contextmanager
def ray_nodes(base: Path, folder: Path) -> Iterator[str]:
    """Ray on all nodes of the allocation; the head's address."""
    import ray

    from cluster.ray_cluster import join
    from cluster.ray_kill import alive_nodes

    names = subprocess.run(["scontrol", "show", "hostnames"], check=True, capture_output=True, text=True).stdout.split()
    step = ["srun", "--overlap", "--nodes=1", "--ntasks=1", f"--cpus-per-task={os.environ['SLURM_CPUS_PER_TASK']}"]
    program = [sys.executable, "-m", "cluster.targets.slurm_job", str(base)]
    nodes = {
        # In sessions of their own: what ends the batch script's group is not to end them before the run is saved.
        name: subprocess.Popen(
            [*step, f"--nodelist={name}", *program, "--worker" if number else "--head"],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        for number, name in enumerate(names)
    }
    try:
        _wait_until(lambda: (folder / ADDRESS).exists(), nodes, "no head answers")
        address = (folder / ADDRESS).read_text()
        join(address)
        _wait_until(lambda: len(alive_nodes()) == len(names), nodes, f"not all of {len(names)} nodes have joined")
        ray.shutdown()
        yield address
    finally:
        (folder / END).touch()
        deadline = time.monotonic() + END_S
        for each in nodes.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                each.wait(max(0.0, deadline - time.monotonic()))
            each.kill()


def _wait_until(condition: Callable[[], bool], nodes: dict[str, subprocess.Popen[bytes]], otherwise: str) -> None:
    """Raises SystemExit where a node's step ends before that, or it takes too long."""
    deadline = time.monotonic() + START_S
    while not condition():
        ended = [name for name, step in nodes.items() if step.poll() is not None]
        if ended or time.monotonic() > deadline:
            where = f"on {', '.join(ended)}: the step's output is above" if ended else f"within {START_S:.0f} s"
            raise SystemExit(f"Ray did not start {where} ({otherwise}).")
        time.sleep(POLL_S)


def run_node(folder: Path, *, is_head: bool) -> int:
    """Ray on this node, until it is told to end: the head on the job's first node, which writes its address."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a preempted job saves first, and ends its nodes itself
    own = _own_address()
    # Unix sockets lie below it, whose paths may be 107 bytes long.
    scratch = Path(tempfile.mkdtemp(prefix="shardyard-slurm-", dir="/tmp"))
    ports = ["--min-worker-port=0", "--max-worker-port=0", "--dashboard-agent-listen-port=0"]
    ray = [str(Path(sys.executable).with_name("ray")), "start", "--block", "--disable-usage-stats", *ports]
    ray += [f"--node-ip-address={own}", f"--num-cpus={os.environ.get('SLURM_CPUS_PER_TASK', '1')}"]
    try:
        if is_head:
            port = _free_port(own)
            ray += ["--head", f"--port={port}", "--include-dashboard=false", f"--temp-dir={scratch}"]
            ray += [f"--ray-client-server-port={_free_port(own)}"]
        else:
            ray += [f"--address={_wait_for_address(folder)}"]
        process = subprocess.Popen(ray, stdout=subprocess.DEVNULL, start_new_session=True)
        if is_head:
            _announce(folder, own, port, process)
        while process.poll() is None and not (folder / END).exists():
            time.sleep(POLL_S)
        return _end(process)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _own_address() -> str:
    """By the name that Slurm reaches this node with."""
    shown = ["scontrol", "show", "node", "--oneliner", os.environ["SLURMD_NODENAME"]]
    text = subprocess.run(shown, check=True, capture_output=True, text=True).stdout
    fields = dict(word.split("=", 1) for word in text.split() if "=" in word)
    return socket.gethostbyname(fields["NodeAddr"])


def _free_port(address: str) -> int:
    with socket.socket() as probe:
        probe.bind((address, 0))
        port: int = probe.getsockname()[1]
    return port


def _announce(folder: Path, address: str, port: int, process: subprocess.Popen[bytes]) -> None:
    """Write the head's address once it answers."""
    deadline = time.monotonic() + START_S
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection((address, port), 1.0):
            written = folder / f"{ADDRESS}.new"
            written.write_text(f"{address}:{port}")
            written.rename(folder / ADDRESS)
            return
        time.sleep(POLL_S)


def _wait_for_address(folder: Path) -> str:
    deadline = time.monotonic() + START_S
    while not (folder / ADDRESS).exists():
        if time.monotonic() > deadline or (folder / END).exists():
            raise SystemExit("The head's address did not come: Ray did not start on the job's first node.")
        time.sleep(POLL_S)
    return (folder / ADDRESS).read_text()


def _end(process: subprocess.Popen[bytes]) -> int:
    """End Ray on this node; its exit code where it ended by itself."""
    import psutil

    from cluster.embedded_ray import end_processes

    if process.poll() is not None:
        return process.returncode
    end_processes([psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
