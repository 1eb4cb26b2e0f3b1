"""Shardyard's own checkpoints: two ranks that save them, and the load of a folder."""

from __future__ import annotations

import contextlib
import math
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from configs.schema import CheckpointConfig
from data_pipelines.storage import Store
from tests.crash.outcomes import Loaded, state_digest
from trainer.checkpoint import Checkpointer, CheckpointReader, delete_leftovers, newest
from trainer.progress import Progress
from trainer.snapshot import Reading

GOLDEN = Path(__file__).with_name("own_saves.jsonl.gz")


class Model(nn.Module):
    """Parameters, and buffers that training moves."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 3)
        self.norm = nn.BatchNorm1d(3)
        self.head = nn.Linear(3, 7)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.norm(self.embed(tokens)))
        return logits


def make_engine(world: Any, seed: int) -> Any:
    torch.manual_seed(seed)
    module = Model()
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.05)
    deepspeed = SimpleNamespace(optimizer=optimizer)
    return SimpleNamespace(
        module=module,
        world=world,
        zero_stage=0,
        average=None,
        exact=None,
        reading=Reading(),
        deepspeed=deepspeed,
        optimizer=optimizer,
    )


def train(engine: Any, step: int) -> None:
    tokens = torch.randint(0, 7, (5,), generator=torch.Generator().manual_seed(step))
    nn.functional.cross_entropy(engine.module(tokens), tokens.flip(0)).backward()
    engine.reading.wait()  # as trainer.engine.Engine does
    engine.optimizer.step()
    engine.optimizer.zero_grad()


def engine_digest(engine: Any, step: int) -> str:
    """What a checkpoint of this engine must hold."""
    names = {parameter: name for name, parameter in engine.module.named_parameters()}
    tensors = {f"buffer/{name}": buffer for name, buffer in engine.module.named_buffers()}
    for parameter, name in names.items():
        tensors[f"master/{name}"] = parameter.detach()
        kinds = engine.optimizer.state[parameter]
        tensors |= {f"{kind}/{name}": kinds[kind] for kind in ("exp_avg", "exp_avg_sq")}
    return state_digest(step, tensors)


def reader_digest(reader: CheckpointReader) -> str:
    tensors = {}
    for name in [*reader.manifest["parameters"], *reader.manifest["buffers"]]:
        for kind in reader.kinds(name):
            tensors[f"{kind}/{name}"] = reader.read(name, kind, 0, math.prod(reader.shape(name)))
    return state_digest(reader.manifest["step"], tensors)


def load(folder: Path) -> Loaded:
    """What a run that starts on this folder goes on from, and what it is told of the rest."""
    return load_from(Store(folder / "checkpoints"))


def load_from(checkpoints: Store) -> Loaded:
    """The same of any store."""
    told: list[str] = []
    found = newest(checkpoints, told.append)
    delete_leftovers(checkpoints)  # a start cleans up; what it found must not be among it
    if found is None:
        return Loaded(None, told)
    return Loaded(reader_digest(found[1]), told, source=found[1].name)


def save(world: Any, folder: Path, mark: Callable[[str, str], None]) -> None:
    """Two attempts that keep the newest two checkpoints.

    The first saves steps 1 and 2 and fails to save step 3, where rank 1 may write no more. The second saves step 2
    again, with other weights, then steps 3 and 4.
    """
    for attempt, steps in enumerate([(1, 2, 3), (2, 3, 4)]):
        saver = Checkpointer(Store(folder / "checkpoints"), world, CheckpointConfig(keep=2), Progress())
        engine = make_engine(world, seed=attempt)
        for step in steps:
            train(engine, step)
            full = attempt == 0 and step == 3
            expected = engine_digest(engine, step)
            mark("begun", expected)
            with disk_full_after(700) if full and world.rank == 1 else contextlib.nullcontext():
                saver.save(step, engine, {"examples_seen": step}, wait=True)
            assert (saver.last_error is not None) == full, saver.last_error
            mark("failed" if full else "saved", expected)


@contextlib.contextmanager
def disk_full_after(num_bytes: int) -> Iterator[None]:
    """No file of this process may grow beyond this; a write stops there, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, resource.RLIM_INFINITY))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
