"""From a source to a data set on disk, once: `ensure_dataset` builds what is not there yet.

One pass over the source, in bounded memory: a first part (up to 64 MB of text) is held back to see whether both sides
of the split get something and to train the tokenizer on a spread of it; the rest streams through. A document is
held out when the hash of its group falls below validation_fraction, so the split stays as it is when data is added.

The build happens in a folder beside the final one, under a lock that dies with its process, and is renamed in the end:
a data set is there as a whole or not at all, of two builders one waits for the other, and what a killed build left is
cleared by the next. For a remote store it happens in a local temporary folder; the index is uploaded last.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import xxhash

from configs.errors import UsageError
from configs.load import ConfigError, validate_plugin
from configs.plugins import find_plugin
from configs.schema import Plugin
from data_pipelines.index import FORMAT_VERSION, INDEX_FILE, TOKENIZER_FILE, Index
from data_pipelines.local_files import explain, sync_folder
from data_pipelines.shards import Dataset
from data_pipelines.sources import Document, SourceConfig
from data_pipelines.storage import Store
from data_pipelines.tokenizer import EOS_ID, Tokenizer, TokenizerConfig, train_tokenizer
from data_pipelines.tokenizer_file import file_digest, read_tokenizer
from data_pipelines.writer import SplitWriter

Progress = Callable[[str, int], None]  # what is being done, documents done so far

SPLITS = ("train", "validation")
_HELD_BACK_BYTES = 64 << 20
_TOKENIZER_SAMPLE_BYTES = 4 << 20
_BATCH_DOCUMENTS = 256
_LOCK_FILE = "lock"
_POLL_S = 0.1


def dataset_digest(data: Plugin, tokenizer: TokenizerConfig) -> str:
    """32 hex digits over the settings and the present state of the source (names, sizes, times: no content is read).

    Of a tokenizer's file the content counts, not where it lies. Raises NotFound where there is none.
    """
    source, config = _source(data)
    described = [
        FORMAT_VERSION,
        data.name,
        config.model_dump(mode="json"),
        source.identity(config),
        tokenizer.model_dump(exclude={"file"}),
    ]
    if tokenizer.file is not None:
        described.append(file_digest(tokenizer.file))
    return xxhash.xxh3_128_hexdigest(json.dumps(described, sort_keys=True).encode())


def dataset_name(data: Plugin, tokenizer: TokenizerConfig) -> str:
    """The name of the data set's folder in <store>/datasets/."""
    return f"{data.name.replace('.', '-')}-{dataset_digest(data, tokenizer)[:16]}"


def ensure_dataset(store: Store, data: Plugin, tokenizer: TokenizerConfig, progress: Progress | None = None) -> Dataset:
    """The data set of a source, opened from <store>/datasets/; built first where it is not there.

    Raises ShardyardErrors: a source or a tokenizer's file that is missing, empty or not readable, a full disk.
    """
    folder = store.child("datasets", dataset_name(data, tokenizer))
    if not folder.exists(INDEX_FILE):
        if folder.is_local:
            _build_locally(folder, data, tokenizer, progress or _silent)
        else:
            _build_and_upload(folder, data, tokenizer, progress or _silent)
    return Dataset.open(folder)


def _silent(_stage: str, _documents: int) -> None:
    pass


def _source(data: Plugin) -> tuple[Any, SourceConfig]:
    """The source's module and its checked settings."""
    source = find_plugin("data_pipelines.sources", data.name)
    config, problems = validate_plugin(source.Config, data, "data", {})
    if not isinstance(config, SourceConfig):
        raise ConfigError(problems)
    return source, config


# --- where


def _build_locally(folder: Store, data: Plugin, tokenizer: TokenizerConfig, progress: Progress) -> None:
    target = folder.local_path()
    assert target is not None
    building = target.with_name(f"{target.name}.building")
    try:
        with _lock(building, target, progress) as locked:
            if not locked:
                return
            try:
                _clear(building)
                build(building, data, tokenizer, progress)
                _remove_remains(target)
                os.rename(building, target)
                (target / _LOCK_FILE).unlink()  # not before: another builder could lock a new one in between
                sync_folder(target.parent)
            except BaseException:
                shutil.rmtree(building, ignore_errors=True)
                raise
    except OSError as error:
        raise explain(error, "build the data set", target) from error


@contextlib.contextmanager
def _lock(building: Path, target: Path, progress: Progress) -> Iterator[bool]:
    """Hold the lock of a build: True when this process shall build, False when another one has finished meanwhile.

    The lock is an flock on a file in the folder of the build: the kernel drops it with the process, however it ends,
    and it goes with the folder.
    """
    while not (target / INDEX_FILE).exists():
        building.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(building / _LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except FileNotFoundError:
            continue  # the other builder has just finished, or given up
        try:
            if not _try_lock(descriptor):
                progress("waiting for another process that builds the same data set", 0)
                time.sleep(_POLL_S)
            elif _is_same_file(descriptor, building / _LOCK_FILE):
                if (target / INDEX_FILE).exists():  # finished between our look and our lock: this folder is our own
                    shutil.rmtree(building)
                    break
                yield True
                return
        finally:
            os.close(descriptor)
    yield False


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_same_file(descriptor: int, path: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), path.stat())
    return False


def _clear(building: Path) -> None:
    """Remove what a killed build left, all but the lock."""
    for leftover in building.iterdir():
        if leftover.name != _LOCK_FILE:
            leftover.unlink()


def _remove_remains(target: Path) -> None:
    """Remove a data set that has lost its index (and the lock of a builder killed at the very end), nothing else."""
    if not target.is_dir():
        return
    for file in [*target.glob("*.arrow"), target / TOKENIZER_FILE, target / _LOCK_FILE]:
        file.unlink(missing_ok=True)
    try:
        target.rmdir()
    except OSError as error:
        raise UsageError(
            f"{target} holds files that are not a data set's ({', '.join(sorted(os.listdir(target))[:3])}) and no "
            f"{INDEX_FILE}. Move them away: the data set is to be built there."
        ) from error


def _build_and_upload(folder: Store, data: Plugin, tokenizer: TokenizerConfig, progress: Progress) -> None:
    with tempfile.TemporaryDirectory(prefix="shardyard-build-") as name:
        building = Path(name)
        build(building, data, tokenizer, progress)
        names = sorted(file.name for file in building.iterdir() if file.name != INDEX_FILE)
        for file in [*names, INDEX_FILE]:
            progress(f"uploading {file}", 0)
            with (building / file).open("rb") as source, folder.open_output(file) as output:
                shutil.copyfileobj(source, output, 8 << 20)


# --- what


def build(folder: Path, data: Plugin, tokenizer_config: TokenizerConfig, progress: Progress) -> None:
    """Write a data set's files into a local folder, the index last."""
    source, config = _source(data)
    store = Store(folder)
    progress("reading", 0)
    documents = (document for document in source.documents(config) if document.text)
    held_back = _hold_back(documents)
    split = Split.of(held_back, config.validation_fraction, data.name)

    if tokenizer_config.file is not None:
        tokenizer = read_tokenizer(tokenizer_config)
    else:
        progress("training the tokenizer", len(held_back))
        sample = _spread(
            [document.text for document in held_back if not split.is_validation(document)], _TOKENIZER_SAMPLE_BYTES
        )
        tokenizer = train_tokenizer(tokenizer_config, sample)
    tokenizer_json = tokenizer.to_json()
    store.write_atomic(TOKENIZER_FILE, tokenizer_json)

    writers = {split: SplitWriter(store, split, tokenizer.dtype) for split in SPLITS}
    with contextlib.ExitStack() as stack:
        for writer in writers.values():
            stack.enter_context(writer)
        _encode(chain(held_back, documents), tokenizer, writers, split, progress)
    index = Index(
        name=data.name,
        source=data.model_dump(mode="json"),
        token_dtype=tokenizer.dtype.__name__,
        vocab_size=tokenizer.vocab_size,
        eos_id=EOS_ID,
        tokenizer_xxh3=xxhash.xxh3_128_hexdigest(tokenizer_json.encode("utf-8")),
        file_sizes={name: size for writer in writers.values() for name, size in writer.file_sizes.items()},
        splits={split: tuple(writer.blocks) for split, writer in writers.items()},
    )
    store.write_atomic(INDEX_FILE, index.to_json())


def _encode(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    writers: dict[str, SplitWriter],
    split: Split,
    progress: Progress,
) -> None:
    remaining = iter(documents)
    done = 0
    while batch := list(islice(remaining, _BATCH_DOCUMENTS)):
        encoded = tokenizer.encode([document.text for document in batch])
        for document, tokens in zip(batch, encoded, strict=True):
            writer = writers["validation" if split.is_validation(document) else "train"]
            writer.add(document.key, tokens, len(document.text.encode("utf-8")))
        done += len(batch)
        progress("tokenizing", done)


def _hold_back(documents: Iterator[Document]) -> list[Document]:
    """The first documents: until their texts exceed the limit, and there are two groups to split."""
    held_back = []
    groups = set()
    size = 0
    for document in documents:
        held_back.append(document)
        groups.add(document.group)
        size += len(document.text)
        if size > _HELD_BACK_BYTES and len(groups) > 1:
            break
    return held_back


@dataclass(frozen=True)
class Split:
    """Which documents are held out: those whose group hashes to less than `fraction` of the range of the hash.

    So that a small source has both sides, the group of the lowest hash is always held out, that of the highest never.
    """

    fraction: float
    lowest: str
    highest: str

    @classmethod
    def of(cls, documents: list[Document], fraction: float, name: str) -> Split:
        """The split of a source that begins with (or is) `documents`.

        Raises UsageError for a source with no documents, or with too few to hold one out.
        """
        groups = sorted({document.group for document in documents}, key=_share)
        if not groups:
            raise UsageError(
                f"The source {name} has no text: it has no documents, or all are empty. Check what it is given in data."
            )
        if len(groups) == 1 and fraction > 0:
            raise UsageError(
                f"The source {name} has {len(documents)} document(s), all nearly the same, so none can be held out for "
                "validation. Give it more documents (for the source text, data.separator cuts a file into several), or "
                "set data.validation_fraction=0."
            )
        return cls(fraction, groups[0], groups[-1])

    def is_validation(self, document: Document) -> bool:
        """Whether the document is held out."""
        if self.fraction == 0 or document.group == self.highest:
            return False
        return document.group == self.lowest or _share(document.group) < self.fraction


def _share(group: str) -> float:
    """Where a group's hash stands in its range, in [0, 1)."""
    return xxhash.xxh3_64_intdigest(group.encode("utf-8")) / 2**64


def _spread(texts: list[str], limit_bytes: int) -> Iterator[str]:
    """Every n-th text, with n so that they come to about the limit; of a long text its beginning."""
    size = sum(map(len, texts))
    stride = max(1, -(-size // limit_bytes))
    for text in texts[::stride]:
        yield text[:limit_bytes]
