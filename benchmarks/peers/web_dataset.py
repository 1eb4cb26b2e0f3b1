"""WebDataset: tar files, read in sequence."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset

from peers.cases import NUM_CHUNKS, Case
from peers.packing import packed

SETTINGS = (
    "12 tar files, raw bytes decoded by np.frombuffer, shardshuffle=12, shuffle(1000), WebLoader(num_workers=0); b: "
    "documents packed in Python. Resume: it has no state; batches are read and dropped"
)


def write(case: Case, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    size = -(-case.num_examples // NUM_CHUNKS)
    with webdataset.ShardWriter(str(folder / "%05d.tar"), maxcount=size, maxsize=1 << 40, verbose=0) as writer:
        for number, row in enumerate(case.rows()):
            writer.write({"__key__": f"{number:08d}", "bin": row.tobytes()})


class Peer:
    def __init__(self, case: Case, folder: Path, batch: int, rank: int = 0, world_size: int = 1) -> None:
        self._case, self._batch, self._skip = case, batch, 0
        urls = [str(path) for path in sorted(folder.glob("*.tar"))]
        rows = webdataset.WebDataset(
            urls, shardshuffle=NUM_CHUNKS, seed=1, nodesplitter=webdataset.split_by_node, empty_check=False
        )
        rows = rows.shuffle(1000, seed=1).map(self._decode)
        if case.key != "b":
            rows = rows.batched(batch, collation_fn=list if case.key == "d" else torch.stack, partial=world_size > 1)
        self._loader = webdataset.WebLoader(rows, batch_size=None, num_workers=0, collate_fn=None)

    def _decode(self, row: dict[str, Any]) -> Any:
        raw = row["bin"]
        if self._case.key == "d":
            return raw
        values = np.frombuffer(bytearray(raw), self._case.dtype)
        return values if self._case.key == "b" else torch.from_numpy(values).view(self._case.shape)

    def epoch(self) -> Iterator[Any]:
        batches = iter(self._loader)
        if self._case.key == "b":
            return packed(batches, self._batch, self._case.shape[0])
        for _ in range(self._skip):
            next(batches, None)
        self._skip = 0
        return batches

    def state(self, batches: int) -> Any:
        return {"examples": batches * self._batch * _world_size()}

    def load(self, state: Any) -> None:
        self._skip = state["examples"] // (self._batch * _world_size())

    def close(self) -> None:
        pass


def _world_size() -> int:
    import torch.distributed as distributed

    return distributed.get_world_size() if distributed.is_initialized() else 1
