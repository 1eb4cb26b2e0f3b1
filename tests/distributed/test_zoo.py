"""A thin slice of the parity grid (benchmarks/parity_grid.py): every model, sharded, against a plain PyTorch loop."""

from __future__ import annotations

import pytest

from tests.contract.examples import MODELS
from tests.distributed.zoo import BOUNDS, TASKS, Cell, difference, engine_losses
from tests.pool import run_workers

pytestmark = pytest.mark.distributed


def test_every_model_is_in_the_grid() -> None:
    assert {name.partition("-")[0] for name in TASKS} == set(MODELS)


@pytest.mark.parametrize("model", TASKS)
def test_fp32_at_zero_3_on_two_workers(model: str) -> None:
    cell = Cell(model, 3, "fp32", 2)
    assert difference(cell, *run_workers(engine_losses, 2, cell)[0]) <= BOUNDS["fp32"]


@pytest.mark.parametrize("model", TASKS)
def test_bf16_at_zero_2(model: str) -> None:
    cell = Cell(model, 2, "bf16", 1)
    assert difference(cell, *run_workers(engine_losses, 1, cell)[0]) <= BOUNDS["bf16"]
