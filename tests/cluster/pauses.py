"""Workers that train in lockstep, one of which pauses now and then as healthy ones do, or for ever as a hung one does.

Which, where and for how long is in plan.json in the run's folder; only the first attempt follows it.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trainer.progress import Progress

EVALUATE_EVERY = 5
NEVER_S = 1000.0


@dataclass(frozen=True)
class Pause:
    """What a rank does for so long in a phase of a step (0 is the first)."""

    rank: int
    step: int
    phase: str
    seconds: float


@dataclass(frozen=True)
class Plan:
    """steps: how many. step_s: how long one takes without a pause."""

    steps: int
    step_s: float
    pauses: list[Pause]

    def write(self, run: Path) -> None:
        run.mkdir(exist_ok=True)
        (run / "plan.json").write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, run: Path) -> Plan:
        raw = json.loads((run / "plan.json").read_text())
        return cls(raw["steps"], raw["step_s"], [Pause(**pause) for pause in raw["pauses"]])


def train(
    store_uri: str, run: str, attempt: int, rank: int, world_size: int, progress: Progress, **arguments: Any
) -> dict[str, Any]:
    """The phases of the real loop, with sleeps for work, and a collective wherever that has one."""
    from trainer.distributed import all_sum, init_world

    place = {name: arguments[name] for name in ("local_rank", "init_method")}
    init_world(rank, world_size, use_gpu=False, threads=1, timeout_s=600.0, **place)
    folder = Path(store_uri) / run
    plan = Plan.read(folder)
    pauses = {(pause.step, pause.phase): pause.seconds for pause in plan.pauses if pause.rank == rank and attempt == 1}
    usual = {"forward": plan.step_s}

    def work(step: int, phase: str) -> None:
        progress.phase = phase
        (folder / f"pid-{attempt}-{rank}").write_text(str(os.getpid()))
        time.sleep(pauses.get((step, phase), usual.get(phase, 0.0)))

    work(0, "restore")
    all_sum([1.0])
    progress.steps = plan.steps
    for step in range(plan.steps):
        for phase in ("data", "forward", "backward"):
            work(step, phase)
        all_sum([1.0])
        work(step, "optimizer")
        progress.step = step + 1
        if progress.step % EVALUATE_EVERY == 0:
            for phase in ("evaluation", "checkpoint"):
                work(step, phase)
                all_sum([1.0])
    return {"outcome": "finished", "step": plan.steps}
