"""This project's loader, through its public classes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_pipelines.columns import Column
from data_pipelines.examples import Rows
from data_pipelines.loader import Loader
from data_pipelines.order import choose_order
from data_pipelines.shards import Dataset
from peers.cases import SEQ_LEN, Case

SETTINGS = (
    "Arrow blocks of 2 MB, data.shuffle: blocks (windows of 128 blocks), one thread that reads ahead (the caller makes "
    "batches too, where none is ready); a, b: packed 'concat' (rows of 2,049 tokens); b: and cu_seqlens; c: fixed "
    "column; d: binary column"
)


def columns(case: Case) -> tuple[Column, ...]:
    if case.key in "ab":
        return (Column("key", "utf8", (None,)), Column("tokens", "uint16", (None,)), Column("num_bytes", "int64", ()))
    if case.key == "c":
        return (Column("image", "uint8", case.shape),)
    return (Column("blob", "binary", (None,)),)


def write(case: Case, folder: Path) -> None:
    from data_pipelines.index import Index, TokenizerFacts
    from data_pipelines.storage import Store
    from data_pipelines.writer import ShardWriter

    folder.mkdir(parents=True, exist_ok=True)
    store, layout = Store(folder), columns(case)
    with ShardWriter(store, "train-00000", layout) as writer:
        for number, row in enumerate(case.rows()):
            if case.key in "ab":
                writer.add({"key": f"{number:08d}", "tokens": row, "num_bytes": 4 * len(row)}, 4 * len(row))
            elif case.key == "c":
                writer.add({"image": row})
            else:
                writer.add({"blob": row.tobytes()})
    tokenizer = TokenizerFacts(vocab_size=50_000, eos_id=0, xxh3="0" * 32) if case.key in "ab" else None
    Index(
        name="benchmark",
        source={"name": "benchmark"},
        columns=layout,
        tokenizer=tokenizer,
        files=writer.files,
        splits={"train": writer.blocks},
        compression=None,
        quarantined=0,
        dropped={},
        packing=None,
    ).write(store)


class Peer:
    def __init__(
        self,
        case: Case,
        folder: Path,
        batch: int,
        rank: int = 0,
        world_size: int = 1,
        micro_batch: int | None = None,
        examples_seen: int = 0,
    ) -> None:
        self._case = case
        self._dataset = Dataset.open(folder)
        if case.key in "ab":
            self._examples: Any = self._dataset.packed("train", SEQ_LEN, boundaries=case.key == "b")
        else:
            name = columns(case)[0].name
            self._examples = Rows(self._dataset.split("train"), (name,))
        self._global_batch = batch * world_size
        self._micro_batch = micro_batch or batch
        self._rank, self._world_size = rank, world_size
        self._open(examples_seen)

    def _open(self, examples_seen: int) -> None:
        order = choose_order("blocks", 1, self._examples.block_examples)
        self._examples_seen = examples_seen
        self._step = 0
        self._loader = Loader(
            self._examples,
            order,
            None,
            seed=1,
            global_batch_size=self._global_batch,
            micro_batch_size=self._micro_batch,
            rank=self._rank,
            world_size=self._world_size,
            examples_seen=examples_seen,
        )

    def epoch(self) -> Iterator[Any]:
        if self._world_size > 1:
            yield from self._one_epoch()
            return
        key, loader = self._case.key, self._loader
        while True:  # positions run on from epoch to epoch
            tensors = loader.step(self._step)[0].tensors
            self._step += 1
            if key == "b":
                yield tensors["tokens"], tensors["cu_seqlens"]
            elif key == "a":
                yield tensors["tokens"]
            else:
                yield tensors["image" if key == "c" else "blob"]

    def _one_epoch(self) -> Iterator[Any]:
        """This rank's examples of the first epoch; an idle micro-batch is somebody else's."""
        size = self._micro_batch
        while self._examples_seen + self._step * self._global_batch < len(self._examples):
            positions = self._loader.positions(self._step)
            parts = []
            for micro in self._loader.step(self._step):
                inside = int((positions[micro.index * size : (micro.index + 1) * size] < len(self._examples)).sum())
                if not micro.idle:
                    parts.extend(micro.tensors["tokens"][:inside])
            self._step += 1
            yield parts

    def state(self, batches: int) -> Any:
        return {"examples_seen": batches * self._global_batch}

    def load(self, state: Any) -> None:
        self._loader.close()
        self._open(state["examples_seen"])

    def close(self) -> None:
        self._loader.close()
        self._dataset.close()
