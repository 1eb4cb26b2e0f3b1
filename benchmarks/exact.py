"""What exact mode costs: the step of determinism=exact beside that of determinism=cluster, and its losses beside those.

    python benchmarks/exact.py [--steps 40] [--out benchmarks/results]
    python benchmarks/exact.py --curve    # 500 steps of a recipe in both modes, three seeds each

Both engines live in one process (one worker, one thread) and take turns, step by step; the ratio is the median of
those of neighbouring steps. Time is the processor's: a lone thread waits for nobody, and others on the machine do not
count.
Models and batches are those of a recipe's size, rows are made up. The losses are those of
language_modeling-gpt-tiny: means of the last 50 steps, and the validation loss at the end.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported

import numpy as np  # noqa: E402
import torch  # noqa: E402

from benchmarks.provenance import commit  # noqa: E402
from configs.plugins import find_plugin  # noqa: E402
from configs.schema import RunConfig  # noqa: E402
from data_pipelines.loader import MicroBatch  # noqa: E402
from tests.configs.minimal import minimal  # noqa: E402
from trainer.bound import BoundModel, BoundTask  # noqa: E402
from trainer.example_batch import batch_of, example_rows  # noqa: E402

WARM_UP = 4  # steps that do not count
RECIPE, CURVE_STEPS, SEEDS = "language_modeling-gpt-tiny", 500, (1337, 1338, 1339)
LANGUAGE = {"seq_len": 256, "tokenizer": {"name": "bpe", "vocab_size": 4096}}


@dataclass(frozen=True)
class Case:
    """A model and its batch; the optimizer is AdamW."""

    name: str
    task: tuple[str, dict[str, Any]]
    model: tuple[str, dict[str, Any]]
    examples: int
    micro_batch: int


CASES = (
    Case(
        "GPT, 4.2 M parameters, 8 x 256 tokens",
        ("language_modeling", LANGUAGE),
        ("gpt", {"num_layers": 4, "hidden_size": 256, "num_heads": 8}),
        8,
        4,
    ),
    Case(
        "LSTM, 2.1 M parameters, 8 x 256 tokens",
        ("language_modeling", LANGUAGE),
        ("lstm", {"num_layers": 2, "hidden_size": 256}),
        8,
        4,
    ),
    Case(
        "CNN, 0.7 M parameters, 64 images of 32 x 32",
        ("image_classification", {"num_classes": 10, "image_size": 32}),
        ("cnn", {"blocks": (2, 2, 2), "width": 32}),
        64,
        32,
    ),
)


def main() -> int:
    """Measure all cases and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 3])
    parser.add_argument("--curve", action="store_true")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    arguments = parser.parse_args()
    if arguments.curve:
        curves(arguments.out)
        return 0

    from trainer.distributed import init_world

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        world = init_world(0, 1, 0, f"file://{folder}/meet", use_gpu=False, threads=1, timeout_s=60)
        rows = [measured(case, stage, world, arguments.steps) for case in CASES for stage in arguments.stages]
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "exact.json").write_text(json.dumps(rows, indent=1) + "\n")
    (arguments.out / "exact.md").write_text(page(rows))
    return 0


def measured(case: Case, stage: int, world: Any, steps: int) -> dict[str, Any]:
    """Seconds of the processor a step of both modes, in turns."""
    from trainer.engine import Engine

    task_module, model_module = find_plugin("trainer.tasks", case.task[0]), find_plugin("trainer.models", case.model[0])
    task = BoundTask(task_module, task_module.Config.model_validate(case.task[1]))
    model = BoundModel(model_module, model_module.Config(**case.model[1]), *task.io())
    lines = example_rows(task, case.examples)
    batches = [
        MicroBatch(number, False, np.arange(case.micro_batch), batch_of(task, lines[start : start + case.micro_batch]))
        for number, start in enumerate(range(0, case.examples, case.micro_batch))
    ]
    engines, seconds = {}, dict[str, list[float]]()
    for mode in ("cluster", "exact"):
        config = RunConfig.model_validate(
            minimal(
                batch={"global_batch_size": case.examples, "micro_batch_size": case.micro_batch},
                zero={"stage": stage},
                determinism=mode,
                optimizer={"name": "adamw", "lr": 1e-3, "weight_decay": 0.1},
            )
        )
        engines[mode], seconds[mode] = Engine(model, config, world), []
    for step in range(-WARM_UP, steps):
        for mode in ("cluster", "exact") if step % 2 else ("exact", "cluster"):
            started = time.process_time()
            engines[mode].train_step(task, batches, lr=1e-3, step=step + WARM_UP)
            if step >= 0:
                seconds[mode].append(time.process_time() - started)
    exact = engines["exact"].exact
    assert exact is not None
    ratios = [ours / theirs for ours, theirs in zip(seconds["exact"], seconds["cluster"], strict=True)]
    low, ratio, high = statistics.quantiles(ratios, n=4)
    row = {"case": case.name, "stage": stage, "seconds": seconds, "ratio": ratio, "quartiles": [low, high]}
    row |= {"medians": {mode: statistics.median(found) for mode, found in seconds.items()}}
    row |= {"fastest": min(seconds["exact"]) / min(seconds["cluster"])}
    row |= {"repeats": exact.repeats, "steps": steps + WARM_UP}
    print(f"{case.name}, stage {stage}: {ratio:.3f} ({low:.3f} to {high:.3f})", flush=True)
    return row


def curves(out: Path) -> None:
    """Train in both modes and write the losses beside each other."""
    from trainer.record import RunRecord

    found: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for seed in SEEDS:
            for mode in ("cluster", "exact"):
                settings = {"seed": seed, "steps": CURVE_STEPS, "determinism": mode, "store": f"{folder}/runs"}
                settings |= {"name": f"{mode}-{seed}", "tracking.mlflow": "null", "resources.workers": 1}
                command = [
                    sys.executable,
                    "-m",
                    "trainer",
                    RECIPE,
                    *(f"{key}={value}" for key, value in settings.items()),
                ]
                subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
                rows = RunRecord.open(f"{folder}/runs", f"{mode}-{seed}").stitched()
                losses = [row["loss"] for row in rows if "loss" in row]
                values = {"loss": statistics.mean(losses[-50:]), "validation/loss": rows[-1]["validation/loss"]}
                for name, value in values.items():
                    found.setdefault(name, {}).setdefault(mode, []).append(value)
                print(seed, mode, values, flush=True)
    lines = [
        "# The losses of exact mode",
        "",
        f"`python benchmarks/exact.py --curve`, {datetime.date.today()}, commit {commit()}:",
        f"`{RECIPE}`, {CURVE_STEPS} steps, seeds {', '.join(map(str, SEEDS))}, one worker on a CPU.",
        "",
        "| | ordinary, by seed | exact, by seed | most between seeds | most between modes | within the seeds |",
        "|---|---|---|---|---|---|",
    ]
    for name, values in found.items():
        plain, exact = values["cluster"], values["exact"]
        between = max(abs(ours - theirs) for ours, theirs in zip(exact, plain, strict=True))
        shown = [", ".join(f"{value:.4f}" for value in each) for each in (plain, exact)]
        spread = max(plain) - min(plain)
        middle = min(plain) <= statistics.median(exact) <= max(plain)
        lines.append(
            f"| {name} | {shown[0]} | {shown[1]} | {spread:.4f} | {between:.4f} | {'yes' if middle else 'no'} |"
        )
    (out / "exact_curve.md").write_text("\n".join([*lines, ""]))


def page(rows: list[dict[str, Any]]) -> str:
    """benchmarks/results/exact.md."""
    return "\n".join(
        [
            "# What exact mode costs",
            "",
            f"`{' '.join(['python benchmarks/exact.py', *sys.argv[1:]])}`, {datetime.date.today()},",
            f"commit {commit()}, one worker, one thread of a CPU, fp32, AdamW;",
            "medians of the processor time of the steps of both, in turns; the ratio is the median of pairs of",
            "neighbours (quartiles), and that of the fastest steps of both.",
            "",
            "| | stage | cluster, ms a step | exact, ms a step | ratio | of the fastest | steps repeated |",
            "|---|---|---|---|---|---|---|",
            *(
                f"| {row['case']} | {row['stage']} | {1e3 * row['medians']['cluster']:.1f} | "
                f"{1e3 * row['medians']['exact']:.1f} | "
                f"{row['ratio']:.3f} ({row['quartiles'][0]:.3f} to {row['quartiles'][1]:.3f}) | {row['fastest']:.3f} | "
                f"{row['repeats']} of {row['steps']} |"
                for row in rows
            ),
            "",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
