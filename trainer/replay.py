"""One step of a run once more: its weights, random numbers and examples rebuilt, and its examples' own losses.

Nothing is written: neither the run's folder, nor its record, nor a lease, so a run that goes on is not disturbed.
"""

from __future__ import annotations

import sys
import time
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from configs.errors import NotFound
from trainer.record import RunRecord
from trainer.record_rows import decode_value
from trainer.step_examples import left_out

if TYPE_CHECKING:
    from data_pipelines.loader import MicroBatch
    from trainer.distributed import World
    from trainer.engine import Engine
    from trainer.run_data import RunData
    from trainer.validate import Plan

NARRATION_EVERY_S = 5.0
_SHOWN_CHARACTERS = 100


@dataclass(frozen=True)
class Target:
    """A step that the record knows, numbered by the steps completed with it.

    attempt, world_size: what ran it. time: epoch seconds at which it was recorded. grad_norm: None where it is unknown.
    """

    step: int
    attempt: int
    world_size: int
    time: float
    loss: float
    grad_norm: float | None


def find_target(record: RunRecord, step: int) -> Target:
    """What the record says of a step, as it was run last; of one that ended the run too.

    Raises:
        NotFound: nothing; says which steps there are.
    """
    rows = {row["step"]: row for row in record.stitched() if "loss" in row}
    events = record.events()
    if step not in rows:
        for event in events:
            if event["kind"] == "diverged":
                norm = event["grad_norm"]
                values = {
                    "loss": decode_value(event["loss"]),
                    "grad_norm": None if norm is None else decode_value(norm),
                }
                rows[event["step"]] = event | values
    row = rows.get(step)
    if row is None:
        near = sorted(rows, key=lambda known: (abs(known - step), known))[:2]
        hint = f"The nearest are {', '.join(map(str, sorted(near)))}." if near else "It has none yet."
        raise NotFound(
            f"The record of run '{record.name}' has no loss of step {step}. {hint} Steps are counted from 1, and every "
            f"{record.config.tracking.every} of them is recorded (tracking.every)."
        )
    sizes = [
        event["world_size"] for event in events if event["kind"] == "started" and event["attempt"] == row["attempt"]
    ]
    return Target(step, row["attempt"], sizes[-1], row["time"], row["loss"], row.get("grad_norm"))


def replay_rank(
    rank: int, world_size: int, init_method: str, store: str, run: str, target: Target, checkpoint_step: int | None
) -> dict[str, Any]:
    """`replay` as one process of `world_size` on this machine."""
    from trainer.distributed import world_of

    world = world_of(RunRecord.open(store, run).config, rank, world_size, rank, init_method)
    return replay(world, store, run, target, checkpoint_step)


def replay(world: World, store: str, run: str, target: Target, checkpoint_step: int | None) -> dict[str, Any]:
    """Re-run the steps from a checkpoint (None: from the beginning) to the target's. Every rank calls it.

    Returns {"from_step", "loss", "grad_norm", "examples": [{"sample_id", "loss", "items", "documents", "preview"}]},
    the examples by their own loss, highest first; what is no number comes before all. Their losses are means over an
    example's items, each example alone, by the weights before the step, in evaluation mode: without dropout, and with
    running statistics, which batches of one do not have and must not move. Seeded like its micro-batch.

    Raises ShardyardErrors: the data set or the checkpoint is gone or damaged, ...
    """
    from trainer import checkpoint
    from trainer.beginning import begin, load_all
    from trainer.divergence import Divergence
    from trainer.engine import Engine
    from trainer.run_data import Position, RunData
    from trainer.run_datasets import open_recorded
    from trainer.schedules import lr_at
    from trainer.validate import validate
    from trainer.warm_start import warm

    record = RunRecord.open(store, run)
    plan = validate(record.resolved, sees_inputs=False)
    config = plan.config
    checkpoints = record.store.child("checkpoints")
    reader = None if checkpoint_step is None else checkpoint.find(checkpoints, checkpoint_step)
    with closing(RunData.of(open_recorded(record, plan), plan)) as data:
        fresh = reader is None and config.warm_start is not None
        engine = Engine(
            warm(plan.model, config.warm_start) if fresh and config.warm_start else plan.model, config, world
        )
        start = begin(record, engine, data) if reader is None else load_all(reader, engine, data)
        events = [event for event in record.events() if event["time"] <= target.time]
        start = Position(start.step, start.examples, left_out(events, start.exceptions))
        divergence = Divergence.of(config.recovery, None if reader is None else reader.manifest.get("divergence"))
        with closing(data.loader(config, world, start)) as loader:
            told = time.monotonic()
            for step in range(start.step, target.step):
                micro_batches = loader.step(step)
                last = step == target.step - 1
                examples = _examples(engine, plan, data, micro_batches, step) if last else []
                lr = lr_at(config.schedule, config.optimizer.lr, step, config.steps)
                limits = divergence.limits() if config.recovery.divergence == "skip" else None
                stats = engine.train_step(plan.task, micro_batches, lr=lr, step=step, limits=limits)
                divergence.judge(step + 1, stats)
                if world.rank == 0 and time.monotonic() - told > NARRATION_EVERY_S:
                    print(f"Step {step + 1:,} of {target.step:,} ...", file=sys.stderr, flush=True)
                    told = time.monotonic()
    examples.sort(key=lambda each: (each["loss"] == each["loss"], -each["loss"], each["sample_id"]))
    return {"from_step": start.step, "loss": stats.loss, "grad_norm": stats.grad_norm, "examples": examples}


def _examples(
    engine: Engine, plan: Plan, data: RunData, micro_batches: list[MicroBatch], step: int
) -> list[dict[str, Any]]:
    """All ranks' examples with their own losses. Every rank calls its model as often: ZeRO-3 gathers weights."""
    import torch

    from trainer.distributed import all_gather_json
    from trainer.rng import seed_forward

    found = []
    engine.module.eval()
    with torch.no_grad():
        for batch in micro_batches:
            for number in range(plan.config.batch.micro_batch_size):
                here = min(number, len(batch.sample_ids) - 1)
                one = {name: tensor[here : here + 1] for name, tensor in batch.tensors.items()}
                on_device = {name: tensor.to(engine.world.device) for name, tensor in one.items()}
                seed_forward(plan.config.seed, step, batch.index)
                loss = float(plan.task.loss(engine.module, on_device))
                if batch.idle or number != here:
                    continue
                items, weight = plan.task.items_and_weight(one)
                sample_id = int(batch.sample_ids[here])
                own = {"sample_id": sample_id, "loss": loss / (weight or 1.0), "items": items}
                found.append(own | {"documents": _documents(data, sample_id), "preview": _preview(data, one)})
    engine.module.train()
    return [each for rank in all_gather_json(found) for each in rank]


def _documents(data: RunData, sample_id: int) -> list[str]:
    """Keys of the stored rows that an example is made of, as the source names them; [] where they cannot be told."""
    from data_pipelines.pack import PackedSplit

    parts = getattr(data.train, "parts", (data.train,))
    source, number = 0, sample_id
    while number >= len(parts[source]):
        source, number = source + 1, number - len(parts[source])
    examples, dataset = parts[source], data.datasets[source]
    rows = examples.rows_of(number) if isinstance(examples, PackedSplit) else np.array([number])
    if not any(column.name == "key" for column in dataset.index.columns):
        return []
    return [key.tobytes().decode() for key in dataset.split("train").gather(rows, ["key"])["key"]]


def _preview(data: RunData, example: dict[str, Any]) -> str:
    """An example in a line: its text, or of each tensor the shape, the least and the greatest value."""
    tokenizer = data.datasets[0].tokenizer
    if tokenizer is not None and "tokens" in example and "valid" in example:
        text = tokenizer.decode(example["tokens"][0, 1 : 1 + int(example["valid"][0])].numpy())
        return " ".join(text.split())[:_SHOWN_CHARACTERS]
    shown = []
    for name, tensor in example.items():
        value = tensor[0]
        if value.numel() == 1:
            shown.append(f"{name} {value.item():.6g}")
        elif value.numel():
            shown.append(f"{name} {tuple(value.shape)} {value.min().item():.4g} to {value.max().item():.4g}")
    return ", ".join(shown)[:_SHOWN_CHARACTERS]
