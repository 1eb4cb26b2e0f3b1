"""Kill workers at random; the weights must be those of a run that nobody disturbed, bit for bit."""

from __future__ import annotations

import json
import random
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from cluster import train
from configs.load import load
from data_pipelines.storage import Store
from tests.chaos.killer import make_schedule, write_schedule
from tests.pool import run_workers
from trainer import checkpoint
from trainer.distributed import World
from trainer.record import RunRecord
from trainer.validate import validate

pytestmark = [pytest.mark.ray, pytest.mark.distributed]

STEPS, SAVE_EVERY, WORKERS, KILLS = 36, 4, 2, 3


def recipe(folder: Path) -> dict[str, Any]:
    rng = random.Random(0)
    words = ["loss", "shard", "rank", "step", "ray", "arrow", "the", "of", "is", "\n"]
    texts = folder / "texts"
    texts.mkdir(parents=True, exist_ok=True)
    for number in range(40):
        (texts / f"{number}.txt").write_text(" ".join(rng.choice(words) for _ in range(rng.randrange(20, 200))))
    return {
        "name": "chaos",
        "seed": 7,
        "steps": STEPS,
        "store": str(folder / "runs"),
        "task": {"name": "language_modeling", "seq_len": 128, "tokenizer": {"name": "bytes"}},
        "model": {"name": "gpt", "num_layers": 2, "hidden_size": 64, "num_heads": 4, "dropout": 0.1},
        "data": {"name": "text", "paths": [str(texts)], "validation_fraction": 0.1},
        # Five micro-batches on two workers: one slot of each step is idle.
        "batch": {"global_batch_size": 20, "micro_batch_size": 4},
        "optimizer": {"lr": 0.003},
        "resources": {"workers": WORKERS},
        "evaluation": {"sample_tokens": 0},
        "checkpoint": {"every": SAVE_EVERY, "keep": None},
        "tracking": {"mlflow": None},
        "recovery": {"max_restarts": KILLS},
    }


def undisturbed(world: World, settings: dict[str, Any]) -> None:
    """The same run on the warm pool: no Ray, nobody killed."""
    from trainer.loop import train as run_loop
    from trainer.progress import Progress
    from trainer.run_datasets import decide_together
    from trainer.session import open_session

    record = RunRecord.create(Store(settings["store"]), load(settings)) if world.rank == 0 else None
    torch.distributed.barrier()
    record = record or RunRecord.open(settings["store"], settings["name"], rank=world.rank)
    record.attempt = 1
    decide_together(record, validate(record.resolved), world)
    with open_session(record, world, Progress()) as session:
        run_loop(session, threading.Event())
    record.close()


def state_of(store: str, step: int) -> dict[str, torch.Tensor]:
    """Every fp32 weight and optimizer value of a checkpoint."""
    reader = checkpoint.find(Store(store).child("chaos", "checkpoints"), step)
    return {
        f"{kind} {name}": reader.read(name, kind, 0, torch.Size(reader.shape(name)).numel())
        for name in reader.manifest["parameters"]
        for kind in reader.kinds(name)
    }


def test_three_kills_leave_no_trace_in_the_weights(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    first = request.config.getoption("--first-seed")
    expected = recipe(tmp_path / "undisturbed")
    run_workers(undisturbed, WORKERS, expected)
    expected_state = state_of(expected["store"], STEPS)
    expected_losses = losses(expected["store"])
    for seed in range(first, first + request.config.getoption("--schedules")):
        folder = tmp_path / f"seed-{seed}"
        settings = recipe(folder)
        Path(settings["store"]).mkdir(parents=True)
        schedule = make_schedule(seed, kills=KILLS, workers=WORKERS, steps=STEPS, save_every=SAVE_EVERY, step_s=0.05)
        write_schedule(Path(settings["store"]), schedule)
        before = {child.pid for child in psutil.Process().children(recursive=True)}

        run = train(settings, quiet=True, body="tests.chaos.killer:train_until_killed")
        summary = run.wait()

        assert summary["outcome"] == "finished", f"seed {seed}"
        assert summary["restarts"] == KILLS, f"seed {seed}"
        prove_kills(settings["store"], seed)
        left = {child.pid for child in psutil.Process().children(recursive=True)} - before
        assert not left, f"seed {seed}: processes {left} outlive the run"
        state = state_of(settings["store"], STEPS)
        assert state.keys() == expected_state.keys()
        differing = [key for key in state if not torch.equal(state[key], expected_state[key])]
        assert not differing, f"seed {seed}: {differing}"
        assert losses(settings["store"]) == expected_losses, f"seed {seed}"


def losses(store: str) -> dict[int, float]:
    record = RunRecord.open(store, "chaos")
    curve = {row["step"]: row["loss"] for row in record.stitched()}
    assert sorted(curve) == list(range(1, STEPS + 1))
    return curve


def prove_kills(store: str, seed: int) -> None:
    """Each kill fell between two steps of its attempt, and made the next attempt repeat some."""
    record = RunRecord.open(store, "chaos")
    starts = {event["attempt"]: event["step"] for event in record.events() if event["kind"] == "started"}
    failures = {event["attempt"]: event for event in record.events() if event["kind"] == "failed"}
    for attempt in range(1, KILLS + 1):
        landed = json.loads((Path(store) / f"landed-{attempt}.json").read_text())
        resumed_at = starts[attempt + 1]
        assert starts[attempt] < landed["step"] < STEPS, f"seed {seed}: {landed} is not inside attempt {attempt}"
        assert resumed_at < landed["step"], f"seed {seed}: {landed}, resumed at {resumed_at}, repeats nothing"
        assert failures[attempt]["rank"] == landed["rank"], f"seed {seed}: {failures[attempt]} blames another rank"
