"""The processes of a run: how one joins the others, and sums over all."""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from configs.errors import Unreachable, UsageError
from configs.schema import RunConfig
from trainer import stopwatch

_LOOPBACK = "lo" if sys.platform == "linux" else "lo0"
_torch_default_timeout = distributed_c10d._get_default_timeout


@dataclass(frozen=True)
class World:
    """Where this process stands: `rank` of `size` workers, number `local_rank` on its node, training on `device`."""

    rank: int
    size: int
    local_rank: int
    device: torch.device


def init_world(
    rank: int,
    size: int,
    local_rank: int,
    init_method: str,
    *,
    use_gpu: bool,
    threads: int,
    timeout_s: float,
) -> World:
    """Join the other workers. Call it once in a process, before anything imports deepspeed.

    init_method: where the ranks meet, "tcp://host:port" or "file:///path"; not used by one alone.
    timeout_s: how long to wait for them to come, and in any collective later; a peer that is silent for longer is an
    error in all the others.
    threads: intra-op threads; fixed, since another number changes the last bits of the weights.

    Raises:
        UsageError: use_gpu without a GPU of that number.
        Unreachable: the others did not come, or the port is taken.
    """
    if use_gpu and torch.cuda.device_count() <= local_rank:
        raise UsageError(
            f"Worker {rank} is number {local_rank} on its node, where torch finds {torch.cuda.device_count()} GPUs. "
            "Set resources.gpus_per_worker=0 to train on CPUs, or start fewer workers a node."
        )
    os.environ["LOCAL_RANK"] = str(local_rank)  # DeepSpeed takes its device from it
    os.environ["DS_ACCELERATOR"] = "cuda" if use_gpu else "cpu"
    if not use_gpu:  # otherwise ZeRO-3 counts devices with a `numactl` process in every backward pass
        os.environ.setdefault("LOCAL_SIZE", "1")
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # nothing is compiled; saves seconds of imports
    torch.set_num_threads(threads)
    device = torch.device("cuda", local_rank) if use_gpu else torch.device("cpu")
    if use_gpu:
        torch.cuda.set_device(device)
    timeout = timedelta(seconds=timeout_s)
    _set_default_timeout(timeout)
    stopwatch.time_collectives()
    if size == 1:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", _LOOPBACK)  # gloo listens, though nobody comes
    try:
        dist.init_process_group(
            # Small sums over CPU tensors go through gloo and never wait for the GPU's queue.
            "cpu:gloo,cuda:nccl" if use_gpu else "gloo",
            # Alone it meets nobody: a store at an address would listen on every network of the machine.
            init_method=init_method if size > 1 else None,
            store=dist.HashStore() if size == 1 else None,
            rank=rank,
            world_size=size,
            timeout=timeout,
        )
    except (dist.DistError, dist.DistStoreError, RuntimeError) as error:
        raise Unreachable(
            f"Worker {rank} of {size} could not meet the others at {init_method} within {timeout_s:g} s: {error}. "
            "Either a worker did not start (look into the logs of the other ranks), or the port is in use, or a "
            "firewall lies between the nodes."
        ) from error
    return World(rank, size, local_rank, device)


def world_of(config: RunConfig, rank: int, size: int, local_rank: int, init_method: str) -> World:
    """init_world with the device, threads and patience of a run."""
    return init_world(
        rank,
        size,
        local_rank,
        init_method,
        use_gpu=config.resources.gpus_per_worker > 0,
        threads=config.resources.threads,
        timeout_s=config.recovery.collective_timeout_s,
    )


def close_world() -> None:
    """Leave the other workers. A process that left cannot join another world: DeepSpeed keeps its groups for good."""
    if dist.is_initialized():
        dist.destroy_process_group()
    stopwatch.leave_collectives()
    distributed_c10d._get_default_timeout = _torch_default_timeout


def of_rank_0(value: float) -> float:
    """Rank 0's value, on every rank."""
    return all_sum([value if dist.get_rank() == 0 else 0.0])[0]


def all_sum(values: Sequence[float]) -> list[float]:
    """Elementwise sums over all workers, in fp64 on the CPU. All workers call it, with as many values."""
    if dist.get_world_size() == 1:
        return [float(value) for value in values]
    sums = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(sums)
    return sums.tolist()


class RunningSum:
    """Elementwise sum over all ranks that goes on while other work is done; fp64."""

    def __init__(self, values: Sequence[float] | torch.Tensor, device: torch.device) -> None:
        self._tensor = torch.as_tensor(values, dtype=torch.float64, device=device).reshape(-1)
        self._work = dist.all_reduce(self._tensor, async_op=True) if dist.get_world_size() > 1 else None
        self._values: list[float] | None = None

    def wait(self) -> list[float]:
        """The sums."""
        if self._values is None:
            if self._work is not None:
                self._work.wait()
            self._values = self._tensor.tolist()
        return self._values


def all_gather_json(value: Any) -> list[Any]:
    """Every worker's plain value, by rank. All workers call it; no value is unpickled."""
    size = dist.get_world_size()
    raw = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    sizes = all_sum([float(len(raw)) if rank == dist.get_rank() else 0.0 for rank in range(size)])
    ends = [int(end) for end in itertools.accumulate(sizes)]
    starts = [0, *ends[:-1]]
    joined = torch.zeros(ends[-1], dtype=torch.uint8)
    joined[starts[dist.get_rank()] : ends[dist.get_rank()]] = raw
    if size > 1:
        dist.all_reduce(joined)  # every byte has one summand
    text = joined.numpy().tobytes()
    return [json.loads(text[start:stop]) for start, stop in zip(starts, ends, strict=True)]


def _set_default_timeout(timeout: timedelta) -> None:
    """Make every process group use our timeout.

    DeepSpeed makes sub-groups without naming one, and so gets torch's 30 minutes: a dead peer would block ZeRO for
    that long. torch has no setting for it but this private function (2.13).
    """
    distributed_c10d._get_default_timeout = lambda backend: timeout  # noqa: ARG005 - torch's signature
