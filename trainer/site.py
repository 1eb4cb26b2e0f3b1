"""Where a run is planned for: a device, what memory a worker has of it, and how fast it is."""

from __future__ import annotations

import math
import os
import time
from dataclasses import dataclass
from pathlib import Path

from configs.devices import Device, device_named, find_device
from configs.errors import ShardyardError
from configs.schema import RunConfig

_MATRIX = 512
_MEASURED_S = 0.2


class NotPlanned(ShardyardError):
    """What a run takes cannot be told from here; it may run all the same."""

    exit_code = 2


@dataclass(frozen=True)
class Site:
    """Where a run is planned for. memory_bytes: what one worker may have; None where that is not known.

    name: of the device. flops: a worker's peak, operations a second.
    """

    name: str
    device: Device
    memory_bytes: int | None
    flops: float
    is_gpu: bool


def site_of(config: RunConfig, device: str | None, *, here: bool) -> Site:
    """The device of this name; None is this machine's: its GPU, by the name that the driver gives, or its CPU.

    here: the run is for this machine, whose memory its workers share.

    Raises:
        NotFound: there is no device of this name. NotPlanned: it is not known which device the workers would have.
    """
    if device is None:
        device = _local_device(config, here)
    known = find_device(device)
    is_gpu = device != "cpu"
    memory = None if known.memory_gb is None else int(known.memory_gb * 1e9)
    flops = known.peak_flops(config.precision)
    if not is_gpu:
        if memory is None and here:
            memory = _machine_memory() // config.resources.workers
        flops = flops or _cpu_flops(config, shared=here)
    if flops is None:
        raise NotPlanned(f"Device '{device}' has no peak for {config.precision}. Write its tflops into devices.yaml.")
    return Site(device, known, memory, flops, is_gpu)


def _local_device(config: RunConfig, here: bool) -> str:
    if not config.resources.gpus_per_worker:
        return "cpu"
    if not here:
        raise NotPlanned("The target does not say which device its workers have: set `device:` in targets.yaml.")
    import torch

    if not torch.cuda.is_available():
        raise NotPlanned(
            "resources.gpus_per_worker=1, and this machine has no GPU. Set `device:` of a target in targets.yaml, and "
            "use --on."
        )
    driver = torch.cuda.get_device_name(0)
    found = device_named(driver)
    if found is None:
        raise NotPlanned(f"No device matches '{driver}'. Write it into devices.yaml, as in docs/plan.md.")
    return found


def _machine_memory() -> int:
    """Bytes that this machine, or the container around it, may have."""
    import psutil

    limits = [int(psutil.virtual_memory().total)]
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            limits.append(int(Path(file).read_text()))
        except (OSError, ValueError):  # another version of cgroups, or "max"
            continue
    return min(limits)


def _cpu_flops(config: RunConfig, *, shared: bool) -> float:
    """Operations a second of a worker's threads: the fastest matrix product of a fifth of a second.

    Not the mean, which would be a fraction of it while others compute here for a moment.

    shared: workers that are more than the cores share them.
    """
    import torch

    from trainer.memory import DTYPES

    before = torch.get_num_threads()
    matrix = torch.ones(_MATRIX, _MATRIX, dtype=DTYPES[config.precision])
    torch.set_num_threads(config.resources.threads)
    try:
        matrix @ matrix
        fastest_s, ends_at = math.inf, time.perf_counter() + _MEASURED_S
        while (started := time.perf_counter()) < ends_at or fastest_s == math.inf:
            matrix @ matrix
            fastest_s = min(fastest_s, time.perf_counter() - started)
    finally:
        torch.set_num_threads(before)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    busy = config.resources.workers * config.resources.threads
    return 2 * _MATRIX**3 / fastest_s * (min(1.0, cores / busy) if shared else 1.0)
