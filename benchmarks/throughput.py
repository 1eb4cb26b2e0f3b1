"""Steps a second, peak memory and time to the first step: Shardyard, whole, beside a bare PyTorch loop, transformers'
Trainer, Lightning, and Ray Train with DeepSpeed.

    python benchmarks/throughput.py [--repeats 5] [--cases gpt-4m gpt-25m lstm resnet-18] [--out benchmarks/results]

All train the same model from the same weights on the same batches, with the same loss, fused AdamW, clipping, precision
and threads, one worker. So their losses must agree, or the script ends with an error. Shardyard runs as `shardyard
train` does: Ray, Arrow, a row of metrics each step, MLflow, and a checkpoint in the middle. The others read batches
that lie in memory, and record and save nothing (benchmarks/throughput_loops.py).

They run in turn, in another order each time, each as a process of its own. Steps a second are those of the steady part
(from the end of step WARMUP to the end of the last, by the wall clock). Ratios are of runs of the same turn.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks.provenance import provenance  # noqa: E402

WARMUP = 3
BATCHES = 16
THREADS = os.cpu_count() or 1
SYSTEMS = {
    "shardyard": "Shardyard",
    "bare": "bare PyTorch",
    "hf_trainer": "HF Trainer",
    "lightning": "Lightning",
    "ray_train": "Ray Train + DeepSpeed",
}
TEXT = {"name": "python_stdlib"}


def language_model(model: dict[str, Any], seq_len: int, batch: int, steps: int) -> dict[str, Any]:
    tokenizer = {"name": "bpe", "vocab_size": 4096}
    task = {"name": "language_modeling", "seq_len": seq_len, "tokenizer": tokenizer}
    return {"task": task, "model": model, "data": TEXT, "batch": batch, "steps": steps}


CASES: dict[str, dict[str, Any]] = {
    "gpt-4m": language_model(
        {"name": "gpt", "num_layers": 4, "hidden_size": 224, "num_heads": 7}, seq_len=256, batch=4, steps=80
    ),
    "gpt-25m": language_model(
        {"name": "gpt", "num_layers": 8, "hidden_size": 480, "num_heads": 8}, seq_len=256, batch=4, steps=24
    ),
    "lstm": language_model(
        {"name": "lstm", "num_layers": 2, "hidden_size": 384}, seq_len=128, batch=8, steps=60
    ),
    "resnet-18": {
        "task": {"name": "image_classification", "num_classes": 10, "image_size": 28, "channels": 1},
        "model": {"name": "cnn", "blocks": [2, 2, 2, 2], "width": 64},
        "data": {"name": "mnist_5k", "validation_fraction": 0.2},
        "batch": 16,
        "steps": 40,
    },
}  # fmt: skip


def recipe(case: str, name: str, store: Path) -> dict[str, Any]:
    shape = CASES[case]
    return {
        "name": name,
        "steps": shape["steps"],
        "store": str(store),
        "task": shape["task"],
        "model": shape["model"],
        "data": shape["data"],
        "batch": {"global_batch_size": shape["batch"], "micro_batch_size": shape["batch"]},
        "optimizer": {"lr": 1e-3},
        "schedule": {"name": "constant"},
        "zero": {"stage": 0},
        "resources": {"workers": 1, "threads": THREADS},
        "evaluation": {"examples": 1, "sample_tokens": 0},
        "checkpoint": {"every": shape["steps"] // 2},  # one in the middle; the last is after the steady part
        "tracking": {"every": 1, "mlflow": "auto"},
    }


def prepare(case: str, folder: Path) -> Path:
    """Build the data, and write the first batches as Shardyard's loader gives them. The recipe's path."""
    from safetensors.torch import save_file
    from torch import device

    from configs.load import load
    from trainer.distributed import World
    from trainer.run_data import Position, RunData, open_datasets
    from trainer.validate import validate

    path = folder / f"{case}.json"
    path.write_text(json.dumps(recipe(case, "prepare", folder / "runs")))  # JSON is YAML
    plan = validate(load(str(path)))
    loader = RunData.of(open_datasets(plan), plan).loader(plan.config, World(0, 1, 0, device("cpu")), Position())
    batches = {}
    for step in range(BATCHES):
        (micro_batch,) = loader.step(step)
        batches |= {f"{step}/{name}": tensor.clone() for name, tensor in micro_batch.tensors.items()}
    loader.close()
    save_file(batches, folder / f"{case}.safetensors")
    return path


def run_product(case: str, folder: Path, name: str) -> dict[str, Any]:
    from trainer.record import RunRecord

    path = folder / f"{name}.json"
    path.write_text(json.dumps(recipe(case, name, folder / "runs")))
    started = time.time()
    call([sys.executable, "-m", "cluster.cli", "train", str(path), "--json"], folder)
    record = RunRecord.open(str(folder / "runs"), name)
    rows = [row for row in record.metrics_table() if "loss" in row]
    return {
        "started": started,
        "ended": [row["time"] for row in rows],
        "losses": [row["loss"] for row in rows],
        "peak_bytes": max(event["peak_bytes"] for event in record.events() if event["kind"] == "memory"),
    }


def run_peer(system: str, case: str, folder: Path, name: str) -> dict[str, Any]:
    out = folder / f"{name}.out.json"
    script = str(ROOT / "benchmarks/throughput_loops.py")
    started = time.time()
    call(
        [sys.executable, script, system, str(folder / f"{case}.json"), str(folder / f"{case}.safetensors"), str(out)],
        folder,
    )
    return json.loads(out.read_text()) | {"started": started}


def call(command: list[str], folder: Path) -> None:
    scratch = folder / "scratch"
    scratch.mkdir(exist_ok=True)
    environment = {
        **os.environ, "OMP_NUM_THREADS": str(THREADS), "PYTHONPATH": str(ROOT), "SCRATCH": str(scratch),
        "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    ended = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if ended.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{ended.stderr[-4000:]}")


def figures(run: dict[str, Any]) -> dict[str, float]:
    ended = run["ended"]
    return {
        "steps_per_s": (len(ended) - 1 - WARMUP) / (ended[-1] - ended[WARMUP]),
        "peak_bytes": run["peak_bytes"],
        "first_step_s": ended[0] - run["started"],
    }


def measure(case: str, repeats: int, systems: list[str], folder: Path) -> dict[str, Any]:
    prepare(case, folder)
    found: dict[str, list[dict[str, float]]] = {system: [] for system in systems}
    for turn in range(repeats):
        losses: dict[str, list[float]] = {}
        first = turn % len(systems)
        for system in systems[first:] + systems[:first]:
            name = f"{case}-{system}-{turn}".replace("_", "-")
            run = run_product(case, folder, name) if system == "shardyard" else run_peer(system, case, folder, name)
            losses[system] = run["losses"]
            found[system].append(figures(run))
        agree(case, losses)
        speeds = ", ".join(f"{system} {found[system][-1]['steps_per_s']:.3f}" for system in systems)
        print(f"{case}, {turn + 1}/{repeats}: {speeds} steps/s", flush=True)
    return {"case": case, "runs": found}


def agree(case: str, losses: dict[str, list[float]]) -> None:
    """Whether all trained the same: the same losses while the batches are the same."""
    ours = losses["shardyard"][:BATCHES]
    for system, theirs in losses.items():
        far = max(abs(a - b) for a, b in zip(ours, theirs[:BATCHES], strict=True))
        if far > 2e-3:
            sys.exit(f"{case}: losses of {system} differ by {far:.2g} from Shardyard's: not the same training")


def table(results: list[dict[str, Any]]) -> str:
    lines = [
        "# Throughput beside other training systems, on a CPU",
        "",
        f"{provenance()}, one "
        f"worker of {THREADS} threads, fp32. `python benchmarks/throughput.py`. Medians; in brackets the least and the "
        "most. The same model, weights, batches, loss and optimizer; their losses agree. Shardyard with Ray, Arrow, a "
        "row of metrics each step, MLflow and a checkpoint in the middle; the others record and save nothing.",
    ]
    for result in results:
        runs = result["runs"]
        lines += [
            "",
            f"## {result['case']}",
            "",
            "| system | steps/s | Shardyard's share of it, turn by turn | peak memory | first step after |",
            "|---|---|---|---|---|",
        ]
        ours = [run["steps_per_s"] for run in runs["shardyard"]]
        for system, found in runs.items():
            speeds = [run["steps_per_s"] for run in found]
            ratios = [mine / theirs for mine, theirs in zip(ours, speeds, strict=True)]
            lines.append(
                f"| {SYSTEMS[system]} | {spread(speeds)} | {'' if system == 'shardyard' else spread(ratios)} "
                f"| {statistics.median(run['peak_bytes'] for run in found) / 1e6:,.0f} MB "
                f"| {statistics.median(run['first_step_s'] for run in found):.1f} s |"
            )
    return "\n".join(lines) + "\n"


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.3f} ({min(values):.3f}-{max(values):.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--systems", nargs="+", choices=list(SYSTEMS), default=list(SYSTEMS))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="throughput-") as folder:
        results = [measure(case, arguments.repeats, arguments.systems, Path(folder)) for case in arguments.cases]
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "throughput.json").write_text(json.dumps(results, indent=1) + "\n")
    (arguments.out / "throughput.md").write_text(table(results))
    print(table(results))


if __name__ == "__main__":
    main()
