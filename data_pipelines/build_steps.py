"""The steps of a build, from the jobs of its partitions to its index; data_pipelines/build.py says in which order."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import xxhash

from configs.errors import Damaged, NotFound, ShardyardError, UsageError
from configs.schema import Plugin
from data_pipelines.blocks import Blocks, join_parts
from data_pipelines.build_folder import SCRATCH
from data_pipelines.columns import DOCUMENT, PAIR, Column, num_buffers, texts_in
from data_pipelines.duplicates import find_groups
from data_pipelines.index import TOKENIZER_FILE, Index, PackingFacts, TokenizerFacts
from data_pipelines.lengths import join as join_lengths
from data_pipelines.lengths import length_columns
from data_pipelines.partition import Part, Sample, Signed, finished, lengths_part, sample, sign, write
from data_pipelines.partition_rows import PARTS, Job, Look
from data_pipelines.quarantine import SHOWN_ROWS, check_share, join
from data_pipelines.split import SPLITS, Split
from data_pipelines.storage import Store
from data_pipelines.tokenizer import Tokenizer, TokenizerConfig, train_tokenizer
from data_pipelines.tokenizer_file import read_tokenizer

Progress = Callable[[str, int], None]  # what is being done, rows done so far
# Results of a function for each of some values, in any order. Both pickle. No call goes on when the iterator is closed.
RunTasks = Callable[[Callable[[Any], Any], Sequence[Any]], Iterator[Any]]

_GROUPED = f"{PARTS}/grouped.json"  # says that the groups are there, and of what jobs
SAMPLE_BYTES = 6 << 20  # of text that a tokenizer is trained on
_SAMPLED_PARTITIONS = 32
_SAMPLE_READ_BYTES = 64 << 20  # of text read for it, at most


@dataclass
class Work:
    """Runs the tasks of a build, and counts rows for who watches. run_tasks: None works in this process."""

    progress: Progress
    run_tasks: RunTasks | None = None
    rows: int = 0

    def count(self, stage: str, rows: int) -> None:
        """Say that so many more are done."""
        self.rows += rows
        self.progress(stage, self.rows)

    def stays_here(self, items: Sequence[Any]) -> bool:
        """Whether tasks for these are run in this process: a single one need not be sent away."""
        return self.run_tasks is None or len(items) == 1

    def results(self, function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
        """function(item) of each, in any order."""
        if self.run_tasks is None or self.stays_here(items):
            yield from map(function, items)
            return
        results = self.run_tasks(function, items)
        try:
            yield from results
        finally:
            close = getattr(results, "close", None)
            if close is not None:
                close()


class BadShare:
    """Adds up the bad rows of a source's partitions as they are read, `of` of them in all."""

    def __init__(self, name: str, max_share: float, of: int) -> None:
        self._name, self._max_share, self._of = name, max_share, of
        self._parts = self._bad = self._rows = 0
        self._first: list[str] = []

    def add(self, part: Signed | Part) -> None:
        """One more is read. Raises TooManyBadRows as soon as the source cannot pass."""
        self._parts, self._bad, self._rows = self._parts + 1, self._bad + part.bad, self._rows + part.rows
        self._first = [*self._first, *part.first_bad][:SHOWN_ROWS]
        check_share(self._name, self._bad, self._rows, self._max_share, self._first, self._parts / self._of)


# --- groups and split


def check_near(name: str, near: bool, values: Sequence[Column]) -> None:
    """Raise UsageError where near-duplicates are looked for and there is no text."""
    if near and DOCUMENT not in {column.name for column in values}:
        raise UsageError(
            f"data.duplicates=near compares texts, and the source {name} has no column '{DOCUMENT}'. Use "
            "data.duplicates=exact, which compares whole rows."
        )


def group(work: Work, jobs: Sequence[Job], name: str, max_bad_share: float) -> list[Job]:
    """Find the rows that are the same, or nearly, over the whole source; the jobs that know of it.

    Raises TooManyBadRows as soon as the source cannot pass.
    """
    store = jobs[0].store
    done = json.dumps({"digest": xxhash.xxh3_128_hexdigest("".join(job.digest for job in jobs).encode())})
    if not store.exists(_GROUPED) or store.read_bytes(_GROUPED) != done.encode():
        share = BadShare(name, max_bad_share, len(jobs))
        work.rows = 0
        work.progress("looking for duplicates", 0)
        for part in work.results(sign, jobs):
            work.count("looking for duplicates", part.rows)
            share.add(part)
        names = [Path(job.path).name for job in jobs]
        with _signatures(store, names) as (signatures, scratch):
            found = find_groups(signatures, names, jobs[0].near, scratch)
            for partition, pieces in groupby(found, key=itemgetter(0)):
                with store.open_output(f"{PARTS}/{partition}.groups") as file:
                    for _, groups in pieces:
                        file.write(groups.tobytes())
        store.write_atomic(_GROUPED, done)
        for job in jobs:
            for ending in (".signed.json", ".content", ".minhash"):
                store.delete(f"{job.path}{ending}")
    return [replace(job, grouped=True) for job in jobs]


@contextlib.contextmanager
def _signatures(store: Store, names: Sequence[str]) -> Iterator[tuple[Path, Path]]:
    """(folder with the signature files, scratch folder), both on this machine's disk."""
    local = store.local_path(PARTS)
    with tempfile.TemporaryDirectory(prefix=SCRATCH, dir=local) as folder:
        scratch = Path(folder)
        if local is None:
            for file in (f"{name}{ending}" for name in names for ending in (".content", ".minhash")):
                if store.exists(f"{PARTS}/{file}"):
                    with store.open_input(f"{PARTS}/{file}") as far, (scratch / file).open("wb") as near:
                        shutil.copyfileobj(far, near, 8 << 20)
        yield local or scratch, scratch


def split_of(jobs: Sequence[Job], name: str, fraction: float, max_bad_share: float) -> Split:
    """The split's rule, from the first rows of the source. Raises UsageError: see Split.of, check_share."""
    looked = Look(jobs)
    try:
        return Split.of(looked, fraction, name)
    except UsageError:
        check_share(name, looked.bad.count, looked.rows, max_bad_share, looked.bad.first)
        raise


# --- tokenizer


def check_text(name: str, values: Sequence[Column]) -> None:
    """Raise UsageError where there is no text to make tokens of."""
    if not texts_in(values):
        raise UsageError(
            f"The task takes tokens, and the source {name} has no column '{DOCUMENT}', nor {' and '.join(PAIR)}, to "
            "make them of. Choose a source of texts, or another task."
        )


def tokenizer(work: Work, jobs: Sequence[Job], wanted: TokenizerConfig) -> tuple[Tokenizer, str]:
    """The data set's tokenizer, written into its folder, and the digest of its file; a killed build's is used again."""
    store = jobs[0].store
    found = None
    with contextlib.suppress(NotFound, Damaged, UnicodeDecodeError):
        found = Tokenizer.from_json(store.read_text(TOKENIZER_FILE))
    if found is None:
        if wanted.file is not None:
            found = read_tokenizer(wanted)
        else:
            work.progress("training the tokenizer", 0)
            found = train_tokenizer(wanted, sample_texts(work, jobs) if wanted.name == "bpe" else [])
        store.write_atomic(TOKENIZER_FILE, found.to_json())
    return found, _digest_of_tokenizer(store)


def _digest_of_tokenizer(store: Store) -> str:
    return xxhash.xxh3_128_hexdigest(store.read_bytes(TOKENIZER_FILE))


def sample_texts(work: Work, jobs: Sequence[Job], limit_bytes: int = SAMPLE_BYTES) -> list[str]:
    """Some of the texts to train on, of about limit_bytes in all, from partitions spread evenly over the source."""
    count = min(len(jobs), _SAMPLED_PARTITIONS)
    chosen = [jobs[place * len(jobs) // count] for place in range(count)]
    wanted = [Sample(job, limit_bytes // count, _SAMPLE_READ_BYTES // count) for job in chosen]
    found = dict(work.results(sample, wanted))
    return list(chain.from_iterable(found[job.number] for job in chosen))


# --- shards and index


def write_shards(work: Work, jobs: Sequence[Job], name: str, max_bad_share: float, stage: str) -> None:
    """Have every partition written. Raises TooManyBadRows as soon as the source cannot pass."""
    share = BadShare(name, max_bad_share, len(jobs))
    work.rows = 0
    work.progress(stage, 0)
    here = work.stays_here(jobs)
    for part in work.results(partial(write, report=partial(work.count, stage)) if here else write, jobs):
        if not here:
            work.count(stage, part.rows)
        share.add(part)


def finish(
    store: Store, data: Plugin, jobs: Sequence[Job], columns: Sequence[Column], tokenizer: Tokenizer | None
) -> None:
    """Write the list of bad rows, the lengths of rows and the index."""
    compressed, buffers = not store.is_local, num_buffers(columns)
    written: dict[str, list[tuple[Any, Blocks]]] = {split: [] for split in SPLITS}
    lengths: dict[str, list[str]] = {split: [] for split in SPLITS}
    dropped: Counter[str] = Counter()
    bad = 0
    for job in jobs:
        part = finished(job)
        if part is None:
            raise ShardyardError(
                f"{store.path(job.path)}.json was there a moment ago and is not there any more, or its shards are not. "
                "Let nothing else write there, and run the same command again."
            )
        bad += part.bad
        dropped.update(part.dropped)
        for split, (files, blocks) in part.splits.items():
            written.setdefault(split, []).append((files, Blocks.from_json(blocks, buffers, compressed)))
            lengths.setdefault(split, []).append(lengths_part(job, split))
    join(store, (f"{job.path}.bad.jsonl" for job in jobs))
    order = [*SPLITS, *sorted(written.keys() - {*SPLITS})]
    files, splits = join_parts({split: written[split] for split in order}, buffers, compressed)
    facts = None
    if tokenizer is not None:
        facts = TokenizerFacts(tokenizer.vocab_size, tokenizer.eos_id, _digest_of_tokenizer(store))
    Index(
        name=data.name,
        source=data.model_dump(mode="json"),
        columns=tuple(columns),
        files=files,
        splits=splits,
        tokenizer=facts,
        compression="zstd" if compressed else None,
        quarantined=bad,
        dropped=dict(sorted(dropped.items())),
        packing=PackingFacts(jobs[0].seq_lens) if jobs[0].seq_lens else None,
        lengths=join_lengths(store, chain(*(lengths[split] for split in order))) if length_columns(columns) else None,
    ).write(store)
