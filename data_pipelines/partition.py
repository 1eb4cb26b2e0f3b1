"""What is done to one partition of a source: plain functions of plain values, so that any process may run them.

`sign` writes the signatures of its rows (duplicates.py), `sample` returns some of its texts for the tokenizer to be
trained on, `write` writes its shards. Each writes files of its own and may be run again: the same input gives the same
bytes. A file of JSON, written last, says that a partition is done; who finds it does not do it again.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import xxhash

from configs.errors import Damaged, NotFound, ShardyardError, UsageError
from data_pipelines.columns import DOCUMENT, KEY, Column, texts_in, tokenized
from data_pipelines.duplicates import SignatureWriter, content_hash
from data_pipelines.index import TOKENIZER_FILE
from data_pipelines.lengths import file_bytes, length_columns
from data_pipelines.pack import best_fit_counts
from data_pipelines.partition_rows import LENGTHS_ENDING, Job, Rows, members, num_bytes, source_of
from data_pipelines.quarantine import BadRows, Quarantine
from data_pipelines.sources import Bad, Row
from data_pipelines.split import TRAIN, Split
from data_pipelines.storage import Store
from data_pipelines.tokenizer import Tokenizer
from data_pipelines.writer import ShardWriter

_BATCH_ROWS = 256
_BATCH_CHARACTERS = 4 << 20

Report = Callable[[int], None]  # rows done since the last call


def _silent(_rows: int) -> None:
    pass


@dataclass(frozen=True)
class Part:
    """What became of a partition. splits: (files, blocks as Blocks.to_json gives them) of each."""

    digest: str
    rows: int  # all that were read: kept, dropped, bad
    bad: int
    first_bad: tuple[str, ...]
    dropped: Mapping[str, int]
    splits: Mapping[str, tuple[Mapping[str, int], Mapping[str, Any]]] = field(default_factory=dict)
    lengths: Mapping[str, int] = field(default_factory=dict)  # bytes of its part of lengths.bin, by file


def stored_columns(values: tuple[Column, ...], tokenizer: Tokenizer | None) -> tuple[Column, ...]:
    """The columns of the shards: the source's after its key; with a tokenizer, ids in the place of texts."""
    if tokenizer is None:
        return (KEY, *values)
    return tokenized(values, tokenizer.dtype.__name__)


# --- tasks


@dataclass(frozen=True)
class Signed:
    """What `sign` has read of a partition: see Part."""

    digest: str
    rows: int
    bad: int
    first_bad: tuple[str, ...]


def sign(job: Job) -> Signed:
    """Write the signatures of the partition's rows."""
    done = f"{job.path}.signed.json"
    with contextlib.suppress(NotFound, ValueError, TypeError, KeyError):
        values = json.loads(job.store.read_bytes(done))
        found = Signed(**{**values, "first_bad": tuple(values["first_bad"])})
        if found.digest == job.digest:
            return found
    bad = BadRows()
    rows = Rows(job, bad)
    with SignatureWriter(job.store, job.path, job.near) as writer:
        for row in rows:
            writer.add(content_hash(row.values), row.values.get(DOCUMENT, ""))
    signed = Signed(job.digest, rows.count, bad.count, tuple(bad.first))
    job.store.write_atomic(done, json.dumps(asdict(signed)))
    return signed


@dataclass(frozen=True)
class Sample:
    """What `sample` shall do: texts of about keep_bytes in all, out of the first read_bytes of a partition."""

    job: Job
    keep_bytes: int
    read_bytes: int


def sample(wanted: Sample) -> tuple[int, list[str]]:
    """(partition, texts): those of every n-th row to train on, n a power of two; of a long one its beginning."""
    job, limit = wanted.job, wanted.keep_bytes
    assert job.split is not None
    kept: list[tuple[str, ...]] = []
    size = read = seen = 0
    stride = 1
    source, config = source_of(job.data)
    names = texts_in(source.schema(config))
    for row, own, group in members(job):
        texts = [row.values[name] for name in names]
        read += sum(map(len, texts))
        if job.split.name(own, group) == TRAIN:
            if seen % stride == 0:
                kept.append(tuple(text[: limit // len(names)] for text in texts))
                size += sum(map(len, kept[-1]))
            seen += 1
        while size > limit and len(kept) > 1:
            kept, stride = kept[::2], 2 * stride
            size = sum(len(text) for texts in kept for text in texts)
        if read > wanted.read_bytes:
            break
    return job.number, [text for texts in kept for text in texts]


def write(job: Job, report: Report = _silent) -> Part:
    """Write the partition's shards, or find that they are there. Raises ShardyardErrors."""
    found = finished(job)
    if found is not None:
        report(found.rows)
        return found
    assert job.split is not None
    source, config = source_of(job.data)
    tokenizer = _tokenizer(job.store, job.tokenizer) if job.tokenizer else None
    texts = texts_in(source.schema(config))
    columns = stored_columns(source.schema(config), tokenizer)
    job.store.delete(f"{job.path}.bad.jsonl")  # of an earlier try
    bad = Quarantine(job.store, f"{job.path}.bad.jsonl")
    writers: dict[str, ShardWriter] = {}
    rows = Rows(job, bad)
    with contextlib.ExitStack() as stack:
        stack.callback(bad.close)
        for batch in _batches(members(job, rows)):
            for split, key, values, text_bytes in _encoded(batch, job.split, texts, tokenizer):
                try:
                    if split not in writers:
                        writers[split] = stack.enter_context(_writer(job, split, columns, stack))
                    writers[split].add({"key": key, **values}, text_bytes)
                except UsageError as error:
                    bad.add(Bad(job.partition.name, None, f"{key}: {error}", ""))
            report(len(batch))
    part = Part(
        job.digest,
        rows.count,
        bad.count,
        tuple(bad.first),
        dict(rows.dropped),
        {split: (writer.files, writer.blocks.to_json()) for split, writer in sorted(writers.items())},
        {
            lengths_part(job, split): file_bytes(int(writer.blocks.rows.sum()), columns)
            for split, writer in sorted(writers.items())
            if length_columns(columns)
        },
    )
    job.store.write_atomic(f"{job.path}.json", json.dumps(asdict(part)))
    return part


def finished(job: Job) -> Part | None:
    """What `write` has written, None where it has not, or for another job, or where files of it have gone."""
    try:
        values = json.loads(job.store.read_bytes(f"{job.path}.json"))
        part = Part(**{**values, "first_bad": tuple(values["first_bad"])})
    except (NotFound, ValueError, TypeError, KeyError):
        return None
    if part.digest != job.digest:
        return None
    files = {name: size for sizes, _ in part.splits.values() for name, size in sizes.items()}
    files.update(part.lengths)
    try:
        whole = all(job.store.size(name) == size for name, size in files.items())
    except ShardyardError:
        return None
    return part if whole else None


def _batches(rows: Iterator[tuple[Row, str | None, int]]) -> Iterator[list[tuple[Row, str | None, int]]]:
    batch, size = [], 0
    for row in rows:
        batch.append(row)
        size += sum(num_bytes(value) for value in row[0].values.values())
        if len(batch) >= _BATCH_ROWS or size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encoded(
    batch: list[tuple[Row, str | None, int]], split: Split, texts: Sequence[str], tokenizer: Tokenizer | None
) -> Iterator[tuple[str, str, dict[str, Any], int]]:
    """(split, key, values as stored, bytes of text) of each row."""
    names = [split.name(own, group) for _, own, group in batch]
    sizes = [sum(len(row.values[text].encode("utf-8")) for text in texts) for row, _, _ in batch]
    if tokenizer is None:
        for name, (row, _, _), size in zip(names, batch, sizes, strict=True):
            yield name, row.key, dict(row.values), size
        return
    mark = np.array([tokenizer.eos_id], tokenizer.dtype)
    encoded = [tokenizer.encode([row.values[text] for row, _, _ in batch]) for text in texts]
    for name, (row, _, _), size, found in zip(names, batch, sizes, zip(*encoded, strict=True), strict=True):
        ids = {text: np.concatenate([mark, tokens]) for text, tokens in zip(texts, found, strict=True)}
        values = dict(row.values) | ids
        if DOCUMENT in ids:
            values |= {"tokens": values.pop(DOCUMENT), "num_bytes": size}
        yield name, row.key, values, size


def lengths_part(job: Job, split: str) -> str:
    """The partition's part of lengths.bin, for one split."""
    return f"{job.path}.{split}{LENGTHS_ENDING}"


def _writer(job: Job, split: str, columns: tuple[Column, ...], stack: contextlib.ExitStack) -> ShardWriter:
    """What else it needs open is put on the stack, below it."""

    def packed(lengths: np.ndarray) -> dict[int, int]:
        return best_fit_counts(lengths, job.seq_lens)

    return ShardWriter(
        job.store,
        f"{split}-{job.number:05d}",
        columns,
        None if job.store.is_local else "zstd",
        packed if job.seq_lens else None,
        stack.enter_context(job.store.open_output(lengths_part(job, split))) if length_columns(columns) else None,
    )


@lru_cache(maxsize=2)
def _tokenizer_of(text: str) -> Tokenizer:
    return Tokenizer.from_json(text)


def _tokenizer(store: Store, digest: str) -> Tokenizer:
    """The data set's tokenizer, kept with the words it knows for the process's next partition."""
    raw = store.read_bytes(TOKENIZER_FILE)
    if xxhash.xxh3_128_hexdigest(raw) != digest:
        raise Damaged(f"{store.path(TOKENIZER_FILE)} fails its digest. Delete that folder and build again.")
    return _tokenizer_of(raw.decode("utf-8"))
