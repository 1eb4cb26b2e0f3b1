"""What the engine promises beside parity: first weights, evaluation, dead peers, overflow, silence, no compiler."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from configs.errors import Unreachable, UsageError
from tests.distributed.language_batches import rank_micro_batches
from tests.distributed.small_runs import Case, allow_emulated_fp16, task
from tests.pool import WorkerFailed, run_workers
from trainer.bound import BoundModel
from trainer.device import unsupported
from trainer.distributed import World, all_sum, close_world, init_world

pytestmark = pytest.mark.distributed


def make_engine(world: World, case: Case) -> Any:
    from trainer.engine import Engine

    return Engine(case.model(), case.config(), world)


def step(engine: Any, case: Case, number: int, change_loss: Callable[[Tensor], Tensor] = lambda loss: loss) -> Any:
    module = SimpleNamespace(**vars(task().module))
    module.loss = lambda *args: change_loss(task().module.loss(*args))
    micro_batches = rank_micro_batches(case.config(), number, engine.world.rank, engine.world.size)
    return engine.train_step(replace(task(), module=module), micro_batches, lr=1e-3, step=number)


def full_weights(engine: Any) -> dict[str, Tensor]:
    import deepspeed

    weights = {}
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=engine.zero_stage == 3):
            weights[name] = parameter.detach().clone()
    return weights


# --- first weights


def first_weights_hashes(world: World) -> set[str]:
    hashes = set()
    for stage in (0, 1, 2, 3):
        digest = hashlib.sha256()
        for name, weight in full_weights(make_engine(world, Case(stage=stage, tied=True))).items():
            digest.update(name.encode() + weight.numpy().tobytes())
        hashes.add(digest.hexdigest())
    return hashes


def test_first_weights_are_the_same_bits_at_every_stage_and_world_size() -> None:
    hashes = set()
    for world_size in (1, 3):
        hashes |= set.union(*run_workers(first_weights_hashes, world_size))
    assert len(hashes) == 1


def most_elements_held(world: World) -> tuple[int, int, int]:
    """(most elements of uncut parameters at a time while the engine is built, all elements, this rank's in the end)"""
    from trainer.engine import Engine

    case = Case(stage=3, num_layers=4)
    model, held, built = case.model(), [0], []

    def build(*args: Any) -> Any:
        built.append(model.module.build(*args))
        return built[0]

    def init_parameter(config: Any, name: str, tensor: Tensor, generator: torch.Generator) -> None:
        uncut = [p for p in built[0].parameters() if not p.is_meta and not hasattr(p, "ds_id")]
        held.append(sum(p.numel() for p in uncut))
        model.module.init_parameter(config, name, tensor, generator)

    module = SimpleNamespace(build=build, init_parameter=init_parameter)
    engine = Engine(BoundModel(module, model.config, model.input, model.output), case.config(), world)  # type: ignore[arg-type]
    mine = sum(parameter.ds_tensor.numel() for parameter in engine.module.parameters())
    return max(held), model.num_parameters(), mine


def test_zero_3_cuts_each_module_as_it_is_made() -> None:
    for most, total, mine in run_workers(most_elements_held, 2):
        assert most < total / 5
        assert mine <= total / 2 + 40  # rounded up in each parameter


# --- evaluation


def evaluate(world: World, case: Case) -> tuple[dict[str, float], bool, bool]:
    engine = make_engine(world, case)
    micro_batches = rank_micro_batches(case.config(), 0, world.rank, world.size)
    before = full_weights(engine)
    sums, _ = engine.evaluate(task(), iter(micro_batches))
    unchanged = all(torch.equal(before[name], weight) for name, weight in full_weights(engine).items())
    step(engine, case, 1)  # training goes on after an evaluation
    return sums, unchanged, engine.module.training


@pytest.mark.parametrize("stage", [1, 3])
def test_evaluation_counts_every_example_once_at_any_world_size(stage: int) -> None:
    ((alone, _, _),) = run_workers(evaluate, 1, Case(stage=stage))
    for world_size in (2, 3):  # idle batches at 3
        for sums, unchanged, training in run_workers(evaluate, world_size, Case(stage=stage)):
            assert sums == pytest.approx(alone, rel=1e-6)
            assert sums["tokens"] == alone["tokens"]
            assert unchanged and training


# --- what goes wrong


def lose_peer(world: World, case: Case, number: signal.Signals) -> tuple[str, float]:
    """Rank 1 is gone between forward and backward, so that the others wait in one of DeepSpeed's own collectives."""

    def go(loss: Tensor) -> Tensor:
        if world.rank == 1:
            os.kill(os.getpid(), number)
        return loss

    engine = make_engine(world, case)
    step(engine, case, 0)
    started = time.monotonic()
    try:
        step(engine, case, 1, change_loss=go)
    except RuntimeError as error:
        return str(error), time.monotonic() - started
    return "", 0.0


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_silent_peer_is_an_error_within_the_collective_timeout(stage: int) -> None:
    timeout_s = 2.0
    results = run_workers(
        lose_peer, 2, Case(stage=stage), signal.SIGSTOP, collective_timeout_s=timeout_s, timeout_s=60, may_die=[1]
    )
    error, waited_s = results[0]
    assert error
    assert waited_s >= timeout_s / 2, "it was not the timeout that ended it"


def test_a_dead_peer_is_an_error_at_once() -> None:
    results = run_workers(
        lose_peer, 2, Case(stage=1), signal.SIGKILL, collective_timeout_s=600, timeout_s=60, may_die=[1]
    )
    assert "peer" in results[0][0] or "reset" in results[0][0].lower()


def overflow(world: World, case: Case) -> tuple[Any, bool, Any]:
    if case.precision == "fp16":
        allow_emulated_fp16()
    engine = make_engine(world, case)
    step(engine, case, 0)
    before = full_weights(engine)
    stats = step(engine, case, 1, change_loss=lambda loss: loss * float("inf"))
    unchanged = all(torch.equal(before[name], weight) for name, weight in full_weights(engine).items())
    return stats, unchanged, step(engine, case, 2)


@pytest.mark.parametrize(
    ("stage", "precision"),
    [*itertools.product([0, 1, 2, 3], ["fp32"]), *itertools.product([1, 2, 3], ["bf16", "fp16"])],
)
def test_gradients_that_are_not_finite_leave_the_weights_alone(stage: int, precision: str) -> None:
    for stats, unchanged, after in run_workers(overflow, 2, Case(stage=stage, precision=precision)):
        assert unchanged
        assert stats.grad_norm == float("inf")
        assert stats.skipped == (precision == "fp16")
        assert not after.skipped and 0 < after.grad_norm < 100


def train_in_fp16(world: World) -> None:
    make_engine(world, Case(stage=1, precision="fp16"))


def test_fp16_is_refused_where_the_processor_has_none() -> None:
    if unsupported(torch.device("cpu"), "fp16") is None:
        run_workers(train_in_fp16, 1)
        return
    with pytest.raises(WorkerFailed, match=r"UsageError: precision=fp16: .*Use precision="):
        run_workers(train_in_fp16, 1)


# --- silence, no compiler


def train_quietly(world: World, case: Case, folder: Path) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError(f"started a process: {args} {kwargs}")

    subprocess.Popen.__init__ = refuse  # type: ignore[method-assign]
    os.environ["PATH"] = str(folder)
    os.environ["TORCH_EXTENSIONS_DIR"] = str(folder / "extensions")
    for number, name in ((1, "stdout"), (2, "stderr")):
        with (folder / f"{name}-{world.rank}").open("w") as file:
            os.dup2(file.fileno(), number)
    engine = make_engine(world, case)
    step(engine, case, 0)
    engine.evaluate(task(), rank_micro_batches(case.config(), 0, world.rank, world.size))
    with contextlib.suppress(OSError):
        os.fsync(1)


@pytest.mark.parametrize(
    ("stage", "precision", "optimizer"),
    [(0, "fp32", "adamw"), (1, "bf16", "sgd"), (2, "fp32", "adamw"), (3, "bf16", "adamw")],
)
def test_nothing_is_compiled_started_or_printed(stage: int, precision: str, optimizer: str, tmp_path: Path) -> None:
    """With an empty PATH there is neither ninja nor a compiler."""
    run_workers(train_quietly, 2, Case(stage=stage, precision=precision, optimizer=optimizer), tmp_path)
    written = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert written == dict.fromkeys(("stdout-0", "stdout-1", "stderr-0", "stderr-1"), "")


# --- the world


def leave(world: World) -> tuple[list[float], bool]:
    sums = all_sum([world.rank, 0.1])
    close_world()
    return sums, torch.distributed.is_initialized()


def test_sums_over_all_workers() -> None:
    assert run_workers(leave, 3) == [([3.0, pytest.approx(0.3)], False)] * 3


def join_nobody(world: World) -> None:
    """Meets nobody, then finds its port taken."""
    close_world()
    options = {"use_gpu": False, "threads": 1, "timeout_s": 1.0}
    with pytest.raises(Unreachable, match=r"Worker 1 of 2 could not meet the others at tcp://127.0.0.1:9 within 1 s"):
        init_world(1, 2, 1, "tcp://127.0.0.1:9", **options)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(Unreachable, match="the port is in use"):
            init_world(0, 2, 0, f"tcp://127.0.0.1:{port}", **options)
    with pytest.raises(UsageError, match=r"resources.gpus_per_worker=0"):
        init_world(0, 1, 1000, "tcp://127.0.0.1:9", **{**options, "use_gpu": True})


def test_joining_fails_with_a_remedy() -> None:
    run_workers(join_nobody, 1, timeout_s=60)


def fail(world: World) -> None:
    if world.rank == 1:
        raise UsageError("rank 1 does not like it")
    time.sleep(60)


def test_the_pool_ends_with_the_first_failure() -> None:
    with pytest.raises(WorkerFailed, match=r"(?s)rank 1 raised.*does not like it"):
        run_workers(fail, 2)


# --- agreement


def gathered(world: World, values: list[Any]) -> list[Any]:
    from trainer.distributed import all_gather_json

    return all_gather_json(values[world.rank])


@pytest.mark.parametrize("world_size", [1, 3])
def test_every_rank_hears_every_ranks_value(world_size: int) -> None:
    values: list[Any] = [[["train", 7], ["ünï", 2**40]], [], {"a": None}][:world_size]
    assert run_workers(gathered, world_size, values) == [values] * world_size
