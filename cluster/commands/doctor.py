"""`shardyard doctor`: is this machine ready, and if not, what to do about it."""

from __future__ import annotations

import importlib.metadata
import os
import secrets
import shutil
import socket
import sys
import tempfile
from argparse import Namespace
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from cluster.commands.output import say
from configs.errors import ShardyardError
from data_pipelines.storage import Store

REQUIRED_PACKAGES = ("torch", "deepspeed", "ray", "mlflow", "pyarrow", "transformers", "tokenizers", "safetensors")
FREE_DISK_BYTES = 2 * 1024**3
FREE_MEMORY_BYTES = 1024**3
FREE_TEMPORARY_BYTES = 512 * 1024**2
FREE_SHM_BYTES = 128 * 1024**2


class NotReady(ShardyardError):
    """Something that a run needs is missing. findings: all that was looked at, for --json."""

    def __init__(self, text: str, findings: list[dict[str, Any]]) -> None:
        super().__init__(text)
        self.findings = findings


class Finding(NamedTuple):
    """One thing looked at: whether it is good, what was found, and the remedy where it is not."""

    ok: bool
    what: str
    found: str
    remedy: str = ""


def doctor(arguments: Namespace) -> dict[str, Any]:
    """Look at everything a run needs here.

    Raises:
        NotReady: something is missing; the findings say what, each with its remedy.
    """
    findings = list(_findings(arguments.store))
    for finding in findings:
        remedy = f"  -> {finding.remedy}" if not finding.ok else ""
        say(arguments, f"{'ok ' if finding.ok else 'BAD'} {finding.what:<12} {finding.found}{remedy}")
    plain = [finding._asdict() for finding in findings]
    bad = [f"{finding.what}: {finding.found}; {finding.remedy}" for finding in findings if not finding.ok]
    if bad:
        raise NotReady(f"{len(bad)} of {len(findings)} checks failed. {'. '.join(bad)}.", plain)
    say(arguments, "This machine is ready.")
    return {"findings": plain}


def _findings(store: str) -> Iterator[Finding]:
    version = sys.version_info[:2]
    yield Finding((3, 11) <= version < (3, 14), "python", sys.version.split()[0], "use Python 3.11, 3.12 or 3.13")
    for package in REQUIRED_PACKAGES:
        yield _package(package)
    yield _devices()
    yield _memory()
    yield _own_name()
    shm = Path("/dev/shm")
    free = shutil.disk_usage(shm).free if shm.is_dir() else 0
    yield Finding(
        free >= FREE_SHM_BYTES, "/dev/shm", f"{free / 1024**2:,.0f} MiB free", "give the container more (--shm-size=1g)"
    )
    yield _temporary_folder()
    yield _store(store)


def _package(name: str) -> Finding:
    try:
        return Finding(True, name, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Finding(False, name, "not installed", "make setup")


def _devices() -> Finding:
    try:
        import torch
    except (ImportError, OSError) as error:
        return Finding(False, "devices", f"torch does not import: {error}", "make setup")
    from trainer.device import supported_precisions

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU with {os.cpu_count()} cores"
    return Finding(True, "devices", f"{name}; precision {', '.join(supported_precisions(device))}")


def _memory() -> Finding:
    import psutil

    memory = psutil.virtual_memory()
    found = f"{memory.available / 1024**3:,.1f} GiB of {memory.total / 1024**3:,.1f} GiB free"
    return Finding(memory.available >= FREE_MEMORY_BYTES, "memory", found, "end other programs: a worker takes 1 GiB")


def _own_name() -> Finding:
    """torch.distributed looks it up, and waits for long where it is not to be found."""
    name = socket.gethostname()
    try:
        return Finding(True, "host name", f"{name}, {socket.gethostbyname(name)}")
    except OSError:
        return Finding(False, "host name", f"{name} has no address", f"add '127.0.0.1 {name}' to /etc/hosts")


def _temporary_folder() -> Finding:
    folder = tempfile.gettempdir()
    free = shutil.disk_usage(folder).free
    found = f"{folder}, {free / 1024**3:,.1f} GiB free"
    return Finding(free >= FREE_TEMPORARY_BYTES, "temporary", found, "Ray works there: free some space, or set TMPDIR")


def _store(uri: str) -> Finding:
    store = Store(uri)
    folder = store.local_path()
    missing = [] if folder is None else [path for path in (folder, *folder.parents) if not path.exists()]
    name = f".doctor-{secrets.token_hex(8)}"
    try:
        try:
            store.write_atomic(name, b"shardyard")
            written = store.read_bytes(name) == b"shardyard"
            free = shutil.disk_usage(folder).free if folder else None
        finally:
            with suppress(ShardyardError):
                store.delete(name)
            with suppress(OSError):  # someone else may use one by now
                for path in missing:
                    path.rmdir()
    except ShardyardError as error:
        return Finding(False, "store", str(error), "choose a --store that can be written")
    enough = free is None or free >= FREE_DISK_BYTES
    found = store.uri if free is None else f"{store.uri}, {free / 1024**3:,.1f} GiB free"
    return Finding(written and enough, "store", found, "free some disk space, or choose another --store")
