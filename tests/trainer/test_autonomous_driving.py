"""What the tests of every task cannot see of driving: motion told from scans, ways that are compared, the mirror."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pydantic
import pytest
import torch
from torch import Tensor, nn

from configs.errors import UsageError
from data_pipelines.columns import Column
from trainer.bound import BoundTask
from trainer.parts.scan_motion import misfits, rotation
from trainer.tasks import autonomous_driving

SETTINGS: dict[str, Any] = {"window": 3, "beams": 180, "sectors": 6, "shifts": 5, "turn_std": 0.5, "forward_mean": 1.0}
STORED = [Column("scan", "float32", (3, 180)), *(Column(name, "float32") for name in ("pose", "turn", "forward"))]


def task(**settings: Any) -> BoundTask:
    return BoundTask(autonomous_driving, autonomous_driving.Config(**(SETTINGS | {"forward_std": 0.1} | settings)))


def scan_in_a_room(x: float, y: float, heading: float) -> Tensor:
    """Distances to the walls of a room, 8 m by 6 m with its corner at (0, 0), by geometry."""
    angles = heading + torch.deg2rad(torch.linspace(-90, 90, 180, dtype=torch.float64))
    ahead, left = angles.cos(), angles.sin()
    along = torch.where(ahead > 0, (8 - x) / ahead, -x / ahead)
    across = torch.where(left > 0, (6 - y) / left, -y / left)
    return torch.minimum(along, across).float()


@pytest.mark.parametrize(("turn", "forward"), [(0.01, 0.0), (-0.02, 0.0), (0.02, 0.3), (-0.04, 0.2), (0.0, 0.4)])
def test_the_turn_is_told_from_two_scans(turn: float, forward: float) -> None:
    x, y, heading = 3.0, 2.5, 0.4
    before = scan_in_a_room(x, y, heading)
    after = scan_in_a_room(x + forward * math.cos(heading), y + forward * math.sin(heading), heading + turn)
    assert rotation(before, after, math.pi).item() == pytest.approx(turn, abs=0.004)
    mirrored = rotation(before.flip(0), after.flip(0), math.pi)
    assert mirrored.item() == pytest.approx(-turn, abs=0.004)


def test_scans_match_best_where_the_turn_has_put_them() -> None:
    beams_turned = 3
    before = scan_in_a_room(3.0, 2.5, 0.4)
    after = scan_in_a_room(3.0, 2.5, 0.4 + beams_turned * math.pi / 179)
    curve = misfits(before, after, 5, most=0.3)
    assert curve.shape == (11,)
    assert curve.argmin() - 5 == beams_turned
    assert curve.min() < 1e-4
    assert curve[5 - 2].item() == pytest.approx((after[2:].log1p() - before[:-2].log1p()).abs().clamp(max=0.3).mean())


class Says(nn.Module):
    """Gives these outputs."""

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.values = nn.Parameter(values)

    def forward(self, frames: Tensor, length: Tensor) -> Tensor:
        assert frames.shape == (len(length), 3, 6 + 11 + 1) and bool((length == 3).all())
        return self.values


def drive(steps: np.ndarray) -> np.ndarray:
    """Poses (n, 3) before each of the steps (n, 2)."""
    heading = np.concatenate([[0.7], 0.7 + np.cumsum(steps[:-1, 0])])
    moved = steps[:, 1:] * np.stack([np.cos(heading), np.sin(heading)], axis=1)
    place = np.array([5.0, 6.0]) + np.cumsum(moved, axis=0) - moved
    return np.column_stack([place, (heading + np.pi) % (2 * np.pi) - np.pi])


def batch(turns: list[float], forwards: list[float]) -> dict[str, Tensor]:
    steps = np.column_stack([turns, forwards])
    return {
        "scan": scan_in_a_room(3.0, 2.5, 0.4).expand(len(turns), 3, -1),
        "pose": torch.from_numpy(drive(np.nan_to_num(steps))).float(),
        "turn": torch.tensor(turns),
        "forward": torch.tensor(forwards),
    }


def test_loss_and_figures_are_by_definition() -> None:
    says = Says(torch.tensor([[0.4, 1.0, 2.0], [0.0, 0.0, 1.0], [9.0, 9.0, 9.0]]))
    made = batch([0.1, -1.0, float("nan")], [1.0, 1.2, 1.0])
    with torch.no_grad():
        found = task().metrics(task().evaluate(says, made), None)
    errors = [0.5 * 0.2**2, 0.5 * 1.0**2, 2.0 - 0.5, 2.0 - 0.5]  # turn and forward, standardised; beyond 1 linear
    ways = [math.log1p(math.exp(-2.0)), math.log1p(math.exp(1.0))]
    with torch.no_grad():
        straight = task(min_turn_rad=0.5).evaluate(says, made)  # the first is no turn
    assert straight["loss"] == pytest.approx(sum(errors) + ways[1], rel=1e-5)
    assert (straight["turns"], straight["right_way"]) == (1, 0)
    assert task().loss(says, made).item() == pytest.approx(sum(errors) + sum(ways), rel=1e-5)
    assert found["loss"] == pytest.approx((sum(errors) + sum(ways)) / 2, rel=1e-5)
    assert found["accuracy"] == 0.5
    assert found["turn_error_rad"] == pytest.approx((0.1 + 1.0) / 2)
    assert found["forward_error_m"] == pytest.approx((0.1 + 0.2) / 2, rel=1e-5)
    task().loss(says, made).backward()
    assert says.values.grad is not None and says.values.grad[2].tolist() == [0.0, 0.0, 0.0]


def test_scores_are_by_definition() -> None:
    rng = np.random.default_rng(0)
    turns, forwards = rng.normal(0, 0.3, 30), rng.uniform(0.3, 0.6, 30)
    made = batch(turns.tolist(), forwards.tolist())
    outputs = torch.from_numpy(rng.normal(0, 1, (30, 3))).float()
    settings = task(path_steps=4, min_turn_rad=0.1)
    predictions = settings.predict(Says(outputs), made, None)
    assert [row["step"] for row in predictions] == [pytest.approx(pair) for pair in zip(turns, forwards, strict=True)]
    found = settings.scores(predictions)

    left, right = outputs[turns >= 0.1, 2], outputs[turns <= -0.1, 2]
    assert found["turn_auc"] == pytest.approx((left.unsqueeze(1) > right).float().mean().item())

    said = np.column_stack([outputs[:, 0] * 0.5, outputs[:, 1] * 0.1 + 1.0])
    true = np.column_stack([turns, forwards])
    errors = [np.hypot(*(goes(true[at : at + 4]) - goes(said[at : at + 4]))) for at in range(27)]
    assert found["path_error_m"] == pytest.approx(np.mean(errors), rel=1e-5)

    # Without the moment 10, no stretch goes over the gap.
    apart = settings.scores([*predictions[:10], *predictions[11:]])
    kept = [error for at, error in enumerate(errors) if not 7 <= at <= 10]
    assert apart["path_error_m"] == pytest.approx(np.mean(kept), rel=1e-5)


def goes(steps: np.ndarray) -> np.ndarray:
    place, heading = np.zeros(2), 0.0
    for turn, forward in steps:
        place = place + forward * np.array([math.cos(heading), math.sin(heading)])
        heading += turn
    return place


def test_few_predictions_give_few_scores() -> None:
    assert task().scores([]) == {}
    one_way = task(path_steps=9).predict(Says(torch.zeros(2, 3)), batch([0.1, 0.2], [1.0, 1.0]), None)
    assert task(path_steps=9).scores(one_way) == {}
    assert task().predict(Says(torch.zeros(1, 3)), batch([float("nan")], [1.0]), None) == []


def test_in_the_mirror_left_is_right() -> None:
    assert task().preparation(STORED, training=True) is None
    assert task(mirror=True).preparation(STORED, training=False) is None
    prepare = task(mirror=True).preparation(STORED, training=True)
    assert prepare is not None
    scan = np.random.default_rng(0).uniform(1, 9, (3, 180)).astype(np.float32)
    row = {"scan": scan, "pose": np.zeros(3, np.float32), "turn": np.float32(0.2), "forward": np.float32(0.5)}
    turns = set()
    for seed in range(20):
        seen = prepare(row, np.random.default_rng(seed))
        turns.add(float(seen["turn"]))
        np.testing.assert_array_equal(seen["scan"], scan if seen["turn"] > 0 else scan[:, ::-1])
        assert seen["forward"] == np.float32(0.5)
    assert sorted(turns) == pytest.approx([-0.2, 0.2])


def test_what_does_not_fit_is_told() -> None:
    with pytest.raises(UsageError, match=r"of shape \(3, 180\); task\.window=4 .*data\.window"):
        task(window=4).preparation(STORED, training=True)
    with pytest.raises(pydantic.ValidationError, match="beams=180 are too few"):
        task(shifts=180)
