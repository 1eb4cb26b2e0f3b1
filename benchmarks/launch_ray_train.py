"""The same training as benchmarks/bare_deepspeed.py, launched by Ray Train v2 as its documentation shows.

python benchmarks/launch_ray_train.py RECIPE.yaml OUT.json FOLDER [ADDRESS]
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

os.environ["RAY_TRAIN_V2_ENABLED"] = "1"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

import ray
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

WORKERS = 2


def worker(settings: dict[str, Any]) -> None:
    sys.path.insert(0, settings["root"])
    from benchmarks.bare_deepspeed import main

    main(settings["recipe"], settings["out"])


def launch(recipe: str, out: str, folder: str, address: str | None = None) -> None:
    if address is None:
        ray.init(num_cpus=WORKERS + 1, include_dashboard=False, log_to_driver=False)
    else:
        ray.init(address=address, log_to_driver=False)
    TorchTrainer(
        worker,
        train_loop_config={"recipe": recipe, "out": out, "root": str(Path(__file__).resolve().parents[1])},
        scaling_config=ScalingConfig(num_workers=WORKERS),
        run_config=RunConfig(storage_path=folder),
    ).fit()
    ray.shutdown()


if __name__ == "__main__":
    launch(*sys.argv[1:])
