"""Sweeps that only stand in a store, for the tests of sweeps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cluster.sweep_folder import Spec, SweepFolder
from configs.load import Resolved
from data_pipelines.storage import Store
from trainer.record import RunRecord
from trainer.validate import load_recipe

ROOT = Path(__file__).resolve().parents[2]


def recipe(folder: Path, **changes: Any) -> Path:
    """Digits and a small network: a step takes milliseconds."""
    values = {
        "name": "d",
        "seed": 1,
        "steps": 60,
        "store": str(folder / "runs"),
        "task": {"name": "image_classification", "num_classes": 10, "image_size": 8, "channels": 1},
        "model": {"name": "mlp", "num_layers": 2, "hidden_size": 32, "dropout": 0.1},
        "data": {"name": "digits", "validation_fraction": 0.2},
        "batch": {"global_batch_size": 16, "micro_batch_size": 16},
        "optimizer": {"lr": 1e-3},
        "evaluation": {"every": 20, "examples": 64},
        "checkpoint": {"every": 20, "keep": None},
        "tracking": {"every": 20, "mlflow": None},
    } | changes
    path = folder / "run.yaml"
    path.write_text(json.dumps(values, indent=1))
    return path


def base(folder: Path, **changes: Any) -> Resolved:
    return load_recipe(recipe(folder, **changes))


def spec(algorithm: str = "random", *rates: float) -> Spec:
    trials = [{"optimizer.lr": rate} for rate in rates or (1e-3, 1e-2)]
    return Spec(algorithm, ["optimizer.lr=log:1e-6:1e-1"], "validation/loss", "min", 0, trials)


def made(folder: Path, algorithm: str = "random", *rates: float, **changes: Any) -> SweepFolder:
    sweep = SweepFolder.create(Store(str(folder / "runs")), "s", spec(algorithm, *rates), base(folder, **changes))
    for trial in sweep.trials():
        sweep.create_run(trial)
    return sweep


def evaluated(sweep: SweepFolder, run: str, losses: dict[int, float], *, saved: bool = True) -> None:
    """A run's record as training leaves it, without weights."""
    record = RunRecord.open(sweep.root.uri, run)
    record.next_attempt()
    for step, loss in losses.items():
        record.metrics(step, {"validation/loss": loss})
        if saved:
            record.store.write_atomic(f"checkpoints/step-{step:08d}/manifest.json", "{}")
    record.close()
