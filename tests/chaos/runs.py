"""A small run, the same run undisturbed, what both left behind, and workers that serve one run after another."""

from __future__ import annotations

import json
import random
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from cluster.ray_group import IMPORTS, RayWorkerGroup
from configs.load import load
from configs.schema import ResourcesConfig
from data_pipelines.storage import Store
from tests.chaos.harm import note_examples
from tests.distributed.small_runs import allow_emulated_fp16
from tests.pool import run_workers
from trainer import checkpoint
from trainer.distributed import World
from trainer.record import RunRecord
from trainer.validate import validate

RUN, WORKERS, SAVE_EVERY = "chaos", 2, 4


def seeds(config: pytest.Config, schedules_each: int = 1) -> range:
    """Seeds of a test's schedules: one and, of those that were asked for, one more for so many."""
    first, schedules = (config.getoption(name) for name in ("--first-seed", "--schedules"))
    return range(first, first + max(1, schedules // schedules_each))


def recipe(folder: Path, steps: int) -> dict[str, Any]:
    """A GPT on some texts in `folder`; its store is beside them."""
    rng = random.Random(0)
    words = ["loss", "shard", "rank", "step", "ray", "arrow", "the", "of", "is", "\n"]
    texts = folder / "texts"
    texts.mkdir(parents=True, exist_ok=True)
    for number in range(40):
        (texts / f"{number}.txt").write_text(" ".join(rng.choice(words) for _ in range(rng.randrange(20, 200))))
    return {
        "name": RUN,
        "seed": 7,
        "steps": steps,
        "store": str(folder / "runs"),
        "task": {"name": "language_modeling", "seq_len": 64, "tokenizer": {"name": "bytes"}},
        "model": {"name": "gpt", "num_layers": 2, "hidden_size": 32, "num_heads": 4, "dropout": 0.1},
        "data": {"name": "text", "paths": [str(texts)], "validation_fraction": 0.1},
        # Five micro-batches on two workers: one slot of each step is idle.
        "batch": {"global_batch_size": 20, "micro_batch_size": 4},
        "optimizer": {"lr": 0.003},
        "resources": {"workers": WORKERS},
        "evaluation": {"sample_tokens": 0},
        "checkpoint": {"every": SAVE_EVERY, "keep": None},
        "tracking": {"mlflow": None},
    }


def train_undisturbed(settings: dict[str, Any]) -> None:
    """The run of a recipe on the warm pool: no Ray, nobody killed."""
    run_workers(undisturbed, WORKERS, settings)


def undisturbed(world: World, settings: dict[str, Any]) -> None:
    """One rank of train_undisturbed."""
    from trainer.loop import train as run_loop
    from trainer.progress import Progress
    from trainer.run_datasets import decide_together
    from trainer.session import open_session

    allow_emulated_fp16()
    record = RunRecord.create(Store(settings["store"]), load(settings)) if world.rank == 0 else None
    torch.distributed.barrier()
    record = record or RunRecord.open(settings["store"], settings["name"], rank=world.rank)
    record.attempt = 1
    note_examples(Path(settings["store"]), 1, world.rank)
    decide_together(record, validate(record.resolved), world)
    with open_session(record, world, Progress()) as session:
        run_loop(session, threading.Event())
    record.close()


def state_of(store: str, step: int) -> dict[str, torch.Tensor]:
    """Every fp32 weight and optimizer value of a checkpoint."""
    reader = checkpoint.find(Store(store).child(RUN, "checkpoints"), step)
    return {
        f"{kind} {name}": reader.read(name, kind, 0, torch.Size(reader.shape(name)).numel())
        for name in reader.manifest["parameters"]
        for kind in reader.kinds(name)
    }


def differing(state: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> list[str]:
    """Names of what is not equal to the last bit."""
    assert state.keys() == expected.keys()
    return [name for name in state if not torch.equal(state[name], expected[name])]


def curve_of(store: str) -> list[tuple[float, float]]:
    """(loss, grad_norm) of each step of the weights that survive."""
    rows = RunRecord.open(store, RUN).stitched()
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return [(row["loss"], row["grad_norm"]) for row in rows]


def noted_steps(store: str, attempt: int, rank: int) -> list[dict[str, Any]]:
    """What a rank of an attempt was given to train on, by step (see harm.note_examples); [] before its first."""
    path = Path(store) / f"examples-{attempt}-{rank}"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def examples_of(store: str) -> list[list[int]]:
    """Sample ids of each step that the weights that survive were trained on, in the order of its micro-batches.

    As noted by the ranks themselves, of the attempt that made the step.
    """
    found = []
    for row in RunRecord.open(store, RUN).stitched():
        noted = [noted_steps(store, row["attempt"], rank) for rank in range(WORKERS)]
        batches = [
            batch for steps in noted for each in steps if each["done"] == row["step"] - 1 for batch in each["ids"]
        ]
        assert [index for index, _ in sorted(batches)] == list(range(len(batches))), f"step {row['step']}: {batches}"
        found.append([sample_id for _, ids in sorted(batches) for sample_id in ids])
    return found


def assert_each_once(examples: list[list[int]]) -> None:
    """Every epoch holds every example exactly once."""
    stream = [sample_id for ids in examples for sample_id in ids]
    size = len(set(stream))
    assert len(stream) > 2 * size, "fewer than two epochs would not show what came twice"
    for start in range(0, len(stream), size):
        epoch = stream[start : start + size]
        assert len(set(epoch)) == len(epoch), f"of the {size} examples some come twice from {start} on"


class LastingGroup(RayWorkerGroup):
    """Workers that stay for the next run, with their imports behind them; they use the Ray that is connected."""

    def __init__(self) -> None:
        parts = ("trainer.tasks.language_modeling", "trainer.models.gpt", "data_pipelines.sources.text")
        super().__init__(
            ResourcesConfig(workers=WORKERS),
            "",
            "",
            body="tests.chaos.harm:train_until_harmed",
            imports=[*IMPORTS, *parts, "tests.chaos.harm"],
        )

    def serve(self, _resources: ResourcesConfig, store_uri: str, run: str, **_: Any) -> LastingGroup:
        """Itself, for another run; to be called in place of RayWorkerGroup."""
        self._store, self._run = Store(store_uri), run
        return self

    def close(self) -> None:
        """End what trains, and keep the workers."""
        self.kill()

    def end(self) -> None:
        """End the workers too."""
        super().close()

    def training(self) -> list[psutil.Process]:
        """Processes that train, or trained and were left behind."""
        return [child for member in self._spare for pid, _ in member.warm["processes"] for child in _children(pid)]


def _children(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children(recursive=True)
