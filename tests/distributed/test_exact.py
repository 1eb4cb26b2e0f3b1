"""Exact mode: the same bits at every ZeRO stage and world size, through resizes in the middle."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from configs.schema import OptimizerConfig, RunConfig
from data_pipelines.loader import MicroBatch
from tests.configs.minimal import minimal
from tests.distributed.zoo import Cell as ZooCell
from tests.distributed.zoo import micro_batches
from tests.pool import run_workers
from trainer.bound import BoundTask
from trainer.distributed import World
from trainer.exact import SUM_BITS, UNKNOWN, ExactGradients
from trainer.optimizers import build

pytestmark = pytest.mark.distributed

STEPS = 12


@dataclass(frozen=True)
class Cell:
    """A model at a stage; GPT, LSTM and CNN are named in tests/distributed/zoo.py. determinism as in a config."""

    model: str
    stage: int
    precision: str = "fp32"
    optimizer: str = "adamw"
    determinism: str = "exact"

    def config(self) -> RunConfig:
        momentum = {"momentum": 0.9} if self.optimizer == "sgd" else {}
        return RunConfig.model_validate(
            minimal(
                seed=11,
                steps=STEPS,
                batch={"global_batch_size": 5, "micro_batch_size": 1},
                precision=self.precision,
                zero={"stage": self.stage},
                determinism=self.determinism,
                optimizer={
                    "name": self.optimizer,
                    "lr": 1e-2,
                    "weight_decay": 0.1,
                    "clip_grad_norm": 0.5,  # smaller than the norm of all steps
                    **momentum,
                },
            )
        )


def work(world: World, cells: list[Cell]) -> list[tuple[dict[str, Any], list[tuple[float, float | None]]]]:
    """Of each cell what this rank holds at the end, {name: [(start, elements)]}, and losses and norms of all steps."""
    from trainer import engine_state
    from trainer.engine import Engine

    report = []
    for cell in cells:
        config, zoo = cell.config(), ZooCell(cell.model, cell.stage, cell.precision, world.size)
        task = zoo.task()
        engine = Engine(zoo.bound_model(), config, world)
        stats = []
        for step in range(STEPS):
            found = engine.train_step(task, slots(config, task, world), lr=1e-2, step=step)
            stats.append((found.loss, found.grad_norm))
        held: dict[str, list[tuple[int, bytes]]] = {}
        for fragment in engine_state.fragments(engine):
            key = f"{fragment.kind}/{fragment.name}"
            held.setdefault(key, []).append((fragment.start, fragment.tensor.contiguous().numpy().tobytes()))
        report.append((held, stats))
    return report


def slots(config: RunConfig, task: BoundTask, world: World) -> list[MicroBatch]:
    """This rank's micro-batches, of one example each; some are idle."""
    whole = [
        {name: tensor[number : number + 1] for name, tensor in pair.items()}
        for pair in micro_batches(task)
        for number in range(len(next(iter(pair.values()))))
    ]
    mine = []
    for slot in range(config.accumulation(world.size)):
        wanted = world.rank + slot * world.size
        index = min(wanted, len(whole) - 1)
        mine.append(MicroBatch(index, wanted > index, np.arange(1), whole[index]))
    return mine


def digests(cells: list[Cell], world_size: int) -> dict[Cell, tuple[str, list[Any]]]:
    """Of masters, optimizer state and buffers, joined over the ranks; and losses and norms."""
    ranks = run_workers(work, world_size, cells, timeout_s=60.0 + 60.0 * len(cells))
    found = {}
    for number, cell in enumerate(cells):
        joined: dict[str, list[tuple[int, bytes]]] = {}
        for report in ranks:
            for key, pieces in report[number][0].items():
                joined.setdefault(key, []).extend(pieces)
        digest = hashlib.sha256()
        for key in sorted(joined):
            digest.update(key.encode())
            for _, raw in sorted(joined[key]):
                digest.update(raw)
        found[cell] = digest.hexdigest(), ranks[0][number][1]
    return found


def cells_of(model: str) -> list[list[Cell]]:
    """Cells that must all end alike."""
    fp32 = [Cell(model, stage) for stage in (0, 1, 2, 3)]
    bf16 = [Cell(model, stage, "bf16") for stage in (1, 2, 3)]
    sgd = [Cell(model, stage, optimizer="sgd") for stage in (0, 3)]
    return [fp32, bf16, sgd]


def assert_alike(found: dict[Any, tuple[str, Any]]) -> None:
    """The same digest, and the same losses and norms to the last bit."""
    assert len({digest for digest, _ in found.values()}) == 1, {cell: digest for cell, (digest, _) in found.items()}
    assert len({str(stats) for _, stats in found.values()}) == 1


@pytest.mark.slow
@pytest.mark.parametrize("model", ["gpt", "lstm", "cnn"])
def test_the_same_bits_at_every_stage_and_world_size(model: str) -> None:
    groups = cells_of(model)
    found = {
        (cell, size): result
        for size in (1, 2, 3, 4)
        for cell, result in digests([cell for group in groups for cell in group], size).items()
    }
    for group in groups:
        assert_alike({key: found[key] for key in found if key[0] in group})


def test_the_same_bits_in_a_few_cells() -> None:
    one = [Cell("cnn", 0), Cell("lstm", 1, "bf16"), Cell("gpt", 0), Cell("gpt", 3)]
    three = [Cell("cnn", 3), Cell("cnn", 2), Cell("lstm", 3, "bf16")]
    found = [*digests(one, 1).items(), *digests(three, 3).items()]
    for model in ("cnn", "lstm", "gpt"):
        assert_alike({cell: result for cell, result in found if cell.model == model})


def test_without_it_the_cluster_shows() -> None:
    cells = [Cell("cnn", stage, determinism="cluster") for stage in (0, 3)]
    found = {digest for size in (1, 3) for digest, _ in digests(cells, size).values()}
    assert len(found) > 1


# --- resizes


def part(world: World, folder: str, cell: Cell, first: int, last: int) -> None:
    """Steps first .. last, from the checkpoint before them and into one after them."""
    from configs.schema import CheckpointConfig
    from data_pipelines.storage import Store
    from trainer import checkpoint
    from trainer.engine import Engine
    from trainer.progress import Progress

    config, zoo = cell.config(), ZooCell(cell.model, cell.stage, cell.precision, world.size)
    engine = Engine(zoo.bound_model(), config, world)
    if first:
        checkpoint.load(engine, checkpoint.find(Store(folder), first))
    for step in range(first, last):
        engine.train_step(zoo.task(), slots(config, zoo.task(), world), lr=1e-2, step=step)
    saver = checkpoint.Checkpointer(Store(folder), world, CheckpointConfig(keep=None), Progress())
    saver.save(last, engine, {}, wait=True)
    torch.distributed.barrier()


def saved(folder: str, step: int) -> dict[str, torch.Tensor]:
    from data_pipelines.storage import Store
    from trainer import checkpoint

    reader = checkpoint.find(Store(folder), step)
    return {
        f"{kind}/{name}": reader.read(name, kind, 0, torch.Size(reader.shape(name)).numel())
        for name in [*reader.manifest["parameters"], *reader.manifest["buffers"]]
        for kind in reader.kinds(name)
    }


@pytest.mark.parametrize(
    ("model", "precision"), [("cnn", "fp32"), pytest.param("lstm", "bf16", marks=pytest.mark.slow)]
)
def test_resized_and_cut_elsewhere_in_the_middle_it_ends_with_the_same_bits(
    model: str, precision: str, tmp_path: Path
) -> None:
    whole, cut = str(tmp_path / "whole"), str(tmp_path / "cut")
    run_workers(part, 1, whole, Cell(model, 1, precision), 0, STEPS)
    run_workers(part, 3, cut, Cell(model, 3, precision), 0, 4)
    run_workers(part, 1, cut, Cell(model, 2, precision), 4, 7)
    run_workers(part, 2, cut, Cell(model, 1, precision), 7, STEPS)
    expected, found = saved(whole, STEPS), saved(cut, STEPS)
    assert expected.keys() == found.keys()
    assert [name for name, values in expected.items() if not torch.equal(values, found[name])] == []


# --- the means


@settings(max_examples=50, deadline=None)
@given(
    terms=st.integers(1, 12),
    numbers=st.lists(st.floats(-(2.0**99), 2.0**99, width=32), min_size=1, max_size=40),
    low=st.booleans(),
    seed=st.integers(0, 99),
)
def test_rounded_gradients_add_up_alike_in_any_order(terms: int, numbers: list[float], low: bool, seed: int) -> None:
    weight = nn.Parameter(torch.zeros(len(numbers), dtype=torch.bfloat16 if low else torch.float32))
    module = nn.Module()
    module.weight = weight
    exact = ExactGradients(module, terms, 1)
    generator = torch.Generator().manual_seed(seed)
    factors = torch.randn(terms, len(numbers), generator=generator)
    raw = (factors * torch.tensor(numbers)).to(weight.dtype)

    def gradients() -> list[Tensor]:
        found = []
        for term in raw:
            weight.grad = None
            (weight * term).sum().backward()
            found.append(weight.grad.float())
        return found

    gradients()
    first = exact.settle()
    rounded = gradients()
    assert exact.settle()
    if terms * raw.float().abs().max() > 2.0 ** (UNKNOWN + SUM_BITS):  # what is smaller fits the first quantum too
        assert not first, "quanta are not known before the first step"
    zero = torch.zeros(len(numbers))
    orders = [torch.randperm(terms, generator=generator).tolist() for _ in range(4)]
    sums = [sum((rounded[index] for index in order), zero) for order in orders]
    for order in orders:  # two ranks
        sums.append(sum((rounded[i] for i in order[::2]), zero) + sum((rounded[i] for i in order[1::2]), zero))
    assert all(torch.equal(sums[0], each) for each in sums)
    for size in (2, 3, 4):  # what stage 3 does with a sum
        assert torch.equal(sums[0] * size / size, sums[0])
    error = (sums[0].double() - raw.double().sum(0)).abs().max()
    assert error <= terms * 2.0 ** (exact.exponents["weight"] + 1)
    norm = exact.norm([sums[0]], len(numbers), replicated=True)
    assert norm == exact.norm([each for each in sums[0].flip(0).split(3)], len(numbers), replicated=True)
    assert norm == pytest.approx(float(sums[0].double().norm()), rel=1e-5, abs=1e-30)


def test_the_norm_does_not_show_where_gradients_are_cut() -> None:
    module = nn.Linear(100, 100, bias=False)
    exact = ExactGradients(module, 1, 1)
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(10_000, generator=generator) * torch.rand(10_000, generator=generator).pow(8)
    exact._peaks["weight"] = values.abs().max()
    exact.settle()
    norms = {
        exact.norm(values[torch.randperm(10_000, generator=generator)].split(size), 10_000, replicated=True)
        for size in (7, 333, 5_000, 10_000)
    }
    assert len(norms) == 1
    assert norms.pop() == pytest.approx(float(values.double().norm()), rel=1e-6)


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd"])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_an_update_does_not_show_where_a_tensor_is_cut(name: str, decay: float) -> None:
    def trained(pieces: Sequence[Tensor], *, exact: bool = True) -> Tensor:
        parameters = [nn.Parameter(piece.clone()) for piece in pieces]
        options = {"momentum": 0.9, "nesterov": True} if name == "sgd" else {}
        config = OptimizerConfig(name=name, lr=0.05, weight_decay=decay, **options)
        named = [(f"{number}", each) for number, each in enumerate(parameters)]
        optimizer = build(config, named, {key: torch.Size((2, 2)) for key, _ in named}, exact=exact)
        generator = torch.Generator().manual_seed(0)
        for _ in range(4):
            gradient = torch.randn(4099, generator=generator)
            for each, part_of in zip(parameters, gradient.split([len(piece) for piece in pieces]), strict=True):
                each.grad = part_of.clone()
            optimizer.step()
        return torch.cat([each.detach() for each in parameters])

    for seed in range(60):
        weights, place = torch.randn(4099, generator=torch.Generator().manual_seed(seed)), 1 + 67 * seed
        assert torch.equal(trained(weights.tensor_split([place])), trained([weights])), (seed, place)
    torch.testing.assert_close(trained([weights]), trained([weights], exact=False), atol=1e-6, rtol=1e-5)
    if name == "adamw":  # why it is not the fused one
        cuts = [trained(weights.tensor_split([place]), exact=False) for place in range(1, 33)]
        assert not all(torch.equal(cuts[0], each) for each in cuts)


def test_what_is_not_shown_is_refused() -> None:
    for change, said in (
        ({"precision": "fp16"}, "loss scale"),
        ({"zero": {"stage": 1, "offload_optimizer": True}}, "offload_optimizer=false"),
        ({"resources": {"gpus_per_worker": 1}}, "GPUs"),
        ({"optimizer": {"name": "rmsprop", "lr": 0.1}}, "Use adamw, adam or sgd"),
    ):
        with pytest.raises(ValueError, match=said):
            RunConfig.model_validate(minimal(determinism="exact", **change))
