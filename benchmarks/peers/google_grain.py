"""Google Grain: ArrayRecord files, index shuffle."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grain
import numpy as np
import torch
from array_record.python.array_record_module import ArrayRecordWriter

from peers.cases import NUM_CHUNKS, Case
from peers.packing import boundaries

SETTINGS = (
    "12 ArrayRecord files (group_size:1, uncompressed), MapDataset.shuffle().map(np.frombuffer).batch(), "
    "ReadOptions(num_threads=0) as its documentation says for data in memory; b: "
    "ConcatThenSplitIterDataset (gives segment ids and positions). Ranks: ElasticIterator"
)


def write(case: Case, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    size = -(-case.num_examples // NUM_CHUNKS)
    with contextlib.ExitStack() as stack:
        writer: Any = None
        for number, row in enumerate(case.rows()):
            if number % size == 0:
                if writer is not None:
                    writer.close()
                name = f"rows.array_record-{number // size:05d}-of-{NUM_CHUNKS:05d}"
                writer = ArrayRecordWriter(str(folder / name), "group_size:1,uncompressed")
            writer.write(row.tobytes())
        stack.callback(writer.close)


class Peer:
    def __init__(self, case: Case, folder: Path, batch: int, rank: int = 0, world_size: int = 1) -> None:
        self._case, self._batch = case, batch
        source = grain.sources.ArrayRecordDataSource([str(path) for path in sorted(folder.glob("*array_record*"))])
        rows = grain.MapDataset.source(source).seed(1).shuffle().map(self._decode)
        options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
        self._elastic = world_size > 1
        if world_size > 1:
            shards = grain.sharding.ShardOptions(rank, world_size)
            self._iterator: Any = iter(
                grain.experimental.ElasticIterator(rows, batch * world_size, shards, read_options=options)
            )
        elif case.key == "b":
            flat = rows.repeat(None).to_iter_dataset(options)
            sequences = grain.experimental.ConcatThenSplitIterDataset(flat, length_struct={"x": case.shape[0]})
            self._iterator = iter(sequences.batch(batch, drop_remainder=True))
        elif case.key == "d":
            self._iterator = iter(
                rows.repeat(None).batch(batch, drop_remainder=True, batch_fn=list).to_iter_dataset(options)
            )
        else:
            self._iterator = iter(rows.repeat(None).batch(batch, drop_remainder=True).to_iter_dataset(options))

    def _decode(self, raw: bytes) -> Any:
        if self._case.key == "d":
            return raw
        values = np.frombuffer(raw, self._case.dtype)
        return {"x": values} if self._case.key == "b" else values.reshape(self._case.shape)

    def epoch(self) -> Iterator[Any]:
        for batch in self._iterator:
            if self._case.key == "d":
                yield batch
            elif self._case.key == "b":
                tokens = torch.from_numpy(batch["x"])
                yield tokens, boundaries(tokens)
            else:
                yield torch.from_numpy(batch)

    def state(self, batches: int) -> Any:
        return self._iterator.get_state()

    def load(self, state: Any) -> None:
        self._iterator.set_state(state)

    def close(self) -> None:
        pass
