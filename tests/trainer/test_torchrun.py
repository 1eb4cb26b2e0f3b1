"""`python -m trainer` under torchrun that is told to end: all ranks save, and the same command goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.tiny import tiny_config, write_recipe
from tests.trainer.attempts import state, train
from tests.trainer.test_divergence import same_state
from trainer.lease import current_claim
from trainer.record import RunRecord

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
STEPS = 400
ONLY_THE_LAST = {"steps": STEPS, "checkpoint": {"every": STEPS}, "evaluation": {"every": None, "sample_tokens": 0}}


class Torchrun:
    """torchrun with two ranks of a recipe; its output goes to a file."""

    def __init__(self, folder: Path, recipe: Path, *options: str) -> None:
        self.output = folder / "output"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        with self.output.open("w") as output:
            self.process = subprocess.Popen(
                [*command, *options, "-m", "trainer", str(recipe)],
                cwd=folder,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def wait_for_step(self, record: RunRecord, step: int) -> None:
        deadline = time.monotonic() + 120.0
        while not any(row["step"] >= step for row in record.stitched()):
            assert self.process.poll() is None, self.output.read_text()
            assert time.monotonic() < deadline, self.output.read_text()
            time.sleep(0.01)

    def preempt(self, number: signal.Signals) -> int:
        """Tell it to end, as a scheduler does; its exit code, when all of its processes are gone."""
        ranks = psutil.Process(self.process.pid).children(recursive=True)
        self.process.send_signal(number)
        code = self.process.wait(60.0)
        _, alive = psutil.wait_procs(ranks, timeout=0)
        assert not alive, alive
        return code


def test_a_preempted_torchrun_saves_and_the_same_command_goes_on_bit_by_bit(tmp_path: Path) -> None:
    undisturbed = train(tiny_config(tmp_path / "undisturbed", **ONLY_THE_LAST))
    folder = tmp_path / "preempted"
    recipe = write_recipe(folder, **ONLY_THE_LAST)
    (folder / "runs").mkdir()
    saved = [0]
    for number, options in (
        (signal.SIGTERM, ()),
        (signal.SIGUSR1, ("--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1")),
    ):
        started = Torchrun(folder, recipe, *options)
        while not (folder / "runs/tiny/run.yaml").exists():
            assert started.process.poll() is None, started.output.read_text()
            time.sleep(0.01)
        record = RunRecord.open(str(folder / "runs"), "tiny")
        started.wait_for_step(record, saved[-1] + 3)
        assert started.preempt(number) == 1  # torchrun's own; those of its ranks are lost
        said = started.output.read_text()
        checkpoint = record.checkpoints()[-1]
        assert said.count(f"Stopped and saved after step {checkpoint['step']}.") == 2, said
        assert saved[-1] < checkpoint["step"] < STEPS
        assert record.status() == "stopped"
        assert current_claim(record.store) is None
        saved.append(checkpoint["step"])
    last = Torchrun(folder, recipe)
    assert last.process.wait(180.0) == 0, last.output.read_text()
    started_at = [event["step"] for event in record.events() if event["kind"] == "started"]
    assert started_at == saved
    assert same_state(state(record, STEPS), state(undisturbed, STEPS))
