"""A run's data: the examples of both splits, the order of the first, and what is done to each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from configs.errors import UsageError
from configs.schema import RunConfig
from data_pipelines.buckets import BucketOrder
from data_pipelines.build import Progress, RunTasks, ensure_dataset
from data_pipelines.data_state import Exceptions
from data_pipelines.examples import Examples, Rows
from data_pipelines.lengths import MixtureLengths
from data_pipelines.loader import Loader
from data_pipelines.mixture import SLOTS, Change, MixtureExamples, MixtureOrder, Schedule
from data_pipelines.mixture_build import ensure_mixture
from data_pipelines.order import Order, choose_order
from data_pipelines.ownership import owners
from data_pipelines.shards import Dataset
from data_pipelines.storage import Store
from trainer.data_position import check_buckets, describe, differences
from trainer.distributed import World
from trainer.reading import reading_metrics
from trainer.validate import Plan, columns_misfit

if TYPE_CHECKING:
    from trainer.bound import BoundTask, Prepare

MIXTURE = "mixture"


def open_datasets(plan: Plan, progress: Progress | None = None, run_tasks: RunTasks | None = None) -> list[Dataset]:
    """The data set of a plan, or those of a mixture's sources; built where they are not there yet."""
    config = plan.config
    store, options = Store(config.store), {"seq_lens": plan.seq_lens}
    if config.data.name == MIXTURE:
        return ensure_mixture(store, config.data, plan.tokenizer, progress, run_tasks, **options)
    return [ensure_dataset(store, config.data, plan.tokenizer, progress, run_tasks, **options)]


def fingerprint(datasets: Sequence[Dataset]) -> str:
    """32 hex digits over the content of a run's data sets; a data set's own where there is one."""
    if len(datasets) == 1:
        return datasets[0].fingerprint
    return xxhash.xxh3_128_hexdigest("".join(dataset.fingerprint for dataset in datasets).encode())


@dataclass(frozen=True)
class Position:
    """Where a run stands: completed steps, examples seen of the endless order, and what it leaves out of it."""

    step: int = 0
    examples: int = 0
    exceptions: Exceptions = field(default_factory=Exceptions)


@dataclass(frozen=True)
class Totals:
    """Of a split: labels that count, and bytes of its text; 0 where it is not text."""

    num_tokens: int
    num_bytes: int


@dataclass(frozen=True)
class RunData:
    """The data of one run, opened; a data set for each source of a mixture.

    prepare, prepare_evaluation: see BoundTask.preparation. validation_totals: of the whole validation split.
    """

    datasets: tuple[Dataset, ...]
    train: Examples
    validation: Examples
    validation_totals: Totals
    order: Order
    mixture: MixtureOrder | None  # what `order` is made of, or is
    length_column: str | None
    source_names: tuple[str, ...]
    prepare: Prepare | None
    prepare_evaluation: Prepare | None
    description: Mapping[str, Any]
    pad: float
    ragged: Mapping[str, int]
    skips_damage: bool

    @classmethod
    def of(cls, datasets: Sequence[Dataset], plan: Plan) -> RunData:
        """The examples that the plan's task reads.

        Raises:
            UsageError: a data set lacks a column that the task reads, or has no example to train on.
        """
        task, settings = plan.task, plan.source_config
        for dataset in datasets:
            if (misfit := columns_misfit(plan.config, task, dataset.index.columns)) is not None:
                raise UsageError(misfit)
        train, validation = ([_examples(each, split, task) for each in datasets] for split in ("train", "validation"))
        for dataset, examples in zip(datasets, train, strict=True):
            if len(examples) == 0:
                raise UsageError(f"The training split of {dataset.path} is empty. Give the data source more to read.")
        totals = [(getattr(each, "num_tokens", 0), getattr(each, "num_bytes", 0)) for each in validation]
        stored = datasets[0].index.columns
        mixed = plan.config.data.name == MIXTURE
        order = _order(plan, train)
        return cls(
            datasets=tuple(datasets),
            train=MixtureExamples(train) if mixed else train[0],
            validation=MixtureExamples(validation, "validation") if mixed else validation[0],
            validation_totals=Totals(sum(tokens for tokens, _ in totals), sum(size for _, size in totals)),
            order=_in_buckets(order, plan, datasets),
            mixture=order if isinstance(order, MixtureOrder) else None,
            length_column=task.length_column(),
            source_names=_source_names(plan),
            prepare=task.preparation(stored, training=True),
            prepare_evaluation=task.preparation(stored, training=False),
            description=_described(datasets),
            pad=task.pad,
            ragged=task.ragged,
            skips_damage=settings.damage == "skip",
        )

    @property
    def fingerprint(self) -> str:
        """32 hex digits over all content; a data set's own where there is one."""
        return fingerprint(self.datasets)

    def close(self) -> None:
        """Let go of files."""
        for dataset in self.datasets:
            dataset.close()

    def loader(self, config: RunConfig, world: World, start: Position) -> Loader:
        """This rank's micro-batches of the order, from `start` on.

        Raises:
            UsageError: a mixture's sources end before the run does.
        """
        self.check_end(config, start)
        return Loader(
            self.train,
            self.order,
            self.prepare,
            seed=config.seed,
            global_batch_size=config.batch.global_batch_size,
            micro_batch_size=config.batch.micro_batch_size,
            rank=world.rank,
            world_size=world.size,
            start_step=start.step,
            examples_seen=start.examples,
            exceptions=start.exceptions,
            threads=config.resources.loader_threads,
            pin=world.device.type == "cuda",
            pad=self.pad,
            ragged=self.ragged,
            damage="skip" if self.skips_damage else "stop",
        )

    def check_end(self, config: RunConfig, position: Position) -> None:
        """Refuse to go on from a position where the order ends before the run does.

        Raises:
            UsageError: a mixture's sources end before.
        """
        if self.mixture is not None:
            _check_length(self.mixture.schedule, self._end(config, position))

    @staticmethod
    def _end(config: RunConfig, position: Position) -> int:
        taken = (config.steps - position.step) * config.batch.global_batch_size
        return position.examples + taken + position.exceptions.num_passed(position.examples)

    def state(self, position: Position) -> dict[str, Any]:
        """For a checkpoint: where the run stands, and in which data."""
        state = {
            "examples_seen": position.examples,
            "fingerprint": self.fingerprint,
            "exceptions": position.exceptions.state(),
            "dataset": dict(self.description),
        }
        if self.mixture is not None:
            state["mixture"] = self.mixture.schedule.history(position.examples)
        if (buckets := self._buckets(position.examples)) is not None:
            state["buckets"] = buckets
        return state

    def _buckets(self, examples: int) -> dict[str, Any] | None:
        """What the order in buckets follows from at a position; None without buckets."""
        if not isinstance(self.order, BucketOrder):
            return None
        return {"column": self.length_column, **self.order.state(examples)}

    def metrics(self, position: Position) -> dict[str, float]:
        """What is worth a curve: blocks left out, where damage is; a mixture's shares of the last examples.

        And what all ranks had to do to read from a remote store, since each was started: see trainer/reading.py. Every
        rank calls it.
        """
        skipped, stop = len(position.exceptions.skipped), position.examples
        found = {"data/skipped_blocks": float(skipped)} if skipped else {}
        if self.mixture is not None:
            start = max(0, stop - SLOTS)
            whole = not skipped and not position.exceptions.passed and self.order is self.mixture
            given = None if whole else self._given(start, position)
            found |= self.mixture.metrics(self.source_names, start, stop, given)
        prefixes = ["data"] if len(self.datasets) == 1 else [f"data/{name}" for name in self.source_names]
        return found | reading_metrics(dict(zip(prefixes, self.datasets, strict=True)))

    def _given(self, start: int, position: Position) -> np.ndarray:
        """How many examples of each source of a mixture were given from a position on, (sources,) int64."""
        positions = np.arange(start, position.examples)
        for passed in position.exceptions.passed:
            positions = positions[(positions < passed.start) | (positions >= passed.stop)]
        ids = self.order.sample_ids(positions)
        blocks = owners(np.cumsum(self.train.block_examples), ids)
        ids = ids[position.exceptions.kept(self.train.name, blocks, positions)]
        assert isinstance(self.train, MixtureExamples)
        sources = owners(np.cumsum([len(part) for part in self.train.parts]), ids)
        return np.bincount(sources, minlength=len(self.train.parts))

    @property
    def waste(self) -> float | None:
        """The share of a packed training split that is padding; None where nothing is packed."""
        parts = [part for part in getattr(self.train, "parts", (self.train,)) if hasattr(part, "waste")]
        places = sum(len(part) for part in parts)
        return sum(part.waste * len(part) for part in parts) / places if places else None

    def position(self, manifest: Mapping[str, Any], source: str) -> Position:
        """Where the run of a checkpoint (its manifest; `source` names it) stands in this data.

        Raises:
            UsageError: it stands in other data, or within a bucket of another order; says what has changed.
            Damaged: its exceptions cannot be read.
        """
        data = manifest["data"]
        if data["fingerprint"] != self.fingerprint:
            changes = "; ".join(differences(data.get("dataset", {}), self.description))
            raise UsageError(
                f"{source} was trained on data set {data['fingerprint']}, but the data set is now "
                f"{self.fingerprint}: the position in the data means nothing there. What changed: "
                f"{changes or 'its content'}. Restore the data, or start a new run from its weights alone: "
                f"shardyard train RECIPE --from {manifest['run']}@{manifest['step']} name=..."
            )
        examples = int(data["examples_seen"])
        if self.mixture is not None:
            self.mixture.schedule.check_history(data.get("mixture", []), examples)
        check_buckets(data.get("buckets"), self._buckets(examples), examples, source)
        return Position(int(manifest["step"]), examples, Exceptions.from_state(data["exceptions"]))


def _examples(dataset: Dataset, split: str, task: BoundTask) -> Examples:
    seq_len = task.packing()
    if seq_len is None:
        return Rows(dataset.split(split), task.columns(), split)
    return dataset.packed(split, seq_len, task.packing_kind())


def _order(plan: Plan, train: Sequence[Examples]) -> Order:
    """Each source of a mixture has an order of its own, so that none moves when another's data grows."""
    settings: Any = plan.source_config
    orders = [
        choose_order(settings.shuffle, plan.config.seed + number, each.block_examples, settings.window_blocks)
        for number, each in enumerate(train)
    ]
    if plan.config.data.name != MIXTURE:
        return orders[0]
    epochs = [source.max_epochs for source in settings.sources]
    caps = [None if most is None else round(most * len(each)) for most, each in zip(epochs, train, strict=True)]
    size = plan.config.batch.global_batch_size
    changes = [Change(change.position(size), change.weights) for change in settings.changes]
    return MixtureOrder(orders, Schedule([source.weight for source in settings.sources], caps, changes))


def _in_buckets(order: Order, plan: Plan, datasets: Sequence[Dataset]) -> Order:
    """The order with rows of like length side by side, where the task names the column of their lengths."""
    column, batch = plan.task.length_column(), plan.config.batch
    if column is None:
        return order
    parts = [dataset.lengths("train", column) for dataset in datasets]
    return BucketOrder(
        order,
        MixtureLengths(parts) if len(parts) > 1 else parts[0],
        seed=plan.config.seed,
        global_batch_size=batch.global_batch_size,
        micro_batch_size=batch.micro_batch_size,
        cuts=order.schedule.changes if isinstance(order, MixtureOrder) else (),
    )


def _source_names(plan: Plan) -> tuple[str, ...]:
    settings: Any = plan.source_config
    if plan.config.data.name != MIXTURE:
        return (plan.config.data.name,)
    return tuple(f"{number}-{source.data.name}" for number, source in enumerate(settings.sources))


def _described(datasets: Sequence[Dataset]) -> dict[str, Any]:
    if len(datasets) == 1:
        return describe(datasets[0].index)
    return {"sources": [describe(dataset.index) for dataset in datasets]}


def _check_length(schedule: Schedule, examples: int) -> None:
    if schedule.end is not None and examples > schedule.end:
        raise UsageError(
            f"The run takes {examples:,} examples, but after {schedule.end:,} every source of the mixture has had its "
            "max_epochs. Set steps lower, or raise max_epochs of a source (null has no end)."
        )
