"""Losses are what they were: no speed-up may change the maths. `python -m tests.golden.losses` writes them anew."""

from __future__ import annotations

import pytest

from tests.distributed.zoo import BOUNDS, TASKS
from tests.golden import losses
from tests.pool import run_workers

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("model", TASKS)
def test_losses_are_what_they_were(model: str) -> None:
    golden = losses.read(model)
    found = run_workers(losses.of, 1, model)[0]
    assert set(found) == set(golden) == set(losses.CELLS)
    for precision, values in found.items():
        first = golden[precision][0]
        far = max(abs(ours - theirs) / first for ours, theirs in zip(values, golden[precision], strict=True))
        assert far <= BOUNDS[precision], f"{precision}: {values}"
        assert golden[precision][-1] < 0.95 * first  # it learns, or the comparison says little
