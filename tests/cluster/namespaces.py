"""Hosts on one machine, real but for the hardware: sets of namespaces, each with its own address on a bridge.

    this machine ---- bridge ---- host
    (tests)                 \\---- host

Each host, and the bridge, is a set of namespaces (network, processes, mounts, host name) held by its first process,
which the kernel kills with the process that made it. With that process all others inside go, and with them namespaces,
mounts and links: nothing outlives the network, however it ends. This machine has a link to the bridge, which goes with
the bridge: it reaches the hosts, and they reach nothing but it. Files are shared: all see this machine's own. Needs
root.
"""

from __future__ import annotations

import ipaddress
import json
import os
import secrets
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.cluster.waiting import alive, wait_for

HERE = "here"  # the name of this machine, for cut and mend
START_S = 60.0
PROGRAMS = ("unshare", "nsenter", "setpriv", "ip")
_BRIDGE = "bridge"

# The last line makes of each host's first process one that reaps what is left to it; daemons start before it, since
# a program that is started with SIGCHLD ignored cannot wait for its children.
_FIRST_PROCESS = """set -e
hostname {name}
ip link set lo up
{script}
trap '' CHLD
exec sleep infinity
"""

_MAKE_BRIDGE = "ip link add bridge type bridge\nip link set bridge up"

_JOIN_BRIDGE = """mount --bind {hosts} /etc/hosts
until ip link show eth0 >/dev/null 2>&1; do sleep 0.05; done
ip address add {address}/24 dev eth0
ip link set eth0 up
"""


def missing(programs: Sequence[str] = ()) -> str:
    """Why no hosts, with these programs on them, can be made here; empty: they can."""
    if os.geteuid() != 0:
        return "needs root"
    if absent := [program for program in (*PROGRAMS, *programs) if shutil.which(program) is None]:
        return f"not installed: {', '.join(absent)}"
    if subprocess.run(["unshare", "--net", "--mount", "--pid", "--fork", "true"], capture_output=True).returncode:
        return "namespaces are not allowed here"
    return ""


def links_of(owner: int) -> list[str]:
    """This machine's links to the bridges of networks that a process has made."""
    return [path.name for path in Path("/sys/class/net").glob(f"sl{owner}-*")]


@dataclass(frozen=True)
class _Place:
    """Namespaces with what runs in them. starter: unshare; first: the process whose end is the end of all there."""

    starter: subprocess.Popen[bytes]
    first: int

    def end(self) -> None:
        """Kill all that runs there, at once and without a word, as a power cut would."""
        self.starter.kill()
        self.starter.wait()
        wait_for(lambda: not alive(self.first), "the end of a place's processes")


class Network:
    """The bridge, from `start` to `close`, and hosts on it. addresses: of all hosts by name, started or not.

    folder: gets /etc/hosts of the hosts, and what each says as NAME.out.
    """

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self._folder = folder
        network = _free_network()
        self._here = str(network[254])
        self.addresses = {name: str(network[index]) for index, name in enumerate(names, start=11)}
        self._link = f"sl{os.getpid()}-{secrets.token_hex(2)}"  # at most 15 bytes
        self._places: dict[str, _Place] = {}

    def start(self) -> None:
        """Make the bridge, and this machine's link to it."""
        lines = [f"{address} {name}\n" for name, address in self.addresses.items()]
        (self._folder / "hosts").write_text("".join(["127.0.0.1 localhost\n", *lines]))
        self._enter(_BRIDGE, _MAKE_BRIDGE, os.environ)
        wait_for(lambda: self._on_bridge("link", "show", _BRIDGE, check=False), "the bridge", START_S)
        peer = ("peer", "name", f"to-{HERE}", "netns", str(self._places[_BRIDGE].first))
        _ip("link", "add", self._link, "type", "veth", *peer)
        _ip("address", "add", f"{self._here}/24", "dev", self._link)
        _ip("link", "set", self._link, "up")
        self._on_bridge("link", "set", f"to-{HERE}", "master", _BRIDGE, "up")

    def start_host(self, name: str, script: str, environment: Mapping[str, str]) -> None:
        """Start a host; the script, lines of sh, starts its daemons in the background when the host has its address."""
        join = _JOIN_BRIDGE.format(hosts=self._folder / "hosts", address=self.addresses[name])
        self._enter(name, join + script, environment)
        # Made in the host's namespace and handed over to the bridge's: this machine sees neither end.
        peer = ("peer", "name", f"to-{name}", "netns", str(self._places[_BRIDGE].first))
        _in_network(self._places[name].first, "link", "add", "eth0", "type", "veth", *peer)
        self._on_bridge("link", "set", f"to-{name}", "master", _BRIDGE, "up")

    def stop_host(self, name: str) -> None:
        """Take a host's power away: its connections get no reset."""
        self._on_bridge("link", "del", f"to-{name}")
        self._places.pop(name).end()

    def stop_hosts(self) -> None:
        """The same for all hosts that are there."""
        for name in [name for name in self._places if name != _BRIDGE]:
            self.stop_host(name)

    def cut(self, name: str) -> None:
        """From now on nothing gets to or from a host; nobody is told."""
        self._on_bridge("link", "set", f"to-{name}", "down")

    def mend(self, name: str) -> None:
        """Undo cut()."""
        self._on_bridge("link", "set", f"to-{name}", "up")

    def run(
        self, name: str, *command: str, environment: Mapping[str, str], timeout_s: float
    ) -> subprocess.CompletedProcess[str]:
        """The result of a command on a host."""
        entered = ["nsenter", "--target", str(self._places[name].first), "--all", f"--wdns={Path.cwd()}"]
        return subprocess.run([*entered, *command], env=environment, capture_output=True, text=True, timeout=timeout_s)

    def close(self) -> None:
        """End all that runs on the hosts; afterwards there is no trace of them but their folder. Safe to call twice."""
        for name in reversed(list(self._places)):
            self._places.pop(name).end()
        # The kernel removes a dead namespace's links a moment after its last process.
        wait_for(lambda: not Path("/sys/class/net", self._link).exists(), "the end of the network's links")

    def _enter(self, name: str, script: str, environment: Mapping[str, str]) -> None:
        command = ["setpriv", "--pdeathsig", "KILL"]
        command += ["unshare", "--net", "--uts", "--mount", "--mount-proc", "--pid", "--fork", "--kill-child"]
        command += ["sh", "-c", _FIRST_PROCESS.format(name=name, script=script)]
        with (self._folder / f"{name}.out").open("ab") as out:
            starter = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
            )
        try:
            children = wait_for(psutil.Process(starter.pid).children, f"the first process of {name}", START_S)
        except BaseException:
            starter.kill()
            starter.wait()
            raise
        self._places[name] = _Place(starter, children[0].pid)

    def _on_bridge(self, *arguments: str, check: bool = True) -> bool:
        return _in_network(self._places[_BRIDGE].first, *arguments, check=check)


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


def _in_network(process: int, *arguments: str, check: bool = True) -> bool:
    """Run ip in a process's network."""
    return _ip(*arguments, prefix=("nsenter", "--target", str(process), "--net"), check=check)


def _ip(*arguments: str, prefix: tuple[str, ...] = (), check: bool = True) -> bool:
    return subprocess.run([*prefix, "ip", *arguments], check=check, capture_output=True).returncode == 0
