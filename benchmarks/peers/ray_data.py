"""Ray Data: Parquet files with tensor columns. It always reads in processes of its own."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")

import numpy as np
import ray
import ray.data

from peers.cases import NUM_CHUNKS, Case

SETTINGS = (
    "12 Parquet files with a tensor column (d: binary), uncompressed, ray.data.read_parquet(shuffle='files'), "
    "iter_torch_batches(local_shuffle_buffer_size=1000, prefetch_batches=4) (d: iter_batches); its readers are "
    "processes, which cannot be turned off. No state: an epoch begins anew"
)


def start() -> None:
    if not ray.is_initialized():
        ray.init(
            num_cpus=2,
            object_store_memory=512 << 20,
            include_dashboard=False,
            logging_level=logging.ERROR,
            log_to_driver=False,
            _node_ip_address="127.0.0.1",
        )
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        ray.data.DataContext.get_current().enable_progress_bars = False


def write(case: Case, folder: Path) -> None:
    if case.key == "b":
        return
    start()
    if case.key == "d":
        rows = ray.data.from_items([{"x": row.tobytes()} for row in case.rows()], override_num_blocks=NUM_CHUNKS)
    else:
        rows = ray.data.from_numpy([np.array(part) for part in np.array_split(case.matrix(), NUM_CHUNKS)])
        rows = rows.rename_columns({"data": "x"})
    rows.write_parquet(str(folder), compression="none")
    ray.shutdown()


class Peer:
    def __init__(self, case: Case, folder: Path, batch: int, rank: int = 0, world_size: int = 1) -> None:
        start()
        self._case, self._batch, self._skip = case, batch, 0
        self._rows = ray.data.read_parquet(str(folder), shuffle="files")

    def epoch(self) -> Iterator[Any]:
        options: dict[str, Any] = {
            "batch_size": self._batch,
            "local_shuffle_buffer_size": max(1000, 2 * self._batch),
            "prefetch_batches": 4,
            "drop_last": True,
        }
        if self._case.key == "d":
            batches: Any = (list(batch["x"]) for batch in self._rows.iter_batches(**options))
        else:
            batches = (batch["x"] for batch in self._rows.iter_torch_batches(**options))
        for _ in range(self._skip):
            next(batches, None)
        self._skip = 0
        return batches

    def state(self, batches: int) -> Any:
        return batches

    def load(self, state: Any) -> None:
        self._skip = state

    def close(self) -> None:
        ray.shutdown()
