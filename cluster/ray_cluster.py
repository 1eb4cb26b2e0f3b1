"""A Ray cluster that is there already: joining it, and what its errors mean."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import socket
import sys
import time
from pathlib import Path
from typing import Any

from cluster.embedded_ray import loopback, quiet
from configs.errors import Unreachable

CONNECT_TIMEOUT_S = 5.0
# What a client of gRPC says first (RFC 9113, 3.4): the preface, and empty settings.
_GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])


def join(address: str) -> None:
    """Connect this process to a running cluster.

    Raises:
        Unreachable: nothing answers there, or it refuses us.
    """
    import ray

    address = _address_here() if address == "auto" else address
    if address.startswith("ray://"):
        raise Unreachable(
            f"{address} is Ray's client protocol, which cannot watch workers. Give the head's own address instead "
            "(--address HOST:6379, or auto on one of its nodes)."
        )
    with quiet(), _network_of(address):
        _introduce(address)
        try:
            ray.init(
                address=address,
                job_config=ray.job_config.JobConfig(_py_driver_sys_path=import_paths()),
                log_to_driver=False,
                configure_logging=False,
                logging_level=logging.ERROR,
            )
        except Exception as error:  # Ray raises ConnectionError, RuntimeError, AuthenticationError, ...
            raise _not_joined(address, error) from error


def _address_here() -> str:
    """Where the Ray of this machine listens, by RAY_ADDRESS, or by its processes. Private API of the pinned Ray."""
    from ray._private.services import canonicalize_bootstrap_address

    try:
        return str(canonicalize_bootstrap_address("auto"))
    except ConnectionError:
        raise Unreachable(
            "No Ray runs on this machine, which --address auto would join. Start one (`ray start --head`), give the "
            "address of a cluster that this machine is a node of (--address HOST:6379), or leave --address out, and "
            "the run starts a Ray of its own."
        ) from None


def _introduce(address: str) -> None:
    """See that the cluster lets us in and has this machine for a node; Ray itself tries both for up to a minute.

    Private API of the pinned Ray: its own errors do not tell these apart.
    """
    import psutil
    import ray
    import ray._raylet
    from ray._private.authentication.authentication_token_setup import ensure_token_if_auth_enabled
    from ray._private.services import find_node_ids

    raylet: Any = ray._raylet
    deadline = time.monotonic() + CONNECT_TIMEOUT_S
    while True:
        try:
            ensure_token_if_auth_enabled(
                create_token_if_missing=False
            )  # a token that cannot be read would end the process in what follows
            nodes = raylet.GcsClient(address=address, cluster_id=None).get_all_node_info(timeout=CONNECT_TIMEOUT_S)
            break
        except Exception as error:  # the cluster may have just started
            refused = "uthenticat" in f"{type(error).__name__} {error}"
            if refused or time.monotonic() > deadline:
                raise _not_joined(address, error) from error
            time.sleep(1)
    # On the head's own host its node may be about to start; Ray waits for that one.
    here = {node_address.address for addresses in psutil.net_if_addrs().values() for node_address in addresses}
    is_node = any(ray.NodeID.from_hex(node_id) in nodes for node_id in find_node_ids())
    if not is_node and address.rpartition(":")[0].strip("[]") not in here:
        raise Unreachable(
            f"This machine is no node of the Ray cluster at {address}. Launch on one of its nodes, make this machine "
            f"one (`ray start --address={address}`), or send the run there: a target of type ray (docs/targets.md)."
        )


def _not_joined(address: str, error: Exception) -> Unreachable:
    said = str(error).partition("\n")[0].partition(". ")[0].rstrip(".")
    return Unreachable(
        f"The Ray cluster at {address} could not be joined: {said}. It needs the same versions of Ray and Python, and "
        "the same token (RAY_AUTH_MODE=token, RAY_AUTH_TOKEN_PATH) as here."
    )


def _network_of(address: str) -> contextlib.AbstractContextManager[None]:
    """See that something answers, which Ray would try for more than a minute, and on which of our addresses."""
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit():
        raise Unreachable(f"--address {address} is not understood. Use auto or HOST:PORT (usually port 6379).")
    host = host.strip("[]")
    try:
        _greet(host, int(port))
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


def _greet(host: str, port: int) -> None:
    """See that a head's server answers there, within seconds. Raises OSError.

    One that listens and is stuck would be waited for 40 s by Ray's client.
    """
    with socket.create_connection((host, port), CONNECT_TIMEOUT_S) as connection:
        connection.sendall(_GREETING)
        connection.recv(1)


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
