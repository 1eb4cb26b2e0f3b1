"""Runs that nobody trained, for the dashboard to show: written as a run writes itself, with times of their own."""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np

import trainer.record
from cluster.sweep_folder import Spec, SweepFolder
from configs.load import load
from data_pipelines.storage import Store
from trainer.pictures import encode_png
from trainer.record import RunRecord, attempt_folder

RECIPE = "language_modeling-gpt-tiny"
STARTED_AT = 1_790_000_000.0
STEP_S = 0.5
TAGS = "<script>document.title = 'broken out'</script><img src=x onerror=document.title='broken-out'>"


@contextmanager
def clock(now: float) -> Iterator[SimpleNamespace]:
    """What a record takes for the time; set `now` to let it pass."""
    told = SimpleNamespace(now=now, monotonic=time.monotonic)
    told.time = lambda: told.now
    with mock.patch.object(trainer.record, "time", told):
        yield told


def create(store: Path, name: str, *overrides: str) -> RunRecord:
    """A run that has only been created."""
    given = [f"name={name}", f"store={store}", "resources.workers=2", "tracking.mlflow=null", *overrides]
    return RunRecord.create(Store(store), load(RECIPE, given))


def write_run(
    store: Path,
    name: str = "restarted",
    *,
    steps: int = 2000,
    fails_at: int = 1100,
    saved_at: int = 1000,
    spike_at: int = 1234,
    spike: float = 40.0,
    ended: bool = True,
    overrides: tuple[str, ...] = (),
) -> RunRecord:
    """A run of two attempts: rank 1 is killed in the first, the second goes on from its checkpoint.

    Its loss has one value that stands out, at `spike_at`, and its grad_norm is not finite at a tenth of the steps'
    number. It has text and pictures, logs, and values that look like HTML.
    """
    with clock(STARTED_AT) as now:
        record = create(store, name, f"steps={steps}", f"tracking.experiment={json.dumps(TAGS)}", *overrides)
        record.event("submitted", target="local")
        for attempt, (start, stop) in enumerate([(0, fails_at), (saved_at, steps)], start=1):
            record.next_attempt()
            if attempt > 1:
                record.event("restarted", step=saved_at, reason="a worker was killed: once more, 1 of 3")
            record.event("queued")
            now.now += 7.0
            record.event("placed", workers=[{"node": "n1", "pid": 10}, {"node": "n2", "pid": 11}], placed_s=7.0)
            now.now += 5.0
            record.event("started", step=start, world_size=2, parameters=1_234_567, data_fingerprint="0" * 32)
            for step in range(start + 1, stop + 1):
                now.now += STEP_S
                record.metrics(step, metrics(step, steps, attempt))
                if step == spike_at:
                    record.metrics(step, {"loss": spike})
                if step % (steps // 20) == 0:
                    record.metrics(step, {"validation/loss": loss_at(step, steps) + 0.2})
                if step % (steps // 8) == 0:
                    write_checkpoint(record, step)
                    record.sample(step, f"After {step} steps. {TAGS}\nA second line of it.")
                    record.picture(step, "digits", encode_png(pixels(step)))
            write_logs(record, attempt, failed=attempt == 1)
            if attempt == 1:
                error = f"RuntimeError: CUDA error {TAGS}"
                record.event(
                    "failed", rank=1, node="n2", cause="raised", step=stop, error=error, final=False,
                    summary=f"Rank 1 on n2 failed after step {stop}: {error}",
                    log=record.store.path(f"{attempt_folder(1)}/rank-00001.log"), decision="once more, 1 of 3",
                )  # fmt: skip
        if ended:
            record.event("finished", step=steps)
        record.close()
        return record


def loss_at(step: int, steps: int) -> float:
    """A curve like that of a language model."""
    return 1.8 + 4.0 * math.exp(-8 * step / steps) + 0.05 * random.Random(step).gauss(0, 1)


def metrics(step: int, steps: int, attempt: int = 1) -> dict[str, float]:
    """Of one step."""
    rng = random.Random(step + 1_000_000 * attempt)
    share = 0.7 + rng.gauss(0, 0.01)
    return {
        "loss": loss_at(step, steps) + 0.02 * attempt,
        "lr": 3e-4 * math.cos(math.pi * step / steps / 2),
        "grad_norm": math.nan if step % (steps // 10) == 0 else 1.0 + rng.random(),
        "step_s": STEP_S + 0.01 * rng.random(),
        "data_wait_s": 0.002 * rng.random() + (0.2 if rng.random() < 0.01 else 0.0),
        "forward_s": 0.15 + 0.01 * rng.random(),
        "backward_s": 0.25 + 0.01 * rng.random(),
        "optimizer_s": 0.05 + 0.005 * rng.random(),
        "tokens_per_s": 65536 / STEP_S + 1000 * rng.random(),
        "examples_per_s": 64 / STEP_S + rng.random(),
        "mfu": 0.41 + 0.01 * rng.random(),
        "items": 65536.0,
        "examples": 64.0 * step,
        "skipped": 0.0,
        "memory_bytes": 3.1e9 + 1e8 * rng.random(),
        "memory_peak_bytes": 3.4e9,
        "data/0-web/planned_share": 0.7,
        "data/0-web/share": share,
        "data/1-code/planned_share": 0.3,
        "data/1-code/share": 1 - share,
        f"odd/{TAGS}": rng.random(),
    }


def write_sweep(store: Path) -> None:
    """One of four trials, `lr`: two have ended well, one has no finite value, one has failed."""
    base = load(RECIPE, [f"store={store}", "name=base", "steps=100", "tracking.mlflow=null"])
    trials = [{"optimizer.lr": lr, "model.num_layers": layers} for lr in (1e-4, 1e-3) for layers in (2, 4)]
    spec = Spec("grid", ["optimizer.lr=1e-4,1e-3", "model.num_layers=2,4"], "validation/loss", "min", 0, trials)
    folder = SweepFolder.create(Store(store), "lr", spec, base)
    for number, value in ((1, 3.0), (2, 2.0), (3, math.nan)):
        record = folder.create_run(folder.trial(number))
        record.next_attempt()
        record.metrics(1, {"validation/loss": value})
        record.event("finished", step=1)
        record.close()
    folder.fail_trial(4, TAGS)


def write_checkpoint(record: RunRecord, step: int) -> None:
    """A checkpoint's event, and the file that makes its folder one."""
    record.store.write_atomic(f"checkpoints/step-{step:08d}/manifest.json", "{}")
    path = record.store.path(f"checkpoints/step-{step:08d}")
    record.event("checkpoint", step=step, path=path, size_bytes=14_800_000, stall_s=0.02, write_s=0.4)


def write_logs(record: RunRecord, attempt: int, *, failed: bool = False, lines: int = 3000) -> None:
    """Of both ranks; rank 1 of a failed attempt ends with a traceback."""
    for rank in range(2):
        text = "".join(f"rank {rank} line {line} of attempt {attempt}\n" for line in range(lines))
        if failed and rank == 1:
            text += f'{TAGS}\nTraceback (most recent call last):\n  File "x.py", line 3, in step\nRuntimeError: gone\n'
        record.store.write_atomic(f"{attempt_folder(attempt)}/rank-{rank:05d}.log", text)


def pixels(step: int) -> Any:
    """A picture that differs by step."""
    across, down = np.meshgrid(np.arange(160), np.arange(96))
    return ((np.sin(across / 9 + step) + np.cos(down / 7)) * 60 + 128).astype(np.uint8)
