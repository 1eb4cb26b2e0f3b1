from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.schema import ScheduleConfig
from trainer.schedules import lr_at

LR = 0.5
NAMES = ("constant", "linear", "cosine", "wsd")


def curve(steps: int, **settings: object) -> list[float]:
    config = ScheduleConfig.model_validate(settings)
    return [lr_at(config, LR, step, steps) for step in range(steps)]


@given(
    name=st.sampled_from(NAMES),
    steps=st.integers(1, 300),
    warmup_share=st.floats(0, 1),
    decay_steps=st.none() | st.integers(1, 400),
    min_lr_ratio=st.floats(0, 1),
)
def test_rises_to_the_peak_and_never_again(
    name: str, steps: int, warmup_share: float, decay_steps: int | None, min_lr_ratio: float
) -> None:
    warmup = int(warmup_share * steps)
    lrs = curve(steps, name=name, warmup_steps=warmup, decay_steps=decay_steps, min_lr_ratio=min_lr_ratio)
    rise, rest = lrs[:warmup], lrs[warmup:]
    assert rise == pytest.approx([LR * (step + 1) / warmup for step in range(warmup)])
    assert all(later <= earlier * (1 + 1e-12) for earlier, later in itertools.pairwise(rest))
    assert all(LR * min_lr_ratio * (1 - 1e-12) <= lr <= LR for lr in rest)


@pytest.mark.parametrize("name", ["linear", "cosine", "wsd"])
def test_first_step_is_at_the_peak_and_the_last_at_the_minimum(name: str) -> None:
    lrs = curve(101, name=name, min_lr_ratio=0.1)
    assert lrs[0] == LR
    assert lrs[100] == pytest.approx(0.1 * LR)
    assert lr_at(ScheduleConfig(name=name, min_lr_ratio=0.1), LR, 1000, 101) == pytest.approx(0.1 * LR)


def test_constant() -> None:
    assert curve(5, name="constant") == [LR] * 5


def test_halfway_down() -> None:
    assert curve(101, name="linear", min_lr_ratio=0.0)[50] == pytest.approx(LR / 2)
    cosine = curve(101, name="cosine", min_lr_ratio=0.0)
    assert cosine[50] == pytest.approx(LR / 2)
    assert cosine[25] == pytest.approx(LR * 0.5 * (1 + math.cos(math.pi / 4)))


@pytest.mark.parametrize(("decay_steps", "stable"), [(None, 80), (10, 90)])
def test_wsd_stays_at_the_peak_until_its_last_steps(decay_steps: int | None, stable: int) -> None:
    lrs = curve(101, name="wsd", decay_steps=decay_steps, min_lr_ratio=0.0)
    assert lrs[: stable + 1] == [LR] * (stable + 1)
    assert lrs[stable + 1] == pytest.approx(LR * (1 - 1 / (100 - stable)))
    assert lrs[100] == 0
