"""Losses are what they were: no speed-up may change the maths. `python -m tests.golden.losses` writes them anew."""

from __future__ import annotations

import pytest

from tests.distributed.zoo import BOUNDS, TASKS
from tests.golden import losses
from tests.pool import run_workers

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, list[float]]]:
    return run_workers(losses.all_models, 1)[0]


@pytest.mark.parametrize("model", TASKS)
def test_losses_are_what_they_were(model: str, found: dict[str, dict[str, list[float]]]) -> None:
    golden = losses.read(model)
    assert set(found[model]) == set(golden) == set(losses.CELLS)
    for precision, values in found[model].items():
        first = golden[precision][0]
        far = max(abs(ours - theirs) / first for ours, theirs in zip(values, golden[precision], strict=True))
        assert far <= BOUNDS[precision], f"{precision}: {values}"
        assert golden[precision][-1] < 0.95 * first  # it learns, or the comparison says little
