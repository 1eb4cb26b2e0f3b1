"""A Ray cluster that is there already: joining it, and what its errors mean."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import socket
import sys
from pathlib import Path

from cluster.embedded_ray import loopback, quiet
from configs.errors import Unreachable

CONNECT_TIMEOUT_S = 5.0


def join(address: str) -> None:
    """Connect this process to a running cluster.

    Raises:
        Unreachable: nothing answers there, or it refuses us.
    """
    import ray

    if address.startswith("ray://"):
        raise Unreachable(
            f"{address} is Ray's client protocol, which cannot watch workers. Give the head's own address instead "
            "(--address HOST:6379, or auto on one of its nodes)."
        )
    with quiet(), _network_of(address):
        try:
            ray.init(
                address=address,
                job_config=ray.job_config.JobConfig(_py_driver_sys_path=import_paths()),
                log_to_driver=False,
                configure_logging=False,
                logging_level=logging.ERROR,
            )
        except Exception as error:  # Ray raises ConnectionError, RuntimeError, AuthenticationError, ...
            raise Unreachable(
                f"The Ray cluster at {address} could not be joined: {error} It needs the same versions of Ray and "
                "Python, and the same token (RAY_AUTH_MODE=token, RAY_AUTH_TOKEN_PATH) as here."
            ) from error


def _network_of(address: str) -> contextlib.AbstractContextManager[None]:
    """See that something answers, which Ray would try for more than a minute, and on which of our addresses."""
    if address == "auto":
        return contextlib.nullcontext()
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit():
        raise Unreachable(f"--address {address} is not understood. Use auto or HOST:PORT (usually port 6379).")
    host = host.strip("[]")
    try:
        knock(host, int(port))
    except OSError as error:
        raise Unreachable(
            f"No Ray answers at {address}: {error}. Start one there with `ray start --head --port={port}`, or "
            "leave --address out to train on this machine."
        ) from error
    if host in ("127.0.0.1", "localhost", "::1"):
        import ray

        try:
            knock(ray.util.get_node_ip_address(), int(port))
        except OSError:
            return loopback()
    return contextlib.nullcontext()


def knock(host: str, port: int) -> None:
    """See that something listens there, within seconds. Raises OSError."""
    socket.create_connection((host, port), CONNECT_TIMEOUT_S).close()


def import_paths() -> list[str]:
    """Where this process imports from besides its installation: the workers' user modules are found there too."""
    project = str(Path(__file__).resolve().parent.parent)
    installed = (sys.prefix, sys.base_prefix, sys.exec_prefix)
    own = [os.path.abspath(path) for path in sys.path if os.path.isdir(path or ".")]
    return list(dict.fromkeys([project, *(path for path in own if not path.startswith(installed))]))


def death_of(error: Exception) -> str:
    """Ray's account of a death, in a sentence."""
    text = " ".join(str(error).split())
    if "raised in its creation task" in text:
        return raised_by(error)
    if "OutOfMemoryError" in type(error).__name__:
        return "Ray ended it, because its node ran out of memory"
    if "node has died" in text or "node died" in text or "marked dead" in text:
        return "its node is gone"
    if "unexpectedly exit" in text or "exits unexpectedly" in text:
        return "the process is gone (killed by a signal, or by the system because memory ran out)"
    if "is unavailable" in text:
        return "the connection to it broke: its process, its node or the network between is gone"
    return text[:300]


def raised_by(error: Exception) -> str:
    """The exception's own line, out of the traceback that Ray sends."""
    lines = [re.sub(r"\x1b\[\d+m", "", line).strip() for line in str(error).splitlines()]
    raised = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Interrupt|Exit)\b", line)]
    text = raised[-1] if raised else lines[-1]
    if text.startswith("ModuleNotFoundError"):
        return f"{text}. Install Shardyard, and the modules that the recipe names, on every node of the cluster."
    return text
