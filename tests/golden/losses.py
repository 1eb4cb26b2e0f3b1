"""Write tests/golden/*.txt anew, after a change that is meant to change the maths:

    python -m tests.golden.losses

The losses of every model of the zoo over a few steps, one worker, without ZeRO in fp32 and with it in bf16.
"""

from __future__ import annotations

import gc
import os
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

from tests.distributed.zoo import TASKS, Cell, engine_losses
from tests.pool import run_workers
from trainer.distributed import World

FOLDER = Path(__file__).parent
CELLS = {"fp32": 0, "bf16": 1}  # precision and ZeRO stage


def all_models(world: World) -> dict[str, dict[str, list[float]]]:
    """By model and precision."""
    gc.freeze()  # DeepSpeed collects garbage again and again
    return {
        model: {
            precision: engine_losses(world, Cell(model, stage, precision, 1))[0] for precision, stage in CELLS.items()
        }
        for model in TASKS
    }


def read(model: str) -> dict[str, list[float]]:
    """Those written down."""
    header, *lines = (FOLDER / f"{model}.txt").read_text().splitlines()
    columns = zip(*(map(float, line.split()[1:]) for line in lines), strict=True)
    return dict(zip(header.split()[1:], map(list, columns), strict=True))


def main() -> None:
    for model, losses in run_workers(all_models, 1)[0].items():
        lines = ["step " + " ".join(f"{precision:>9}" for precision in losses)]
        for step, row in enumerate(zip(*losses.values(), strict=True), start=1):
            lines.append(f"{step:4} " + " ".join(f"{loss:9.6f}" for loss in row))
        (FOLDER / f"{model}.txt").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
