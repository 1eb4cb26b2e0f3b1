"""Two hosts on this machine: network namespaces with a link between them, a Ray node in each. Needs root."""

from __future__ import annotations

import contextlib
import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HEAD, OTHER = "10.77.7.1", "10.77.7.2"
PORT = 6399
START_S = 90.0


@dataclass(frozen=True)
class Hosts:
    """Names of both namespaces; the head's Ray listens on HEAD:PORT. environment: of what joins it."""

    head: str
    other: str
    environment: dict[str, str]

    def popen(self, host: str, *command: str, **options: object) -> subprocess.Popen[str]:
        """Start a command on a host."""
        whole = ["ip", "netns", "exec", host, *command]
        return subprocess.Popen(whole, cwd=ROOT, env=self.environment, text=True, **options)  # type: ignore[call-overload,no-any-return]

    def cut(self) -> None:
        """From now on nothing gets from one host to the other; nobody is told."""
        _ip("-n", self.other, "link", "set", "to-head", "down")

    def join(self) -> None:
        """Undo cut()."""
        _ip("-n", self.other, "link", "set", "to-head", "up")


def allowed() -> bool:
    """Whether namespaces can be made here."""
    return os.geteuid() == 0 and subprocess.run(["unshare", "-n", "true"], capture_output=True).returncode == 0


@contextlib.contextmanager
def two_hosts() -> Iterator[Hosts]:
    """Both hosts with their Ray nodes of one CPU each; all of it is gone afterwards."""
    mark = secrets.token_hex(3)
    head, other = f"head-{mark}", f"other-{mark}"
    with tempfile.TemporaryDirectory(prefix="hosts-", dir="/tmp") as folder, contextlib.ExitStack() as stack:
        token = Path(folder, "token")
        token.write_text(secrets.token_hex(32))
        token.chmod(0o600)
        environment = os.environ | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_USAGE_STATS_ENABLED": "0",
            "PYTHONPATH": str(ROOT),
        }
        hosts = Hosts(head, other, environment)
        for name in (head, other):
            _ip("netns", "add", name)
            stack.callback(_ip, "netns", "del", name)
            _ip("-n", name, "link", "set", "lo", "up")
        _ip("link", "add", "to-head", "netns", other, "type", "veth", "peer", "name", "to-other", "netns", head)
        for name, interface, address in ((head, "to-other", HEAD), (other, "to-head", OTHER)):
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", interface)
            _ip("-n", name, "link", "set", interface, "up")
        start = [
            str(Path(sys.executable).with_name("ray")),
            "start",
            "--block",
            "--num-cpus=1",
            "--disable-usage-stats",
        ]
        for name, options in (
            (head, ["--head", f"--node-ip-address={HEAD}", f"--port={PORT}", "--include-dashboard=false"]),
            (other, [f"--address={HEAD}:{PORT}", f"--node-ip-address={OTHER}"]),
        ):
            log = stack.enter_context(Path(folder, f"{name}.log").open("w"))
            temporary = ["--temp-dir", f"{folder}/{name}"] if name == head else []
            node = hosts.popen(name, *start, *options, *temporary, stdout=log, stderr=log, start_new_session=True)
            stack.callback(_end, node)
            if name == head:
                _wait_for_port(hosts, head)
        _wait_for_nodes(hosts, head)
        yield hosts


def _wait_for_port(hosts: Hosts, host: str) -> None:
    knock = f"import socket; socket.create_connection(('{HEAD}', {PORT}), 1)"
    deadline = time.monotonic() + START_S
    while hosts.popen(host, sys.executable, "-c", knock, stderr=subprocess.DEVNULL).wait() != 0:
        assert time.monotonic() < deadline, "Ray's head did not start"
        time.sleep(0.2)


def _wait_for_nodes(hosts: Hosts, host: str) -> None:
    count = (
        f"import ray, time; ray.init('{HEAD}:{PORT}', log_to_driver=False)\nwhile len(ray.nodes()) < 2: time.sleep(0.2)"
    )
    assert hosts.popen(host, sys.executable, "-c", count, stderr=subprocess.DEVNULL).wait(START_S) == 0


def _end(node: subprocess.Popen[str]) -> None:
    """Kill a Ray node with all that it started."""
    import psutil

    with contextlib.suppress(psutil.NoSuchProcess):
        family = [psutil.Process(node.pid), *psutil.Process(node.pid).children(recursive=True)]
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(family, timeout=10)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)
