"""Batches on their way to a GPU: the order of what is asked of it, and when memory may be used again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from data_pipelines import loader as loader_module
from data_pipelines.buffers import Buffers
from data_pipelines.loader import Loader, MicroBatch
from data_pipelines.order import ExampleOrder
from tests.data_pipelines.fakes import Lists, Numbers
from tests.trainer.fake_cuda import DEVICE, Copy, Cuda, Host
from trainer.upload import Uploads

STEPS = 300


def loader(examples: Numbers, *, pin: bool) -> Loader:
    """5 examples in micro-batches of 2 are 3: on 2 ranks the second one of rank 1 is idle."""
    order = ExampleOrder(3, len(examples))
    sizes = {"global_batch_size": 5, "micro_batch_size": 2, "rank": 1, "world_size": 2}
    return Loader(examples, order, seed=3, prefetch_bytes=2000, pin=pin, **sizes)


def expected_batches(examples: Numbers) -> Iterator[dict[str, torch.Tensor]]:
    plain = loader(examples, pin=False)
    for step in range(STEPS):
        for batch in plain.step(step):
            yield {name: tensor.clone() for name, tensor in batch.tensors.items()}
    plain.close()


@pytest.mark.parametrize("examples", [Numbers([7, 30, 12]), Lists([7, 30, 12])])
def test_memory_is_filled_again_only_after_its_copies(examples: Numbers, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device that copies as late as it may, every batch is that of a loader whose memory nobody copies from."""
    cuda = Cuda(monkeypatch)
    filled: list[int] = []

    def allocate(_: Buffers, num_bytes: int) -> np.ndarray:
        filled.append(num_bytes)
        return np.empty(num_bytes, np.uint8)

    monkeypatch.setattr(Buffers, "_allocate", allocate)
    uploads, pinned = Uploads(DEVICE), loader(examples, pin=True)
    found: list[dict[str, Any]] = []

    def compute(tensors: dict[str, Copy]) -> None:
        assert all(copy.users == [cuda.computing] for copy in tensors.values())
        found.append({name: copy.value for name, copy in tensors.items()})

    for step in range(STEPS):
        micro_batches = pinned.step(step)
        assert [each.idle for each in micro_batches] == [False, True]
        hosts = [
            replace(each, tensors={name: Host(cuda, name, tensor) for name, tensor in each.tensors.items()})
            for each in micro_batches
        ]
        with cuda.lock:
            for _, tensors in uploads.each(hosts):
                cuda.computing.put(lambda tensors=tensors: compute(tensors))
    pinned.close()
    cuda.finish()
    assert len(filled) < STEPS, "the memory was never used again"
    for mine, expected in zip(found, expected_batches(examples), strict=True):
        assert mine.keys() == expected.keys()
        assert all(torch.equal(mine[name], expected[name]) for name in expected)


def batch(cuda: Cuda, number: int) -> MicroBatch:
    tensors: Any = {f"{name} {number}": Host(cuda, f"{name} {number}", torch.tensor(number)) for name in "ab"}
    return MicroBatch(number, False, np.array([number]), tensors)


def test_a_batch_is_copied_while_the_one_before_it_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Cuda(monkeypatch)
    waited: list[int] = []
    for given, tensors in Uploads(DEVICE).each(batch(cuda, number) for number in range(3)):
        cuda.calls.append(f"compute {given.index}")
        computed = cuda.computing.put(lambda: None)
        computed.run()  # with all that it waits for, and nothing else
        assert all(copy.value is not None for copy in tensors.values())
        waited.append(sum(not task.done for task in cuda.tasks))
    copies = [f"copy {name} {number}" for number in range(3) for name in "ab"]
    assert cuda.calls == [*copies[:4], "compute 0", *copies[4:], "compute 1", "compute 2"]
    assert waited == [2, 2, 0], "the copies of the next batch hold up nobody"


def test_on_a_cpu_batches_stay_as_they_are() -> None:
    tensors = {"a": torch.zeros(2)}
    ((given, found),) = Uploads(torch.device("cpu")).each([MicroBatch(0, False, np.arange(2), tensors)])
    assert found is tensors and given.index == 0
    assert list(Uploads(torch.device("cpu")).each([])) == []


@pytest.mark.gpu
@pytest.mark.parametrize("examples", [Numbers([700, 3000, 1200]), Lists([700, 3000, 1200])])
def test_a_gpu_gets_every_batch_bit_for_bit(examples: Numbers, monkeypatch: pytest.MonkeyPatch) -> None:
    """The device is kept busy, so that copies and refills race; what it summed is compared at the end."""
    monkeypatch.setattr(loader_module, "_AHEAD", 40)
    device = torch.device("cuda", 0)
    uploads, pinned = Uploads(device), loader(examples, pin=True)
    busy = torch.rand(1024, 1024, device=device)
    found = []
    for step in range(STEPS):
        for _, tensors in uploads.each(pinned.step(step)):
            busy = (busy @ busy).clamp(0, 1)
            found.append({name: tensor.clone() for name, tensor in tensors.items()})
    pinned.close()
    for mine, expected in zip(found, expected_batches(examples), strict=True):
        assert mine.keys() == expected.keys()
        assert all(torch.equal(mine[name].cpu(), expected[name]) for name in expected)
