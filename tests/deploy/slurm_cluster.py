"""A Slurm of two nodes, all on this machine, with daemons, ports and a key of its own."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.deploy.tools import ROOT, program, run

_REMEDY = "Debian: apt-get install slurm-wlm munge"
_CONFIG = """\
ClusterName=test
SlurmctldHost=localhost
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
SlurmctldPort={ports[0]}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdSpoolDir={folder}/spool-%n
StateSaveLocation={folder}/state
SlurmUser=root
SlurmdUser=root
SwitchType=switch/none
TaskPlugin=task/none
ProctrackType=proctrack/pgid
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MailProg=/bin/true
KillWait=10
NodeName=n1 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[1]} CPUs={cpus}
NodeName=n2 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[2]} CPUs={cpus}
PartitionName=all Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""


class Slurm:
    """Its commands, as a user would call them in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "RAY_"))},
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
        }

    def ask(self, *command: str | Path) -> str:
        return run(*command, env=self.environment, cwd=self.folder)

    def submit(self, *arguments: str | Path) -> str:
        """The id of a new job."""
        return self.ask("sbatch", "--parsable", *arguments).strip()

    def job(self, number: str) -> dict[str, str]:
        """What Slurm says of it."""
        words = self.ask("scontrol", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_for(self, number: str, condition: Callable[[], bool], timeout_s: float = 180) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            log = self.folder / f"{number}.log"
            assert time.monotonic() < deadline, f"{self.job(number)}\n{log.read_text() if log.exists() else ''}"
            time.sleep(0.2)


@contextlib.contextmanager
def slurm_cluster(folder: Path) -> Iterator[Slurm]:
    """The daemons live as long as the block."""
    if os.getuid() != 0:
        pytest.skip("needs root: Slurm's daemons start jobs as their users")
    for name in ("munged", "slurmctld", "slurmd", "sbatch", "srun"):
        program(name, _REMEDY)
    slurm = Slurm(folder)
    key = folder / "munge.key"
    key.touch(0o600)
    key.write_bytes(secrets.token_bytes(128))
    text = _CONFIG.format(folder=folder, ports=_free_ports(3), cpus=os.cpu_count())
    (folder / "slurm.conf").write_text(text)
    for name in ("state", "spool-n1", "spool-n2"):
        (folder / name).mkdir()
    own = [
        f"--{name}={folder}/munge.{name.removesuffix('-file')}"
        for name in ("socket", "pid-file", "log-file", "seed-file")
    ]
    processes = []
    try:
        for number, command in enumerate(
            (
                ["munged", "--force", "--foreground", f"--key-file={key}", *own],
                ["slurmctld", "-D"],
                ["slurmd", "-D", "-N", "n1"],
                ["slurmd", "-D", "-N", "n2"],
            )
        ):
            log = (folder / f"daemon-{number}.log").open("w")
            path = shutil.which(command[0], path=f"{slurm.environment['PATH']}:/usr/sbin:/sbin")
            assert path is not None
            processes.append(
                subprocess.Popen([path, *command[1:]], env=slurm.environment, cwd=folder, stdout=log, stderr=log)
            )
            time.sleep(0.5)
        deadline = time.monotonic() + 60
        while "idle" not in _state(slurm):
            assert time.monotonic() < deadline, _state(slurm)
            time.sleep(0.2)
        yield slurm
    finally:
        for process in reversed(processes):
            process.terminate()
        for process in reversed(processes):
            try:
                process.wait(timeout=15)
            except subprocess.TimeoutExpired:
                process.kill()


def _state(slurm: Slurm) -> str:
    done = subprocess.run(
        ["sinfo", "--noheader", "--format=%D %T"], env=slurm.environment, capture_output=True, text=True
    )
    return done.stdout + done.stderr


def _free_ports(number: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
