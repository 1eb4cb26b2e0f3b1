"""The composition root: a run's record in, a Session with everything a training loop needs out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from configs.errors import UsageError
from configs.schema import RunConfig
from data_pipelines.build import ensure_dataset
from data_pipelines.loader import Loader
from data_pipelines.pack import PackedSplit
from data_pipelines.shards import Dataset
from data_pipelines.storage import Store
from trainer import checkpoint, device
from trainer.bound import BoundModel, BoundTask
from trainer.checkpoint import Checkpointer
from trainer.distributed import World, all_sum
from trainer.engine import Engine
from trainer.progress import Progress
from trainer.record import RunRecord
from trainer.validate import validate


@dataclass(frozen=True)
class Session:
    """All that one rank needs to train; built once an attempt, never changed."""

    config: RunConfig
    world: World
    record: RunRecord
    progress: Progress
    task: BoundTask
    model: BoundModel
    dataset: Dataset
    validation: PackedSplit
    prepare: Callable[[dict[str, Any], np.random.Generator], dict[str, np.ndarray]]
    loader: Loader
    engine: Engine
    checkpointer: Checkpointer
    start_step: int
    start_examples: int

    @property
    def writes_record(self) -> bool:
        """Rank 0 keeps the record; the others only train."""
        return self.world.rank == 0

    def log_metrics(self, step: int, values: dict[str, float]) -> None:
        """Metrics after `step` completed steps, into the run's record."""
        if self.writes_record:
            self.record.metrics(step, values | {"examples": float(self.examples_seen(step))})

    def log_sample(self, step: int) -> None:
        """What the model now makes of nothing: text, for a language model. Every rank takes part (ZeRO-3 shards)."""
        length = self.config.evaluation.sample_tokens
        if length:
            with self.engine.inference() as module:
                text = self.task.sample(module, self.dataset.tokenizer, length, self.config.seed)
            if self.writes_record:
                self.record.sample(step, text)

    def save(self, step: int) -> None:
        """Start saving a checkpoint after `step` completed steps; it is written behind the next ones."""
        data_state = {"examples_seen": self.examples_seen(step), "fingerprint": self.dataset.fingerprint}
        self.checkpointer.save(step, self.engine, data_state, {"tokenizer": self.dataset.tokenizer.to_json()})

    def examples_seen(self, step: int) -> int:
        """Position in the global order after `step` completed steps."""
        return self.start_examples + (step - self.start_step) * self.config.batch.global_batch_size

    def device_metrics(self, step_s: float) -> dict[str, float]:
        """Memory of this worker, and model FLOPs utilisation where the device's peak is known."""
        metrics = device.memory_metrics(self.world.device)
        peak = device.peak_flops(self.world.device, self.config.precision)
        if peak is not None:
            flops = self.model.flops_per_example() * self.config.batch.global_batch_size
            metrics["mfu"] = flops / step_s / (peak * self.world.size)
        return metrics


@contextmanager
def open_session(record: RunRecord, world: World, progress: Progress) -> Iterator[Session]:
    """Build a Session for the record's attempt, at its newest good checkpoint, and close it in the end.

    Raises:
        ConfigError: the config names something that is not there, or does not fit.
        UsageError: the data set is not the one that the checkpoint was trained on.
    """
    config = record.config
    plan = validate(record.resolved)
    with ExitStack() as stack:
        progress.phase = "data"
        tokenizer = plan.task.config.tokenizer
        dataset = ensure_dataset(Store(config.store), config.data, tokenizer)
        seq_len = plan.task.packing()
        train_split = dataset.packed("train", seq_len)

        progress.phase = "model"
        engine = Engine(plan.model, config, world, progress)
        checkpoints = record.store.child("checkpoints")
        checkpointer = Checkpointer(checkpoints, world, config.checkpoint.keep, progress, record)
        stack.callback(checkpointer.close)
        progress.phase = "restore"
        start_step, start_examples = _restore(record, engine, world, dataset.fingerprint)

        prepare = plan.task.prepare
        loader = Loader(
            train_split,
            prepare,
            seed=config.seed,
            global_batch_size=config.batch.global_batch_size,
            micro_batch_size=config.batch.micro_batch_size,
            rank=world.rank,
            world_size=world.size,
            start_step=start_step,
            examples_seen=start_examples,
        )
        stack.callback(loader.close)
        progress.step, progress.steps = start_step, config.steps
        if world.rank == 0:
            record.event(
                "started",
                step=start_step,
                world_size=world.size,
                parameters=plan.num_parameters,
                data_fingerprint=dataset.fingerprint,
            )
        yield Session(
            config=config,
            world=world,
            record=record,
            progress=progress,
            task=plan.task,
            model=plan.model,
            dataset=dataset,
            validation=dataset.packed("validation", seq_len),
            prepare=prepare,
            loader=loader,
            engine=engine,
            checkpointer=checkpointer,
            start_step=start_step,
            start_examples=start_examples,
        )


def _restore(record: RunRecord, engine: Engine, world: World, fingerprint: str) -> tuple[int, int]:
    """Load the run's newest good checkpoint, else its parent's; returns (completed steps, examples seen)."""
    checkpoints = record.store.child("checkpoints")
    reader = _newest_agreed(checkpoints, record, world)
    parent = record.config.parent
    if reader is None and parent is None:
        return 0, 0
    if reader is None and parent is not None:
        if parent.state == "weights":
            checkpoint.load_weights(engine, checkpoint.open_weights(parent.checkpoint))
            return 0, 0
        reader = checkpoint.open_checkpoint(parent.checkpoint)
    assert reader is not None
    data = reader.manifest["data"]
    if data["fingerprint"] != fingerprint:
        raise UsageError(
            f"Checkpoint {reader.store.path()} was trained on data set {data['fingerprint']}, but the data set is now "
            f"{fingerprint}: the position in the data means nothing there. Restore the data, or start a new run from "
            f"its weights alone: shardyard train RECIPE --from {record.name}@{reader.manifest['step']} name=..."
        )
    checkpoint.load(engine, reader)
    return int(reader.manifest["step"]), int(data["examples_seen"])


def _newest_agreed(checkpoints: Store, record: RunRecord, world: World) -> checkpoint.CheckpointReader | None:
    """The newest checkpoint that verifies, the same on all ranks: rank 0 reads it all and decides."""
    step = 0
    if world.rank == 0:
        damage: list[str] = []
        found = checkpoint.newest(checkpoints, damage.append)
        for message in damage:
            record.event("checkpoint_damaged", error=message)
        step = found[0] if found else 0
    step = int(all_sum([float(step)])[0])
    return checkpoint.find(checkpoints, step) if step else None
