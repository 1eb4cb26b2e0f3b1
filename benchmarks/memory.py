"""A worker's memory as it is predicted before a run, beside what the worker measures: benchmarks/results/memory.md.

    python benchmarks/memory.py [--only TEXT] [--out benchmarks/results]

Each configuration is trained for a few steps by `python -m trainer`, one process a worker, with a checkpoint in the
middle; each worker says how much memory its process had at most (VmHWM). Beside it stands what trainer/memory.py
predicts, and what DeepSpeed's own estimators say. What is there already is not measured again unless --only names it.
A configuration of which the prediction is off by more than a tenth makes the script fail.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import io
import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.provenance import commit  # noqa: E402

BAR = 0.1
STEPS = 3
WORK = ROOT / "runs" / "memory"
FEW = ["schedule.warmup_steps=0", "evaluation.every=null", "evaluation.examples=8", "tracking.mlflow=null"]
FEW += [f"steps={STEPS}", "checkpoint.every=2", "evaluation.sample_tokens=0"]
TEXT = ["data.name=text", f"data.paths=[{ROOT / 'docs'}]", "data.suffixes=[.md]", "data.validation_fraction=0.1"]
GPT = [*TEXT, "model.num_layers=6", "model.hidden_size=384", "model.num_heads=6"]
LONG = ["batch.micro_batch_size=8", "batch.global_batch_size=8", "task.seq_len=512"]
EVEN = ["batch.micro_batch_size=128", "batch.global_batch_size=256"]  # texts are cut to one length by seq_len
MODELS: dict[str, tuple[str, list[str]]] = {
    "gpt": ("language_modeling-gpt-tiny", GPT),
    "gpt, long": (
        "language_modeling-gpt-tiny",
        [*TEXT, "model.num_layers=4", "model.hidden_size=320", "model.num_heads=5", *LONG],
    ),
    "cnn": (
        "image_classification-cnn-digits",
        ["model.width=64", "model.blocks=[2,2,2,2]", "batch.global_batch_size=64", "batch.micro_batch_size=32"],
    ),
    "cnn, wide batch": (
        "image_classification-cnn-digits",
        ["model.width=64", "model.blocks=[2,2]", "batch.global_batch_size=512", "batch.micro_batch_size=512"],
    ),
    "lstm": (
        "sentiment_analysis-lstm-small",
        ["model.hidden_size=640", "model.embedding_size=512", "model.num_layers=2", "task.seq_len=8", *EVEN],
    ),
}


@dataclass(frozen=True)
class Case:
    """One configuration."""

    model: str
    stage: int
    precision: str = "fp32"
    workers: int = 1
    offload: bool = False
    recompute: bool = False

    def __str__(self) -> str:
        extra = ", offload" * self.offload + ", recompute" * self.recompute
        return f"{self.model}: ZeRO-{self.stage}, {self.precision}, {self.workers} worker(s){extra}"

    def overrides(self) -> list[str]:
        """What is changed of the model's recipe."""
        settings = [f"zero.stage={self.stage}", f"precision={self.precision}", f"resources.workers={self.workers}"]
        settings += ["zero.offload_optimizer=true"] * self.offload
        settings += ["model.activation_checkpointing=true"] * self.recompute
        return [*MODELS[self.model][1], *FEW, *settings]


def cases() -> list[Case]:
    """Everything that is measured."""
    found = [Case("gpt", stage) for stage in range(4)]
    found += [Case("gpt", stage, workers=2) for stage in range(4)]
    found += [Case("gpt", stage, offload=True) for stage in (1, 2, 3)]
    found += [Case("gpt", stage, "bf16", workers) for workers, stage in itertools.product((1, 2), (1, 2, 3))]
    found += [Case("gpt", stage, "bf16", offload=True) for stage in (1, 2, 3)]
    found += [Case("gpt", stage, "bf16", 2, offload=True) for stage in (2, 3)]
    found += [Case("gpt, long", stage, recompute=recompute) for stage in (0, 3) for recompute in (False, True)]
    found += [Case("gpt, long", 1, "bf16", recompute=recompute) for recompute in (False, True)]
    found += [Case("cnn", stage) for stage in range(4)]
    found += [Case("cnn", 2, "bf16"), Case("cnn", 2, workers=2), Case("cnn", 3, workers=2), Case("cnn, wide batch", 1)]
    found += [Case("lstm", stage) for stage in range(4)]
    return [*found, Case("lstm", 1, "bf16"), Case("lstm", 3, workers=2), Case("lstm", 2, offload=True)]


def main() -> int:
    """Measure what is missing and write the table; 1 where a prediction is off."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="measure only what has this text in its name, again where it is there")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    arguments = parser.parse_args()
    file = arguments.out / "memory.json"
    rows: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    for case in cases():
        if (arguments.only is None and str(case) not in rows) or (
            arguments.only is not None and arguments.only in str(case)
        ):
            rows[str(case)] = measured(case)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(rows, indent=1) + "\n")
        if str(case) in rows:
            rows[str(case)] |= predicted(case)
            row = rows[str(case)]
            error = row["predicted"] / row["measured"] - 1
            print(
                f"{case}: {_mib(row['measured'])} measured, {_mib(row['predicted'])} predicted, {error:+.1%}",
                flush=True,
            )
    rows = {str(case): rows[str(case)] for case in cases() if str(case) in rows}
    arguments.out.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(rows, indent=1) + "\n")
    (arguments.out / "memory.md").write_text(page(rows))
    return 1 if any(abs(row["predicted"] / row["measured"] - 1) > BAR for row in rows.values()) else 0


def measured(case: Case) -> dict[str, Any]:
    """What rank 0 says of its memory, in bytes: the most, and before it had a model."""
    from trainer.record import RunRecord

    # Text becomes tokens before, so that this is no part of what is measured.
    recipe = MODELS[case.model][0]
    run = [sys.executable, "-m", "trainer", recipe, "name=case", f"store={WORK}", *case.overrides()]
    if not _has_data(case):
        build = [sys.executable, "-m", "cluster.cli", "data", "build", recipe, "--workers", "1", f"store={WORK}"]
        subprocess.run([*build, *case.overrides()], cwd=ROOT, env=_environment(), check=True, stdout=subprocess.DEVNULL)
    shutil.rmtree(WORK / "case", ignore_errors=True)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    meet = {"WORLD_SIZE": str(case.workers), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        subprocess.Popen(
            run,
            cwd=ROOT,
            env=_environment() | meet | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(case.workers)
    ]
    outputs = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise SystemExit(f"{case} failed:\n" + "\n".join(outputs))
    events = [event for event in RunRecord.open(str(WORK), "case").events() if event["kind"] == "memory"]
    (mine,) = [event for event in events if event["rank"] == 0]
    return {"measured": mine["peak_bytes"], "base": mine["base_bytes"]}


def _has_data(case: Case) -> bool:
    from data_pipelines.build import FOLDER, dataset_name
    from trainer.validate import load_recipe, validate

    plan = validate(load_recipe(MODELS[case.model][0], case.overrides()))
    return (WORK / FOLDER / dataset_name(plan.config.data, plan.tokenizer)).exists()


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}


def predicted(case: Case) -> dict[str, Any]:
    """What trainer/memory.py and DeepSpeed say."""
    from trainer.memory import predict_memory
    from trainer.validate import load_recipe, validate

    plan = validate(load_recipe(MODELS[case.model][0], [*case.overrides(), f"store={WORK}"]))
    memory = predict_memory(plan.model, plan.task, plan.config, case.workers, on_gpu=False)
    parts = {part: size + memory.host.get(part, 0) for part, size in memory.device.items()}
    return {"predicted": memory.peak, "parts": parts, "deepspeed": deepspeed_estimate(case, plan)}


def deepspeed_estimate(case: Case, plan: Any) -> int | None:
    """The model states that DeepSpeed expects of a worker, on its device and on the host; it knows stages 1 to 3."""
    if case.stage == 0:
        return None
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
        from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs
    parameters, workers = plan.num_parameters, case.workers
    if case.stage < 3:
        host, device = estimate_zero2_model_states_mem_needs(parameters, workers, 1, case.offload, 1.0)
        return int(device + host / workers * case.offload)
    largest = _largest_layer(plan)
    host, device, _ = estimate_zero3_model_states_mem_needs(
        parameters, largest, workers, 1, case.offload, False, True, 1.0
    )
    return int(device + host / workers * case.offload)


def _largest_layer(plan: Any) -> int:
    import torch

    with torch.device("meta"):
        module = plan.model.build()
    return max(sum(p.numel() for p in each.parameters(recurse=False)) for each in module.modules())


def _mib(size: float) -> str:
    return f"{size / 2**20:,.0f} MiB"


def page(rows: dict[str, Any]) -> str:
    """benchmarks/results/memory.md."""
    errors = {name: row["predicted"] / row["measured"] - 1 for name, row in rows.items()}
    off = [name for name, error in errors.items() if abs(error) > BAR]
    lines = [
        "# Memory of a worker, predicted and measured",
        "",
        f"`python benchmarks/memory.py`, {datetime.date.today()}, commit {commit()}, on CPUs, MiB of rank 0.",
        "Measured: the most that the process had in memory (VmHWM) in",
        f"{STEPS} steps with a checkpoint in the middle, by `python -m trainer`. Predicted: by trainer/memory.py.",
        "Above base: the error of what is more than the process had before it had a model, as a share of that.",
        "DeepSpeed: its estimators of model states, which know neither activations nor the process.",
        "Heap: of the prediction, what malloc keeps of what was freed (glibc's own ways, no variable set).",
        f"{len(rows)} configurations; {len(rows) - len(off)} within {BAR:.0%},",
        f"the largest error is {max(errors.values(), key=abs):+.1%}.",
        "",
        "| configuration | measured | predicted | error | above base | DeepSpeed | heap |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        above = (row["predicted"] - row["measured"]) / (row["measured"] - row["base"])
        cells = [f"{row['measured'] / 2**20:,.0f}", f"{row['predicted'] / 2**20:,.0f}", f"{errors[name]:+.1%}"]
        cells += [f"{above:+.1%}", "-" if row["deepspeed"] is None else f"{row['deepspeed'] / 2**20:,.0f}"]
        cells += [f"{row['parts']['heap'] / 2**20:,.0f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    sys.exit(main())
