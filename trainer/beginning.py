"""Where an engine begins: at the run's newest good checkpoint, at its parent's, or with first values."""

from __future__ import annotations

import gc
import sys

from configs.errors import Damaged, UsageError
from data_pipelines.shards import Dataset
from data_pipelines.tokenizer_file import same_ids
from trainer import checkpoint
from trainer.checkpoint import CheckpointReader
from trainer.distributed import World, of_rank_0
from trainer.engine import Engine
from trainer.parent import check_parent, tokenizer_of
from trainer.progress import Progress
from trainer.record import RunRecord
from trainer.run_data import Position, RunData
from trainer.validate import Plan
from trainer.warm_start import WarmModel, warm


def engine_at_start(
    record: RunRecord, plan: Plan, world: World, progress: Progress, data: RunData
) -> tuple[Engine, CheckpointReader | None, Position]:
    """The engine at the run's newest good checkpoint, else as its config begins it; that checkpoint, and its position.

    Each rank reads only its own part, so damage is met while an engine is filled: it is filled anew from an older
    checkpoint, and made anew where there is none, so that nothing of a damaged one stays.
    """
    progress.phase = "restore"
    reader = newest_agreed(record, world)
    progress.phase = "model"
    if reader is not None:
        engine = Engine(plan.model, record.config, world, progress)
        progress.phase = "restore"
        if (loaded := load_newest(record, world, engine, data, reader)) is not None:
            return engine, *loaded
        progress.phase = "model"
        del engine
        gc.collect()  # its memory is needed again
    model = plan.model if record.config.warm_start is None else _warmed(record, plan, world)
    engine = Engine(model, record.config, world, progress)
    progress.phase = "restore"
    return engine, None, begin(record, engine, data)


def _warmed(record: RunRecord, plan: Plan, world: World) -> WarmModel:
    """The model with the first values that the config names; the record tells what they were used for."""
    assert plan.config.warm_start is not None
    model = warm(plan.model, plan.config.warm_start)
    if world.rank == 0:
        weights, fresh = plan.config.warm_start.weights, plan.config.warm_start.fresh
        record.event("warm_start", weights=weights, taken=len(model.stored), fresh=fresh, unused=model.unused)
        left = f"; not used: {', '.join(model.unused)}" if model.unused else ""
        print(f"{len(model.stored)} tensors are taken from {weights}{left}.", file=sys.stderr, flush=True)
    return model


def begin(record: RunRecord, engine: Engine, data: RunData) -> Position:
    """Load what the parent has, if there is one."""
    parent = record.config.parent
    if parent is None:
        return Position()
    if parent.state == "all":
        reader = checkpoint.open_checkpoint(parent.checkpoint)
        check_parent(record.config, reader.manifest, "all")
        return load_all(reader, engine, data)
    source = checkpoint.open_weights(parent.checkpoint)
    if isinstance(source, CheckpointReader):
        check_parent(record.config, source.manifest, "weights")
    if (tokenizer := tokenizer_of(parent.checkpoint)) is not None:
        check_tokenizer(tokenizer, parent.checkpoint, data.datasets[0])
    checkpoint.load_weights(engine, source)
    return Position()


def load_newest(
    record: RunRecord, world: World, engine: Engine, data: RunData, reader: CheckpointReader | None
) -> tuple[CheckpointReader, Position] | None:
    """Load `reader`, or the newest one before it of which every rank can read its part: which it was, and its position.

    None if there is no such: then the engine is left half filled.
    """
    while reader is not None:
        try:
            return reader, load_all(reader, engine, data)
        except Damaged as error:
            if world.rank == 0:
                _tell_damage(record, checkpoint.skipped(reader.store, str(error)))
            reader = newest_agreed(record, world, reader.manifest["step"])
    return None


def load_all(reader: CheckpointReader, engine: Engine, data: RunData) -> Position:
    """Give the engine all that a checkpoint has; returns its position in this data. Every rank calls it."""
    position = data.position(reader.manifest, f"Checkpoint {reader.store.path()}")
    checkpoint.load(engine, reader)
    return position


def check_tokenizer(parents: str, source: str, dataset: Dataset) -> None:
    """Refuse weights that know the token ids of another tokenizer (both as the text of a tokenizer.json).

    Raises:
        UsageError: a BPE is trained on its data, so on other data the same ids mean something else.
    """
    tokenizer = dataset.tokenizer
    if tokenizer is None or not same_ids(parents, tokenizer.to_json()):
        raise UsageError(
            f"The weights of {source} know the token ids of another tokenizer than that of data set {dataset.path}: a "
            "bpe tokenizer is trained on its data. Give the parent's tokenizer.json as task.tokenizer.file "
            "(`shardyard train --from` does), or train both runs with task.tokenizer.name=bytes."
        )


def newest_agreed(record: RunRecord, world: World, before: int | None = None) -> CheckpointReader | None:
    """The newest checkpoint, older than step `before`, with a good manifest and files of the right sizes.

    The same on all ranks: rank 0 decides, and names what it skips. What is in the files is verified as it is read.
    """
    checkpoints = record.store.child("checkpoints")
    step = -1
    if world.rank == 0:
        damage: list[str] = []
        found = checkpoint.newest(checkpoints, damage.append, before=before, contents=False)
        for message in damage:
            _tell_damage(record, message)
        step = found[0] if found else -1
    step = int(of_rank_0(float(step)))
    return checkpoint.find(checkpoints, step) if step >= 0 else None


def _tell_damage(record: RunRecord, message: str) -> None:
    print(message, file=sys.stderr, flush=True)
    record.event("checkpoint_damaged", error=message)
