"""A Ray cluster of three hosts on this machine, real but for its hardware: what tests of sending runs there go against.

The head has the Jobs API and no CPU, and each node one CPU, so that two workers are on two hosts. All are hosts of
tests/cluster/namespaces.py, and the cluster asks for a token. Needs root.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import sys
import urllib.request
from pathlib import Path
from types import TracebackType

from tests.cluster import namespaces
from tests.cluster.waiting import wait_for

HEAD, NODES = "head", ("node1", "node2")
ROOT = Path(__file__).resolve().parents[2]
DASHBOARD_PORT, AGENT_PORT = 8265, 52365
START_S = 150.0

# What is other than usual, and why:
# health_check: a node that is gone is given up within seconds instead of a minute.
# start_wait_time: three Rays that start at once on few cores need longer than 30 s.
# The rest are numbers that nobody reads here.
SETTINGS = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_raylet_start_wait_time_s": "120",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_enable_metrics_collection": "0",
    "RAY_task_events_report_interval_ms": "0",
    "RAY_event_stats": "0",
}

# Each host sees a folder of its own as /mnt: the paths of Ray's sockets stay short, and the logs outlive the host.
DAEMON = """mount --bind {folder}/{name}.ray /mnt
{ray} start --block --temp-dir=/mnt --node-ip-address={address} --object-store-memory=78643200 {options} &
"""


def missing() -> str:
    """Why no site can be made here; empty: it can."""
    return namespaces.missing()


class RaySite:
    """Use it in `with`. address: the head's dashboard. environment: with it programs on this machine may ask there.

    folder: an empty one, that stays.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._network = namespaces.Network(folder, (HEAD, *NODES))
        self.addresses = self._network.addresses
        self.address = f"http://{self.addresses[HEAD]}:{DASHBOARD_PORT}"
        clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        self.environment = clean | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder / "token")}
        self.environment |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}  # the job's `python`
        self._token = secrets.token_hex(32)

    def __enter__(self) -> RaySite:
        try:
            self._start()
        except BaseException as error:
            said = "".join(f"\n--- {path.name}\n{path.read_text()[-2000:]}" for path in self.folder.glob("*.out"))
            error.add_note(f"The hosts said:{said}")
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def kill(self, name: str) -> None:
        """Take the power of a node, or of the head, away: its connections get no reset."""
        self._network.stop_host(name)

    def start_node(self, name: str) -> None:
        """Start a killed node again, empty; returns when the cluster uses it."""
        self._start_host(name, f"--address={self.addresses[HEAD]}:6379 --num-cpus=1")
        self.wait_for_nodes()

    def cut(self, name: str) -> None:
        """From now on nothing gets to or from a host (namespaces.HERE: this machine); nobody is told."""
        self._network.cut(name)

    def mend(self, name: str) -> None:
        """Undo cut(). A node that was given up meanwhile ends its Ray: kill and start it."""
        self._network.mend(name)

    def restart(self) -> None:
        """End all hosts as by a power cut, and start the cluster anew: it knows nothing of the old one."""
        self._network.stop_hosts()
        self._start_hosts()

    def wait_for_nodes(self) -> None:
        """Until the cluster has all hosts, and no other."""
        wait_for(lambda: self._alive() == set(self.addresses.values()), "a cluster of all hosts", START_S)

    def close(self) -> None:
        """End all that runs in the site; afterwards there is no trace of it but its folder."""
        self._network.close()

    def _start(self) -> None:
        token = self.folder / "token"
        token.touch(0o600)
        token.write_text(self._token)
        self._network.start()
        self._start_hosts()

    def _start_hosts(self) -> None:
        self._start_host(
            HEAD, f"--head --num-cpus=0 --dashboard-host={self.addresses[HEAD]} --dashboard-port={DASHBOARD_PORT}"
        )
        wait_for(lambda: self._alive(), "the head", START_S)
        for name in NODES:
            self._start_host(name, f"--address={self.addresses[HEAD]}:6379 --num-cpus=1")
        self.wait_for_nodes()
        wait_for(lambda: self._listens(AGENT_PORT), "the agent that starts jobs", START_S)

    def _start_host(self, name: str, options: str) -> None:
        (self.folder / f"{name}.ray").mkdir(exist_ok=True)
        ray = Path(sys.executable).with_name("ray")
        script = DAEMON.format(
            folder=self.folder, name=name, ray=ray, address=self.addresses[name], options=f"{options} --num-gpus=0"
        )
        self._network.start_host(name, script, self.environment | SETTINGS)

    def _alive(self) -> set[str]:
        """Addresses of the nodes that the cluster believes alive."""
        request = urllib.request.Request(
            f"{self.address}/api/v0/nodes", headers={"Authorization": f"Bearer {self._token}"}
        )
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):  # it starts, and says something else
            with urllib.request.urlopen(request, timeout=5) as answer:
                nodes = json.load(answer)["data"]["result"]["result"]
            return {node["node_ip"] for node in nodes if node["state"] == "ALIVE"}
        return set()

    def _listens(self, port: int) -> bool:
        with contextlib.suppress(OSError):
            socket.create_connection((self.addresses[HEAD], port), 1.0).close()
            return True
        return False
