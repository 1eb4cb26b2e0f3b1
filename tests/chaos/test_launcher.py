"""SIGKILL to the launcher, which `runs resume` makes good: the same weights as those of a run that nobody disturbed."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.chaos.runs import RUN, SAVE_EVERY, curve_of, differing, recipe, seeds, state_of, train_undisturbed
from tests.cluster.waiting import alive, wait_for
from trainer.record import RunRecord

pytestmark = [pytest.mark.ray, pytest.mark.distributed, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
STEPS, KILLS = 120, 2
START_S = 120.0


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A schedule takes as long as ten of test_harm.py: two launches and a resume, each with a Ray of its own."""
    metafunc.parametrize("seed", seeds(metafunc.config, schedules_each=10))


def test_a_killed_launcher_is_resumed_to_the_same_weights(seed: int, tmp_path: Path) -> None:
    settings = recipe(tmp_path / "disturbed", STEPS)
    undisturbed = recipe(tmp_path / "undisturbed", STEPS)
    train_undisturbed(undisturbed)
    file, store, chance = tmp_path / "run.yaml", settings["store"], random.Random(seed)
    file.write_text(json.dumps(settings))
    command = ["train", str(file)]
    for number in range(KILLS):
        least = (1 + number) * STEPS // (KILLS + 1) // SAVE_EVERY * SAVE_EVERY
        kill_in_step(command, store, chance.randrange(least, least + 3 * SAVE_EVERY))
        command = ["runs", "resume", RUN, "--store", store]
    assert subprocess.run([sys.executable, "-m", "cluster.cli", *command], cwd=ROOT).returncode == 0
    record = RunRecord.open(store, RUN)
    starts = [event["step"] for event in record.events() if event["kind"] == "started"]
    assert len(starts) == KILLS + 1 and 0 < starts[1] < starts[2] < STEPS, starts
    assert differing(state_of(store, STEPS), state_of(undisturbed["store"], STEPS)) == []
    assert curve_of(store) == curve_of(undisturbed["store"])


def kill_in_step(command: list[str], store: str, step: int) -> None:
    """Launch, and kill the launcher alone once a checkpoint of `step` or later is there; it has not ended by then."""
    launcher = subprocess.Popen([sys.executable, "-m", "cluster.cli", *command], cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        wait_for(lambda: newest(store) >= step or launcher.poll() is not None, f"step {step}", START_S)
        below = [process.pid for process in psutil.Process(launcher.pid).children(recursive=True)]
    finally:
        launcher.kill()
    assert launcher.wait() == -9, "it ended before it was killed"
    wait_for(lambda: not any(map(alive, below)), "the end of all its processes", 30.0)
    assert len(below) > 3 and newest(store) < STEPS, "the run was at its end"


def newest(store: str) -> int:
    """The step of the newest checkpoint; 0 before the first."""
    folder = Path(store, RUN, "checkpoints")
    names = (
        [name for name in os.listdir(folder) if (folder / name / "manifest.json").exists()] if folder.exists() else []
    )
    return max((int(name.removeprefix("step-")) for name in names), default=0)
