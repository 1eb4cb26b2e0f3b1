"""The composition root: a run's record in, a Session with everything a training loop needs out."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from configs.errors import Damaged, NotFound, PeerFailed, RunFailed
from configs.schema import RunConfig
from data_pipelines.examples import Examples
from data_pipelines.loader import Loader, MicroBatch, evaluation_batches
from trainer import checkpoint, device, peak_memory
from trainer.beginning import engine_at_start, load_newest, newest_agreed
from trainer.bound import BoundModel, BoundTask
from trainer.checkpoint import Checkpointer, CheckpointReader
from trainer.distributed import World, all_sum
from trainer.divergence import Divergence, Finding
from trainer.early_stopping import EarlyStopping
from trainer.engine import Engine
from trainer.generate import distinct
from trainer.pictures import encode_png
from trainer.progress import Progress
from trainer.record import RunRecord
from trainer.run_data import Position, RunData
from trainer.run_datasets import open_recorded
from trainer.skipping import NumberedBlock, agreed, unreadable, without_skipped
from trainer.validate import validate

_NAMED_EXAMPLES = 256  # of a step that diverged, in its event


@dataclass(frozen=True)
class Session:
    """All that one rank needs to train; built once an attempt, never changed."""

    config: RunConfig
    world: World
    record: RunRecord
    progress: Progress
    task: BoundTask
    model: BoundModel
    data: RunData
    loader: Loader
    engine: Engine
    checkpointer: Checkpointer
    start: Position
    early_stopping: EarlyStopping | None
    divergence: Divergence
    resumed: bool  # from a checkpoint of this run
    base_bytes: int  # of the process before it had a model

    @property
    def start_step(self) -> int:
        """Completed steps at the start of this attempt."""
        return self.start.step

    @property
    def writes_record(self) -> bool:
        """Rank 0 keeps the record; the others only train."""
        return self.world.rank == 0

    def log_metrics(self, step: int, values: dict[str, float]) -> None:
        """Metrics after `step` completed steps, into the run's record; every rank calls it."""
        seen = {"examples": float(self.examples_seen(step))} | self.data.metrics(self.position(step))
        if self.writes_record:
            self.record.metrics(step, values | seen)

    def log_rank(self, step: int, values: dict[str, float]) -> None:
        """How this rank has fared up to `step` completed steps; every rank calls it."""
        self.record.rank_row(step, values)

    def log_sample(self, step: int) -> None:
        """What the model now makes of nothing: text, and how little it repeats itself.

        Every rank takes part (ZeRO-3 shards).
        """
        length = self.config.evaluation.sample_tokens
        if length and self.task.has_samples:
            with self.engine.inference() as module:
                text = self.task.sample(module, self.data.datasets[0].tokenizer, length, self.config.seed)
            self.log_metrics(step, {f"sample/distinct_{size}": distinct(text, size) for size in (1, 2, 3)})
            if self.writes_record:
                self.record.sample(step, text)

    def log_pictures(self, step: int) -> None:
        """What the model makes of the first examples of the validation split. Every rank takes part (ZeRO-3 shards)."""
        size = self.config.batch.micro_batch_size
        examples = self.validation(size)
        if not (self.task.has_pictures and len(examples)):
            return
        (batch,) = evaluation_batches(
            examples,
            self.data.prepare_evaluation,
            micro_batch_size=size,
            rank=0,
            world_size=1,
            num_examples=size,
            pad=self.data.pad,
            ragged=self.data.ragged,
        )
        tensors = {name: tensor.to(self.world.device) for name, tensor in batch.tensors.items()}
        with self.engine.inference() as module:
            made = self.task.pictures(module, tensors, self.data.datasets[0].tokenizer, self.config.seed)
        if self.writes_record:
            for name, picture in made.items():
                self.record.picture(step, name, encode_png(picture))

    def micro_batches(self, step: int) -> list[MicroBatch]:
        """This rank's micro-batches of `step`; every rank calls it.

        With data.damage=skip the ranks first agree on the damaged blocks that any of them has met: from this step's
        first position on all of them leave out their examples, and so does every resume.

        Raises:
            Damaged: with data.damage=stop, or when nothing would be left.
        """
        while True:
            micro_batches = self.loader.step(step)
            if not self.data.skips_damage or not (found := agreed(self.loader.found_damage())):
                return micro_batches
            self._leave_out(found, step)

    def validation(self, num_examples: int | None) -> Examples:
        """What an evaluation of so many examples reads; every rank calls it. Less damaged blocks, as micro_batches."""
        if not self.data.skips_damage:
            return self.data.validation
        while True:
            examples = without_skipped(self.data.validation, self.loader.exceptions)
            found = agreed(unreadable(examples, self.world, self.config.batch.micro_batch_size, num_examples))
            if not found:
                return examples
            self._leave_out(found, self.progress.step)

    def _leave_out(self, blocks: list[NumberedBlock], step: int) -> None:
        position = self.examples_seen(step)
        self.loader.skip(blocks, position)
        if self.writes_record:
            self.record.event("data_skipped", step=step, position=position, blocks=blocks)
            named = ", ".join(f"block {block} of split '{split}'" for split, block in blocks)
            print(f"The data is damaged: {named} left out from step {step + 1} on.", file=sys.stderr, flush=True)

    def position(self, step: int) -> Position:
        """Where the run stands after `step` completed steps."""
        return Position(step, self.examples_seen(step), self.loader.exceptions)

    def save(self, step: int, evaluation: Mapping[str, float] = MappingProxyType({})) -> None:
        """Start saving a checkpoint after `step` completed steps; it is written behind the next ones.

        evaluation: metrics of the validation split after that step, if they were measured.
        """
        tokenizer = self.data.datasets[0].tokenizer
        extra: dict[str, Any] = {} if tokenizer is None else {"tokenizer": tokenizer.to_json()}
        finite = {name: value for name, value in evaluation.items() if math.isfinite(value)}
        if finite:
            extra["evaluation"] = {name.removeprefix("validation/"): value for name, value in finite.items()}
        if self.early_stopping is not None:
            extra["early_stopping"] = self.early_stopping.state()
        if self.config.recovery.divergence != "stop" or self.config.recovery.spike_factor is not None:
            extra["divergence"] = self.divergence.state()
        self.checkpointer.save(step, self.engine, self.data.state(self.position(step)), extra)

    def log_divergence(self, finding: Finding) -> None:
        """Say that a step diverged, and on which examples."""
        if not self.writes_record:
            return
        positions, ids = self.loader.examples(finding.done - 1)
        policy = self.config.recovery.divergence
        self.record.event(
            "diverged",
            step=finding.done,
            what=finding.what,
            value=finding.value,
            limit=finding.limit if math.isfinite(finding.limit) else None,
            loss=finding.loss,
            grad_norm=finding.grad_norm,
            policy=policy,
            positions=[int(positions[0]), int(positions[-1]) + 1],
            examples=len(ids),
            sample_ids=ids[:_NAMED_EXAMPLES].tolist(),
        )
        then = {"skip": " It makes no update.", "rollback": " Its examples are left out."}.get(policy, "")
        print(f"{finding}.{then}", file=sys.stderr, flush=True)

    def roll_back(self, step: int) -> int:
        """Return to the newest good checkpoint, and leave the examples of `step` (completed steps with it) out.

        Returns its step. Every rank calls it. Killed before the next checkpoint, a run resumes from this one without
        what it left out, diverges at the same step again, and comes here again: so it need not be kept elsewhere.

        Raises:
            RunFailed: no checkpoint is good, or the data ends too soon without these examples.
        """
        self.progress.phase = "restore"
        without = self.loader.positions(step - 1)
        self.checkpointer.wait()
        newest = newest_agreed(self.record, self.world)
        loaded = load_newest(self.record, self.world, self.engine, self.data, newest)
        if loaded is None:
            raise RunFailed(
                f"Step {step} diverged, and no checkpoint is good to roll back to. With recovery.divergence=skip a run "
                "needs none."
            )
        reader, start = loaded
        self.loader.go_back(start.step, start.examples, without)
        self.data.check_end(self.config, self.position(start.step))
        self.divergence.return_to(reader.manifest.get("divergence"))
        if self.early_stopping is not None:
            self.early_stopping.return_to(reader.manifest.get("early_stopping"))
        self.progress.step = start.step
        if self.writes_record:
            left_out = [int(without[0]), int(without[-1]) + 1]
            self.record.event("rolled_back", step=step, to=start.step, left_out=left_out)
            print(f"Rolled back to the checkpoint of step {start.step}.", file=sys.stderr, flush=True)
        return start.step

    def return_to_best(self, step: int) -> None:
        """After `step` completed steps give the engine the state of the best evaluation; the data's position stays.

        Every rank calls it.

        Raises:
            RunFailed: the checkpoint of that evaluation was not saved, or is damaged.
        """
        assert self.early_stopping is not None
        found = self.early_stopping.state()
        best = found["best_step"]
        self.wait_until_saved(best)
        try:
            checkpoint.load(self.engine, checkpoint.find(self.record.store.child("checkpoints"), best))
        except (NotFound, Damaged) as error:
            raise RunFailed(
                f"The best evaluation was after step {best}, and its checkpoint cannot be read: {error} With "
                "early_stopping=null the same command ends with the newest checkpoint's weights."
            ) from error
        if self.writes_record:
            self.record.event("best_evaluation", step=step, **found)

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
        return self.loader.position(step)

    def log_memory(self) -> None:
        """Every rank says what memory it took at most, beside which the launcher's prediction stands (planned)."""
        peak = peak_memory.peak_bytes(self.world.device)
        self.record.event("memory", rank=self.world.rank, peak_bytes=peak, base_bytes=self.base_bytes)

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

    The record must name its data sets (run_datasets.py).

    Raises:
        ConfigError: the config names something that is not there, or does not fit.
        UsageError: the data set is not the one that the checkpoint was trained on, or a parent does not fit.
    """
    config = record.config
    plan = validate(record.resolved, sees_inputs=False)
    base_bytes = peak_memory.begin(world.device)
    with ExitStack() as stack:
        progress.phase = "data"
        data = RunData.of(open_recorded(record, plan), plan)
        stack.callback(data.close)

        engine, reader, start = engine_at_start(record, plan, world, progress, data)
        checkpoints = record.store.child("checkpoints")
        checkpointer = Checkpointer(checkpoints, world, config.checkpoint, progress, record)
        stack.callback(checkpointer.close)

        loader = data.loader(config, world, start)
        stack.callback(loader.close)
        progress.step, progress.steps = start.step, config.steps
        record.begin_rank(world.rank, world.size, start.step, local_rank=world.local_rank, device=str(world.device))
        if world.rank == 0:
            record.event(
                "started",
                step=start.step,
                world_size=world.size,
                parameters=plan.num_parameters,
                data_fingerprint=data.fingerprint,
                **({} if data.waste is None else {"packing_waste": round(data.waste, 6)}),
            )
        yield Session(
            config=config,
            world=world,
            record=record,
            progress=progress,
            task=plan.task,
            model=plan.model,
            data=data,
            loader=loader,
            engine=engine,
            checkpointer=checkpointer,
            start=start,
            early_stopping=_early_stopping(config, reader),
            divergence=Divergence.of(config.recovery, None if reader is None else reader.manifest.get("divergence")),
            resumed=reader is not None,
            base_bytes=base_bytes,
        )


def _early_stopping(config: RunConfig, reader: CheckpointReader | None) -> EarlyStopping | None:
    if config.early_stopping is None:
        return None
    state = None if reader is None else reader.manifest.get("early_stopping")
    return EarlyStopping.of(config.early_stopping, state)
