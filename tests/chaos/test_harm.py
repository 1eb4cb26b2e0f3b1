"""Harm a run at random; the weights must be those of a run that nobody disturbed, bit for bit."""

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
from configs.errors import RunFailed
from configs.load import load
from data_pipelines.storage import Store
from tests.chaos.harm import Harm, make_schedule, mend_shards, write_schedule
from tests.pool import run_workers
from trainer import checkpoint
from trainer.distributed import World
from trainer.record import RunRecord
from trainer.validate import validate

pytestmark = [pytest.mark.ray, pytest.mark.distributed]

STEPS, SAVE_EVERY, WORKERS = 56, 4, 2
KINDS = ["kill", "stop", "raise_error", "corrupt_newest", "full_disk", "corrupt_shard"]


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
        "recovery": {"max_restarts": len(KINDS), "silence_s": 5.0},
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


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, torch.Tensor], dict[int, float]]:
    """The state and the losses of the run that nobody disturbs."""
    settings = recipe(tmp_path_factory.mktemp("undisturbed"))
    run_workers(undisturbed, WORKERS, settings)
    return state_of(settings["store"], STEPS), losses(settings["store"])


def test_no_harm_leaves_a_trace_in_the_weights(
    request: pytest.FixtureRequest, tmp_path: Path, expected: tuple[dict[str, torch.Tensor], dict[int, float]]
) -> None:
    first, schedules = (request.config.getoption(name) for name in ("--first-seed", "--schedules"))
    for seed in range(first, first + schedules):
        settings = recipe(tmp_path / f"seed-{seed}")
        store = Path(settings["store"])
        store.mkdir(parents=True)
        kinds = KINDS if schedules > 1 else random.Random(seed).sample(KINDS, 3)  # a short one for `make test`
        schedule = make_schedule(seed, kinds, workers=WORKERS, steps=STEPS, save_every=SAVE_EVERY, step_s=0.05)
        write_schedule(store, schedule)
        before = {child.pid for child in psutil.Process().children(recursive=True)}

        summary = trained(settings, schedule)

        assert summary["outcome"] == "finished", f"seed {seed}"
        prove_harms(settings["store"], schedule, seed)
        left = {child.pid for child in psutil.Process().children(recursive=True)} - before
        assert not left, f"seed {seed}: processes {left} outlive the run"
        state, expected_state = state_of(settings["store"], STEPS), expected[0]
        assert state.keys() == expected_state.keys()
        differing = [key for key in state if not torch.equal(state[key], expected_state[key])]
        assert not differing, f"seed {seed}: {differing}"
        assert losses(settings["store"]) == expected[1], f"seed {seed}"


def trained(settings: dict[str, Any], schedule: list[Harm]) -> dict[str, Any]:
    """The run to its end; launched anew once its data is mended, where a harm makes it unreadable."""
    body = "tests.chaos.harm:train_until_harmed"
    if any(harm.kind == "corrupt_shard" for harm in schedule):
        with pytest.raises(RunFailed, match=r"\.arrow.* fails its (digest|checksum)"):
            train(settings, quiet=True, body=body).wait()
        assert mend_shards(Path(settings["store"])) > 0
    return train(settings, quiet=True, body=body).wait()


def losses(store: str) -> dict[int, float]:
    record = RunRecord.open(store, "chaos")
    curve = {row["step"]: row["loss"] for row in record.stitched()}
    assert sorted(curve) == list(range(1, STEPS + 1))
    return curve


def prove_harms(store: str, schedule: list[Harm], seed: int) -> None:
    """Each harm fell between two steps of its attempt, made the next repeat some, and was blamed on its rank."""
    events = RunRecord.open(store, "chaos").events()
    starts = {event["attempt"]: event["step"] for event in events if event["kind"] == "started"}
    failures = {event["attempt"]: event for event in events if event["kind"] == "failed"}
    for harm in schedule:
        landed = json.loads((Path(store) / f"landed-{harm.attempt}.json").read_text())
        resumed_at = min(starts[attempt] for attempt in starts if attempt > harm.attempt)
        assert starts[harm.attempt] < landed["step"] < STEPS, f"seed {seed}: {landed} is not inside its attempt"
        assert resumed_at < landed["step"], f"seed {seed}: {landed}, resumed at {resumed_at}, repeats nothing"
        blamed = failures[harm.attempt]
        assert blamed["rank"] == landed["rank"], f"seed {seed}: {blamed} blames another rank than {landed}"
        assert blamed["cause"] == {"stop": "silent", "raise_error": "raised"}.get(harm.kind, "died"), blamed
    told = {"corrupt_newest": "checkpoint_damaged", "full_disk": "checkpoint_failed"}
    wanted = {told[harm.kind] for harm in schedule if harm.kind in told}
    kinds = {event["kind"] for event in events}
    assert wanted <= kinds, f"seed {seed}: {kinds}"
