"""Drug discovery: a property of a molecule, a number, from its SMILES.

A stored row has `smiles`, text, and `target`, a number. In training a molecule may be written in another order of its
atoms each time (trainer/parts/smiles.py), by the generator of its place in the order of the data.

A batch, B = examples, L = symbols of the longest SMILES: tokens (B, L) uint8, ids of trainer/parts/smiles.py, then 0;
tokens_length (B,); target (B,) float32 in the units of the data, NaN where it does not count. The model reads
standardised numbers and gives (B, 1), standardised.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from configs.errors import RunFailed, UsageError
from configs.schema import Section
from trainer.parts.smiles import VOCAB_SIZE, encode, rewritten
from trainer.shapes import Tokens, Values

if TYPE_CHECKING:
    from data_pipelines.columns import Column

RAGGED = {"tokens": 1}


class Config(Section):
    """How SMILES are read, and the scale of the target."""

    seq_len: int = Field(ge=1, description="Most symbols of a SMILES; longer ones are refused.", examples=[128])
    mean: float = Field(default=0.0, description="Mean of the training targets.")
    std: float = Field(default=1.0, gt=0, description="Standard deviation of the training targets.")
    rewrite: bool = Field(
        default=False, description="Write a training molecule in another order of its atoms each time, at random."
    )


def columns(config: Config) -> tuple[str, ...]:  # noqa: ARG001 - the signature of every task
    """What it reads of a stored row."""
    return ("smiles", "target")


def example(config: Config, rng: np.random.Generator) -> dict[str, Any]:
    """A chain of atoms, some with a branch or a ring."""
    units = ("C", "N", "O", "C(Cl)", "C(=O)", "C1CC1", "c1ccccc1")
    fitting = [unit for unit in units if len(unit) <= config.seq_len]
    count = int(rng.integers(1, config.seq_len // len(fitting[-1]) + 1))
    smiles = "".join(fitting[number] for number in rng.integers(len(fitting), size=count))
    return {"smiles": smiles, "target": np.float32(config.mean + config.std * rng.standard_normal())}


def packing(config: Config) -> None:  # noqa: ARG001
    """Examples are rows."""
    return


def io(config: Config) -> tuple[Tokens, Values]:
    """Symbols in, one number out."""
    return Tokens(VOCAB_SIZE, config.seq_len), Values(1)


def preparation(
    config: Config, stored: Sequence[Column], *, training: bool
) -> Callable[[Mapping[str, Any], np.random.Generator], dict[str, np.ndarray]]:
    """SMILES become ids.

    Raises:
        UsageError: the columns are no text and numbers.
    """
    types = {column.name: (column.dtype, tuple(column.shape)) for column in stored}
    if types["smiles"][0] != "utf8" or types["target"][1] != () or types["target"][0] in ("utf8", "binary"):
        raise UsageError(
            f"The data set's smiles are {types['smiles'][0]} and its target is {types['target'][0]} of shape "
            f"{types['target'][1]}; the task reads text and one number. Name such columns in the source's settings."
        )
    return partial(_prepare, config=config, training=training)


def _prepare(
    row: Mapping[str, Any], rng: np.random.Generator, *, config: Config, training: bool
) -> dict[str, np.ndarray]:
    smiles = bytes(row["smiles"]).decode("utf-8")
    tokens = encode(smiles)
    if not 0 < len(tokens) <= config.seq_len:
        raise RunFailed(
            f"The SMILES {smiles[:80]!r} has {len(tokens)} symbols; task.seq_len={config.seq_len} allows 1 to as many. "
            "Set task.seq_len to the longest in the data, or take the row out."
        )
    if training and config.rewrite:
        other = encode(rewritten(smiles, rng))
        tokens = other if len(other) <= config.seq_len else tokens
    return {"tokens": tokens, "target": np.asarray(row["target"], np.float32)}


def num_items(batch: Mapping[str, Tensor]) -> int:
    """Molecules that count."""
    return int((~batch["target"].isnan()).sum())


def num_tokens(batch: Mapping[str, Tensor]) -> int:
    """Symbols of the molecules."""
    return int(batch["tokens_length"].sum())


def idle(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The batch with no target that counts: its loss is zero, and so is every gradient."""
    return {**batch, "target": torch.full_like(batch["target"], math.nan)}


def loss(model: nn.Module, batch: Mapping[str, Tensor], config: Config) -> Tensor:
    """Sum of the squared errors of the standardised target: an fp32 scalar."""
    wanted = (batch["target"] - config.mean) / config.std
    return torch.where(wanted.isnan(), 0.0, _standardised(model, batch) - wanted).square().sum()


def evaluate(model: nn.Module, batch: Mapping[str, Tensor], config: Config) -> dict[str, float]:
    """Sums over the molecules that count, in the units of the data: those of R^2 and the root mean square."""
    counts = ~batch["target"].isnan()
    target = batch["target"][counts].double()
    error = _standardised(model, batch)[counts].double() * config.std + config.mean - target
    return {
        "molecules": float(len(target)),
        "squared_error": float(error.square().sum()),
        "target": float(target.sum()),
        "squared_target": float(target.square().sum()),
    }


def metrics(sums: Mapping[str, float], config: Config, split: Any) -> dict[str, float]:  # noqa: ARG001
    """loss (of the standardised target), rmse in the units of the data, and r2, the share of the variance explained.

    Nothing where no molecule counted; no r2 where all targets are one.
    """
    count = sums.get("molecules")
    if not count:
        return {}
    mean_square = sums["squared_error"] / count
    found = {"loss": mean_square / config.std**2, "rmse": math.sqrt(mean_square)}
    variation = sums["squared_target"] - sums["target"] ** 2 / count
    return found | ({"r2": 1 - sums["squared_error"] / variation} if variation > 0 else {})


def _standardised(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """(B,) fp32. Padding is a document of its own."""
    tokens = batch["tokens"].to(torch.int64)
    padding = torch.arange(tokens.shape[1], device=tokens.device) >= batch["tokens_length"].unsqueeze(1)
    return model(tokens, padding.to(torch.int32))[:, 0].float()
