"""What a checkpoint costs training: this project's save behind the training, beside DeepSpeed's save_checkpoint.

    python benchmarks/checkpoint.py [--rounds 40] [--steps 10] [--stages 1 2 3] [--workers 1] [--out benchmarks/results]

One engine trains on; blocks of steps take turns, in all orders: without a save, with one of ours at the beginning, and
with one of DeepSpeed's at the beginning. The seconds of a block include its save; ours writes behind the block's
steps, and the next block begins when that is done. Each worker has one thread; the slowest rank counts.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import math
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.multiprocessing  # noqa: E402

from benchmarks.provenance import commit  # noqa: E402
from configs.plugins import find_plugin  # noqa: E402
from configs.schema import CheckpointConfig, RunConfig  # noqa: E402
from data_pipelines.loader import MicroBatch  # noqa: E402
from data_pipelines.storage import Store  # noqa: E402
from tests.configs.minimal import minimal  # noqa: E402
from trainer.bound import BoundModel, BoundTask  # noqa: E402
from trainer.checkpoint import Checkpointer  # noqa: E402
from trainer.distributed import World, all_gather_json, init_world  # noqa: E402
from trainer.example_batch import batch_of, example_rows  # noqa: E402
from trainer.progress import Progress  # noqa: E402

VARIANTS = ("none", "ours", "deepspeed")
TASK = {"seq_len": 64, "tokenizer": {"name": "bpe", "vocab_size": 4096}}
MODEL = {"num_layers": 4, "hidden_size": 256, "num_heads": 8}  # small, so that blocks of all kinds take close turns
EXAMPLES, MICRO_BATCH = 4, 2
STALL_BAR, STALL_AIM, SLOWDOWN_BAR = 1 / 10, 1 / 50, 0.03


def main() -> int:
    """Measure all stages and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40, help="blocks of each kind that count")
    parser.add_argument("--steps", type=int, default=10, help="steps between two saves")
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--workers", type=int, choices=(1, 2), default=1)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_worker, args=(arguments, Path(folder)), nprocs=arguments.workers)
        rows = json.loads((Path(folder) / "rows.json").read_text())
    arguments.out.mkdir(parents=True, exist_ok=True)
    name = "checkpoint" if arguments.workers == 1 else f"checkpoint_{arguments.workers}_workers"
    (arguments.out / f"{name}.json").write_text(json.dumps(rows, indent=1) + "\n")
    (arguments.out / f"{name}.md").write_text(page(rows))
    print(page(rows))
    return 0


def _worker(rank: int, arguments: argparse.Namespace, folder: Path) -> None:
    world = init_world(rank, arguments.workers, rank, f"file://{folder}/meet", use_gpu=False, threads=1, timeout_s=120)
    rows = []
    for stage in arguments.stages:
        rows.append(measured(stage, world, folder, arguments.rounds, arguments.steps))
        if rank == 0:
            print(f"stage {stage}: slowdown {rows[-1]['slowdown_ours'][0]:+.1%}", flush=True)
    if rank == 0:
        (folder / "rows.json").write_text(json.dumps(rows))


def measured(stage: int, world: World, folder: Path, rounds: int, steps: int) -> dict[str, Any]:
    """Stalls and seconds a block of all variants, in turns."""
    from trainer.engine import Engine

    task_module, model_module = find_plugin("trainer.tasks", "language_modeling"), find_plugin("trainer.models", "gpt")
    task = BoundTask(task_module, task_module.Config.model_validate(TASK))
    model = BoundModel(model_module, model_module.Config(**MODEL), *task.io())
    lines = example_rows(task, EXAMPLES)
    batches = [
        MicroBatch(number, False, np.arange(MICRO_BATCH), batch_of(task, lines[start : start + MICRO_BATCH]))
        for number, start in enumerate(range(0, EXAMPLES, MICRO_BATCH))
    ][world.rank :: world.size]
    config = RunConfig.model_validate(
        minimal(
            batch={"global_batch_size": EXAMPLES, "micro_batch_size": MICRO_BATCH},
            zero={"stage": stage},
            optimizer={"name": "adamw", "lr": 1e-3, "weight_decay": 0.1},
        )
    )
    engine = Engine(model, config, world)
    with torch.device("meta"):
        num_parameters = sum(each.numel() for each in model.build().parameters())
    own, peer = folder / f"own-{stage}", folder / f"deepspeed-{stage}"
    saver = Checkpointer(Store(own), world, CheckpointConfig(keep=1), Progress())
    step = 0

    def block(variant: str, steps: int) -> dict[str, float]:
        """The slowest rank's figures, and the bytes that are then in the save's folder.

        block_s: the whole. stall_s: lost to the save, waited_s of it in the update. late_s: from the end of the block
        to that of the writing.
        """
        nonlocal step
        all_gather_json(None)  # the ranks begin together
        started = time.perf_counter()
        if variant == "ours":
            saver.save(step, engine, {})
        elif variant == "deepspeed":
            engine.deepspeed.save_checkpoint(str(peer))
        call_s = time.perf_counter() - started
        for _ in range(steps):
            engine.train_step(task, batches, lr=1e-3, step=step)
            step += 1
        block_s = time.perf_counter() - started
        waited_s = engine.reading.waited_s if variant == "ours" else 0.0
        saver.wait()
        assert saver.last_error is None, saver.last_error
        late_s = time.perf_counter() - started - block_s
        of_ranks = all_gather_json([block_s, call_s + waited_s, waited_s, late_s])
        found = [max(each) for each in zip(*of_ranks, strict=True)]
        size = sum(path.stat().st_size for path in (own if variant == "ours" else peer).rglob("*") if path.is_file())
        all_gather_json(None)  # all have counted
        if world.rank == 0:
            shutil.rmtree(peer, ignore_errors=True)  # here, where nothing is measured
        return dict(zip(("block_s", "stall_s", "waited_s", "late_s"), found, strict=True)) | {"bytes": size}

    for variant in VARIANTS:  # optimizer states and the snapshot's buffer are made here
        block(variant, 2)
    orders = list(itertools.permutations(VARIANTS))
    turns = [{variant: block(variant, steps) for variant in orders[number % 6]} for number in range(rounds)]
    saver.close()
    return row_of(stage, world.size, num_parameters, steps, turns)


def row_of(stage: int, workers: int, num_parameters: int, steps: int, turns: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures of a stage. turns: block()'s results, by round and variant."""

    def each(variant: str, what: str) -> list[float]:
        return [turn[variant][what] for turn in turns]

    row: dict[str, Any] = {"stage": stage, "workers": workers, "parameters": num_parameters, "steps": steps}
    row["block_s"] = {variant: statistics.median(each(variant, "block_s")) for variant in VARIANTS}
    row["stall_s"] = {variant: statistics.median(each(variant, "stall_s")) for variant in VARIANTS[1:]}
    row["waited_s"] = statistics.median(each("ours", "waited_s"))
    row["bytes"] = {variant: turns[-1][variant]["bytes"] for variant in VARIANTS[1:]}
    row["stall_ratio"] = row["stall_s"]["ours"] / row["stall_s"]["deepspeed"]
    for variant in VARIANTS[1:]:
        pairs = zip(each(variant, "block_s"), each("none", "block_s"), strict=True)
        row[f"slowdown_{variant}"] = _median_and_interval([with_save / without - 1 for with_save, without in pairs])
    row["late_s"] = max(each("ours", "late_s"))
    return row | {"rounds": turns}


def _median_and_interval(values: list[float]) -> list[float]:
    """The median, and the ranks between which the true one lies with a chance of at least 95 % (by the binomial)."""
    values, count, below, chance = sorted(values), len(values), 0, 0.0
    while (chance := chance + math.comb(count, below) / 2**count) <= 0.025:
        below += 1
    lowest = max(below - 1, 0)
    return [statistics.median(values), values[lowest], values[count - 1 - lowest]]


def page(rows: list[dict[str, Any]]) -> str:
    """benchmarks/results/checkpoint.md."""
    first = rows[0]
    lines = [
        "# What a checkpoint costs training",
        "",
        f"`{' '.join(['python benchmarks/checkpoint.py', *sys.argv[1:]])}`, {datetime.date.today()},",
        f"commit {commit()}, {os.cpu_count()} CPUs, {first['workers']} worker(s) with one thread each,",
        f"GPT of {first['parameters'] / 1e6:.1f} M parameters, fp32, AdamW,",
        f"{EXAMPLES} x {TASK['seq_len']} tokens a step,",
        f"a save every {first['steps']} steps, {len(first['rounds'])} blocks of each kind in turns.",
        "",
        "Stall: what training lost to a save: the call, and the update's wait for the copy; medians. Slowdown: a",
        "block with a save, over that without of the same round; the median of the rounds, and where it lies with a",
        "chance of 95 %. Ours are synced to the disk behind the training; DeepSpeed's call ends with its files in the",
        "page cache.",
        "",
        f"| stage | stall, ours / DeepSpeed, ms | ratio | at most {STALL_BAR:.2f} (aim {STALL_AIM:.2f}) "
        f"| slowdown, ours | at most {SLOWDOWN_BAR:.0%} | slowdown, DeepSpeed | ms a step | MB, ours / DeepSpeed "
        "| longest write after its block, s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        stall, size = row["stall_s"], row["bytes"]
        ratio = row["stall_ratio"]
        stall_bar = "aim met" if ratio <= STALL_AIM else "met" if ratio <= STALL_BAR else "missed"
        slowdown_bar = "met" if row["slowdown_ours"][0] <= SLOWDOWN_BAR else "missed"
        ours, peer = ("{:+.1%} ({:+.1%} to {:+.1%})".format(*row[f"slowdown_{each}"]) for each in VARIANTS[1:])
        lines.append(
            f"| {row['stage']} | {1e3 * stall['ours']:.1f} ({1e3 * row['waited_s']:.1f} of them in the update) / "
            f"{1e3 * stall['deepspeed']:.1f} | {ratio:.3f} | {stall_bar} "
            f"| {ours} | {slowdown_bar} | {peer} | {1e3 * row['block_s']['none'] / row['steps']:.0f} "
            f"| {size['ours'] / 1e6:.1f} / {size['deepspeed'] / 1e6:.1f} | {row['late_s']:.2f} |"
        )
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    sys.exit(main())
