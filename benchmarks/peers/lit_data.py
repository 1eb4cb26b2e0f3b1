"""LitData: chunks on local disk, read in place."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

os.environ["LITDATA_DISABLE_VERSION_CHECK"] = "1"

import numpy as np
import torch
from litdata import StreamingDataLoader, StreamingDataset, TokensLoader, optimize

from peers.cases import NUM_CHUNKS, SEQ_LEN, Case
from peers.packing import boundaries

SETTINGS = (
    "optimize() to chunks, local folder (mapped in place), shuffle=True (default windows of 256 items, which its cache "
    "of decoded items needs), StreamingDataLoader(num_workers=0); a, b: TokensLoader(block_size=2048), boundaries of b "
    "found by the end marks; c: tensors; d: bytes"
)


def _row(index: int, case: Case, offsets: np.ndarray | None) -> Any:
    if case.key == "d":
        return case.matrix()[index].tobytes()
    if offsets is None:
        return torch.from_numpy(np.array(case.matrix()[index]))
    return torch.from_numpy(np.array(case.flat()[offsets[index] : offsets[index + 1]]))


def write(case: Case, folder: Path) -> None:
    offsets = np.load(case.raw / "offsets.npy") if case.key == "b" else None
    if case.key in "ab":
        num_sequences = case.raw_bytes // 2 // SEQ_LEN
        sizes = {"chunk_size": -(-num_sequences // NUM_CHUNKS) * SEQ_LEN, "item_loader": TokensLoader(SEQ_LEN)}
    else:
        sizes = {"chunk_size": -(-case.num_examples // NUM_CHUNKS)}
    optimize(
        fn=partial(_row, case=case, offsets=offsets),
        inputs=list(range(case.num_examples)),
        output_dir=str(folder),
        num_workers=1,
        keep_data_ordered=True,
        reorder_files=False,
        start_method="fork",
        verbose=False,
        **sizes,
    )


class Peer:
    def __init__(self, case: Case, folder: Path, batch: int, rank: int = 0, world_size: int = 1) -> None:
        loader = TokensLoader(SEQ_LEN) if case.key in "ab" else None
        dataset = StreamingDataset(str(folder), item_loader=loader, shuffle=True, seed=1, drop_last=False)
        collate: Any = {"b": _with_boundaries, "d": list}.get(case.key)
        self._loader = StreamingDataLoader(
            dataset, batch_size=batch, num_workers=0, drop_last=world_size == 1, collate_fn=collate
        )

    def epoch(self) -> Iterator[Any]:
        return iter(self._loader)

    def state(self, batches: int) -> Any:
        return self._loader.state_dict()

    def load(self, state: Any) -> None:
        self._loader.load_state_dict(state)

    def close(self) -> None:
        self._loader = None


def _with_boundaries(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.stack(rows)
    return tokens, boundaries(tokens)
