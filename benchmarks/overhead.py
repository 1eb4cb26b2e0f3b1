"""What the whole product costs a step: Shardyard (Ray, Arrow, checkpoints, MLflow on) against a bare torchrun script.

Both train the same model file with the same loss, ZeRO stage, precision, kernels and threads. They run in turn,
A B B A ..., each as a process of its own; a run's figure is steps a second over its steady part (wall time from the
end of step WARMUP to the end of the last, so checkpoints, records and everything else that happens meanwhile count),
and the table shows medians over the repeats.

    python benchmarks/overhead.py [--repeats 5] [--cases 20 100 500] [--out benchmarks/results]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks.provenance import provenance  # noqa: E402

WARMUP = 10
WORKERS = 2

# Target milliseconds a step on two slow cores: model and batch, and how many steps a run has.
CASES: dict[int, dict[str, Any]] = {
    20: {"hidden_size": 64, "num_layers": 2, "seq_len": 128, "batch": 2, "steps": 800},
    100: {"hidden_size": 192, "num_layers": 4, "seq_len": 160, "batch": 4, "steps": 200},
    500: {"hidden_size": 192, "num_layers": 4, "seq_len": 256, "batch": 12, "steps": 60},
}


def recipe(case: int, name: str, store: Path) -> dict[str, Any]:
    shape = CASES[case]
    return {
        "name": name,
        "steps": shape["steps"],
        "store": str(store),
        "task": {
            "name": "language_modeling",
            "seq_len": shape["seq_len"],
            "tokenizer": {"name": "bpe", "vocab_size": 1024},
        },
        "model": {
            "name": "gpt",
            "num_layers": shape["num_layers"],
            "hidden_size": shape["hidden_size"],
            "num_heads": shape["hidden_size"] // 32,
        },
        "data": {"name": "python_stdlib"},
        "batch": {"global_batch_size": shape["batch"], "micro_batch_size": shape["batch"] // WORKERS},
        "optimizer": {"lr": 1e-3},
        "zero": {"stage": 1},
        "resources": {"workers": WORKERS, "threads": 1},
        "evaluation": {"examples": 1, "sample_tokens": 0},
        "checkpoint": {"every": shape["steps"] // 2},  # one in the middle; the last is after the steady part
        "tracking": {"every": 1, "mlflow": "auto"},
    }


def steps_per_s(ended: list[float]) -> float:
    return (len(ended) - 1 - WARMUP) / (ended[-1] - ended[WARMUP])


def run_bare(case: int, index: int, folder: Path) -> float:
    path, out = folder / f"bare-{case}-{index}.json", folder / f"bare-{case}-{index}-out.json"
    path.write_text(json.dumps(recipe(case, "bare", folder / "runs")))  # JSON is YAML
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={WORKERS}"]
    call([*torchrun, str(ROOT / "benchmarks/bare_deepspeed.py"), str(path), str(out)], folder)
    return steps_per_s(json.loads(out.read_text()))


def run_product(case: int, index: int, folder: Path) -> float:
    name = f"product-{case}-{index}"
    path = folder / f"{name}.json"
    path.write_text(json.dumps(recipe(case, name, folder / "runs")))
    call([sys.executable, "-m", "cluster.cli", "train", str(path), "--json"], folder)
    rows = [
        json.loads(line)
        for segment in sorted((folder / "runs" / name / "metrics").iterdir())
        for line in segment.read_text().splitlines()
    ]
    return steps_per_s([row["time"] for row in rows if "loss" in row["values"]])


def call(command: list[str], folder: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if ended.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{ended.stderr[-4000:]}")


def measure(case: int, repeats: int, folder: Path) -> dict[str, Any]:
    bare: list[float] = []
    product: list[float] = []
    for index in range(repeats):
        order = [(run_bare, bare), (run_product, product)]
        for run, results in order if index % 2 == 0 else order[::-1]:
            results.append(run(case, index, folder))
        print(f"{case} ms, {index + 1}/{repeats}: bare {bare[-1]:.3f}, Shardyard {product[-1]:.3f} steps/s", flush=True)
    ratios = [ours / theirs for ours, theirs in zip(product, bare, strict=True)]
    return {
        "case_ms": case,
        "bare_steps_per_s": bare,
        "product_steps_per_s": product,
        "step_ms": 1000 / statistics.median(bare),
        "ratio_of_medians": statistics.median(product) / statistics.median(bare),
        "median_of_pair_ratios": statistics.median(ratios),
        "pair_ratios": ratios,
    }


def table(results: list[dict[str, Any]]) -> str:
    lines = [
        "# Cost of the whole product a step",
        "",
        f"{provenance()}, "
        f"{WORKERS} workers of 1 thread, ZeRO-1, fp32. "
        "Steps a second over the steady part of a run, medians of interleaved runs; `python benchmarks/overhead.py`.",
        "",
        "| step | bare torchrun + DeepSpeed | Shardyard | Shardyard / bare | pair by pair: median (min-max) |",
        "|---|---|---|---|---|",
    ]
    for row in results:
        ratios = row["pair_ratios"]
        lines.append(
            f"| {row['step_ms']:.0f} ms | {statistics.median(row['bare_steps_per_s']):.2f} steps/s "
            f"| {statistics.median(row['product_steps_per_s']):.2f} steps/s | {row['ratio_of_medians']:.3f} "
            f"| {row['median_of_pair_ratios']:.3f} ({min(ratios):.3f}-{max(ratios):.3f}) |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cases", type=int, nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="overhead-") as folder:
        results = [measure(case, arguments.repeats, Path(folder)) for case in arguments.cases]
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "overhead.json").write_text(json.dumps(results, indent=1) + "\n")
    (arguments.out / "overhead.md").write_text(table(results))
    print(table(results))


if __name__ == "__main__":
    main()
