"""Autonomous driving: from what a robot has seen until now, which way and how far it goes in its next step.

Imitation of the one who drove (Pomerleau 1989, ALVINN). A stored row is a moment of a drive: scan (T, beams), the last
T laser scans, oldest first, distances in metres from right to left; turn (radians, left is positive) and forward
(metres), the step that came next; pose (3,), x, y and heading at the moment, by which steps of one drive are found
again: the model does not read it. In training a row may be seen in a mirror: left is right.

A batch, B = examples: scan (B, T, beams) float32; pose (B, 3), turn (B,), forward (B,) float32, turn NaN where the
example does not count. The model reads of each scan how near things are, by sector, and how the robot turned since the
scan before it (trainer/parts/scan_motion.py); it gives (B, 3): turn and forward, standardised, and the logit of a turn
to the left.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from configs.errors import UsageError
from configs.schema import Section
from trainer.parts.scan_motion import misfits, rotation
from trainer.shapes import Frames, Values

if TYPE_CHECKING:
    from data_pipelines.columns import Column

SAME_PLACE = 0.01  # metres or radians between where a step ends and where the next begins


class Config(Section):
    """What a moment looks like, what the model reads of it, and the scale of a step."""

    window: int = Field(ge=1, description="Scans in a row, the last of them the present one.", examples=[4])
    beams: int = Field(ge=2, description="Distances in a scan.", examples=[12])
    field_of_view_deg: float = Field(default=180.0, gt=0, le=360, description="Angle from the first beam to the last.")
    max_range_m: float = Field(default=50.0, gt=0, description="Longer distances count as this one.")
    sectors: int = Field(ge=1, description="Parts of the view whose mean nearness the model reads.", examples=[4])
    shifts: int = Field(
        ge=0, description="Beams, each way, by which two scans are shifted to see how they match.", examples=[2]
    )
    turn_std: float = Field(default=0.15, gt=0, description="Radians: standard deviation of the training turns.")
    forward_mean: float = Field(default=0.5, description="Metres: mean of the training steps.")
    forward_std: float = Field(default=0.15, gt=0, description="Metres: their standard deviation.")
    min_turn_rad: float = Field(
        default=0.02, ge=0, description="A smaller turn is straight on, neither left nor right: odometry does not tell."
    )
    mirror: bool = Field(default=False, description="Show a training moment in a mirror with probability 1/2.")
    path_steps: int = Field(default=10, ge=1, description="Steps of a stretch at whose end path_error_m is measured.")

    @model_validator(mode="after")
    def _beams_are_enough(self) -> Config:
        if max(self.sectors, self.shifts + 1) > self.beams:
            raise ValueError(
                f"beams={self.beams} are too few for sectors={self.sectors} and shifts={self.shifts}. Use at most "
                "as many sectors as beams, and fewer shifts"
            )
        return self


def columns(config: Config) -> tuple[str, ...]:  # noqa: ARG001 - the signature of every task
    """What it reads of a stored row."""
    return ("scan", "pose", "turn", "forward")


def example(config: Config, rng: np.random.Generator) -> dict[str, Any]:
    """Noise."""
    return {
        "scan": rng.uniform(0.3, 60.0, (config.window, config.beams)).astype(np.float32),
        "pose": rng.standard_normal(3).astype(np.float32),
        "turn": np.float32(config.turn_std * rng.standard_normal()),
        "forward": np.float32(config.forward_mean + config.forward_std * rng.standard_normal()),
    }


def packing(config: Config) -> None:  # noqa: ARG001
    """Examples are rows."""
    return


def io(config: Config) -> tuple[Frames, Values]:
    """What is read of each scan in; turn, forward and the way out."""
    return Frames(config.sectors + 2 * config.shifts + 2, config.window), Values(3)


def preparation(
    config: Config, stored: Sequence[Column], *, training: bool
) -> Callable[[Mapping[str, Any], np.random.Generator], dict[str, np.ndarray]] | None:
    """The mirror, in training; otherwise None, since the stored columns are a batch.

    Raises:
        UsageError: the stored scans are not of the configured size.
    """
    scan = next(column for column in stored if column.name == "scan")
    if tuple(scan.shape) != (config.window, config.beams):
        raise UsageError(
            f"The data set's scans are of shape {tuple(scan.shape)}; task.window={config.window} and task.beams="
            f"{config.beams} want {(config.window, config.beams)}. Set them to what is stored, or data.window to the "
            "task's."
        )
    return _mirrored_by_chance if training and config.mirror else None


def _mirrored_by_chance(row: Mapping[str, Any], rng: np.random.Generator) -> dict[str, np.ndarray]:
    values = {name: np.asarray(row[name]) for name in ("scan", "pose", "turn", "forward")}
    if rng.random() < 0.5:
        values |= {"scan": np.ascontiguousarray(values["scan"][:, ::-1]), "turn": np.asarray(-values["turn"])}
    return values


def num_items(batch: Mapping[str, Tensor]) -> int:
    """Moments that count."""
    return int((~batch["turn"].isnan()).sum())


def idle(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The batch with no turn that counts: its loss is zero, and so is every gradient."""
    return {**batch, "turn": torch.full_like(batch["turn"], math.nan)}


def loss(model: nn.Module, batch: Mapping[str, Tensor], config: Config) -> Tensor:
    """Sum over the moments of three errors: an fp32 scalar.

    Those of turn and forward, standardised, square up to 1 and linear beyond (Huber 1964), since a few turns on the
    spot are twenty times as wide as most; and -log p(left or right) where it is not straight on.
    """
    counts = ~batch["turn"].isnan().unsqueeze(1)
    wanted = torch.stack(
        [batch["turn"] / config.turn_std, (batch["forward"] - config.forward_mean) / config.forward_std], dim=1
    )
    given = _outputs(model, batch, config)  # (B, 3)
    error = torch.where(counts, given[:, :2] - wanted, 0.0)
    left = (batch["turn"] > 0).float().unsqueeze(1)
    way = F.binary_cross_entropy_with_logits(given[:, 2:], left, reduction="none")
    return (
        F.smooth_l1_loss(error, torch.zeros_like(error), reduction="sum")
        + torch.where(_is_turn(batch, config).unsqueeze(1), way, 0.0).sum()
    )


def evaluate(model: nn.Module, batch: Mapping[str, Tensor], config: Config) -> dict[str, float]:
    """Sums over the moments that count: the loss, turns and those told right, absolute errors in radians and metres."""
    counts, turns = ~batch["turn"].isnan(), _is_turn(batch, config)
    turn, forward, left = _steps(model, batch, config)
    return {
        "moments": float(counts.sum()),
        "loss": float(loss(model, batch, config)),
        "turns": float(turns.sum()),
        "right_way": float(((left > 0) == (batch["turn"] > 0))[turns].sum()),
        "turn_error": float((turn - batch["turn"])[counts].abs().double().sum()),
        "forward_error": float((forward - batch["forward"])[counts].abs().double().sum()),
    }


def metrics(sums: Mapping[str, float], config: Config, split: Any) -> dict[str, float]:  # noqa: ARG001
    """loss, the mean absolute errors of a step, and accuracy (left or right); nothing where no moment counted."""
    count = sums.get("moments")
    if not count:
        return {}
    found = {
        "loss": sums["loss"] / count,
        "turn_error_rad": sums["turn_error"] / count,
        "forward_error_m": sums["forward_error"] / count,
    }
    return found | ({"accuracy": sums["right_way"] / sums["turns"]} if sums["turns"] else {})


def predict(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    config: Config,
    tokenizer: Any,  # noqa: ARG001 - the signature of every task
) -> list[dict[str, Any]]:
    """Of each moment that counts: pose (x, y, heading), step and predicted (turn, forward), and left, a logit."""
    turn, forward, left = _steps(model, batch, config)
    step, predicted = torch.stack([batch["turn"], batch["forward"]], 1), torch.stack([turn, forward], 1)
    tables = {"pose": batch["pose"], "step": step, "predicted": predicted, "left": left}
    rows = zip(*(table[~batch["turn"].isnan()].tolist() for table in tables.values()), strict=True)
    return [dict(zip(tables, row, strict=True)) for row in rows]


def scores(predictions: Sequence[Mapping[str, Any]], config: Config) -> dict[str, float]:
    """turn_auc and path_error_m.

    turn_auc: the probability that of a turn to the left and one to the right the model finds the first more left;
    of turns from min_turn_rad on.
    path_error_m: how far apart two robots are after path_steps steps, one that goes as recorded and one as predicted
    from the recorded scans, that begin together; mean over all stretches that follow one another in the predictions.
    """
    if not predictions:
        return {}
    poses, steps, predicted = (
        np.array([row[name] for row in predictions], np.float64) for name in ("pose", "step", "predicted")
    )
    found = {}
    turns = np.abs(steps[:, 0]) >= config.min_turn_rad
    left = steps[turns, 0] > 0
    if left.any() and not left.all():
        found["turn_auc"] = _area_under_curve(left, np.array([row["left"] for row in predictions])[turns])
    errors = [
        math.dist(_end(steps[first:last]), _end(predicted[first:last]))
        for first, last in _stretches(poses, steps, config.path_steps)
    ]
    return found | ({"path_error_m": float(np.mean(errors))} if errors else {})


def _area_under_curve(positive: np.ndarray, score: np.ndarray) -> float:
    try:
        from sklearn.metrics import roc_auc_score
    except ImportError as error:
        raise UsageError(
            'turn_auc is computed by scikit-learn, which is not installed. Run: pip install "shardyard[metrics]"'
        ) from error
    return float(roc_auc_score(positive, score))


def _stretches(poses: np.ndarray, steps: np.ndarray, length: int) -> list[tuple[int, int]]:
    """First and last + 1 of every `length` moments of which each begins where the one before it ended."""
    moved, heading = np.diff(poses, axis=0), poses[:-1, 2]
    turned = (moved[:, 2] - steps[:-1, 0] + np.pi) % (2 * np.pi) - np.pi
    went = np.cos(heading) * moved[:, 0] + np.sin(heading) * moved[:, 1] - steps[:-1, 1]
    follows = np.append((np.abs(turned) < SAME_PLACE) & (np.abs(went) < SAME_PLACE), False)
    before = np.concatenate([[0], np.cumsum(~follows)])  # moments that no moment follows
    starts = np.arange(max(0, len(steps) - length + 1))
    whole = before[starts + length - 1] == before[starts]
    return [(first, first + length) for first in starts[whole].tolist()]


def _end(steps: np.ndarray) -> tuple[float, float]:
    """Where a robot is after these steps (n, 2) from (0, 0), facing along x."""
    heading = np.concatenate([[0.0], np.cumsum(steps[:-1, 0])])
    return float(steps[:, 1] @ np.cos(heading)), float(steps[:, 1] @ np.sin(heading))


def _is_turn(batch: Mapping[str, Tensor], config: Config) -> Tensor:
    """(B,): moments that count and do not go straight on."""
    return batch["turn"].abs() >= config.min_turn_rad


def _outputs(model: nn.Module, batch: Mapping[str, Tensor], config: Config) -> Tensor:
    """(B, 3) fp32."""
    frames = _frames(batch["scan"].clamp(0.0, config.max_range_m), config)
    length = torch.full((len(frames),), frames.shape[1], device=frames.device)
    return model(frames.to(next(model.parameters()).dtype), length).float()


def _frames(scan: Tensor, config: Config) -> Tensor:
    """What the model reads: (B, T, sectors + 2 shifts + 2), each of about the size 1. The first scan has no motion."""
    near = 2 / (1 + scan) - 0.5  # what is near differs most
    sectors = F.adaptive_avg_pool1d(near, config.sectors)  # (B, T, sectors)
    before, after = scan[:, :-1], scan[:, 1:]
    match = misfits(before, after, config.shifts, most=0.3)
    match = (match - match.mean(-1, keepdim=True)) / 0.05
    turned = rotation(before, after, math.radians(config.field_of_view_deg)).unsqueeze(-1)
    turned = (turned / 0.02).asinh() / 1.5  # a fraction of a degree and a turn on the spot both tell
    motion = F.pad(torch.cat([match, turned], dim=-1), (0, 0, 1, 0))  # (B, T, 2 shifts + 2)
    return torch.cat([sectors, motion], dim=-1)


def _steps(model: nn.Module, batch: Mapping[str, Tensor], config: Config) -> tuple[Tensor, Tensor, Tensor]:
    """Turns in radians, ways in metres, and logits of a turn to the left, (B,) each."""
    turn, forward, left = _outputs(model, batch, config).unbind(1)
    return turn * config.turn_std, forward * config.forward_std + config.forward_mean, left
