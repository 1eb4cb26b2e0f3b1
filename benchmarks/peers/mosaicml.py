"""MosaicML streaming: MDS shards on local disk."""

from __future__ import annotations

import contextlib
import sys
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import transformers.feature_extraction_utils  # noqa: F401  (looks whether torchvision is there, so it comes first)

from peers.cases import NUM_CHUNKS, Case
from peers.packing import packed

if "torchvision" not in sys.modules:  # `import streaming` imports its CIFAR-10 example; nothing of it is used here
    vision, datasets, transforms, functional = (
        types.ModuleType(f"torchvision{part}") for part in ("", ".datasets", ".transforms", ".transforms.functional")
    )
    datasets.VisionDataset = datasets.CIFAR10 = object  # type: ignore[attr-defined]
    functional.to_tensor = None  # type: ignore[attr-defined]
    vision.datasets, vision.transforms, transforms.functional = datasets, transforms, functional  # type: ignore[attr-defined]
    for module in (vision, datasets, transforms, functional):
        sys.modules[module.__name__] = module

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from streaming import MDSWriter, StreamingDataLoader, StreamingDataset

SETTINGS = (
    "MDS shards without compression or hashes, local folder and no remote, ndarray encodings of fixed dtype and shape, "
    "shuffle=True (py1e), StreamingDataLoader(num_workers=0); b: documents packed in Python"
)


def write(case: Case, folder: Path) -> None:
    shape = "" if case.key == "b" else ":" + ",".join(map(str, case.shape))
    encoding = "bytes" if case.key == "d" else f"ndarray:{np.dtype(case.dtype).name}{shape}"
    limit = max(case.raw_bytes // NUM_CHUNKS, 1 << 16)
    with MDSWriter(out=str(folder), columns={"x": encoding}, size_limit=limit) as writer:
        for row in case.rows():
            writer.write({"x": row.tobytes() if case.key == "d" else np.asarray(row)})


class Peer:
    def __init__(self, case: Case, folder: Path, batch: int, rank: int = 0, world_size: int = 1) -> None:
        with contextlib.suppress(Exception):
            if world_size == 1:
                from streaming.base.util import clean_stale_shared_memory

                clean_stale_shared_memory()
        self._case = case
        self._batch = batch
        size = 1 if case.key == "b" else batch
        dataset = StreamingDataset(local=str(folder), shuffle=True, batch_size=size, shuffle_seed=1)
        collate: Any = {"b": _alone, "d": _blobs}.get(case.key)
        self._loader = StreamingDataLoader(
            dataset,
            batch_size=None if case.key == "b" else batch,
            drop_last=world_size == 1 and case.key != "b",
            collate_fn=collate,
        )

    def epoch(self) -> Iterator[Any]:
        if self._case.key == "b":
            return packed((row["x"] for row in self._loader), self._batch, self._case.shape[0])
        return (batch if self._case.key == "d" else batch["x"] for batch in self._loader)

    def state(self, batches: int) -> Any:
        return self._loader.state_dict()

    def load(self, state: Any) -> None:
        self._loader.load_state_dict(state)

    def close(self) -> None:
        self._loader = None


def _blobs(rows: list[dict[str, bytes]]) -> list[bytes]:
    return [row["x"] for row in rows]


def _alone(row: Any) -> Any:
    return row
