"""A Slurm of two nodes on this machine, real but for its hardware: what tests of launching there run against.

    this machine ---- bridge of "controller" ---- node1
    (tests)           (slurmctld, munged)   \\---- node2

Each of the three is a set of namespaces (network, processes, mounts, host name) held by its first process, which the
kernel kills with the process that made the site. With that process all others inside go, and with them namespaces,
mounts and links: nothing outlives the site, however it ends. This machine has a link to the bridge, which goes with the
bridge: it reaches the nodes, and they reach nothing but it. Files are shared: all see this machine's own.
Needs root and Debian's packages (apt-get install slurm-wlm); leaves /etc and the system's services alone.
"""

from __future__ import annotations

import ipaddress
import json
import os
import secrets
import shutil
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import psutil

from tests.cluster.waiting import alive, wait_for

NODES = ("node1", "node2")
CPUS = 2  # of a node, believed whatever this machine has
GRACE_S = 20  # what a job of partition `low` has left when one of `high` wants its nodes
SLURMD_PORT = 6818
ROOT = Path(__file__).resolve().parents[2]
START_S = 60.0
PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "unshare", "nsenter", "setpriv", "ip")
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

# The last line makes of each place's first process one that reaps what is left to it; daemons start before it, since
# a program that is started with SIGCHLD ignored cannot wait for its children.
PLACE = """set -e
hostname {name}
mount --bind {folder}/hosts /etc/hosts
ip link set lo up
{script}
trap '' CHLD
exec sleep infinity
"""

CONTROLLER = """ip link add bridge type bridge
ip address add {address}/24 dev bridge
ip link set bridge up
munged --force --socket={folder}/munge.socket --key-file={folder}/munge.key --pid-file={folder}/munged.pid \
    --log-file={folder}/munged.log --seed-file={folder}/munge.seed
slurmctld -D -f {folder}/slurm.conf &
"""

NODE = """until ip link show eth0 >/dev/null 2>&1; do sleep 0.05; done
ip address add {address}/24 dev eth0
ip link set eth0 up
slurmd -D -f {folder}/slurm.conf &
"""


def missing() -> str:
    """Why no site can be made here; empty: it can."""
    if os.geteuid() != 0:
        return "needs root"
    if absent := [program for program in PROGRAMS if shutil.which(program) is None]:
        return f"not installed: {', '.join(absent)} (apt-get install slurm-wlm)"
    if subprocess.run(["unshare", "--net", "--mount", "--pid", "--fork", "true"], capture_output=True).returncode:
        return "namespaces are not allowed here"
    return ""


@dataclass(frozen=True)
class Place:
    """Namespaces with what runs in them. starter: unshare; first: the process whose end is the end of all there."""

    starter: subprocess.Popen[bytes]
    first: int

    def end(self) -> None:
        """Kill all that runs there, at once and without a word, as a power cut would."""
        self.starter.kill()
        self.starter.wait()
        wait_for(lambda: not alive(self.first), "the end of a place's processes")


class SlurmSite:
    """Use it in `with`. nodes: addresses by name. environment: with it programs on this machine find the site's Slurm.

    folder: an empty one, with a short path. settings: more lines of slurm.conf, for what differs from site to site.
    """

    def __init__(self, folder: Path, settings: str = "") -> None:
        assert len(str(folder)) <= LONGEST_FOLDER, f"{folder} is too long for the sockets below it"
        self.folder, self._settings = folder, settings
        network = _free_network()
        self.controller, self._here, *nodes = (str(network[index]) for index in (1, 254, 11, 12))
        self.nodes = dict(zip(NODES, nodes, strict=True))
        outer_job = ("SLURM_", "SBATCH_", "SALLOC_")
        clean = {name: value for name, value in os.environ.items() if not name.startswith(outer_job)}
        self.environment = {"HOME": str(Path.home())} | clean | {"SLURM_CONF": f"{folder}/slurm.conf"}
        self._link = f"sl{os.getpid()}-{secrets.token_hex(2)}"  # at most 15 bytes
        self._places: dict[str, Place] = {}

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
        entered = ["nsenter", "--target", str(self._places["controller"].first), "--all", f"--wdns={Path.cwd()}"]
        return subprocess.run(
            [*entered, *command], env=self.environment, capture_output=True, text=True, timeout=timeout_s
        )

    def job(self, job_id: str) -> dict[str, str]:
        """What Slurm knows of a job: JobState, ExitCode, Restarts, BatchHost..."""
        answer = self.run("scontrol", "show", "job", "-o", job_id)
        assert answer.returncode == 0, answer.stderr
        return dict(word.split("=", 1) for word in answer.stdout.split() if "=" in word)

    def stop_node(self, name: str) -> None:
        """Take a node's power away: its connections get no reset."""
        self._on_bridge("link", "del", f"to-{name}")
        self._places.pop(name).end()

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
        self._on_bridge("link", "set", f"to-{name}", "down")

    def mend(self, name: str) -> None:
        """Undo cut(). Slurm asks after a node that it missed every 30 s or so: wait for usable()."""
        self._on_bridge("link", "set", f"to-{name}", "up")

    def close(self) -> None:
        """End all that runs in the site; afterwards there is no trace of it but its folder."""
        for name in reversed(list(self._places)):
            self._places.pop(name).end()
        # The kernel removes a dead namespace's links a moment after its last process.
        wait_for(lambda: not Path("/sys/class/net", self._link).exists(), "the end of the site's links")

    def _start(self) -> None:
        addresses = {"controller": self.controller} | self.nodes
        (self.folder / "state").mkdir()
        for name in NODES:
            (self.folder / f"{name}.spool").mkdir()
        (self.folder / "plugstack.conf").touch()
        (self.folder / "hosts").write_text(
            "127.0.0.1 localhost\n" + "".join(f"{address} {name}\n" for name, address in addresses.items())
        )
        config = CONFIG.format(folder=self.folder, slurmd_port=SLURMD_PORT, cpus=CPUS, grace_s=GRACE_S, **addresses)
        (self.folder / "slurm.conf").write_text(config + self._settings)
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        self._enter_place("controller", CONTROLLER.format(address=self.controller, folder=self.folder))
        wait_for(lambda: self._on_bridge("link", "show", "bridge", check=False), "the bridge", START_S)
        first = str(self._places["controller"].first)
        _ip("link", "add", self._link, "type", "veth", "peer", "name", "to-outside", "netns", first)
        _ip("address", "add", f"{self._here}/24", "dev", self._link)
        _ip("link", "set", self._link, "up")
        self._on_bridge("link", "set", "to-outside", "master", "bridge", "up")
        for name in NODES:
            self._start_node(name)
        for name in NODES:
            self._wait_for(name)

    def _start_node(self, name: str) -> None:
        self._enter_place(name, NODE.format(address=self.nodes[name], folder=self.folder))
        first = str(self._places[name].first)
        # Made in the node's namespace and handed over to the bridge's: this machine sees neither end.
        peer = ("peer", "name", f"to-{name}", "netns", str(self._places["controller"].first))
        _in_network(first, "link", "add", "eth0", "type", "veth", *peer)
        self._on_bridge("link", "set", f"to-{name}", "master", "bridge", "up")

    def _enter_place(self, name: str, script: str) -> None:
        command = ["setpriv", "--pdeathsig", "KILL"]
        command += ["unshare", "--net", "--uts", "--mount", "--mount-proc", "--pid", "--fork", "--kill-child"]
        command += ["sh", "-c", PLACE.format(name=name, folder=self.folder, script=script)]
        with (self.folder / f"{name}.out").open("ab") as out:
            starter = subprocess.Popen(
                command, env=self.environment, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
            )
        try:
            children = wait_for(psutil.Process(starter.pid).children, f"the first process of {name}", START_S)
        except BaseException:
            starter.kill()
            starter.wait()
            raise
        self._places[name] = Place(starter, children[0].pid)

    def _on_bridge(self, *arguments: str, check: bool = True) -> bool:
        return _in_network(str(self._places["controller"].first), *arguments, check=check)

    def _wait_for(self, name: str) -> None:
        wait_for(lambda: self._listens(name) and self.usable(name), f"{name} (logs: {self.folder}/*.log)", START_S)

    def _listens(self, name: str) -> bool:
        """Whether its slurmd runs: a node just stopped counts as usable until Slurm misses it."""
        try:
            socket.create_connection((self.nodes[name], SLURMD_PORT), 1.0).close()
        except OSError:
            return False
        return True


def _free_network() -> ipaddress.IPv4Network:
    """One of the networks reserved for measurements (RFC 2544) that this machine has no way to yet."""
    answer = subprocess.run(["ip", "-json", "-4", "route"], check=True, capture_output=True, text=True).stdout
    taken = [ipaddress.IPv4Network(route["dst"]) for route in json.loads(answer) if route["dst"] != "default"]
    candidates = list(ipaddress.IPv4Network("198.18.0.0/15").subnets(new_prefix=24))
    start = os.getpid() % len(candidates)  # two sites made at the same time differ
    return next(
        network
        for network in candidates[start:] + candidates[:start]
        if not any(network.overlaps(other) for other in taken)
    )


def _in_network(process: str, *arguments: str, check: bool = True) -> bool:
    """Run ip in a process's network."""
    return _ip(*arguments, prefix=("nsenter", "--target", process, "--net"), check=check)


def _ip(*arguments: str, prefix: tuple[str, ...] = (), check: bool = True) -> bool:
    return subprocess.run([*prefix, "ip", *arguments], check=check, capture_output=True).returncode == 0
