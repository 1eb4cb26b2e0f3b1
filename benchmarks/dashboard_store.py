"""A store of finished runs, made in seconds, to measure the dashboard with.

    python benchmarks/dashboard_store.py FOLDER [--runs 100] [--metrics 100] [--steps 10000]

Its rows are as trainer/record_rows.py writes them, of noise around a falling loss. All runs have the same rows, and
one loss that stands out, `SPIKE` times what is around it, after two thirds of the steps.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from configs.load import load  # noqa: E402
from data_pipelines.storage import Store  # noqa: E402
from trainer.columns import Columns  # noqa: E402
from trainer.record import RunRecord  # noqa: E402

RECIPE = "language_modeling-gpt-tiny"
SPIKE = 5.0
STEP_S = 0.1
_FIRST = ("loss", "step_s", "tokens_per_s", "examples_per_s", "lr", "grad_norm")
_BLOCK = 1000  # rows


def metric_names(metrics: int) -> list[str]:
    """As training names them: what every run has, then something of each layer."""
    return [*_FIRST, *(f"layers/{each:03d}/grad_norm" for each in range(metrics))][:metrics]


def spike_step(steps: int) -> int:
    """The step whose loss stands out."""
    return 2 * steps // 3


def metric_values(metrics: int, steps: int, spike: int | None = None) -> np.ndarray:
    """(steps, metrics). spike: the step whose loss stands out."""
    rng = np.random.default_rng(0)
    values = 1.0 + 0.05 * rng.standard_normal((steps, metrics))
    values[:, 0] += 4.0 * np.exp(-np.arange(steps) / (steps / 5))
    values[(spike or spike_step(steps)) - 1, 0] *= SPIKE
    if metrics > 1:
        values[:, 1] = STEP_S
    return values


def spike_of(metrics: int, steps: int, spike: int | None = None) -> float:
    """The loss that stands out, to the last bit: the first losses of a run are as large."""
    return float(metric_values(metrics, steps, spike)[(spike or spike_step(steps)) - 1, 0])


def write_run(store: Store, name: str, metrics: int, steps: int, spike: int | None = None) -> None:
    """One run that has finished; spike as in `metric_values`."""
    names = metric_names(metrics)
    record = RunRecord.create(store, load(RECIPE, [f"name={name}", f"store={store.uri}", f"steps={steps}"]))
    record.next_attempt()
    record.event("started", step=0)
    ended = time.time()
    template = '{"time":%r,"attempt":1,"step":%d,"values":{' + ",".join(f'"{name}":%r' for name in names) + "}}\n"
    segments = record.store.appender("metrics/0001-rank-00000")
    values = metric_values(metrics, steps, spike)
    for start in range(0, steps, _BLOCK):
        block = values[start : start + _BLOCK].tolist()
        lines = [
            template % (ended - (steps - step) * STEP_S, step, *row) for step, row in enumerate(block, start=start + 1)
        ]
        segments.write("".join(lines).encode())
        segments.flush()
    segments.close()
    columns = Columns(record.store, None)  # as training keeps them
    columns.update()
    columns.close()
    record.event("finished", step=steps)
    record.close()


def write_store(folder: Path, runs: int, metrics: int, steps: int) -> list[str]:
    """Runs named run-000 and so on; their names."""
    names = [f"run-{number:03d}" for number in range(runs)]
    write_run(Store(folder), names[0], metrics, steps)
    for name in names[1:]:
        shutil.copytree(folder / names[0], folder / name)
    return names


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--metrics", type=int, default=100)
    parser.add_argument("--steps", type=int, default=10_000)
    arguments = parser.parse_args(argv)
    write_store(arguments.folder, arguments.runs, arguments.metrics, arguments.steps)


if __name__ == "__main__":
    main()
