"""How long a killed worker costs: Shardyard beside stock Ray Train v2 with DeepSpeed, in turns.

    python benchmarks/recovery.py [--rounds 5] [--out benchmarks/results]

Both train the same GPT at ZeRO stage 1 on two workers and save every 10 steps. Worker 1 ends itself with SIGKILL after
step 25. Every worker's steps are written down with the time of the machine's clock; the gap is from the kill to the end
of the next optimizer step. The peer is what its documentation shows: TorchTrainer, FailureConfig, a checkpoint of
DeepSpeed's reported to Ray every 10 steps; all defaults. Its start is spared DeepSpeed's own compilations, as ours is.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported

from benchmarks.provenance import commit  # noqa: E402

WORKERS, STEPS, SAVE_EVERY = 2, 40, 10
MODEL = {"num_layers": 4, "hidden_size": 256, "num_heads": 8}
SEQ_LEN, EXAMPLES_PER_WORKER = 128, 4
SYSTEMS = ("shardyard", "shardyard, the whole actor", "ray train")


def main() -> int:
    """Measure in turns and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--one", choices=SYSTEMS, help=argparse.SUPPRESS)  # in a process of its own
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one is not None:
        (ray_train if arguments.one == "ray train" else shardyard)(arguments.folder, arguments.one)
        return 0
    gaps: dict[str, list[float]] = {system: [] for system in SYSTEMS}
    parts: dict[str, list[dict[str, float]]] = {system: [] for system in SYSTEMS}
    for round_ in range(arguments.rounds):
        for system in SYSTEMS:
            with tempfile.TemporaryDirectory(prefix="recovery-") as folder:
                command = [sys.executable, __file__, "--one", system, "--folder", folder]
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=300)
                gap, repeated = measured(Path(folder))
                gaps[system].append(gap)
                parts[system].append({"gap_s": gap, "repeated_steps": repeated})
            print(f"round {round_ + 1}, {system}: {gap:.2f} s, {repeated} steps repeated", flush=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "recovery.json").write_text(json.dumps(parts, indent=1) + "\n")
    (arguments.out / "recovery.md").write_text(page(gaps, parts))
    return 0


def measured(folder: Path) -> tuple[float, int]:
    """Seconds from the kill to the end of rank 0's next step, and how many steps were made twice."""
    killed_at = float((folder / "killed").read_text())
    rows = [json.loads(line) for path in folder.glob("steps-0-*.jsonl") for line in path.read_text().splitlines()]
    before = [row["step"] for row in rows if row["time"] <= killed_at]
    after = sorted((row for row in rows if row["time"] > killed_at + 0.05), key=lambda row: row["time"])
    first = next(row for row in after if row["step"] <= max(before))  # a step that was begun before may still end
    assert max(row["step"] for row in rows) == STEPS, "the run did not end"
    return first["time"] - killed_at, max(before) - first["step"] + 1


# --- Shardyard


def shardyard(folder: Path, system: str) -> None:
    """A run of ours whose body watches its own progress."""
    from cluster import train

    (folder / "texts").mkdir()
    letters = random.Random(0)
    for number in range(64):
        (folder / "texts" / f"{number}.txt").write_text("".join(letters.choices("abcdefgh ", k=6000)))
    (folder / "whole-actor").write_text(str(system != "shardyard"))
    recipe = {
        "name": "recovery",
        "steps": STEPS,
        "store": str(folder / "runs"),
        "task": {"name": "language_modeling", "seq_len": SEQ_LEN, "tokenizer": {"name": "bytes"}},
        "model": {"name": "gpt", **MODEL},
        "data": {"name": "text", "paths": [str(folder / "texts")], "validation_fraction": 0.1},
        "batch": {"global_batch_size": EXAMPLES_PER_WORKER * WORKERS, "micro_batch_size": EXAMPLES_PER_WORKER},
        "optimizer": {"lr": 0.001},
        "zero": {"stage": 1},
        "resources": {"workers": WORKERS},
        "evaluation": {"sample_tokens": 0},
        "checkpoint": {"every": SAVE_EVERY},
        "tracking": {"mlflow": None},
    }
    result = train(recipe, quiet=True, body="benchmarks.recovery_worker:watched_worker").wait()
    assert result["outcome"] == "finished" and result["restarts"] == 1, result


# --- Ray Train


def ray_train(folder: Path, _system: str) -> None:
    """The stock run."""
    os.environ["RAY_TRAIN_V2_ENABLED"] = "1"
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    ray.init(num_cpus=WORKERS + 1, include_dashboard=False, log_to_driver=False, runtime_env={"working_dir": None})
    trainer = TorchTrainer(
        ray_train_worker,
        train_loop_config={"folder": str(folder)},
        scaling_config=ScalingConfig(num_workers=WORKERS),
        run_config=RunConfig(
            storage_path=str(folder / "storage"),
            failure_config=FailureConfig(max_failures=3),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
        ),
    )
    trainer.fit()
    ray.shutdown()


def ray_train_worker(settings: dict[str, Any]) -> None:
    """A training function as the documentation of Ray Train and DeepSpeed has it."""
    sys.path.insert(0, str(ROOT))
    os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # as ours
    import ray.train
    import torch

    from benchmarks.step_log import StepLog

    torch.set_num_threads(1)
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled for minutes
    folder = Path(settings["folder"])
    rank = ray.train.get_context().get_world_rank()
    torch.manual_seed(0)
    deepspeed.init_distributed(auto_mpi_discovery=False)
    module = _gpt()
    engine, *_ = deepspeed.initialize(
        model=module,
        optimizer=torch.optim.AdamW(module.parameters(), lr=0.001, fused=True),
        config={
            "train_micro_batch_size_per_gpu": EXAMPLES_PER_WORKER,
            "gradient_clipping": 1.0,
            "zero_optimization": {"stage": 1},
            "zero_force_ds_cpu_optimizer": False,
        },
    )
    start = 0
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as saved:
            _, client = engine.load_checkpoint(saved)
            start = client["step"]
    log = StepLog(folder, rank)
    for step in range(start + 1, STEPS + 1):
        generator = torch.Generator().manual_seed(step * WORKERS + rank)
        tokens = torch.randint(0, 256, (EXAMPLES_PER_WORKER, SEQ_LEN + 1), generator=generator)
        loss = torch.nn.functional.cross_entropy(engine(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        engine.backward(loss)
        engine.step()
        log.step(step)
        if log.kill_due(step):
            log.kill(os.getpid())
        if step % SAVE_EVERY == 0:
            with tempfile.TemporaryDirectory() as target:
                engine.save_checkpoint(target, client_state={"step": step})
                ray.train.report({"loss": loss.item()}, checkpoint=ray.train.Checkpoint.from_directory(target))


def _gpt() -> Any:
    """The same model as ours, with values of its own."""
    import torch

    from configs.plugins import find_plugin
    from trainer.bound import BoundModel, BoundTask
    from trainer.initialization import materialize

    task_module, model_module = find_plugin("trainer.tasks", "language_modeling"), find_plugin("trainer.models", "gpt")
    task = BoundTask(
        task_module, task_module.Config.model_validate({"seq_len": SEQ_LEN, "tokenizer": {"name": "bytes"}})
    )
    model = BoundModel(model_module, model_module.Config(**MODEL), *task.io())
    with torch.device("meta"):
        module = model.build()
    materialize(module, model.init_parameter, seed=0)
    return module


# --- the table


def page(gaps: dict[str, list[float]], parts: dict[str, list[dict[str, float]]]) -> str:
    """benchmarks/results/recovery.md."""
    import deepspeed
    import ray

    stock = statistics.median(gaps["ray train"])
    return "\n".join(
        [
            "# From a killed worker to the next optimizer step",
            "",
            f"`{' '.join(['python benchmarks/recovery.py', *sys.argv[1:]])}`, {datetime.date.today()},",
            f"commit {commit()}, Ray {ray.__version__}, DeepSpeed {deepspeed.__version__}, {os.cpu_count()} CPUs,",
            "two workers, in turns.",
            "",
            "| | median, s | least to most, s | times as fast | steps repeated |",
            "|---|---|---|---|---|",
            *(
                f"| {system} | {statistics.median(found):.2f} | {min(found):.2f} to {max(found):.2f} | "
                f"{stock / statistics.median(found):.1f} | "
                f"{statistics.median(each['repeated_steps'] for each in parts[system]):g} |"
                for system, found in gaps.items()
            ),
            "",
            '"The whole actor": Ray\'s process is killed together with the training process that it forks, so that a',
            "new one has to be started and to import. Ray Train's checkpoints are DeepSpeed's; training waits.",
            "",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
