"""How the ranks read from a remote store, as one run's metrics."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_pipelines import writer
from data_pipelines.shards import Dataset
from data_pipelines.storage import Store
from tests.tiny import tiny_config
from tests.trainer.attempts import launched, train
from trainer.record import recorded_datasets

pytestmark = pytest.mark.distributed


def test_what_all_ranks_read_of_both_splits_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks of a node share a cache, so together they fetch each block once. Blocks that are compressed, as those of a
    remote store are, come through the cache from a local folder too."""
    data = {"cache_dir": str(tmp_path / "cache"), "shuffle": "examples"}
    config = tiny_config(tmp_path)
    config["data"] |= data
    with monkeypatch.context() as patch:
        patch.setattr(Store, "is_local", property(lambda _: False))
        patch.setattr(writer, "BLOCK_BYTES", 2000)
        record = launched(config)
    (name,) = recorded_datasets(record.store)
    index = Dataset.open(Path(config["store"]) / "datasets" / name).index
    assert index.compression == "zstd" and min(len(blocks) for blocks in index.splits.values()) >= 1
    rows = train(config).stitched()
    assert rows[-1]["data/fetches"] == len(index.blocks) >= 4
    assert rows[-1]["data/fetched_bytes"] == int((index.blocks.stop - index.blocks.start).sum())
    asked = rows[-1]["data/hits"] + rows[-1]["data/misses"]
    assert rows[-1]["data/hit_rate"] == pytest.approx(rows[-1]["data/hits"] / asked)
