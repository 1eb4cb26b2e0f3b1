"""What workers run in these tests instead of training: seconds of a run without torch."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

from tests.cluster import pauses
from trainer.progress import Progress

STEP_S = 0.02
pausing = pauses.train


def steps(
    store_uri: str,
    run: str,
    attempt: int,
    rank: int,
    world_size: int,
    local_rank: int,
    init_method: str,
    stop: threading.Event,
    progress: Progress,
    num_steps: int = 20,
) -> dict[str, Any]:
    """Count steps and show them; the attempt's later ranks write what they were given into the run's folder."""
    facts = [rank, world_size, local_rank, os.getpid(), os.environ["OMP_NUM_THREADS"], init_method.partition(":")[0]]
    facts.append(os.nice(0))
    (Path(store_uri) / run / f"facts-{attempt}-{rank}").write_text(" ".join(map(str, facts)))
    print(f"worker {rank} of attempt {attempt}")
    progress.steps = num_steps
    for step in range(1, num_steps + 1):
        progress.phase = "forward"
        time.sleep(STEP_S)
        progress.step = step
        if stop.is_set():
            return {"outcome": "stopped", "step": step}
    return {"outcome": "finished", "step": num_steps}


def endless_first_attempt(**arguments: Any) -> dict[str, Any]:
    """Something to kill; the second attempt finishes."""
    return steps(**arguments, num_steps=1_000_000 if arguments["attempt"] == 1 else 20)


def endless(**arguments: Any) -> dict[str, Any]:
    """Runs until it is stopped."""
    return steps(**arguments, num_steps=1_000_000)


def deaf(**arguments: Any) -> dict[str, Any]:
    """Does not stop when asked to."""
    arguments["stop"] = threading.Event()
    return steps(**arguments, num_steps=1_000_000)


def _wait_for_rank_0(arguments: dict[str, Any]) -> None:
    facts = Path(arguments["store_uri"]) / arguments["run"] / f"facts-{arguments['attempt']}-0"
    while not (facts.exists() and facts.read_text()):
        time.sleep(0.01)


def raising(**arguments: Any) -> dict[str, Any]:
    """Rank 1 fails after some steps, the other goes on."""
    steps(**arguments, num_steps=5)
    if arguments["rank"] == 1:
        _wait_for_rank_0(arguments)
        raise ValueError("a bad example")
    return steps(**arguments, num_steps=1_000_000)


def exiting(**arguments: Any) -> dict[str, Any]:
    """Rank 1 leaves in a way that no `except Exception` sees."""
    steps(**arguments, num_steps=1)
    if arguments["rank"] == 1:
        _wait_for_rank_0(arguments)
        raise SystemExit(3)
    return steps(**arguments, num_steps=1_000_000)


def leaving(**arguments: Any) -> dict[str, Any]:
    """Rank 1's process ends without a word."""
    steps(**arguments, num_steps=2)
    if arguments["rank"] == 1:
        os._exit(3)
    return steps(**arguments, num_steps=1_000_000)


def computing(**arguments: Any) -> dict[str, Any]:
    """Multiplies matrices, in as many threads as OMP_NUM_THREADS says; the step is how many there are."""
    import numpy as np
    import psutil
    import torch

    size = 600
    product = torch.ones(size, size) @ torch.ones(size, size)
    assert float(product.sum()) == size**3
    assert float((np.ones((size, size)) @ np.ones((size, size))).sum()) == size**3
    return {"outcome": "finished", "step": psutil.Process().num_threads() - 1}


def stuck_in_data(**arguments: Any) -> dict[str, Any]:
    """In the first attempt rank 1's data never comes, for which the other ranks wait in a collective."""
    if arguments["attempt"] > 1:
        return steps(**arguments)
    from trainer.distributed import all_sum, init_world

    world = {key: arguments[key] for key in ("rank", "local_rank", "init_method")}
    init_world(size=arguments["world_size"], use_gpu=False, threads=1, timeout_s=600.0, **world)
    progress = arguments["progress"]
    for step in range(1, 1_000_000):
        progress.phase = "data"
        if arguments["rank"] == 1 and step > 150:
            read_forever()
        progress.phase = "forward"
        all_sum([1.0])
        time.sleep(STEP_S)
        progress.step = step
    return {"outcome": "finished", "step": 0}


def read_forever() -> None:
    """A disk that does not answer."""
    time.sleep(1000)


def holding_the_lock(**arguments: Any) -> dict[str, Any]:
    """Works for seconds in a call that lets no other Python thread run."""
    arguments["progress"].phase = "evaluation"
    time.sleep(0.5)
    number = 3**20_000_000
    return {"outcome": "finished", "step": number % 2}
