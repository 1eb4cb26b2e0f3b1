from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trainer.initialization import materialize, parameter_generator


def normal(name: str, tensor: Tensor, generator: torch.Generator) -> None:
    tensor.normal_(generator=generator)


class Table(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.empty(3), persistent=False)

    def reset_buffers(self) -> None:
        self.table.copy_(torch.arange(3))


def tied_model(dtype: torch.dtype = torch.float32) -> Any:
    with torch.device("meta"):
        model = nn.ModuleDict({"embedding": nn.Embedding(7, 5), "table": Table(), "norm": nn.LayerNorm(5)})
        model["layers"] = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5))
        model["head"] = nn.Linear(5, 7, bias=False)
    model["head"].weight = model["embedding"].weight
    return model.to(dtype)


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def test_values_depend_on_seed_and_name_alone() -> None:
    model, alone = tied_model(), nn.ModuleDict({"layers": nn.Sequential(nn.Identity(), nn.Linear(5, 5, device="meta"))})
    materialize(model, normal, seed=3)
    materialize(alone, normal, seed=3)
    assert torch.equal(model["layers"][1].weight, alone["layers"][1].weight)
    assert not torch.equal(model["layers"][0].weight, model["layers"][1].weight)
    other = tied_model()
    materialize(other, normal, seed=4)
    assert all(not torch.equal(a, b) for a, b in zip(values(model).values(), values(other).values(), strict=True))


def test_generators_of_different_names_and_seeds_differ() -> None:
    keys = [(seed, f"blocks.{layer}.{name}") for seed in range(5) for layer in range(40) for name in ("a", "b")]
    draws = {float(torch.rand(1, dtype=torch.float64, generator=parameter_generator(*key))) for key in keys}
    assert len(draws) == len(keys)


def test_tied_parameters_stay_tied_and_are_filled_once() -> None:
    filled = []
    model = tied_model()
    materialize(model, lambda name, tensor, _: filled.append(name) or tensor.zero_(), seed=0)
    assert model["head"].weight is model["embedding"].weight
    assert sorted(filled) == sorted(name for name, _ in tied_model().named_parameters())
    assert "embedding.weight" in filled


def test_buffers_are_computed_and_everything_has_left_the_meta_device() -> None:
    model = tied_model()
    materialize(model, normal, seed=0)
    assert torch.equal(model["table"].table, torch.arange(3.0))
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])


def test_a_buffer_that_nothing_computes_is_a_programming_error() -> None:
    with torch.device("meta"):
        model = nn.BatchNorm1d(3)
    with pytest.raises(AssertionError, match="BatchNorm1d"):
        materialize(model, normal, seed=0)


def test_low_precision_values_are_the_fp32_ones_rounded() -> None:
    exact, low = tied_model(), tied_model(torch.bfloat16)
    materialize(exact, normal, seed=1)
    materialize(low, normal, seed=1)
    for name, value in values(low).items():
        assert torch.equal(value, values(exact)[name].bfloat16()), name


def test_frozen_parameters_stay_frozen() -> None:
    model = tied_model()
    model["layers"][0].weight.requires_grad_(False)
    materialize(model, normal, seed=0)
    assert [name for name, parameter in model.named_parameters() if not parameter.requires_grad] == ["layers.0.weight"]


def test_each_module_is_partitioned_once_when_all_below_it_has_values() -> None:
    model = tied_model()
    seen: list[nn.Module] = []

    def partition(module: nn.Module) -> None:
        assert not any(parameter.is_meta for parameter in module.parameters())
        seen.append(module)

    materialize(model, normal, seed=0, partition=partition)
    owned = [parameter for module in seen for parameter in module.parameters(recurse=False)]
    assert len(owned) == len({*owned}) == len(list(model.parameters()))  # the tied one once


def test_partitioned_values_are_those_of_the_whole() -> None:
    whole, sharded = tied_model(), tied_model()
    materialize(whole, normal, seed=2)
    shards: dict[str, Tensor] = {}
    names = {module: name for name, module in sharded.named_modules()}

    def keep_first_half(module: nn.Module) -> None:
        for name, parameter in module.named_parameters(recurse=False):
            size = math.ceil(parameter.numel() / 2)
            shards[f"{names[module]}.{name}"] = parameter.detach().flatten()[:size].clone()
            parameter.data = torch.empty(0)

    materialize(sharded, normal, seed=2, partition=keep_first_half)
    expected = dict(whole.named_parameters(remove_duplicate=False))
    assert len(shards) == len(values(whole))
    for name, shard in shards.items():
        assert torch.equal(shard, expected[name].flatten()[: len(shard)]), name


PEAK = """
import re, torch
from torch import nn
from trainer.initialization import materialize

def peak_bytes():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])

def peak_of(partition):  # extra bytes at the peak of initialising 48 layers of 2 MiB
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(1024, 512, bias=False) for _ in range(48)))
    before = peak_bytes()
    materialize(model, lambda name, tensor, generator: tensor.normal_(generator=generator), seed=0, partition=partition)
    return peak_bytes() - before

def drop(module):
    module.weight.data = torch.empty(0)

drop_one = nn.Linear(1024, 512, bias=False, device="meta")  # code and pools that a first call loads
materialize(drop_one, lambda name, tensor, generator: tensor.normal_(generator=generator), seed=0, partition=drop)
print(peak_of(drop), peak_of(None))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak memory that Linux records")
def test_peak_memory_is_about_one_module_where_each_is_sharded_at_once() -> None:
    root = Path(__file__).parent.parent.parent
    # Memory goes back to the system as soon as a tensor is freed, as it does for tensors of more than 32 MiB anyway.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    output = subprocess.run(
        [sys.executable, "-c", PEAK], cwd=root, env=environment, capture_output=True, text=True, check=True
    ).stdout
    sharded, whole = (int(number) / 2**20 for number in output.split())  # MiB
    assert whole > 80, "this test no longer sees what a model takes"
    assert sharded < 12
