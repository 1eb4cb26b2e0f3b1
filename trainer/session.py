"""The composition root: a run's record in, a Session with everything a training loop needs out."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from configs.errors import PeerFailed, RunFailed, UsageError
from configs.schema import RunConfig
from data_pipelines.build import ensure_dataset
from data_pipelines.loader import Loader
from data_pipelines.pack import PackedSplit
from data_pipelines.shards import Dataset
from data_pipelines.storage import Store
from data_pipelines.tokenizer_file import same_ids
from trainer import checkpoint, device
from trainer.bound import BoundModel, BoundTask
from trainer.checkpoint import Checkpointer, CheckpointReader
from trainer.distributed import World, all_sum
from trainer.engine import Engine
from trainer.parent import check_parent, tokenizer_of
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

    def wait_until_saved(self, step: int) -> None:
        """Wait for the save of `step`, the last one of this attempt; all ranks call it.

        Raises:
            RunFailed: it could not be written, on any rank; without it what was trained since the one before is lost.
            PeerFailed: the same on the other ranks, since rank 0 is told of every rank's cause.
        """
        self.checkpointer.wait()
        error = self.checkpointer.last_error
        if all_sum([float(error is not None)])[0]:
            if self.world.rank != 0:
                raise PeerFailed(error or f"The checkpoint of step {step} was not saved: rank 0 tells why.")
            raise RunFailed(
                f"{error or f'The checkpoint of step {step} was not saved: see the logs of the other ranks.'} It was "
                "the last one: the same command goes on from the newest good checkpoint."
            )

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
        UsageError: the data set is not the one that the checkpoint was trained on, or a parent does not fit.
    """
    config = record.config
    plan = validate(record.resolved)
    with ExitStack() as stack:
        progress.phase = "data"
        tokenizer = plan.tokenizer
        dataset = ensure_dataset(Store(config.store), config.data, tokenizer)
        seq_len = plan.task.packing()
        assert seq_len is not None, "only tasks on packed documents have a loader"
        train_split = dataset.packed("train", seq_len)

        progress.phase = "model"
        engine = Engine(plan.model, config, world, progress)
        checkpoints = record.store.child("checkpoints")
        checkpointer = Checkpointer(checkpoints, world, config.checkpoint.keep, progress, record)
        stack.callback(checkpointer.close)
        progress.phase = "restore"
        start_step, start_examples = _restore(record, engine, world, dataset)

        loader = _loader(train_split, plan.task, config, world, start_step, start_examples)
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
            prepare=plan.task.prepare,
            loader=loader,
            engine=engine,
            checkpointer=checkpointer,
            start_step=start_step,
            start_examples=start_examples,
        )


def _loader(
    split: PackedSplit, task: BoundTask, config: RunConfig, world: World, start_step: int, start_examples: int
) -> Loader:
    """This rank's micro-batches of the global order, from (completed steps, examples seen) on."""
    return Loader(
        split,
        task.prepare,
        seed=config.seed,
        global_batch_size=config.batch.global_batch_size,
        micro_batch_size=config.batch.micro_batch_size,
        rank=world.rank,
        world_size=world.size,
        start_step=start_step,
        examples_seen=start_examples,
    )


def _restore(record: RunRecord, engine: Engine, world: World, dataset: Dataset) -> tuple[int, int]:
    """Load the run's newest good checkpoint, else its parent's; returns (completed steps, examples seen)."""
    reader = _newest_agreed(record, world)
    if reader is not None:
        return _load_all(reader, engine, dataset)
    parent = record.config.parent
    if parent is None:
        return 0, 0
    if parent.state == "all":
        reader = checkpoint.open_checkpoint(parent.checkpoint)
        check_parent(record.config, reader.manifest, "all")
        return _load_all(reader, engine, dataset)
    source = checkpoint.open_weights(parent.checkpoint)
    if isinstance(source, CheckpointReader):
        check_parent(record.config, source.manifest, "weights")
    if (tokenizer := tokenizer_of(parent.checkpoint)) is not None:
        check_tokenizer(tokenizer, parent.checkpoint, dataset)
    checkpoint.load_weights(engine, source)
    return 0, 0


def _load_all(reader: CheckpointReader, engine: Engine, dataset: Dataset) -> tuple[int, int]:
    data = reader.manifest["data"]
    if data["fingerprint"] != dataset.fingerprint:
        raise UsageError(
            f"Checkpoint {reader.store.path()} was trained on data set {data['fingerprint']}, but the data set is now "
            f"{dataset.fingerprint}: the position in the data means nothing there. Restore the data, or start a new "
            "run from its weights alone: "
            f"shardyard train RECIPE --from {reader.manifest['run']}@{reader.manifest['step']} name=..."
        )
    checkpoint.load(engine, reader)
    return int(reader.manifest["step"]), int(data["examples_seen"])


def check_tokenizer(parents: str, source: str, dataset: Dataset) -> None:
    """Refuse weights that know the token ids of another tokenizer (both as the text of a tokenizer.json).

    Raises:
        UsageError: a BPE is trained on its data, so on other data the same ids mean something else.
    """
    if not same_ids(parents, dataset.tokenizer.to_json()):
        raise UsageError(
            f"The weights of {source} know the token ids of another tokenizer than that of data set {dataset.path}: a "
            "bpe tokenizer is trained on its data. Give the parent's tokenizer.json as task.tokenizer.file "
            "(`shardyard train --from` does), or train both runs with task.tokenizer.name=bytes."
        )


def _newest_agreed(record: RunRecord, world: World) -> CheckpointReader | None:
    """The newest checkpoint that verifies, the same on all ranks: rank 0 reads it all, decides, names what it skips."""
    checkpoints = record.store.child("checkpoints")
    step = 0
    if world.rank == 0:
        damage: list[str] = []
        found = checkpoint.newest(checkpoints, damage.append)
        for message in damage:
            print(message, file=sys.stderr, flush=True)
            record.event("checkpoint_damaged", error=message)
        step = found[0] if found else 0
    step = int(all_sum([float(step)])[0])
    return checkpoint.find(checkpoints, step) if step else None
