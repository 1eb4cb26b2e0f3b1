"""The rows of one partition of a source, as a build takes them: good ones, numbered, each with its group."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import xxhash

from configs.errors import UsageError
from configs.load import validate_plugin
from configs.plugins import find_plugin
from configs.problems import ConfigError
from configs.schema import Plugin
from data_pipelines.columns import has_empty_text
from data_pipelines.duplicates import content_hash, group_number, read_groups
from data_pipelines.filters import reason_to_drop
from data_pipelines.index import FORMAT_VERSION
from data_pipelines.quarantine import BadRows
from data_pipelines.sources import Bad, Partition, Row, SourceConfig
from data_pipelines.split import Member, Split
from data_pipelines.storage import Store

PARTS = "parts"  # the folder of what a build keeps while it goes on
LENGTHS_ENDING = ".lengths"  # of a partition's parts of lengths.bin
_SPLIT_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,31}")


@dataclass(frozen=True)
class Job:
    """A partition, and what is to be known to work on it. Pickles.

    near: near-duplicates are looked for; grouped: their groups are there (after `sign`); unique: only the first row of
    a group is kept. split, tokenizer (digest of tokenizer.json, None without) and seq_lens (best-fit sequences of these
    lengths are counted) are for `write`.
    """

    store: Store
    data: Plugin
    partition: Partition
    number: int
    near: bool = False
    grouped: bool = False
    unique: bool = False
    split: Split | None = None
    tokenizer: str | None = None
    seq_lens: tuple[int, ...] = ()

    @property
    def path(self) -> str:
        """What the names of this partition's files in PARTS begin with."""
        return f"{PARTS}/{self.number:05d}"

    @property
    def digest(self) -> str:
        """Of everything that what is written depends on, but the source itself."""
        facts = asdict(replace(self, store=Store("."), data=Plugin(name=self.data.name)))
        described = [FORMAT_VERSION, {name: value for name, value in facts.items() if name not in ("store", "data")}]
        return xxhash.xxh3_128_hexdigest(json.dumps(described, sort_keys=True).encode())


def source_of(data: Plugin) -> tuple[Any, SourceConfig]:
    """The source's module and its checked settings. Raises ConfigError."""
    source = find_plugin("data_pipelines.sources", data.name)
    config, problems = validate_plugin(source.Config, data, "data", {})
    if not isinstance(config, SourceConfig):
        raise ConfigError(problems)
    return source, config


class Rows:
    """The rows of a partition that are neither bad nor filtered out. count, dropped: what was read and left out."""

    def __init__(self, job: Job, bad: BadRows | None = None) -> None:
        self.count = 0
        self.dropped: Counter[str] = Counter()
        self._job = job
        self._bad = bad

    def __iter__(self) -> Iterator[Row]:
        source, config = source_of(self._job.data)
        for row in source.read(config, self._job.partition):
            self.count += 1
            if isinstance(row, Bad):
                if self._bad is not None:
                    self._bad.add(row)
                continue
            reason = "empty" if has_empty_text(row.values) else reason_to_drop(config, row)
            if reason is not None:
                self.dropped[reason] += 1
            elif row.split is not None and not _SPLIT_NAME.fullmatch(row.split):
                if self._bad is not None:
                    self._bad.add(Bad(self._job.partition.name, None, f"{row.key}: '{row.split}' names no split", ""))
            else:
                yield row


def members(job: Job, rows: Rows | None = None) -> Iterator[tuple[Row, str | None, int]]:
    """(row, the split it names itself, group) of those rows that are kept."""
    rows = rows if rows is not None else Rows(job)
    groups = read_groups(job.store, f"{job.path}.groups") if job.grouped else None
    for row in rows:
        if groups is None:
            group = group_number(content_hash(row.values))
        else:
            found = next(groups, None)
            if found is None:
                raise _changed(job)
            group, first = found
            if job.unique and not first:
                rows.dropped["duplicate"] += 1
                continue
        if row.group is not None:
            group = xxhash.xxh3_64_intdigest(row.group.encode("utf-8"))
        yield row, row.split, group
    if groups is not None and next(groups, None) is not None:
        raise _changed(job)


def _changed(job: Job) -> UsageError:
    return UsageError(
        f"The source {job.data.name} gave other rows than before ({job.partition.name}): it was changed while the data "
        "set was built. Run the same command again when it stays as it is."
    )


class Look:
    """What the split has to know of the rows of a source, read as far as it is asked. bad, rows: seen so far."""

    def __init__(self, jobs: Iterable[Job]) -> None:
        self.rows = 0
        self.bad = BadRows()
        self._jobs = jobs

    def __iter__(self) -> Iterator[Member]:
        for job in self._jobs:
            rows = Rows(job, self.bad)
            for row, own, group in members(job, rows):
                yield Member(own, group, sum(num_bytes(value) for value in row.values.values()))
            self.rows += rows.count


def num_bytes(value: Any) -> int:
    """Of a value, or its characters where it is text: a measure of memory."""
    return len(value) if isinstance(value, str | bytes) else int(np.asarray(value).nbytes)
