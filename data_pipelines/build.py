"""From a source to a data set in a store, once: `ensure_dataset` builds what is not there yet.

A source names its partitions, of 4 to 64 MB of input each, and every step is a task a partition (partition.py), run
here one after the other or by `run_tasks` on all cores of all nodes:

1. where near-duplicates share a group, or duplicates are dropped: signatures of all rows, then groups (duplicates.py);
2. the split (split.py), and the tokenizer, trained on a spread of texts over the whole source;
3. the shards of each partition, and what became of it in parts/NNNNN.json, written last;
4. the list of bad rows and the index; then parts/ goes.

The files lie in the data set's own folder from the beginning. There is a data set when there is an index; a build that
was killed, or that met a full disk, goes on from the partitions that are done. What a partition writes depends on the
source and the settings alone, so the bytes are the same whatever the number of workers, kills and tries.

Memory: a block for each split, and a batch of rows, a worker; here some 200 bytes a block, and in step 1 no more than
repeats.MEMORY_BYTES: of the rows it keeps files in the folder, which go with parts/. In a local folder one process
builds at a time, and others wait; in a remote store, which has no locks, two builders write the same bytes twice.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import xxhash

from configs.errors import ShardyardError, UsageError
from configs.schema import Plugin
from data_pipelines import build_steps as steps
from data_pipelines.build_folder import clear, refuse_other_files, sweep
from data_pipelines.build_lock import hold
from data_pipelines.build_steps import Progress, RunTasks, Work
from data_pipelines.damage import DamagePolicy
from data_pipelines.index import FORMAT_VERSION, INDEX_FILE
from data_pipelines.local_files import explain
from data_pipelines.partition import stored_columns
from data_pipelines.partition_rows import PARTS, Job, source_of
from data_pipelines.shards import Dataset
from data_pipelines.sources import READING_SETTINGS, SourceConfig
from data_pipelines.storage import Store
from data_pipelines.tokenizer import TokenizerConfig
from data_pipelines.tokenizer_file import file_digest

__all__ = [
    "FOLDER",
    "Build",
    "Progress",
    "RunTasks",
    "dataset_digest",
    "dataset_name",
    "ensure_dataset",
    "newest_built",
    "policy_of",
]

FOLDER = "datasets"  # in the store


def dataset_digest(data: Plugin, tokenizer: TokenizerConfig | None) -> str:
    """32 hex digits over the settings and the present state of the source (names, sizes, times: no content is read).

    Of a tokenizer's file the content counts, not where it lies. Raises NotFound where there is none.
    """
    source, config = source_of(data)
    return _digest([*_settings(data, config, tokenizer), source.identity(config)])


def dataset_name(data: Plugin, tokenizer: TokenizerConfig | None) -> str:
    """The name of the data set's folder in <store>/datasets/: SOURCE-SETTINGS-DIGEST. Raises as dataset_digest."""
    return f"{_begin_of_name(data, tokenizer)}{dataset_digest(data, tokenizer)[:16]}"


def newest_built(store: Store, data: Plugin, tokenizer: TokenizerConfig | None) -> str | None:
    """The name of the data set that was built last with these settings; None where there is none.

    The source is not asked: for when it is gone.
    """
    folder, begin = store.child(FOLDER), _begin_of_name(data, tokenizer)
    built = [
        (index.changed or 0, name)
        for name in folder.list_dirs()
        if name.startswith(begin) and (index := folder.info(f"{name}/{INDEX_FILE}")) is not None
    ]
    return max(built)[1] if built else None


def _begin_of_name(data: Plugin, tokenizer: TokenizerConfig | None) -> str:
    settings = _digest(_settings(data, source_of(data)[1], tokenizer))
    return f"{data.name.replace('.', '-')}-{settings[:8]}-"


def _settings(data: Plugin, config: SourceConfig, tokenizer: TokenizerConfig | None) -> list[Any]:
    """All that a data set depends on but the source itself."""
    return [
        FORMAT_VERSION,
        data.name,
        config.model_dump(mode="json", exclude=set(READING_SETTINGS)),
        tokenizer.model_dump(exclude={"file"}) if tokenizer else None,
        file_digest(tokenizer.file) if tokenizer is not None and tokenizer.file is not None else None,
    ]


def _digest(described: list[Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(described, sort_keys=True).encode())


def ensure_dataset(
    store: Store,
    data: Plugin,
    tokenizer: TokenizerConfig | None,
    progress: Progress | None = None,
    run_tasks: RunTasks | None = None,
    *,
    seq_lens: Sequence[int] = (),
) -> Dataset:
    """The data set of a source, opened from <store>/datasets/; built first where it is not there.

    tokenizer: None keeps the rows as the source gives them. run_tasks: None works in this process. seq_lens: the
    lengths of which a build counts the best-fit sequences (others are counted when the data set is opened).

    Raises ShardyardErrors: a source or a tokenizer's file that is missing, empty or not readable, too many bad rows,
    a full disk.
    """
    if data.name == "mixture":
        raise UsageError(
            "A mixture is a data set for each of its sources. Build it with ensure_mixture, or each by itself."
        )
    _, config = source_of(data)
    folder = store.child(FOLDER, dataset_name(data, tokenizer))
    Build(folder, data, tokenizer, Work(progress or _silent, run_tasks), tuple(seq_lens)).ensure()
    return Dataset.open(folder, damage=policy_of(config))


def policy_of(config: SourceConfig) -> DamagePolicy:
    """How a source's settings say that its data set is read."""
    return DamagePolicy(
        action=config.damage,
        retry_s=config.retry_s,
        stall_s=config.stall_s,
        cache_path=config.cache_dir,
        cache_bytes=config.cache_bytes,
    )


def _silent(_stage: str, _rows: int) -> None:
    pass


class Build:
    """One build of one data set."""

    def __init__(
        self,
        folder: Store,
        data: Plugin,
        tokenizer: TokenizerConfig | None,
        work: Work,
        seq_lens: tuple[int, ...] = (),
    ) -> None:
        self._folder = folder
        self._data = data
        self._tokenizer = tokenizer
        self._work = work
        self._seq_lens = seq_lens
        self._source, self._config = source_of(data)

    def ensure(self) -> None:
        """Build, unless it is there or another process does it; afterwards nothing is left of the work."""
        target = self._folder.local_path()
        if target is None:
            if not self._folder.exists(INDEX_FILE):
                self._run_or_clear()
                self._folder.delete_dir(PARTS)
            return

        def is_done() -> bool:
            return (target / INDEX_FILE).exists() and not (target / PARTS).exists()

        try:
            with hold(target, is_done, self._waiting) as locked:
                if locked and not (target / INDEX_FILE).exists():
                    refuse_other_files(target)
                    self._run_or_clear()
                if locked:
                    shutil.rmtree(target / PARTS, ignore_errors=True)
        except OSError as error:
            raise explain(error, "build the data set", target) from error

    def _waiting(self) -> None:
        self._work.progress("waiting for another process that builds the same data set", 0)

    def _run_or_clear(self) -> None:
        try:
            sweep(self._folder)
            self.run()
        except BaseException as error:
            with contextlib.suppress(ShardyardError, OSError):  # the disk is full, the store is gone: the next one does
                if isinstance(error, UsageError):
                    # Other input, or other settings, have another folder: what is here is of no use to them.
                    clear(self._folder)
                else:
                    sweep(self._folder)
            raise

    def run(self) -> None:
        """Write the data set's files, the index last."""
        digest = dataset_digest(self._data, self._tokenizer)
        self._work.progress("reading", 0)
        jobs = self.jobs()
        near = self._config.duplicates == "near" or getattr(self._source, "NEAR_DUPLICATES_SHARE_A_SPLIT", False)
        unique = self._config.duplicates != "keep"
        values = self._source.schema(self._config)
        if near or unique:
            steps.check_near(self._data.name, near, values)
            jobs = [replace(job, near=near, unique=unique) for job in jobs]
            jobs = steps.group(self._work, jobs, self._data.name, self._config.max_bad_share)
        jobs = self.split(jobs)
        tokenizer = None
        if self._tokenizer is not None:
            steps.check_text(self._data.name, values)
            tokenizer, tokenizer_digest = steps.tokenizer(self._work, jobs, self._tokenizer)
            jobs = [replace(job, tokenizer=tokenizer_digest) for job in jobs]
        stage = "writing" if tokenizer is None else "tokenizing"
        steps.write_shards(self._work, jobs, self._data.name, self._config.max_bad_share, stage)
        if dataset_digest(self._data, self._tokenizer) != digest:
            raise UsageError(
                f"The source {self._data.name} was changed while the data set was built from it. Run the same command "
                "again when it stays as it is."
            )
        self._work.progress("writing the index", 0)
        steps.finish(self._folder, self._data, jobs, stored_columns(values, tokenizer), tokenizer)

    def jobs(self) -> list[Job]:
        """A job for each partition of the source. Raises UsageError where there is none."""
        partitions = self._source.partitions(self._config)
        if not partitions:
            raise UsageError(f"The source {self._data.name} has nothing to read. Check what it is given in data.")
        return [Job(self._folder, self._data, partition, number) for number, partition in enumerate(partitions)]

    def split(self, jobs: Sequence[Job]) -> list[Job]:
        """The same jobs, knowing the split, and what is counted for `write`."""
        settings = self._config
        rule = steps.split_of(jobs, self._data.name, settings.validation_fraction, settings.max_bad_share)
        return [replace(job, split=rule, seq_lens=self._seq_lens) for job in jobs]
