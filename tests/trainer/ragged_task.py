"""A task of one's own: which class a signal is of. In training a signal begins at a random one of its moments."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from configs.schema import Section
from tests.trainer.ragged_model import Signal
from trainer.parts.cross_entropy import IGNORED, summed_cross_entropy
from trainer.shapes import ClassLogits

PAD = 1e6  # who takes padding for a signal goes wrong by much
RAGGED = {"signal": 1}


class Config(Section):
    """By what rows are put side by side."""

    by: str | None = "signal"
    from_random_moments: bool = True


def columns(config: Config) -> tuple[str, ...]:
    return ("signal", "label")


def packing(config: Config) -> None:
    return


def length_column(config: Config) -> str | None:
    return config.by


def io(config: Config) -> tuple[Signal, ClassLogits]:
    return Signal(3), ClassLogits(2)


def preparation(
    config: Config, stored: Sequence[Any], *, training: bool
) -> Callable[[Mapping[str, Any], np.random.Generator], dict[str, np.ndarray]]:
    def prepare(row: Mapping[str, Any], rng: np.random.Generator) -> dict[str, np.ndarray]:
        begin = int(rng.integers(0, min(3, len(row["signal"])))) if training and config.from_random_moments else 0
        return {"signal": row["signal"][begin:], "label": np.asarray(row["label"])}

    return prepare


def num_items(batch: Mapping[str, Tensor]) -> int:
    return int((batch["label"] != IGNORED).sum())


def idle(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {**batch, "label": torch.full_like(batch["label"], IGNORED)}


def loss(model: nn.Module, batch: Mapping[str, Tensor], config: Config) -> Tensor:
    return summed_cross_entropy(model(batch["signal"], batch["signal_length"]), batch["label"])


def evaluate(model: nn.Module, batch: Mapping[str, Tensor], config: Config) -> dict[str, float]:
    return {"nats": float(loss(model, batch, config)), "signals": float(num_items(batch))}


def metrics(sums: Mapping[str, float], config: Config, split: Any) -> dict[str, float]:
    return {"loss": sums["nats"] / sums["signals"]} if sums.get("signals") else {}
