"""One worker process of an attempt: what a Ray actor, torchrun and a bare `python -m trainer` all run."""

from __future__ import annotations

import threading
from dataclasses import asdict
from typing import Any

from trainer.progress import Progress


def run_worker(
    store_uri: str,
    run: str,
    attempt: int,
    rank: int,
    world_size: int,
    local_rank: int,
    init_method: str,
    stop: threading.Event,
    progress: Progress,
) -> dict[str, Any]:
    """Take part in attempt `attempt` of a run as rank `rank` of `world_size`, until it finishes or stops.

    init_method: where the ranks meet, for `torch.distributed` ("tcp://host:port" or "file:///path").
    Returns {"outcome": "finished" | "stopped", "step": completed steps}.
    """
    from trainer import loop, session
    from trainer.distributed import close_world, world_of
    from trainer.record import RunRecord

    record = RunRecord.open(store_uri, run, rank=rank)
    record.attempt = attempt
    world = world_of(record.config, rank, world_size, local_rank, init_method)
    try:
        with session.open_session(record, world, progress) as opened:
            return asdict(loop.train(opened, stop))
    finally:
        close_world()
        record.close()
