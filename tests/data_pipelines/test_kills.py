"""Ranks that read batches are killed at random, and others go on at another world size, with other threads."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

from data_pipelines.examples import Examples
from data_pipelines.loader import Loader, MicroBatch
from data_pipelines.order import Order
from tests.data_pipelines.test_loader import some_data, with_noise

STEPS, GLOBAL_BATCH, MICRO_BATCH = 150, 11, 3
DEADLINE_S = 300.0
SLOW = pytest.mark.slow


def digest(batch: MicroBatch) -> str:
    state = xxhash.xxh3_128(batch.sample_ids.tobytes())
    for name, tensor in sorted(batch.tensors.items()):
        state.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        state.update(tensor.contiguous().numpy().tobytes())
    return state.hexdigest()


def read(examples: Examples, order: Order, start: int, rank: int, world_size: int, threads: int, log: Path) -> None:
    """Write down a line a step: its number, and of each micro-batch k the digest."""
    loader = Loader(
        examples,
        order,
        with_noise,
        seed=7,
        global_batch_size=GLOBAL_BATCH,
        micro_batch_size=MICRO_BATCH,
        rank=rank,
        world_size=world_size,
        start_step=start,
        examples_seen=start * GLOBAL_BATCH,
        threads=threads,
        ragged={"list": 1},
        prefetch_bytes=4000,
    )
    with log.open("ab", buffering=0) as file:
        for step in range(start, STEPS):
            found = {batch.index: digest(batch) for batch in loader.step(step) if not batch.idle}
            file.write((json.dumps([step, found]) + "\n").encode())
    loader.close()


def lines(log: Path) -> list[Any]:
    """What was written whole."""
    text = log.read_text() if log.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def latest_step(log: Path) -> int:
    """Of the last whole line; -1 where there is none."""
    whole, _, _ = (log.read_bytes() if log.exists() else b"").rpartition(b"\n")
    return int(json.loads(whole[whole.rfind(b"\n") + 1 :])[0]) if whole else -1


@pytest.mark.parametrize(
    "kind",
    [*(pytest.param(kind, marks=SLOW) for kind in ("concat", "mixture", "ragged")), "best_fit", "ragged mixture"],
)
def test_the_same_batches_whoever_is_killed(kind: str, tmp_path: Path) -> None:
    examples, order = some_data(kind, 5, GLOBAL_BATCH, MICRO_BATCH)
    assert 3 * len(examples) < STEPS * GLOBAL_BATCH  # several epochs
    read(examples, order, 0, 0, 1, 1, tmp_path / "whole")
    expected = {(step, k): value for step, found in lines(tmp_path / "whole") for k, value in found.items()}

    fork = multiprocessing.get_context("fork")
    rng = np.random.default_rng(3)
    start, seen, kills = 0, set(), 0
    deadline = time.monotonic() + DEADLINE_S
    for attempt, world_size in enumerate([2, 3, 1, 4, 2, 3]):
        logs = [tmp_path / f"{attempt}-{rank}" for rank in range(world_size)]
        ranks = [
            fork.Process(target=read, args=(examples, order, start, rank, world_size, 1 + attempt % 3, log))
            for rank, log in enumerate(logs)
        ]
        for process in ranks:
            process.start()
        last = start + int(rng.integers(5, 40)) if attempt < 5 else STEPS  # kill when somebody is there
        while any(each.is_alive() for each in ranks) and not any(latest_step(log) >= last for log in logs):
            assert time.monotonic() < deadline
            time.sleep(0.002)
        for process in ranks:
            if process.is_alive():
                os.kill(process.pid or 0, signal.SIGKILL)
                kills += 1
            process.join()
        read_steps = [lines(log) for log in logs]
        for step, found in (line for steps in read_steps for line in steps):
            for k, value in found.items():
                assert expected[step, k] == value, (step, k)
                seen.add((step, k))
        start = min(start + len(steps) for steps in read_steps)  # the checkpoint: what every rank has had
    assert start == STEPS and seen == set(expected)
    assert kills >= 4
