"""The data sets of a mixture: one for each source, all with the same tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import xxhash

from configs.schema import Plugin
from data_pipelines.build import Build, Progress, RunTasks, dataset_digest, ensure_dataset, policy_of
from data_pipelines.build_steps import SAMPLE_BYTES, Work, sample_texts
from data_pipelines.partition_rows import source_of
from data_pipelines.shards import Dataset
from data_pipelines.storage import Store
from data_pipelines.tokenizer import TokenizerConfig, train_tokenizer
from data_pipelines.tokenizer_file import FOLDER


def ensure_mixture(
    store: Store,
    data: Plugin,
    tokenizer: TokenizerConfig | None,
    progress: Progress | None = None,
    run_tasks: RunTasks | None = None,
    *,
    seq_lens: Sequence[int] = (),
) -> list[Dataset]:
    """The data set of each source of `data` (sources/mixture.py), in order; see ensure_dataset.

    Where a tokenizer is to be trained, it is on a spread of texts of all sources, alike whatever their weights.
    """
    sources = _sources(data)
    shared = mixture_tokenizer(store, data, tokenizer, progress, run_tasks)
    datasets = [ensure_dataset(store, one, shared, progress, run_tasks, seq_lens=seq_lens) for one in sources]
    damage = policy_of(source_of(data)[1])  # how a mixture is read stands in its own settings
    return [Dataset.open(dataset.store, damage=damage) for dataset in datasets]


def mixture_tokenizer(
    store: Store,
    data: Plugin,
    tokenizer: TokenizerConfig | None,
    progress: Progress | None = None,
    run_tasks: RunTasks | None = None,
) -> TokenizerConfig | None:
    """The tokenizer of a mixture's sources: in <store>/tokenizers/, trained first where it is not there."""
    if tokenizer is None or tokenizer.name != "bpe" or tokenizer.file is not None:
        return tokenizer
    sources = _sources(data)
    digests = "".join(dataset_digest(one, tokenizer) for one in sources)
    name = f"mixture-{xxhash.xxh3_128_hexdigest(digests.encode())}.json"
    folder = store.child(FOLDER)
    if not folder.exists(name):
        texts: list[str] = []
        work = Work(progress or _silent, run_tasks)
        work.progress("training the tokenizer", 0)
        for one in sources:
            build = Build(folder, one, tokenizer, work)
            texts += sample_texts(work, build.split(build.jobs()), SAMPLE_BYTES // len(sources))
        folder.write_atomic(name, train_tokenizer(tokenizer, texts).to_json())
    return tokenizer.model_copy(update={"file": folder.child(name).uri})


def _sources(data: Plugin) -> list[Plugin]:
    config: Any = source_of(data)[1]
    return [source.data for source in config.sources]


def _silent(_stage: str, _rows: int) -> None:
    pass
