"""What all ranks of a run had to do to read their data sets from a remote store, as metrics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from data_pipelines.shards import Dataset
from trainer.distributed import all_sum

_SPLITS = ("train", "validation")


def reading_metrics(datasets: Mapping[str, Dataset]) -> dict[str, float]:
    """Of data sets by the prefix of their metrics' names; {} where all lie on local disks. Every rank calls it.

    The counters of data_pipelines/cache.py, since each rank was started, summed over splits and ranks (a damaged block
    counts once for each rank that met it, and wait_s is the seconds of all); hit_rate of these sums. evictions are
    those of all processes, whatever they read; cache_bytes is what the cache of this rank's node takes on its disk.
    """
    read: dict[str, list[dict[str, float]]] = {}
    for prefix, dataset in datasets.items():
        sources: list[Any] = [dataset.split(split).source for split in _SPLITS]
        if all(hasattr(source, "metrics") for source in sources):  # local files have none
            read[prefix] = [source.metrics() for source in sources]
    if not read:
        return {}
    from data_pipelines.cache import COUNTED

    mine: dict[str, float] = {}  # the same names in the same order on every rank
    for prefix, values in read.items():
        mine |= {f"{prefix}/{name}": sum(each[name] for each in values) for name in (*COUNTED, "damaged_blocks")}
        mine[f"{prefix}/evictions"] = values[0]["evictions"]  # the splits share a cache
    found = dict(zip(mine, all_sum(list(mine.values())), strict=True))
    for prefix, values in read.items():
        asked = found[f"{prefix}/hits"] + found[f"{prefix}/misses"]
        found[f"{prefix}/hit_rate"] = found[f"{prefix}/hits"] / asked if asked else 1.0
        found[f"{prefix}/cache_bytes"] = values[0]["cache_bytes"]
    return found
