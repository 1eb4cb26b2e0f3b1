"""`shardyard doctor`: is this machine ready, and if not, what to do about it."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from cluster.commands.output import say
from configs.errors import RunFailed, ShardyardError
from data_pipelines.storage import Store

REQUIRED_PACKAGES = ("torch", "deepspeed", "ray", "mlflow", "pyarrow", "transformers", "tokenizers", "safetensors")
FREE_DISK_BYTES = 2 * 1024**3
FREE_SHM_BYTES = 128 * 1024**2


class Finding(NamedTuple):
    """One thing looked at: whether it is good, what was found, and the remedy where it is not."""

    ok: bool
    what: str
    found: str
    remedy: str = ""


def doctor(arguments: Namespace) -> dict[str, Any]:
    """Look at everything a run needs here.

    Raises:
        RunFailed: something is missing; the findings say what, each with its remedy.
    """
    findings = list(_findings(arguments.store))
    for finding in findings:
        remedy = f"  -> {finding.remedy}" if not finding.ok else ""
        say(arguments, f"{'ok ' if finding.ok else 'BAD'} {finding.what:<12} {finding.found}{remedy}")
    bad = [finding for finding in findings if not finding.ok]
    if bad:
        raise RunFailed(f"{len(bad)} of {len(findings)} checks failed: " + "; ".join(f"{f.what}: {f.remedy}" for f in bad))
    return {"findings": [finding._asdict() for finding in findings]}


def _findings(store: str) -> Iterator[Finding]:
    version = sys.version_info[:2]
    yield Finding((3, 11) <= version < (3, 14), "python", sys.version.split()[0], "use Python 3.11, 3.12 or 3.13")
    for package in REQUIRED_PACKAGES:
        yield _package(package)
    yield _devices()
    shm = Path("/dev/shm")
    free = shutil.disk_usage(shm).free if shm.is_dir() else 0
    yield Finding(
        free >= FREE_SHM_BYTES, "/dev/shm", f"{free / 1024**2:,.0f} MiB free", "give the container more (--shm-size=1g)"
    )
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


def _store(uri: str) -> Finding:
    store = Store(uri)
    try:
        store.write_atomic("canary", b"shardyard")
        written = store.read_bytes("canary") == b"shardyard"
        store.delete("canary")
    except ShardyardError as error:
        return Finding(False, "store", str(error), "choose a --store that can be written")
    folder = store.local_path()
    free = shutil.disk_usage(folder).free if folder else None
    enough = free is None or free >= FREE_DISK_BYTES
    found = store.uri if free is None else f"{store.uri}, {free / 1024**3:,.1f} GiB free"
    return Finding(written and enough, "store", found, "free some disk space, or choose another --store")
