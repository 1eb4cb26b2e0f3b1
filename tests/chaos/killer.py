"""A worker body that kills itself where a schedule says: SIGKILL, in the middle of a step of real training."""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trainer.progress import Progress
from trainer.worker import run_worker

SCHEDULE = "schedule.json"


@dataclass(frozen=True)
class Kill:
    """SIGKILL `rank` in attempt `attempt`, `delay_s` after it has completed `step` steps."""

    attempt: int
    rank: int
    step: int
    delay_s: float


def make_schedule(seed: int, *, kills: int, workers: int, steps: int, save_every: int, step_s: float) -> list[Kill]:
    """Kills spread over the run, each between two checkpoints, so that what follows has steps to repeat."""
    rng = random.Random(seed)
    part = steps // kills
    schedule = []
    for index in range(kills):
        candidates = [
            step
            for step in range(max(index * part, save_every) + 1, (index + 1) * part)
            if step % save_every not in (0, save_every - 1)
        ]
        schedule.append(Kill(index + 1, rng.randrange(workers), rng.choice(candidates), rng.uniform(0, step_s)))
    return schedule


def write_schedule(store: Path, schedule: list[Kill]) -> None:
    (store / SCHEDULE).write_text(json.dumps([asdict(kill) for kill in schedule]))


def train_until_killed(
    store_uri: str, run: str, attempt: int, rank: int, progress: Progress, **rest: Any
) -> dict[str, Any]:
    """trainer.worker.run_worker, with a thread that carries out this rank's kill and writes down where it landed."""
    for entry in json.loads((Path(store_uri) / SCHEDULE).read_text()):
        kill = Kill(**entry)
        if (kill.attempt, kill.rank) == (attempt, rank):
            folder = Path(store_uri)
            threading.Thread(target=_carry_out, args=(kill, progress, folder), daemon=True).start()
    return run_worker(store_uri, run, attempt, rank, progress=progress, **rest)


def _carry_out(kill: Kill, progress: Progress, folder: Path) -> None:
    while progress.step < kill.step:
        time.sleep(0.0005)
    time.sleep(kill.delay_s)
    landed = {"attempt": kill.attempt, "rank": kill.rank, "step": progress.step, "phase": progress.phase}
    descriptor = os.open(folder / f"landed-{kill.attempt}.json", os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    os.write(descriptor, json.dumps(landed).encode())
    os.fsync(descriptor)
    os.kill(os.getpid(), signal.SIGKILL)
