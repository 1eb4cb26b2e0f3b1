"""One worker's place on the cluster: it answers pings and stop requests, and a process that it owns trains.

The class knows nothing of Ray but its process's place in it; ray_group.py makes an actor of it. It stays for the whole
run: attempts come and go as children of its warm process.
"""

from __future__ import annotations

import os
import socket
import sys
from typing import Any

from cluster.reaper import start_ticks
from cluster.warm_process import Child, WarmProcess
from cluster.zygote import die_with


class Worker:
    """Lives as long as its process. Its methods are called from different threads at once."""

    def __init__(self, folder: str, environment: dict[str, str]) -> None:
        os.environ.update(environment)
        if os.path.isdir(folder):
            os.chdir(folder)  # relative paths and modules beside the recipe mean the same as where it was launched
        if folder not in sys.path:
            sys.path.append(folder)
        die_with()
        self._warm: WarmProcess | None = None
        self._child: Child | None = None
        self._stopped = 0  # the attempt that was asked to stop last

    def describe(self) -> dict[str, Any]:
        """Where this process is: what the group needs to rank, reach, watch and kill it."""
        import ray

        context = ray.get_runtime_context()
        address = ray.util.get_node_ip_address()
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            if (interface := _interface_of(address)) is not None:
                os.environ.setdefault(name, interface)
        return {
            "pid": os.getpid(),
            "process": (os.getpid(), start_ticks(os.getpid())),
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

    def warm(self, modules: list[str]) -> dict[str, Any]:
        """Start the process that imports what training needs, and wait for it: {"processes", "imported_s"}.

        Where it could not: {"outcome": "raised" | "died", "error"}.
        """
        self._warm = WarmProcess()
        return self._warm.import_modules(modules)

    def train(self, **arguments: Any) -> dict[str, Any]:
        """Fork a child and wait for its end; returns its outcome (see cluster.child.run, which takes the arguments).

        A child that left without a word: {"outcome": "died", "error"}.
        """
        assert self._warm is not None, "warm() comes first"
        self._child = child = self._warm.fork(arguments)
        if self._stopped == arguments["arguments"]["attempt"]:  # it was asked before there was a child
            child.stop()
        return child.wait()

    def ping(self) -> dict[str, Any]:
        """What training does now, and `unheard_s`: since its process last said so."""
        child = self._child
        return {} if child is None else child.report()

    def stop(self, attempt: int) -> None:
        """Ask training of an attempt to save a checkpoint and return; it may be about to begin."""
        self._stopped, child = attempt, self._child
        if child is not None:
            child.stop()

    def stack(self) -> tuple[str, str]:
        """Python stacks of the training thread, and of all threads."""
        child = self._child
        return ("", "") if child is None else child.stack()

    def end(self) -> bool:
        """Kill the child, if there is one, and forget it; whether it is gone, and another one can be forked.

        A ping that comes before the next one is there must not be answered with this one's silence.
        """
        child, self._child = self._child, None
        if child is not None:
            child.kill()
        return self._warm is not None and self._warm.can_fork()


def _interface_of(address: str) -> str | None:
    """The network interface that has this address, so that the ranks meet on the network that Ray uses."""
    import psutil

    for name, entries in psutil.net_if_addrs().items():
        if any(entry.address == address for entry in entries):
            return name
    return None
