"""A Slurm of two nodes on this machine, real but for its hardware: what tests of launching there run against.

A controller (slurmctld, munged) and the nodes are hosts of tests/cluster/namespaces.py. Needs root and Debian's
packages (apt-get install slurm-wlm); leaves /etc and the system's services alone.
"""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
from pathlib import Path
from types import TracebackType

from tests.cluster import namespaces
from tests.cluster.waiting import wait_for

NODES = ("node1", "node2")
CPUS = 2  # of a node, believed whatever this machine has
GRACE_S = 20  # what a job of partition `low` has left when one of `high` wants its nodes
SLURMD_PORT = 6818
ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun")
LONGEST_FOLDER = 70  # sockets lie below it, and a socket's path has at most 107 bytes

# What is shorter than usual, and why:
# cred_expire: a requeued job waits for so long before it starts again (120 s by default).
# MinJobAge: ended jobs stay visible to scontrol, with their exit codes; there is no accounting.
# ReturnToService: a node that comes back is used again without an administrator.
# linuxproc: kills a step's processes by their parents; cgroups are not to be had in every container.
CONFIG = """
ClusterName=site
SlurmctldHost=controller({controller})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n.spool
SlurmctldPidFile={folder}/controller.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.slurmd.log
PlugStackConfig={folder}/plugstack.conf
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,sched_min_interval=0,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
MinJobAge=86400
KillWait=5
SlurmdTimeout=10
MessageTimeout=5
ReturnToService=2
SlurmdPort={slurmd_port}
SlurmdParameters=config_overrides
NodeName=node1 NodeAddr={node1} CPUs={cpus} RealMemory=8000
NodeName=node2 NodeAddr={node2} CPUs={cpus} RealMemory=8000
PartitionName=low Nodes=node[1-2] Default=YES MaxTime=60 PriorityTier=1 PreemptMode=REQUEUE GraceTime={grace_s}
PartitionName=high Nodes=node[1-2] MaxTime=60 PriorityTier=2 PreemptMode=OFF
"""

CONTROLLER = """munged --force --socket={folder}/munge.socket --key-file={folder}/munge.key \
    --pid-file={folder}/munged.pid --log-file={folder}/munged.log --seed-file={folder}/munge.seed
slurmctld -D -f {folder}/slurm.conf &
"""

NODE = "slurmd -D -f {folder}/slurm.conf &"


def missing() -> str:
    """Why no site can be made here; empty: it can."""
    why = namespaces.missing(PROGRAMS)
    return f"{why} (apt-get install slurm-wlm)" if why.startswith("not installed") else why


class SlurmSite:
    """Use it in `with`. nodes: addresses by name. environment: with it programs on this machine find the site's Slurm.

    folder: an empty one, with a short path. settings: more lines of slurm.conf, for what differs from site to site.
    """

    def __init__(self, folder: Path, settings: str = "") -> None:
        assert len(str(folder)) <= LONGEST_FOLDER, f"{folder} is too long for the sockets below it"
        self.folder, self._settings = folder, settings
        self._network = namespaces.Network(folder, ("controller", *NODES))
        self.controller, *nodes = self._network.addresses.values()
        self.nodes = dict(zip(NODES, nodes, strict=True))
        outer_job = ("SLURM_", "SBATCH_", "SALLOC_")
        clean = {name: value for name, value in os.environ.items() if not name.startswith(outer_job)}
        self.environment = {"HOME": str(Path.home())} | clean | {"SLURM_CONF": f"{folder}/slurm.conf"}

    def __enter__(self) -> SlurmSite:
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def run(self, *command: str, timeout_s: float = 60.0) -> subprocess.CompletedProcess[str]:
        """The result of a command (sbatch, srun, our own...) on the controller's host, as on a login node.

        There it ends with the site, with all it leaves: a killed srun's helper asks for its controller for minutes.
        """
        return self._network.run("controller", *command, environment=self.environment, timeout_s=timeout_s)

    def job(self, job_id: str) -> dict[str, str]:
        """What Slurm knows of a job: JobState, ExitCode, Restarts, BatchHost..."""
        answer = self.run("scontrol", "show", "job", "-o", job_id)
        assert answer.returncode == 0, answer.stderr
        return dict(word.split("=", 1) for word in answer.stdout.split() if "=" in word)

    def stop_node(self, name: str) -> None:
        """Take a node's power away: its connections get no reset."""
        self._network.stop_host(name)

    def start_node(self, name: str) -> None:
        """Start a stopped node; returns when Slurm uses it again, up to half a minute later."""
        self._start_node(name)
        self._wait_for(name)

    def usable(self, name: str) -> bool:
        """Whether Slurm holds a node for one that jobs can run on; it takes 10 to 20 s to miss one."""
        state = self.run("sinfo", "-h", "-n", name, "-p", "low", "-o", "%T").stdout.strip()
        return state in ("idle", "mixed", "allocated")

    def cut(self, name: str) -> None:
        """From now on nothing gets to or from a node; nobody is told."""
        self._network.cut(name)

    def mend(self, name: str) -> None:
        """Undo cut(). Slurm asks after a node that it missed every 30 s or so: wait for usable()."""
        self._network.mend(name)

    def close(self) -> None:
        """End all that runs in the site; afterwards there is no trace of it but its folder."""
        self._network.close()

    def _start(self) -> None:
        (self.folder / "state").mkdir()
        for name in NODES:
            (self.folder / f"{name}.spool").mkdir()
        (self.folder / "plugstack.conf").touch()
        config = CONFIG.format(
            folder=self.folder, slurmd_port=SLURMD_PORT, cpus=CPUS, grace_s=GRACE_S, **self._network.addresses
        )
        (self.folder / "slurm.conf").write_text(config + self._settings)
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        self._network.start()
        self._network.start_host("controller", CONTROLLER.format(folder=self.folder), self.environment)
        for name in NODES:
            self._start_node(name)
        for name in NODES:
            self._wait_for(name)

    def _start_node(self, name: str) -> None:
        self._network.start_host(name, NODE.format(folder=self.folder), self.environment)

    def _wait_for(self, name: str) -> None:
        wait_for(
            lambda: self._listens(name) and self.usable(name), f"{name} (logs: {self.folder}/*.log)", namespaces.START_S
        )

    def _listens(self, name: str) -> bool:
        """Whether its slurmd runs: a node just stopped counts as usable until Slurm misses it."""
        try:
            socket.create_connection((self.nodes[name], SLURMD_PORT), 1.0).close()
        except OSError:
            return False
        return True
